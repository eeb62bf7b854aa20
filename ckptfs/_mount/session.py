"""The FUSE session below pyfuse3: mounting, and both ends of the FUSE_INIT handshake.

The keeper mounts and answers the kernel's FUSE_INIT itself. Then every daemon, the first included,
takes the session over by the same steps (`operations.take_session`): libfuse initialises itself on
one end of a socket pair, with a FUSE_INIT made here, and the daemon relays between that and the
real descriptor (`relay`). So ckptfs chooses the kernel's features in one place, independent of
libfuse.

This module must not touch the mount by path, because the mount may not have a daemon yet. The only
exception is `is_served`.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from ckptfs._mount import fuse_abi
from ckptfs._os.mountinfo import FSTYPE, mounts
from ckptfs.errors import CannotMount

log = logging.getLogger(__name__)

_PAUSE_S = 0.01
_INIT_BYTES = fuse_abi.IN_HEADER.size + fuse_abi.INIT_IN.size

_WANTED = (
    fuse_abi.ASYNC_READ
    | fuse_abi.DO_READDIRPLUS  # without _AUTO, because pyfuse3 answers READDIRPLUS only
    | fuse_abi.ASYNC_DIO
    | fuse_abi.PARALLEL_DIROPS
    | fuse_abi.MAX_PAGES
    | fuse_abi.CACHE_SYMLINKS
    | fuse_abi.EXPLICIT_INVAL_DATA
    | fuse_abi.INIT_EXT
    | fuse_abi.HAS_RESEND
)
_PAGES_MAX = 256
"""Requests of 1 MiB, the most that the kernel's limit for unprivileged mounts allows."""
MAX_WRITE = 128 << 10
"""Longest write. The kernel sends none, but buffers for requests must be long enough for one."""
_READAHEAD_BYTES_MAX = 16 << 20
"""Upper bound of the mount's read_ahead_kb."""
_BACKGROUND_MAX = 1000
_CONGESTION = 750
"""Requests of the kernel's readahead that may wait at the same time (defaults: 12 and 9). The whole
mount shares them, so reads that wait for an unreachable store must not use them up. Otherwise reads
of cached files of other checkpoints would wait, too, and the daemon would not even receive them."""

_OF_FUSERMOUNT = {
    "could not determine username": (
        "give uid {uid} a line in /etc/passwd, which fusermount3 demands (a container's runtime or "
        "image can), or let the node's daemon mount (ckptfs help containers)"
    ),
    "too many FUSE filesystems": "raise mount_max in /etc/fuse.conf, as root",
    "user_allow_other": (
        "echo user_allow_other >> /etc/fuse.conf, as root; or set allow_other = false"
    ),
    "failed to open /dev/fuse": "chmod 666 /dev/fuse, as root, or let the node's daemon mount",
    "device not found": "modprobe fuse; in a container: docker run --device /dev/fuse",
    "Operation not permitted": (
        "let the container have CAP_SYS_ADMIN and set-uid programs (no no_new_privs; Kubernetes: "
        "allowPrivilegeEscalation), or let the node's daemon mount"
    ),
}
"""Messages of fusermount3 (its fusermount.c), and a remedy for each."""
_MTAB = "/etc/mtab"
"""fusermount3 unmounts for users other than root only what this file names (may_unmount in its
fusermount.c). Small containers and chroots lack the file."""
_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def mount(mountpoint: Path, *, allow_other: bool) -> int:
    """Mount on the directory `mountpoint`, and return the descriptor of the session.

    The mount is not read-only for the kernel (MS_RDONLY), because the kernel would then refuse to
    set attributes, too (mnt_want_write in setxattr(2)). The daemon refuses everything else.

    Without `allow_other` the kernel lets only the mount's user in (fuse_allow_current_process), and
    hands access(2) to the daemon, which denies writing. With `allow_other` the kernel has to decide
    by owner and mode (``default_permissions``), because otherwise it would show the names and
    attributes in its cache to every user. For access(2) and before it sets an attribute the kernel
    then asks the same question, whether the mode lets this user write (fuse_permission,
    xattr_permission), so the two have one answer.

    Root mounts by mount(2). Other users mount by fusermount3, which passes the descriptor back.

    Raises:
        CannotMount: /dev/fuse, fusermount3 or a permission is missing.
    """
    if os.geteuid() != 0:
        return _mount_by_fusermount(mountpoint, allow_other)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise CannotMount(
            f"cannot mount: /dev/fuse: {error.strerror}; load the fuse module, or give the "
            "container the device (--device /dev/fuse --cap-add SYS_ADMIN)"
        ) from None
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0" + _for(allow_other)
    flags = _MS_NOSUID | _MS_NODEV
    if _libc.mount(b"ckptfs", os.fsencode(mountpoint), FSTYPE.encode(), flags, options.encode()):
        code = ctypes.get_errno()
        os.close(fd)
        raise CannotMount(
            f"cannot mount on {mountpoint}: {os.strerror(code)}; mounting needs CAP_SYS_ADMIN "
            "(in a container: --cap-add SYS_ADMIN --security-opt apparmor=unconfined)"
        )
    return fd


def _for(allow_other: bool) -> str:
    return ",allow_other,default_permissions" if allow_other else ""


def _mount_by_fusermount(mountpoint: Path, allow_other: bool) -> int:
    if not os.path.exists(_MTAB):
        raise CannotMount(
            f"cannot mount on {mountpoint}: {_MTAB} is missing, and fusermount3 could not unmount "
            f"without it; ln -s /proc/self/mounts {_MTAB}, as root"
        )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    options = "nosuid,nodev,fsname=ckptfs,subtype=ckptfs" + _for(allow_other)
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", options, "--", str(mountpoint)],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            raise CannotMount(
                "cannot mount: fusermount3 is not installed; install the package fuse3"
            ) from None
        if done.returncode:
            raise CannotMount(f"cannot mount on {mountpoint}: {_refusal(done.stderr)}")
        _, [fd], _, _ = socket.recv_fds(ours, 1, 1)
    os.set_inheritable(fd, False)
    return fd


def _refusal(said: str) -> str:
    """The message of fusermount3 in one line, with a remedy if one is known."""
    line = ", ".join(said.strip().splitlines())
    for known, remedy in _OF_FUSERMOUNT.items():
        if known in line:
            return f"{line.rstrip('.')}; {remedy.format(uid=os.geteuid())}"
    return line


def unmount(mountpoint: Path) -> None:
    """Detach the mount, also while it is in use. Does nothing if nothing is mounted there."""
    if os.geteuid() == 0:
        _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH)
        return
    command = ["fusermount3", "-u", "-z", "--", str(mountpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        log.warning("cannot unmount %s: %s", mountpoint, done.stderr.strip())


def unmount_scratch(folder: Path) -> None:
    """Detach the mount on ``mnt`` in a scratch directory, if there is one."""
    mountpoint = Path(os.path.realpath(folder), "mnt")  # as the kernel names it
    if device_of_mount(mountpoint) is not None:
        unmount(mountpoint)


def device_of_mount(mountpoint: Path) -> str | None:
    """``major:minor`` of the mount of ckptfs there, or None. Never touches the mount itself."""
    found = [line.device for line in mounts() if line.path == str(mountpoint)]
    return found[-1] if found else None


def is_served(mountpoint: Path, timeout_s: float) -> bool:
    """Whether a daemon answers for a mount of ckptfs within `timeout_s`.

    Only this function touches a mount by path. It does so in a child process, because a request to
    a daemon that hangs cannot be cancelled. The request is statfs(2), which the kernel never
    answers from memory. If the user has no access to the mount, the kernel itself answers with an
    error, and then the mount counts as served.
    """
    asking = os.fork()
    if not asking:
        try:
            os.statvfs(mountpoint)
        except BaseException as error:
            os._exit(not isinstance(error, PermissionError))
        os._exit(0)
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        ended, status = os.waitpid(asking, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(_PAUSE_S)
    os.kill(asking, signal.SIGKILL)
    return False


def set_read_ahead(mountpoint: Path, kib: int) -> bool:
    """Set the kernel's readahead for the mount, which needs root. Returns whether it worked."""
    device = device_of_mount(mountpoint)
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(kib))
    except OSError:
        return False
    return True


class Features(NamedTuple):
    """Features that the kernel has agreed to."""

    passthrough: bool
    resend: bool


def answer_init(fd: int, stack_depth: int = 0, *, allow_other: bool = False) -> Features:
    """Read the kernel's FUSE_INIT from a fresh session and answer it. Raises CannotMount.

    With `allow_other`, root can make idmapped mounts of the session, as container runtimes do for
    pods with user namespaces. The kernel then decides by owner and mode, and names the user in no
    request (see ``_daemon.fuse.operations``).

    Args:
        fd: The session.
        stack_depth: For passthrough, the greatest depth of the cache's file system among stacked
            file systems, plus 1; 0 for no passthrough.
        allow_other: As in `mount`.
    """
    message = os.read(fd, 64 << 10).ljust(_INIT_BYTES, b"\0")
    _, opcode, unique, *_ = fuse_abi.IN_HEADER.unpack_from(message)
    major, minor, _, flags, *rest = fuse_abi.INIT_IN.unpack_from(message, fuse_abi.IN_HEADER.size)
    is_known = opcode == fuse_abi.INIT and major == fuse_abi.PROTOCOL_MAJOR
    if not is_known or minor < fuse_abi.PROTOCOL_MINOR_MIN:
        raise CannotMount(f"cannot mount: FUSE protocol {major}.{minor} of the kernel is too old")
    offered = flags | (rest[0] << 32 if flags & fuse_abi.INIT_EXT else 0)
    wanted = _WANTED | (fuse_abi.PASSTHROUGH if stack_depth else 0)
    chosen = (wanted | (fuse_abi.ALLOW_IDMAP if allow_other else 0)) & offered
    passthrough = bool(chosen & fuse_abi.PASSTHROUGH)
    body = fuse_abi.INIT_OUT.pack(
        major,
        min(minor, fuse_abi.PROTOCOL_MINOR_MAX),
        _READAHEAD_BYTES_MAX,
        chosen & 0xFFFFFFFF,
        _BACKGROUND_MAX,
        _CONGESTION,
        MAX_WRITE,
        1,  # time_gran: nanoseconds
        _PAGES_MAX,
        0,
        chosen >> 32,
        stack_depth if passthrough else 0,
        0,
    )
    os.write(fd, fuse_abi.OUT_HEADER.pack(fuse_abi.OUT_HEADER.size + len(body), 0, unique) + body)
    return Features(passthrough, bool(chosen & fuse_abi.HAS_RESEND))


def made_init() -> bytes:
    """A FUSE_INIT for libfuse: the flags that every libfuse 3 knows, protocol 7.41."""
    header = fuse_abi.IN_HEADER.pack(_INIT_BYTES, fuse_abi.INIT, 1, 0, 0, 0, 0, 0, 0)
    return header + fuse_abi.INIT_IN.pack(7, 41, 128 << 10, 0x73FFFFFB, *[0] * 12)
