"""Bind mounts of volumes. Nothing here touches a mount by path, because its daemon may hang, except
`bind`, whose source the daemon has just shown."""

import ctypes
import errno
import os

from ckptfs._model.volume import FOLDER
from ckptfs._os.mountinfo import FSTYPE, MountLine, mount_table

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND = 32, 4096
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_libc = ctypes.CDLL(None, use_errno=True)


def real(target: str) -> str:
    """A target as mountinfo names it. Its last component is not followed."""
    folder, name = os.path.split(target)
    return os.path.join(os.path.realpath(folder), name)


def at(target: str) -> MountLine | None:
    """The topmost mount on a target, or None. Raises OSError."""
    path = real(target)
    found = [line for line in mount_table() if line.path == path]
    return found[-1] if found else None


def is_volume(line: MountLine) -> bool:
    """Whether a mount shows a volume of ckptfs."""
    return line.kind == FSTYPE and line.root.startswith(f"/{FOLDER}/")


def bound_volumes() -> set[str]:
    """The directories, relative to the mount, of all volumes that are bound somewhere. Raises
    OSError."""
    return {line.root[1:].removesuffix("//deleted") for line in mount_table() if is_volume(line)}


def bind(source: str, target: str, *, noexec: bool) -> None:
    """Show the directory `source` at `target`, read-only. Raises OSError; then nothing is mounted.

    Two calls are needed, because the kernel ignores the other flags of a bind mount. Until the
    second one the daemon refuses writes.
    """
    _mount(source, target, _MS_BIND)
    flags = _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    try:
        _mount(None, target, flags | (_MS_NOEXEC if noexec else 0))
    except OSError:
        unmount(target)
        raise


def unmount(target: str) -> bool:
    """Unmount the topmost mount of a target. Returns False if it was in use, and therefore goes
    with its last user. Raises OSError."""
    if not _libc.umount2(os.fsencode(target), _UMOUNT_NOFOLLOW):
        return True
    code = ctypes.get_errno()
    if code == errno.EBUSY and not _libc.umount2(
        os.fsencode(target), _UMOUNT_NOFOLLOW | _MNT_DETACH
    ):
        return False
    raise OSError(code, os.strerror(code), target)


def _mount(source: str | None, target: str, flags: int) -> None:
    path = None if source is None else os.fsencode(source)
    if _libc.mount(path, os.fsencode(target), None, flags, None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)
