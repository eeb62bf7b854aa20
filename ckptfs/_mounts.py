"""Whether a path is in a mount of ckptfs, as this process sees it.

A container sees the node's mount under a path of its own, or not at all: see `require_seen`.
"""

import errno
import os

from ckptfs.errors import DaemonError

_FSTYPE = b"fuse.ckptfs"


def is_mounted(path: "str | os.PathLike[str]") -> bool:
    """Whether it is in a mount of ckptfs: a copy made with its attributes is not. Raises
    OSError."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.split(b" ")
            if fields[2] == number.encode():
                return fields[fields.index(b"-") + 1] == _FSTYPE
    return False


def require_seen(path: str, daemons_mount: str) -> bool:
    """Make sure that this process sees the attachment at `path`, which the daemon shows in
    `daemons_mount`.

    Returns False if the mount is there and does not have it: it has ended, or that is the mount of
    another daemon.

    Raises:
        DaemonError: The mount is not there, or is dead; the message says what to do.
    """
    mount = os.path.dirname(path)
    try:
        if is_mounted(path):
            return True
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTCONN):
            raise DaemonError(f"{path} cannot be read here: {error.strerror}") from None
    try:
        if is_mounted(mount):
            return False
        cause = "is no mount of ckptfs here"
    except FileNotFoundError:
        cause = "does not exist here"
    except OSError as error:
        cause = f"is a mount whose daemon has ended ({error.strerror})"
    raise DaemonError(
        f"{mount} {cause}; the daemon has mounted on {daemons_mount} as it sees it: in a "
        "container, mount the directory around that (with mountPropagation: HostToContainer) and "
        "set CKPTFS_MOUNT to where it is"
    )
