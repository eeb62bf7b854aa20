"""The cache's directory: its owner, its layout, and the objects that an earlier daemon left.

``objects/<2 hex>/<digest>/`` is an object (see ``object_dir``); ``trash/<name>`` is one that is
being deleted; the daemon that has claimed the directory holds a lock on ``lock``. The daemon looks
all of these names up from a descriptor of the directory. So a daemon whose directory was removed,
and perhaps made again by another daemon, touches nothing of the new one (see `is_there`). The
directory itself is locked, too, because a user may remove ``lock``. NFS cannot lock a directory, so
there only ``lock`` is.

The cache counts foreign names in ``objects`` and leaves them alone.
"""

import contextlib
import errno
import itertools
import logging
import os
import re
import stat
import time
from pathlib import Path
from typing import NamedTuple

from ckptfs._daemon.cache import disk_ops, object_dir
from ckptfs._daemon.cache.object_dir import UNKNOWN, Stored
from ckptfs._os.ownership import is_this_users_alone
from ckptfs.errors import PlaceUnusable

log = logging.getLogger(__name__)

_PREFIX = re.compile("[0-9a-f]{2}")
_DIGEST = re.compile("[0-9a-f]{32}")
_REMEDY = "set cache_dir (CKPTFS_CACHE_DIR) to another directory"

_NOTHING = Path("/dev/null")


def warn(what: str, error: Exception) -> None:
    """Log what the cache cannot do. A disk that is full or fails refuses everything, so the log has
    one line a minute for each verb (``_mount.logs``)."""
    verb = what.split(" ", 1)[0]
    log.warning("cache: cannot %s: %s", what, error, extra={"once_for": verb})


class Found(NamedTuple):
    """The contents of the directory: its objects, least recently used first; the bytes on disk of
    all other files; and the number of removed objects, which were incomplete or of another
    format."""

    objects: dict[str, Stored]
    other_bytes: int
    removed: int


class CacheRoot:
    """The directory of one daemon.

    Args:
        directory: Its name.
        required: Whether it has to be claimed now. If not, it is empty until `move` succeeds.

    Attributes:
        lock_fd: A file in it; -1 as long as it is not claimed.
        path: Its path by a descriptor, which holds also when its name is another directory's.

    Raises:
        PlaceUnusable: It cannot be used, or another daemon uses it.
    """

    def __init__(self, directory: Path, *, required: bool = True) -> None:
        self.directory = directory
        # No name of an earlier daemon's: what could not be deleted is still there.
        self._trash = (f"{time.time_ns():x}-{serial}" for serial in itertools.count(1))
        try:
            self._fd, self.lock_fd = self._claim()
        except PlaceUnusable as error:
            if required:
                raise
            warn("use its directory; reading without a cache", error)
            # A descriptor to be replaced. It is no directory, so each name in it is ENOTDIR.
            self._fd, self.lock_fd = disk_ops.open_file(_NOTHING, os.O_RDONLY), -1
        self.path = Path(f"/proc/self/fd/{self._fd}")

    def _claim(self) -> tuple[int, int]:
        """Descriptors of the directory and of its lock. Raises PlaceUnusable."""
        try:
            with contextlib.ExitStack() as undo:
                disk_ops.make_folders(self.directory)
                fd = disk_ops.open_folder(self.directory)
                undo.callback(disk_ops.close, fd)
                if not is_this_users_alone(disk_ops.status(fd)):
                    raise PlaceUnusable(
                        f"cache directory {self.directory} must belong to this user and be "
                        f"writable by no other user; {_REMEDY}"
                    )
                lock_fd = disk_ops.open_file(self.directory / "lock", os.O_RDWR | os.O_CREAT)
                undo.callback(disk_ops.close, lock_fd)
                _lock(fd, where_possible=True)
                _lock(lock_fd)
                undo.pop_all()
                return fd, lock_fd
        except BlockingIOError:
            problem = " is in use by another ckptfs daemon, or by ckptfs cache"
        except OSError as error:
            problem = f": {error.strerror}"
        raise PlaceUnusable(f"cache directory {self.directory}{problem}; {_REMEDY}")

    def close(self) -> None:
        """Let another daemon use the directory."""
        disk_ops.close(self.lock_fd)
        disk_ops.close(self._fd)

    def is_there(self) -> bool:
        """Whether the directory of that name is still the one that was claimed."""
        try:
            ours, named = disk_ops.status(self._fd), disk_ops.status_behind(self.directory)
        except OSError:
            return False
        return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)

    def move(self) -> None:
        """Claim the directory of that name again. Raises PlaceUnusable.

        `path` stays the same, for threads that use it now.
        """
        fd, lock_fd = self._claim()
        os.dup2(fd, self._fd, inheritable=False)
        disk_ops.close(fd)
        disk_ops.close(self.lock_fd)
        self.lock_fd = lock_fd

    # -- folders

    def folder(self, digest: str) -> Path:
        """Where an object is."""
        return self.path / "objects" / digest[:2] / digest

    def has(self, digest: str) -> bool:
        """Whether the folder of an object is there, or may be."""
        return _may_be_there(self.folder(digest))

    def to_trash(self, digest: str) -> Path | None:
        """Move a folder out of the way at once, so that the object can be opened anew: where it is
        now; None: there was none. Raises OSError."""
        source, target = self.folder(digest), self.path / "trash" / next(self._trash)
        try:
            try:
                disk_ops.rename(source, target)
            except FileNotFoundError:  # which of the two is not there?
                with contextlib.suppress(OSError):
                    disk_ops.make_folder(target.parent)
                disk_ops.rename(source, target)
        except FileNotFoundError:
            if self.has(digest):
                raise
            return None
        self._remove_prefix(digest)
        return target

    def remove(self, digest: str) -> None:
        """Remove a folder where it is. Raises OSError."""
        disk_ops.remove(self.folder(digest))
        self._remove_prefix(digest)

    def _remove_prefix(self, digest: str) -> None:
        """Its space is counted with the objects in it."""
        with contextlib.suppress(OSError):  # there are others
            disk_ops.remove_empty(self.folder(digest).parent)

    def spare_bytes(self, free_share_min: float) -> int:
        """Bytes of the disk that are free and need not be left free (below 0: more are needed).
        Raises OSError."""
        space = disk_ops.free_space(self.path)
        leave = int(free_share_min * space.f_blocks * space.f_frsize)
        return space.f_bavail * space.f_frsize - leave

    # -- what an earlier daemon left

    def recover(self) -> Found:
        """Index the objects, remove what is not whole, and empty the trash.

        Raises PlaceUnusable if ``objects`` or ``trash`` is not a directory of this user, or if
        something cannot be listed and so not be counted.
        """
        try:
            return self._recover()
        except OSError as error:
            raise PlaceUnusable(
                f"cache directory {self.directory} cannot be read: {error.strerror}; remove it, or "
                f"{_REMEDY}"
            ) from None

    def _recover(self) -> Found:
        for name in ("trash", "objects"):
            self._prepare(name)
        other_bytes = removed = 0
        for name in _names_in(self.path / "trash"):
            if not remove(self.path / "trash" / name):
                other_bytes += tree_bytes(self.path / "trash" / name)
        found: list[tuple[str, Stored]] = []
        for prefix in _names_in(self.path / "objects"):
            folder = self.path / "objects" / prefix
            if not _PREFIX.fullmatch(prefix):
                log.info("cache: %s/objects/%s is not ours: left alone", self.directory, prefix)
                other_bytes += tree_bytes(folder)
            elif not _is_own_folder(folder):
                log.info("cache: removing %s/objects/%s", self.directory, prefix)
                other_bytes += 0 if remove(folder) else tree_bytes(folder)
            else:
                for name in _names_in(folder):
                    if _DIGEST.fullmatch(name) and name.startswith(prefix):
                        stored = self._found(folder / name)
                        removed += stored is None
                        found += [(name, stored)] if stored else []
                    else:
                        log.info("cache: %s/%s is not ours: left alone", prefix, name)
                        other_bytes += tree_bytes(folder / name)
                with contextlib.suppress(OSError):
                    disk_ops.remove_empty(folder)
        found.sort(key=lambda each: (each[1].used_s, each[0]))
        return Found(dict(found), other_bytes, removed)

    def _prepare(self, name: str) -> None:
        path = self.path / name
        try:
            try:
                disk_ops.make_folder(path)
            except FileExistsError:
                object_dir.require_own_folder(path)
                is_private = not disk_ops.status_of(path).st_mode & 0o077
                if not is_private:  # a copy that was made with another umask
                    disk_ops.keep_private(path)
        except ValueError:
            raise PlaceUnusable(
                f"{self.directory / name} is not a directory that belongs to this user alone; "
                "remove it"
            ) from None
        except OSError as error:  # a full disk: it is tried again when it is needed
            log.warning("cache: cannot make %s: %s", self.directory / name, error.strerror)

    def _found(self, folder: Path) -> Stored | None:
        try:
            return object_dir.examine(folder)
        except (OSError, ValueError) as error:
            log.info("cache: removing %s: %s", folder.name, error)
            return None if remove(folder) else Stored(tree_bytes(folder), 0, 0.0, UNKNOWN)


def _lock(fd: int, *, where_possible: bool = False) -> None:
    try:
        disk_ops.lock(fd)
    except OSError as error:
        # flock(2) of a directory on NFS: EBADF; without a lock manager: ENOLCK.
        unable = error.errno in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
        if not (where_possible and unable):
            raise


def _may_be_there(path: Path) -> bool:
    try:
        disk_ops.status_of(path)
    except OSError as error:
        return error.errno != errno.ENOENT
    return True


def _names_in(folder: Path) -> list[str]:
    try:
        return disk_ops.list_folder(folder)
    except FileNotFoundError:
        if _may_be_there(folder):
            raise
        return []  # it could not be made


def _is_own_folder(folder: Path) -> bool:
    try:
        object_dir.require_own_folder(folder)
    except (OSError, ValueError):
        return False
    return True


def remove(path: Path) -> bool:
    """Blocking. Remove a file or a folder. Returns whether the disk permits it."""
    try:
        disk_ops.remove(path)
    except OSError as error:
        warn(f"remove {path.name}", error)
        return False
    return True


def tree_bytes(top: Path) -> int:
    """Bytes on disk of a file or of a directory with all that is in it. Raises OSError."""
    total = 0
    paths = [top]
    while paths:
        path = paths.pop()
        info = disk_ops.status_of(path)
        total += disk_ops.taken_bytes(info)
        if stat.S_ISDIR(info.st_mode):
            paths += [path / name for name in disk_ops.list_folder(path)]
    return total
