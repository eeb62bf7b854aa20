"""What of the cache is on the disk while nobody has it open, and the count of all bytes.

Closed objects are kept in the order of their use. What is in the trash and could not be deleted yet
is counted like everything else, and chosen first when room is needed. State belongs to the event
loop, but for `delete` (blocking). IO is renaming and what a look at the directory costs, except
where the directory was removed and is begun anew.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from ckptfs._daemon import disk
from ckptfs._daemon.cachedir import Origin, Stored
from ckptfs._daemon.cacheroot import CacheRoot, warn
from ckptfs.errors import ConfigError

log = logging.getLogger(__name__)


class Ledger:
    """The bytes in `directory`, at most `bytes_max` (0: no limit of its own).

    Args:
        bytes_max, free_share_min: Attributes, too, that can be changed.
        is_open: Whether an object is open; these are counted by whoever has opened them.
        was_removed: Called when the directory was removed, and all that is not open with it.
        required: Whether the directory has to be usable now. If not, there is no room until it is.

    Attributes:
        used_bytes: Of all objects, and of what is to be deleted; whoever opens, writes or reserves
            changes it.
        evicted_bytes: That had to go because there was no room, so far; also of objects that are
            open. `evicted_objects`: how many went as a whole.
        removed: How many objects were removed at start, as they were not whole, or of another
            format.

    Raises:
        ConfigError: The directory cannot be used, or another daemon uses it.
    """

    def __init__(
        self,
        directory: Path,
        bytes_max: int,
        free_share_min: float,
        is_open: Callable[[str], bool],
        was_removed: Callable[[], None],
        *,
        required: bool = True,
    ) -> None:
        self.bytes_max = bytes_max
        self.free_share_min = free_share_min
        self._is_open = is_open
        self._was_removed = was_removed
        self._closed: OrderedDict[str, Stored] = OrderedDict()  # by digest, LRU first
        self._origins: dict[Origin, Origin] = {}  # so that equal ones are in memory once
        self._leftovers: dict[Path, int] = {}  # to be deleted -> bytes on disk
        self.root = CacheRoot(directory, required=required)
        self._is_indexed = False
        self.used_bytes = self.removed = 0
        self.evicted_bytes = self.evicted_objects = 0
        if not self.root.is_claimed:
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
            if not self._is_open(digest) and digest not in self._closed:
                self.put(digest, stored)
        self.used_bytes += found.other_bytes
        self.removed += found.removed
        while self._closed and self.excess(0) > 0:
            digest, stored = self._closed.popitem(last=False)
            try:
                self.root.remove(digest)
            except OSError as error:
                warn("remove an object", error)
                self._closed[digest] = stored
                break
            self.used_bytes -= stored.bytes

    # -- objects

    def closed(self) -> list[tuple[str, Stored]]:
        """All objects that are not open, by digest, least recently used first."""
        return list(self._closed.items())

    def stored(self, digest: str) -> Stored | None:
        """What is on the disk of an object that is not open."""
        return self._closed.get(digest)

    def take(self, digest: str) -> int:
        """An object is opened: count its bytes no longer. How many they were."""
        stored = self._closed.pop(digest, None)
        if stored is None:
            return 0
        self.used_bytes -= stored.bytes
        return stored.bytes

    def put(self, digest: str, stored: Stored) -> None:
        """An object is closed, and was used last."""
        origin = self._origins.setdefault(stored.origin, stored.origin)
        self._closed[digest] = stored._replace(origin=origin)
        self.used_bytes += stored.bytes

    def evict(self, digest: str) -> Path | None:
        """Drop an object; returns the folder to `delete`, if it was there. Raises OSError where
        the disk refuses; the object stays then."""
        stored = self._closed.get(digest)
        if stored is None:
            return None
        path = self.to_trash(digest)
        if isinstance(path, OSError):
            raise path
        self.take(digest)
        if path is not None:
            self.leave(path, stored.bytes)
        return path

    def condemn(self, digest: str, size: int) -> int:
        """Have the folder of an object deleted that is not counted now; what stays in its place, in
        bytes."""
        path = self.to_trash(digest)
        if isinstance(path, OSError):
            return size
        if path is not None:
            self.leave(path, size)
        return 0

    def to_trash(self, digest: str) -> Path | OSError | None:
        """Move a folder out of the way at once, so that the object can be opened anew: where it is
        now; None: it is gone; or why it stays where it is."""
        try:
            return self.root.to_trash(digest)
        except OSError as error:
            warn("remove an object", error)
            return error

    def leave(self, path: Path, size: int) -> None:
        """Have what is in the trash deleted with the next reservation, and counted until then."""
        self._leftovers[path] = size
        self.used_bytes += size

    def left(self, folders: list[tuple[Path, int]]) -> None:
        """Some of what `clear_out` chose could not be deleted."""
        self._leftovers.update(folders)

    @staticmethod
    def delete(folder: Path) -> bool:
        """Blocking. Delete what is in the trash; False: the disk refuses."""
        try:
            disk.remove(folder)
        except OSError as error:
            warn("remove a folder", error)
            return False
        return True

    def deleted(self, folder: Path, gone: bool) -> None:
        """Take in the outcome of `delete` after `evict`."""
        if gone:
            self.used_bytes -= self._leftovers.pop(folder, 0)

    # -- room

    def capacity_bytes(self) -> int:
        """How many bytes there could be now, if there were none yet."""
        spare = self.spare_bytes()
        if spare is None:
            return 0
        on_disk = max(0, spare + self.used_bytes)
        return min(on_disk, self.bytes_max) if self.bytes_max else on_disk

    def excess(self, length: int) -> int:
        """Bytes above the limit, if there were `length` more."""
        return self.used_bytes + length - self.bytes_max if self.bytes_max else 0

    def spare_bytes(self) -> int | None:
        """Bytes of the disk that may be used; None: the directory is gone, or its disk."""
        if not (self._is_indexed and self.root.is_there()) and not self._begin_anew():
            return None
        try:
            return self.root.spare_bytes(self.free_share_min)
        except OSError as error:
            warn("see how much space is left", error)
            return None

    def clear_out(self, length: int, spare: int) -> tuple[int, list[tuple[Path, int]]]:
        """Choose what nobody has open and has to go, so that `length` bytes fit into the limit and
        into the `spare` ones of the disk.

        Returns how many bytes have to be freed, and folders in the trash, with their bytes, which
        stay counted until they are deleted. They may be too few.
        """
        lack = length - spare
        goal = max(lack, self.excess(length))
        folders = list(self._leftovers.items())
        self._leftovers.clear()
        planned_bytes = sum(size for _, size in folders)
        while planned_bytes < goal and self._closed:
            digest, stored = self._closed.popitem(last=False)
            path = self.to_trash(digest)
            if isinstance(path, OSError):
                self._closed[digest] = stored
                self._closed.move_to_end(digest, last=False)
                break
            if path is None:  # somebody has removed it
                self.used_bytes -= stored.bytes
                goal = max(lack, self.excess(length))
            else:
                folders.append((path, stored.bytes))
                planned_bytes += stored.bytes
                self.evicted_objects += 1
                self.evicted_bytes += stored.bytes
        return goal, folders

    def _begin_anew(self) -> bool:
        """Somebody has removed the directory: make it again, if nobody else has. Or it could not be
        used so far."""
        try:
            if not self.root.is_there():
                was_claimed = self.root.is_claimed
                self.root.move()
                what = "was removed, and is made again" if was_claimed else "is used from now on"
                log.info("cache: %s %s", self.root.directory, what)
                self.used_bytes -= sum(stored.bytes for stored in self._closed.values())
                self.used_bytes -= sum(self._leftovers.values())
                self._closed.clear()
                self._leftovers.clear()
                self._was_removed()
            self._recover()
        except ConfigError as error:
            warn("use its directory", error)
            return False
        return True
