"""The closed objects on the disk, in the order of their last use, and the count of all bytes.

Folders in the trash count until they are deleted. All state belongs to the event loop. The methods
rename folders, and look at the directory. If another process has removed the directory, they make
it again.
"""

import logging
from collections.abc import Callable, Container, Iterable
from pathlib import Path

from ckptfs._daemon.cache.cache_dir import CacheRoot, remove, warn
from ckptfs._daemon.cache.object_dir import Origin, Stored
from ckptfs._daemon.offload import Lane
from ckptfs.errors import ConfigError

log = logging.getLogger(__name__)


class Index:
    """The bytes in `directory`.

    Args:
        directory, bytes_max, free_share_min, required: As in `Cache`.
        opened: The open objects, whose bytes `Cache` counts.
        was_removed: Called when the directory was removed, and all that is not open with it.

    Attributes:
        bytes_max: The limit, which can be changed; 0 for no limit.
        free_share_min: The share of the disk to leave free, which can be changed.
        root: The directory.
        closed: The objects that are not open, by digest, least recently used first.
        trash: The folders to be deleted, and their bytes on the disk.
        used_bytes: Bytes on the disk of all objects and of the trash, with the bytes that are
            reserved for writes. `Cache` and `Room` change it, too.
        evicted_bytes: Bytes evicted for want of room, also those of objects that are in use.
        evicted_objects: Number of objects evicted as a whole.
        removed: Number of incomplete objects, or of another format, removed at start.

    Raises:
        ConfigError: The directory cannot be used, or another daemon uses it.
    """

    def __init__(
        self,
        directory: Path,
        bytes_max: int,
        free_share_min: float,
        opened: Container[str],
        was_removed: Callable[[], None],
        *,
        required: bool = True,
    ) -> None:
        self.bytes_max = bytes_max
        self.free_share_min = free_share_min
        self._opened = opened
        self._was_removed = was_removed
        self.closed: dict[str, Stored] = {}
        self._origins: dict[Origin, Origin] = {}  # so that equal ones are in memory once
        self.trash: dict[Path, int] = {}
        self.root = CacheRoot(directory, required=required)
        self._is_indexed = False
        self.used_bytes = self.removed = 0
        self.evicted_bytes = self.evicted_objects = 0
        if self.root.lock_fd < 0:
            return
        try:
            self._recover()
        except ConfigError as error:
            if required:
                self.root.close()
                raise
            warn("use its directory; reading without a cache", error)

    def _recover(self) -> None:
        """Index what an earlier daemon left. After a loss of power, or with another limit, that may
        be too much."""
        self._is_indexed = False
        found = self.root.recover()
        self._is_indexed = True
        for digest, stored in found.objects.items():
            # One that is open will be replaced with its next block.
            if digest not in self._opened and digest not in self.closed:
                self.put(digest, stored)
        self.used_bytes += found.other_bytes
        self.removed += found.removed
        while self.closed and self.excess(0) > 0:
            oldest = next(iter(self.closed))
            try:
                self.root.remove(oldest)
            except OSError as error:
                warn("remove an object", error)
                break
            self.take(oldest)

    # -- objects

    def take(self, digest: str) -> int:
        """Count an object no longer, because it is opened or removed. Returns its bytes."""
        stored = self.closed.pop(digest, None)
        taken_bytes = stored.bytes if stored else 0
        self.used_bytes -= taken_bytes
        return taken_bytes

    def put(self, digest: str, stored: Stored) -> None:
        """Count an object that is closed, as the last one used."""
        origin = self._origins.setdefault(stored.origin, stored.origin)
        self.closed[digest] = stored._replace(origin=origin)
        self.used_bytes += stored.bytes

    def evict(self, digest: str) -> Path | None:
        """Drop a closed object. Returns the folder for `delete`, if there is one. Raises OSError if
        the disk refuses; then the object stays."""
        stored = self.closed.get(digest)
        if stored is None:
            return None
        path = self.to_trash(digest)
        self.take(digest)
        if path is not None:
            self.leave(path, stored.bytes)
        return path

    def condemn(self, digest: str, size: int) -> int:
        """Have the folder of an object deleted that is not counted now. Returns the bytes that stay
        in its place."""
        try:
            path = self.to_trash(digest)
        except OSError:
            return size
        if path is not None:
            self.leave(path, size)
        return 0

    def to_trash(self, digest: str) -> Path | None:
        """Move a folder out of the way at once, so that the object can be opened anew. Returns its
        new path, or None if there is no folder. Raises OSError, and logs it."""
        try:
            return self.root.to_trash(digest)
        except OSError as error:
            warn("remove an object", error)
            raise

    def leave(self, path: Path, size: int) -> None:
        """Have a folder in the trash deleted when room is made next, and counted until then."""
        self.trash[path] = size
        self.used_bytes += size

    async def delete(self, lane: Lane, folders: Iterable[Path]) -> list[Path]:
        """Delete folders in the trash. Returns those that the disk has permitted to delete."""
        gone = await lane(_deleted, list(folders))
        self.used_bytes -= sum(self.trash.pop(folder, 0) for folder in gone)
        return gone

    # -- room

    def capacity_bytes(self) -> int:
        """Bytes that the cache could hold now if it were empty."""
        spare = self.spare_bytes()
        if spare is None:
            return 0
        on_disk = max(0, spare + self.used_bytes)
        return min(on_disk, self.bytes_max) if self.bytes_max else on_disk

    def excess(self, length: int) -> int:
        """Bytes above the limit, if there were `length` more."""
        return self.used_bytes + length - self.bytes_max if self.bytes_max else 0

    def surplus_bytes(self) -> int:
        """Bytes above the limit, or beyond the share of the disk that is to be left free."""
        spare = self.spare_bytes()
        return max(0, self.excess(0), -spare if spare is not None else 0)

    def spare_bytes(self) -> int | None:
        """Bytes of the disk that may be used; None if the directory or its disk is gone."""
        if not (self._is_indexed and self.root.is_there()) and not self._begin_anew():
            return None
        try:
            return self.root.spare_bytes(self.free_share_min)
        except OSError as error:
            warn("see how much space is left", error)
            return None

    def _begin_anew(self) -> bool:
        """Make the directory again after another process removed it, or claim a directory that was
        not usable so far."""
        try:
            if not self.root.is_there():
                was_claimed = self.root.lock_fd >= 0
                self.root.move()
                what = "was removed, and is made again" if was_claimed else "is used from now on"
                log.info("cache: %s %s", self.root.directory, what)
                self.used_bytes -= sum(stored.bytes for stored in self.closed.values())
                self.used_bytes -= sum(self.trash.values())
                self.closed.clear()
                self.trash.clear()
                self._was_removed()
            self._recover()
        except ConfigError as error:
            warn("use its directory", error)
            return False
        return True


def _deleted(folders: list[Path]) -> list[Path]:
    """Blocking. Delete folders, and return those that are gone."""
    return [folder for folder in folders if remove(folder)]
