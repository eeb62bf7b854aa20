"""The cache's directory: whose it is, where things are in it, and what an earlier daemon left.

``objects/<2 hex>/<digest>/`` is an object (see ``cachedir``); ``trash/<name>`` is one that is
being deleted; ``lock`` is held by the daemon whose directory it is. All of these names are looked
up from a descriptor of the directory, so that a daemon whose directory was removed, and perhaps
made again by another daemon, touches nothing of the new one (`is_there` finds that out). The
directory itself is locked, too: somebody may remove ``lock`` (not on NFS, which cannot do that).

What is in ``objects`` under a name that a daemon would not give is left alone, and counted.
"""

import contextlib
import errno
import itertools
import logging
import math
import os
import re
import stat
import time
from pathlib import Path
from typing import NamedTuple

from ckptfs._daemon import cachedir, disk
from ckptfs._daemon.cachedir import UNKNOWN, Stored
from ckptfs.errors import ConfigError

log = logging.getLogger(__name__)

_PREFIX = re.compile("[0-9a-f]{2}")
_DIGEST = re.compile("[0-9a-f]{32}")
_REMEDY = "set cache_dir (CKPTFS_CACHE_DIR) to another directory"


_NOTHING = Path("/dev/null")
_WARN_PAUSE_S = 60.0
_warned_s: dict[str, float] = {}


def warn(what: str, error: Exception) -> None:
    """Say what the cache cannot do, one line a minute for each verb: a disk that is full or fails
    refuses everything."""
    kind = what.split(" ", 1)[0]
    now_s = time.monotonic()
    if now_s - _warned_s.get(kind, -math.inf) > _WARN_PAUSE_S:
        _warned_s[kind] = now_s
        log.warning("cache: cannot %s: %s", what, error)


class Found(NamedTuple):
    """What was in the directory: the objects, least recently used first; the bytes on disk of all
    that is no object; and what was removed because it was not whole, or of another format."""

    objects: dict[str, Stored]
    other_bytes: int
    removed: int


class CacheRoot:
    """The directory of one daemon.

    Args:
        directory: Its name.
        required: Whether it has to be claimed now. If not, nothing is in it until `move` succeeds.

    Attributes:
        is_claimed: Whether it has been.
        lock_fd: A file in it, once it has been.
        path: What stands for it, whatever becomes of its name.

    Raises:
        ConfigError: It cannot be used, or another daemon uses it.
    """

    def __init__(self, directory: Path, *, required: bool = True) -> None:
        self.directory = directory
        # No name of an earlier daemon's: what could not be deleted is still there.
        self._trash = (f"{time.time_ns():x}-{serial}" for serial in itertools.count(1))
        self.is_claimed = True
        try:
            self._fd, self.lock_fd = self._claim()
        except ConfigError as error:
            if required:
                raise
            warn("use its directory; reading without a cache", error)
            self.is_claimed = False
            # Descriptors to be replaced. No directory: whatever is looked up in it is ENOTDIR.
            self._fd, self.lock_fd = (disk.open_file(_NOTHING, os.O_RDONLY) for _ in range(2))
        self.path = Path(f"/proc/self/fd/{self._fd}")

    def _claim(self) -> tuple[int, int]:
        fds: list[int] = []
        try:
            disk.make_folders(self.directory)
            fds.append(disk.open_folder(self.directory))
            info = disk.status(fds[0])
            if info.st_uid != os.geteuid() or info.st_mode & 0o022:
                raise ConfigError(
                    f"cache directory {self.directory} must belong to this user and be writable by "
                    f"nobody else; {_REMEDY}"
                )
            fds.append(disk.open_file(self.directory / "lock", os.O_RDWR | os.O_CREAT))
            _lock(fds[0], where_possible=True)
            _lock(fds[1])
        except BlockingIOError:
            error = ConfigError(
                f"cache directory {self.directory} is in use by another ckptfs daemon, or by "
                f"ckptfs cache; {_REMEDY}"
            )
        except OSError as failure:
            error = ConfigError(f"cache directory {self.directory}: {failure.strerror}; {_REMEDY}")
        except ConfigError as refusal:
            error = refusal
        else:
            return fds[0], fds[1]
        for fd in fds:
            disk.close(fd)
        raise error

    def close(self) -> None:
        """Let another daemon use the directory."""
        disk.close(self.lock_fd)
        disk.close(self._fd)

    def is_there(self) -> bool:
        """Whether the directory of that name is still the one that was claimed."""
        try:
            ours, named = disk.status(self._fd), disk.status_behind(self.directory)
        except OSError:
            return False
        return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)

    def move(self) -> None:
        """Claim the directory of that name again. Raises ConfigError.

        `path` stays the same, for threads that use it now.
        """
        fd, lock_fd = self._claim()
        os.dup2(fd, self._fd, inheritable=False)
        disk.close(fd)
        disk.close(self.lock_fd)
        self.lock_fd = lock_fd
        self.is_claimed = True

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
                disk.rename(source, target)
            except FileNotFoundError:  # which of the two is not there?
                with contextlib.suppress(OSError):
                    disk.make_folder(target.parent)
                disk.rename(source, target)
        except FileNotFoundError:
            if self.has(digest):
                raise
            return None
        self._remove_prefix(digest)
        return target

    def remove(self, digest: str) -> None:
        """Remove a folder where it is. Raises OSError."""
        disk.remove(self.folder(digest))
        self._remove_prefix(digest)

    def _remove_prefix(self, digest: str) -> None:
        """Its space is counted with the objects in it."""
        with contextlib.suppress(OSError):  # there are others
            disk.remove_empty(self.folder(digest).parent)

    def spare_bytes(self, free_share_min: float) -> int:
        """Bytes of the disk that are free and need not be left free (below 0: more are needed).
        Raises OSError."""
        space = disk.free_space(self.path)
        leave = int(free_share_min * space.f_blocks * space.f_frsize)
        return space.f_bavail * space.f_frsize - leave

    # -- what an earlier daemon left

    def recover(self) -> Found:
        """Index the objects, remove what is not whole, and empty the trash.

        Raises ConfigError if ``objects`` or ``trash`` is no directory of this user's, or something
        cannot be listed, and so not be counted.
        """
        try:
            return self._recover()
        except OSError as error:
            raise ConfigError(
                f"cache directory {self.directory} cannot be read: {error.strerror}; remove it, or "
                f"{_REMEDY}"
            ) from None

    def _recover(self) -> Found:
        for name in ("trash", "objects"):
            self._prepare(name)
        other_bytes = removed = 0
        for name in _names_in(self.path / "trash"):
            if not _remove(self.path / "trash" / name):
                other_bytes += tree_bytes(self.path / "trash" / name)
        found: list[tuple[str, Stored]] = []
        for prefix in _names_in(self.path / "objects"):
            folder = self.path / "objects" / prefix
            if not _PREFIX.fullmatch(prefix):
                log.info("cache: %s/objects/%s is not ours: left alone", self.directory, prefix)
                other_bytes += tree_bytes(folder)
            elif not _is_own_folder(folder):
                log.info("cache: removing %s/objects/%s", self.directory, prefix)
                other_bytes += 0 if _remove(folder) else tree_bytes(folder)
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
                    disk.remove_empty(folder)
        found.sort(key=lambda each: (each[1].used_s, each[0]))
        return Found(dict(found), other_bytes, removed)

    def _prepare(self, name: str) -> None:
        path = self.path / name
        try:
            try:
                disk.make_folder(path)
            except FileExistsError:
                cachedir.require_own_folder(path)
                if disk.status_of(path).st_mode & 0o077:  # a copy that was made with another umask
                    disk.keep_private(path)
        except ValueError:
            raise ConfigError(
                f"{self.directory / name} is no directory that belongs to this user alone; "
                "remove it"
            ) from None
        except OSError as error:  # a full disk: it is tried again when it is needed
            log.warning("cache: cannot make %s: %s", self.directory / name, error.strerror)

    def _found(self, folder: Path) -> Stored | None:
        try:
            return cachedir.examine(folder)
        except (OSError, ValueError) as error:
            log.info("cache: removing %s: %s", folder.name, error)
            return None if _remove(folder) else Stored(tree_bytes(folder), 0, 0.0, UNKNOWN)


def _lock(fd: int, *, where_possible: bool = False) -> None:
    try:
        disk.lock(fd)
    except OSError as error:
        # flock(2) of a directory on NFS: EBADF; without a lock manager: ENOLCK.
        unable = error.errno in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
        if not (where_possible and unable):
            raise


def _may_be_there(path: Path) -> bool:
    try:
        disk.status_of(path)
    except OSError as error:
        return error.errno != errno.ENOENT
    return True


def _names_in(folder: Path) -> list[str]:
    try:
        return disk.list_folder(folder)
    except FileNotFoundError:
        if _may_be_there(folder):
            raise
        return []  # it could not be made


def _is_own_folder(folder: Path) -> bool:
    try:
        cachedir.require_own_folder(folder)
    except (OSError, ValueError):
        return False
    return True


def _remove(path: Path) -> bool:
    try:
        disk.remove(path)
    except OSError as error:
        log.warning("cache: cannot remove %s: %s", path.name, error)
        return False
    return True


def tree_bytes(top: Path) -> int:
    """Bytes on disk of a file or of a directory with all that is in it. Raises OSError."""
    total = 0
    paths = [top]
    while paths:
        path = paths.pop()
        info = disk.status_of(path)
        total += disk.taken_bytes(info)
        if stat.S_ISDIR(info.st_mode):
            paths += [path / name for name in disk.list_folder(path)]
    return total
