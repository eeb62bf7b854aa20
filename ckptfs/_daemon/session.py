"""The FUSE session below pyfuse3: mounting, and both ends of the FUSE_INIT handshake.

The keeper mounts and answers the kernel's FUSE_INIT itself; every daemon, the first included, then
takes the session over by the same steps (`fuse.take_session`): libfuse initialises itself on one
end of a socket pair, with a FUSE_INIT made here, and the daemon relays between that and the real
descriptor (`relay`). So the kernel's features are chosen in one place, whatever libfuse knows of
them. Message layouts: linux/fuse.h.

This module must not touch the mount by path: nobody may answer yet.
"""

import array
import ctypes
import logging
import os
import re
import socket
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

from ckptfs.errors import CannotMount

log = logging.getLogger(__name__)

IN_HEADER = struct.Struct("<IIQQIIIHH")
"""struct fuse_in_header: length, opcode, unique, inode, ..."""
OUT_HEADER = struct.Struct("<IiQ")
"""struct fuse_out_header: length, error (negative) or notification, unique."""
NOTIFY_INVAL_ENTRY = struct.Struct("<QII")
"""struct fuse_notify_inval_entry_out: parent, length of the name, flags."""
NOTIFY_INVAL_ENTRY_CODE = 3
NOTIFY_RESEND_CODE = 7
"""FUSE_NOTIFY_RESEND, Linux >= 6.9: send again what was read and not answered."""
_INIT_IN = struct.Struct("<IIII12I")
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
_FUSE_INIT = 26
_PROTOCOL = 7, 45  # newest that we know; the kernel's is used if it is older

_ASYNC_READ = 1 << 0
_DO_READDIRPLUS = 1 << 13  # without _AUTO: pyfuse3 answers READDIRPLUS only
_ASYNC_DIO = 1 << 15
_PARALLEL_DIROPS = 1 << 18
_MAX_PAGES = 1 << 22
_CACHE_SYMLINKS = 1 << 23
_EXPLICIT_INVAL_DATA = 1 << 25
_INIT_EXT = 1 << 30
_PASSTHROUGH = 1 << 37
_HAS_RESEND = 1 << 39
_WANTED = (
    _ASYNC_READ
    | _DO_READDIRPLUS
    | _ASYNC_DIO
    | _PARALLEL_DIROPS
    | _MAX_PAGES
    | _CACHE_SYMLINKS
    | _EXPLICIT_INVAL_DATA
    | _INIT_EXT
    | _HAS_RESEND
)
_PAGES_MAX = 256  # 1 MiB requests: the most that an unprivileged limit of the kernel allows
MAX_WRITE = 128 << 10
"""Longest write; none is ever sent, but the buffers for requests must have room for one."""
_READAHEAD_BYTES_MAX = 16 << 20  # only bounds what read_ahead_kb may be set to
_BACKGROUND_MAX = 1000
_CONGESTION = 750
"""Requests of the kernel's readahead that may wait at the same time (defaults: 12 and 9). All of
the mount shares them, so reads that wait for a dark store must not use them up: cached files of
other checkpoints would wait, too, and the daemon would not even hear of it. """

_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)
FSTYPE = "fuse.ckptfs"


def mount(mountpoint: Path, *, allow_other: bool) -> int:
    """Mount on the directory `mountpoint`; returns the descriptor of the session.

    Not read-only (MS_RDONLY), for the kernel: it would refuse to set attributes. The daemon refuses
    everything else.

    As root by mount(2), otherwise by fusermount3, which passes the descriptor back.

    Raises:
        CannotMount: No /dev/fuse, no fusermount3, or no permission.
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
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions"
    options += ",allow_other" if allow_other else ""
    flags = _MS_NOSUID | _MS_NODEV
    if _libc.mount(b"ckptfs", os.fsencode(mountpoint), FSTYPE.encode(), flags, options.encode()):
        code = ctypes.get_errno()
        os.close(fd)
        raise CannotMount(
            f"cannot mount on {mountpoint}: {os.strerror(code)}; mounting needs CAP_SYS_ADMIN "
            "(in a container: --cap-add SYS_ADMIN --security-opt apparmor=unconfined)"
        )
    return fd


def _mount_by_fusermount(mountpoint: Path, allow_other: bool) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    options = "nosuid,nodev,default_permissions,fsname=ckptfs,subtype=ckptfs"
    options += ",allow_other" if allow_other else ""
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
                "cannot mount: there is no fusermount3; install the package fuse3"
            ) from None
        if done.returncode:
            raise CannotMount(f"cannot mount on {mountpoint}: {done.stderr.strip()}")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    fd = array.array("i", ancillary[0][2])[0]
    os.set_inheritable(fd, False)
    return fd


def unmount(mountpoint: Path) -> None:
    """Detach the mount, also while it is in use. Does nothing where nothing is mounted."""
    if os.geteuid() == 0:
        _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH)
        return
    command = ["fusermount3", "-u", "-z", "--", str(mountpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        log.warning("cannot unmount %s: %s", mountpoint, done.stderr.strip())


class Mounted(NamedTuple):
    """A mount of ckptfs, see proc(5). `device`: ``major:minor``; `uid`: whose it is."""

    path: str
    device: str
    uid: int


def mounts() -> list[Mounted]:
    """All of ckptfs that this process could see, those on top last. Touches none of them."""
    found: list[Mounted] = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines():
        fields = line.split(" ")
        kind, _, *options = fields[fields.index("-") + 1 :]
        if kind == FSTYPE:
            path = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])  # see proc(5)
            uid = re.search(r"\buser_id=(\d+)", options[-1])
            found.append(Mounted(path, fields[2], int(uid[1]) if uid else 0))
    return found


def device_of_mount(mountpoint: Path) -> str | None:
    """``major:minor`` of what ckptfs has mounted there, or None. Never touches the mount itself."""
    found = [mounted.device for mounted in mounts() if mounted.path == str(mountpoint)]
    return found[-1] if found else None


def set_read_ahead(mountpoint: Path, kib: int) -> bool:
    """Set the kernel's readahead for the mount; needs root. Returns whether it worked."""
    device = device_of_mount(mountpoint)
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(kib))
    except OSError:
        return False
    return True


class Features(NamedTuple):
    """What the kernel has agreed to."""

    passthrough: bool
    resend: bool


def answer_init(fd: int, stack_depth: int = 0) -> Features:
    """Read the kernel's FUSE_INIT from a fresh session and answer it. Raises CannotMount.

    Args:
        fd: The session.
        stack_depth: How deep the cache's file system may be stacked, plus 1, for passthrough; 0: no
            passthrough.

    """
    message = os.read(fd, 64 << 10)
    _, opcode, unique, *_ = IN_HEADER.unpack_from(message)
    major, minor, _, flags, *rest = _INIT_IN.unpack_from(
        message.ljust(IN_HEADER.size + _INIT_IN.size, b"\0"), IN_HEADER.size
    )
    if opcode != _FUSE_INIT or major != _PROTOCOL[0] or minor < 28:
        raise CannotMount(f"cannot mount: FUSE protocol {major}.{minor} of the kernel is too old")
    offered = flags | (rest[0] << 32 if flags & _INIT_EXT else 0)
    chosen = (_WANTED | (_PASSTHROUGH if stack_depth else 0)) & offered
    passthrough = bool(chosen & _PASSTHROUGH)
    body = _INIT_OUT.pack(
        major,
        min(minor, _PROTOCOL[1]),
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
    os.write(fd, OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body)
    return Features(passthrough, bool(chosen & _HAS_RESEND))


def made_init() -> bytes:
    """A FUSE_INIT for libfuse: the flags that every libfuse 3 knows, protocol 7.41."""
    body = _INIT_IN.pack(7, 41, 128 << 10, 0x73FFFFFB, *[0] * 12)
    return IN_HEADER.pack(IN_HEADER.size + len(body), _FUSE_INIT, 1, 0, 0, 0, 0, 0, 0) + body
