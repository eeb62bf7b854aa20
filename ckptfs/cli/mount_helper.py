"""``mount.ckptfs``, which mount(8) runs for ``mount -t ckptfs`` and ``-t fuse.ckptfs``.

A line in ``/etc/fstab`` looks like this:

    s3://bucket/run7/ckpt /mnt/ckpt fuse.ckptfs ro,noauto,x-systemd.automount,_netdev 0 0

The program attaches the checkpoint, or another prefix, through the node's daemon, and bind-mounts
the attachment's directory on the place. A small process holds the attachment (`cli/bind_holder.py`)
until the place is unmounted. When the daemon ends, this process unmounts the place.

The options are those of every file system, and the following ones. An unknown option is an error.

- ``endpoint=HOST:PORT`` (or a URL; for S3 and Google), ``region=NAME`` (S3), ``anonymous``
- ``requester_pays``, ``force_virtual_addressing`` (S3)
- ``ca_file=PATH``, ``ca_dir=PATH``, ``verify_certificates=false``
- ``prefetch=GLOB[:GLOB…]``: begin to fetch these files
- ``uid=USER``: attach as this user, so that only this user and root can read the checkpoint

Write a value with a comma in double quotes. The source is a URI, as on the command line, or
``store:path``, and then the store's table has its options. In ``/etc/fstab`` write a space as
``\\040``, a tab as ``\\011`` and a backslash as ``\\134`` (fstab(5)). mount(8) decodes these.

Do not put credentials here, where all users can see them. The daemon has its own.
"""

import argparse
import contextlib
import ctypes
import functools
import os
import pwd
import re
import subprocess
import sys
from typing import NoReturn

import msgspec

from ckptfs._client import client
from ckptfs._client.connection import Connection
from ckptfs._model.config import Config
from ckptfs._model.named_store import split_named
from ckptfs._model.uris import parse_uri, scheme_of, shown_uri, with_parameters
from ckptfs.cli import bind_holder
from ckptfs.cli.target import location_of
from ckptfs.errors import CannotMount, CkptfsError, LocationError

_MS_REMOUNT, _MS_BIND = 1 << 5, 1 << 12
_FLAGS = {
    "ro": 1 << 0,
    "nosuid": 1 << 1,
    "nodev": 1 << 2,
    "noexec": 1 << 3,
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "relatime": 1 << 21,
}
"""MS_*, linux/mount.h."""
_ALWAYS = _FLAGS["nosuid"] | _FLAGS["nodev"]  # as on the daemon's mount
_FOR_OTHERS = (
    *("rw", "exec", "async", "defaults", "auto", "noauto", "nofail", "_netdev"),
    *("user", "nouser", "users", "owner", "group"),
)
"""Options for mount(8) and systemd, and options without effect. The mount is always read-only."""
_PARAMETERS = {
    "endpoint": "endpoint_override",
    "region": "region",
    "anonymous": "anonymous",
    "requester_pays": "requester_pays",
    "force_virtual_addressing": "force_virtual_addressing",
    "ca_file": "tls_ca_file_path",
    "ca_dir": "tls_ca_dir_path",
    "verify_certificates": "tls_verify_certificates",
}
"""Options of the store, named as in a store's table, and the parameters of URIs."""
_SWITCHES = ("anonymous", "requester_pays", "force_virtual_addressing")
_OPTION = re.compile(r'((?:[^",]|"[^"]*")+)')
_USAGE_STATUS, _FAILURE_STATUS = 1, 32  # mount(8)
_libc = ctypes.CDLL(None, use_errno=True)


class Options(msgspec.Struct):
    """The values of ``-o``: flags of the mount, and settings of the attachment."""

    flags: int = _ALWAYS
    parameters: dict[str, str] = {}
    prefetch: list[str] = []
    user: str = ""


def main() -> NoReturn:
    """Mount, and exit with a status of mount(8). An error is one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="mount.ckptfs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="the URI")
    parser.add_argument("place", help="an existing directory")
    parser.add_argument("-o", dest="options", action="append", default=[], help="options")
    parser.add_argument("-t", dest="kind", help=argparse.SUPPRESS)
    for flag in ("-f", "-n", "-s", "-v"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        options = parse(",".join(args.options), sloppy=args.s)
        uri = uri_of(args.source, options)
    except LocationError as error:
        print(f"mount.ckptfs: {error}", file=sys.stderr)
        sys.exit(_USAGE_STATUS)
    try:
        if not args.f:
            _mount(uri, args.place, options)
    except (CkptfsError, OSError) as error:
        print(f"mount.ckptfs: {error}", file=sys.stderr)
        sys.exit(_FAILURE_STATUS)
    sys.exit(0)


def parse(text: str, *, sloppy: bool = False) -> Options:
    """Parse options as after ``-o``. Raises LocationError for an unknown option, unless `sloppy`
    (``-s``)."""
    options = Options()
    for option in _OPTION.findall(text):
        name, equals, value = option.partition("=")
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        if option in _FLAGS:
            options.flags |= _FLAGS[option]
        elif option in _SWITCHES:
            _add(options, option, "true")
        elif name in _PARAMETERS and value:
            _add(options, name, value)
        elif name == "prefetch" and value:
            options.prefetch += value.split(":")
        elif name == "uid" and value:
            options.user = value
        elif not (option in _FOR_OTHERS or name == "comment" or name.startswith("x-") or sloppy):
            what = f"{name}= needs a value" if equals and not value else f"unknown option {option}"
            raise LocationError(f"{what}; mount.ckptfs --help names the options")
    return options


def _add(options: Options, name: str, value: str) -> None:
    if name in options.parameters:
        raise LocationError(f"the option {name} is given twice; leave one out")
    options.parameters[name] = value


def uri_of(source: str, options: Options) -> str:
    """The URI with the options of the store. Raises LocationError."""
    said = options.parameters
    if split_named(source) is not None:
        if said:
            raise LocationError(
                f"{source}: the table of a named store sets {', '.join(said)}; leave it out here"
            )
        return source
    if not scheme_of(source):
        raise LocationError(f"{source} is not a URI; write e.g. s3://bucket/path")
    if parse_uri(source).secrets:
        raise LocationError(
            f"{shown_uri(source)}: all users can see credentials here; configure them in the daemon"
        )
    try:
        return with_parameters(source, **{_PARAMETERS[name]: v for name, v in said.items()})
    except LocationError as error:
        raise LocationError(f"{error} (of the options {', '.join(said)})") from None


def _mount(uri: str, place: str, options: Options) -> None:
    if os.geteuid() != 0:
        raise CannotMount(f"cannot mount on {place}: only root can; ckptfs attach needs no root")
    place = os.path.realpath(place)
    if not os.path.isdir(place):
        raise CannotMount(f"cannot mount on {place}: it is not a directory; create it")
    with contextlib.ExitStack() as stack:
        to = functools.partial(_connect_as, options.user) if options.user else None
        lease = client.leased(location_of(uri), prefetch=options.prefetch, to=to)
        path = stack.enter_context(lease)
        _call_mount(path, place, _MS_BIND)
        try:
            _call_mount(path, place, _MS_REMOUNT | _MS_BIND | options.flags)
            _leave_holder(path, place)
        except BaseException:
            bind_holder.unmount(place)
            raise


def _connect_as(name: str, config: Config, timeout_s: float | None) -> Connection:
    """Connect to the daemon as another user. The kernel tells the daemon the user."""
    try:
        user = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
        uid, gid = user.pw_uid, user.pw_gid
    except KeyError:
        if not name.isdigit():
            raise CannotMount(f"uid={name}: no such user; name a user of this machine") from None
        uid = gid = int(name)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        return client.connect(config, timeout_s)
    finally:
        os.seteuid(0)
        os.setegid(0)


def _call_mount(path: str, place: str, flags: int) -> None:
    if _libc.mount(os.fsencode(path), os.fsencode(place), None, flags, None):
        raise CannotMount(f"cannot mount on {place}: {os.strerror(ctypes.get_errno())}")


def _leave_holder(path: str, place: str) -> None:
    """Start the process that holds the attachment, and wait until it holds it."""
    mount = bind_holder.mount_on(place)
    assert mount is not None
    program = [sys.executable, "-I", "-S", bind_holder.__file__]
    holder = subprocess.Popen(
        [*program, path, mount.id, mount.device, place],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    assert holder.stdout is not None
    if not holder.stdout.read():
        raise CannotMount(f"cannot mount on {place}: the attachment has ended; try again")
