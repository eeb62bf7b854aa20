"""The mounts that this process sees, and the paths in mounts of ckptfs.

A container sees the node's mount under a path of its own, or does not see it (`require_seen`).
"""

import errno
import os
import re
from typing import NamedTuple

from ckptfs.errors import CannotMount

FSTYPE = "fuse.ckptfs"
_TABLE = "/proc/self/mountinfo"


class MountLine(NamedTuple):
    """A line of mountinfo; see proc_pid_mountinfo(5).

    Attributes:
        path: The mount point.
        device: The device of the file system, as ``major:minor``.
        kind: The type of the file system.
        options: The options of the file system.
        root: The directory of the file system that is mounted.
    """

    path: str
    device: str
    kind: str
    options: str
    root: str

    def number(self, option: str) -> int:
        """The value of a numeric option, such as ``user_id``; 0 if it is missing."""
        found = re.search(rf"\b{option}=(\d+)", self.options)
        return int(found[1]) if found else 0


def mount_table() -> list[MountLine]:
    """The mounts that this process sees, the topmost last. Touches no mount. Raises OSError."""
    with open(_TABLE, "rb") as table:
        lines = os.fsdecode(table.read()).splitlines()
    found: list[MountLine] = []
    for line in lines:
        fields = line.split(" ")
        kind, _, *options = fields[fields.index("-") + 1 :]
        path = fields[4]
        if "\\" in path:
            path = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), path)
        found.append(MountLine(path, fields[2], kind, options[-1] if options else "", fields[3]))
    return found


def filesystem_type(path: "str | os.PathLike[str]") -> str:
    """The type of a path's file system, also for a path that does not exist; "" if unknown."""
    line = _line_above(os.path.realpath(path))
    return "" if line is None else line.kind


def _line_above(path: str) -> MountLine | None:
    found: MountLine | None = None
    for line in mount_table():
        is_above = line.path == "/" or path == line.path or path.startswith(f"{line.path}/")
        if is_above and (found is None or len(line.path) >= len(found.path)):
            found = line
    return found


def why_hidden(path: "str | os.PathLike[str]") -> str:
    """The reason for an error message if a path is in a mount of ckptfs that serves only another
    user or group; else "". Touches no mount.

    The kernel compares the group, too (fuse_permissible_uidgid in fs/fuse/dir.c), so it refuses a
    process to which newgrp(1), sg(1) or a scheduler has given another group.
    """
    line = _line_above(os.path.abspath(path))
    if line is None or line.kind != FSTYPE:
        return ""
    if "allow_other" in line.options.split(","):
        return ""
    uid, gid = (line.number(name) for name in ("user_id", "group_id"))
    if uid == os.geteuid():
        if gid == os.getegid():
            return ""
        return (
            f"{line.path} is a mount of group {gid}, which the kernel demands, and this process "
            f"has group {os.getegid()}; run this as group {gid} (sg), end that daemon (ckptfs "
            "umount) and start it from here, or mount with allow_other = true"
        )
    return (
        f"{line.path} is a mount of uid {uid}, and the kernel lets only that user in, not even "
        "root; run this as that user, or mount with allow_other = true (ckptfs help containers)"
    )


def mounts() -> list[MountLine]:
    """The mounts of ckptfs that this process sees, the topmost last. Touches no mount, because one
    whose daemon hangs would hold up the process."""
    return [line for line in mount_table() if line.kind == FSTYPE]


def is_mounted(path: "str | os.PathLike[str]") -> bool:
    """Whether a path is in a mount of ckptfs, and not in a copy with its attributes. Raises
    OSError."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(line.device == number and line.kind == FSTYPE for line in mount_table())


HAS_ENDED = frozenset([errno.ENOTCONN, errno.ECONNABORTED])
"""The errnos of a mount that has ended. The second one is for requests that were under way."""


class MountEnded(Exception):
    """The mount of the daemon has ended. The text has a remedy."""


def require_seen(path: str, daemons_mount: str) -> bool:
    """Check that this process sees the attachment at `path`, which the daemon shows in
    `daemons_mount`. Returns False if the mount lacks the attachment, because that has ended, or
    because the mount is that of another daemon.

    Raises:
        CannotMount: The mount is missing or cannot be read. The message has a remedy.
        MountEnded: The mount has ended.
    """
    mount = os.path.dirname(path)
    try:
        if is_mounted(path):
            return True
    except OSError as error:
        if error.errno not in (errno.ENOENT, *HAS_ENDED):
            cause = why_hidden(path) or error.strerror
            raise CannotMount(f"{path} cannot be read here: {cause}") from None
    remedy = (
        f"the daemon has mounted on {daemons_mount} as it sees it: in a container, mount the "
        "directory around that (with mountPropagation: HostToContainer) and set CKPTFS_MOUNT to "
        "where it is"
    )
    try:
        if is_mounted(mount):
            return False
        cause = "is not a mount of ckptfs here"
    except FileNotFoundError:
        cause = "does not exist here"
    except OSError as error:
        cause = f"is a mount whose daemon has ended ({error.strerror})"
        if error.errno in HAS_ENDED:
            raise MountEnded(f"{mount} {cause}; {remedy}") from None
    raise CannotMount(f"{mount} {cause}; {remedy}")
