"""``mount.ckptfs``: what mount(8) runs for ``mount -t ckptfs`` or ``-t fuse.ckptfs``, also for a
line in ``/etc/fstab`` like

    s3://bucket/run7/ckpt /mnt/ckpt fuse.ckptfs ro,noauto,x-systemd.automount,_netdev 0 0

It attaches the checkpoint (or any other prefix) at the node's daemon, and binds the attachment's
directory to the place. What holds the attachment is a small process that stays (`_bindlease`): when
the place is unmounted, it lets go, and when the daemon has ended, it unmounts the place.

Options besides those of every file system, of which an unknown one is refused by its name:

- ``endpoint=HOST:PORT`` (or a URL; of S3 and Google), ``region=NAME`` (S3), ``anonymous``.
- ``requester_pays``, ``force_virtual_addressing`` (S3).
- ``ca_file=PATH``, ``ca_dir=PATH``, ``verify_certificates=false``.
- ``prefetch=GLOB[:GLOB…]``: begin to fetch these files.
- ``uid=USER``: attach as that user, who alone may then read it (but for root).

A value with a comma stands in double quotes. The source is a URI, as on the command line, or
``store:path``, whose table says what else there is to say. In ``/etc/fstab``, whose fields end with
spaces, a space is written ``\\040``, a tab ``\\011``, and a backslash ``\\134`` (fstab(5)).
mount(8) decodes these.

Credentials never stand here, where everybody sees them: they are the daemon's.
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

from ckptfs import _bindlease, _client
from ckptfs._connection import Connection
from ckptfs._model.config import Config
from ckptfs._model.stores import split_named
from ckptfs._model.uris import parse_uri, scheme_of, shown_uri, with_parameters
from ckptfs.cli.checkpoints import location_of
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
_ALWAYS = _FLAGS["nosuid"] | _FLAGS["nodev"]  # as the mount itself
_FOR_OTHERS = (
    *("rw", "exec", "async", "defaults", "auto", "noauto", "nofail", "_netdev"),
    *("user", "nouser", "users", "owner", "group"),
)
"""For mount(8) and systemd, and what is so anyway. (What is mounted can only be read.)"""
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
"""Options about the store, named as in the table of a store, and the parameters of URIs."""
_SWITCHES = ("anonymous", "requester_pays", "force_virtual_addressing")
_OPTION = re.compile(r'((?:[^",]|"[^"]*")+)')
_USAGE_STATUS, _FAILURE_STATUS = 1, 32  # mount(8)
_libc = ctypes.CDLL(None, use_errno=True)


class Options(msgspec.Struct):
    """What ``-o`` says: flags of the mount, and how to attach."""

    flags: int = _ALWAYS
    parameters: dict[str, str] = {}
    prefetch: list[str] = []
    user: str = ""


def main() -> NoReturn:
    """Mount; ends with mount(8)'s statuses and one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="mount.ckptfs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="its URI")
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
    """The options in `text`, as after ``-o``. Raises LocationError for one that is unknown, unless
    `sloppy` (``-s``)."""
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
    """The URI with what the options say of the store. Raises LocationError."""
    said = options.parameters
    if split_named(source) is not None:
        if said:
            raise LocationError(
                f"{source}: {', '.join(said)}: not with a named store; its table says that"
            )
        return source
    if not scheme_of(source):
        raise LocationError(f"{source} is no URI; write e.g. s3://bucket/path")
    if parse_uri(source).secrets:
        raise LocationError(
            f"{shown_uri(source)}: everybody sees credentials here; give them to the daemon"
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
        raise CannotMount(f"cannot mount on {place}: there is no such directory")
    with contextlib.ExitStack() as stack:
        to = functools.partial(_connect_as, options.user) if options.user else None
        lease = _client.leased(location_of(uri), prefetch=options.prefetch, to=to)
        path = stack.enter_context(lease)
        _call_mount(path, place, _MS_BIND)
        try:
            _call_mount(path, place, _MS_REMOUNT | _MS_BIND | options.flags)
            _leave_holder(path, place)
        except BaseException:
            _bindlease.unmount(place)
            raise


def _connect_as(name: str, config: Config, timeout_s: float | None) -> Connection:
    """A connection on which the daemon takes us for that user: the kernel says so."""
    try:
        user = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
        uid, gid = user.pw_uid, user.pw_gid
    except KeyError:
        if not name.isdigit():
            raise CannotMount(f"uid={name}: there is no such user") from None
        uid = gid = int(name)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        return _client.connect(config, timeout_s)
    finally:
        os.seteuid(0)
        os.setegid(0)


def _call_mount(path: str, place: str, flags: int) -> None:
    if _libc.mount(os.fsencode(path), os.fsencode(place), None, flags, None):
        raise CannotMount(f"cannot mount on {place}: {os.strerror(ctypes.get_errno())}")


def _leave_holder(path: str, place: str) -> None:
    """Start the process that holds the attachment, and wait until it does."""
    mount = _bindlease.mount_on(place)
    assert mount is not None
    program = [sys.executable, "-I", "-S", _bindlease.__file__, path, mount.id, mount.device, place]
    holder = subprocess.Popen(
        program,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    assert holder.stdout is not None
    if not holder.stdout.read():
        raise CannotMount(f"cannot mount on {place}: the attachment has ended meanwhile")
