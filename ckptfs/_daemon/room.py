"""Room in the cache: what has to go before a write, so that the limit holds.

`Room.reserve` decides, without IO but for renaming, what has to go so that the limit holds *before*
a write, and the bytes that go are counted until `make_room` (blocking) has removed them. Whole
objects that nobody has open go first, least recently used first; then the oldest blocks of open
objects. Where that is not enough, the bytes are not stored: a buffer is all that has them, and
readers advance without a disk. One reservation at a time: `storing` holds a lock from `reserve` to
`settle`.
"""

from collections.abc import Mapping

from ckptfs._daemon import blockio, cachedir
from ckptfs._daemon.cached import ABSENT, DYING, ON_DISK, CachedObject, Reservation
from ckptfs._daemon.cachedir import NO_FILES, Files, folder_bytes, pages
from ckptfs._daemon.cacheroot import warn
from ckptfs._daemon.ledger import Ledger
from ckptfs._model.blocks import block_length


class Room:
    """Makes room in what `ledger` counts, also by blocks of the objects in `opened`."""

    def __init__(self, ledger: Ledger, opened: Mapping[str, CachedObject]) -> None:
        self._ledger = ledger
        self._root = ledger.root
        self._open = opened

    def reserve(self, entry: CachedObject | None, length: int) -> Reservation:
        """Decide what goes so that `length` more bytes of `entry` can be stored, and count them;
        without one, so that the limit holds.

        Run `make_room` (blocking) with the result and then `settle`. If the result still `stores`,
        write, and then `unreserve` what was not published; otherwise the bytes can only be kept in
        memory.
        """
        result = Reservation(entry, length)
        spare = self._ledger.spare_bytes()
        if spare is None or (entry is not None and entry.unreliable):
            result.refuse()
            return result
        goal, result.folders = self._ledger.clear_out(result.bytes, spare)
        planned_bytes = sum(size for _, size in result.folders)
        while planned_bytes < goal and (victim := self._fullest_open()) is not None:
            index = victim.oldest.popleft()
            if victim.state[index] in ON_DISK:
                victim.state[index] = DYING
                victim.memory.pop(index, None)
                result.blocks.append((victim, index))
                planned_bytes += pages(block_length(index, victim.size))
                self._ledger.evicted_bytes += pages(block_length(index, victim.size))
        if planned_bytes < goal:
            result.refuse()
        result.goal_bytes = goal
        self._ledger.used_bytes += result.bytes
        return result

    def make_room(self, reservation: Reservation) -> Files:
        """Blocking. Free the space; returns the files of the new folder, if there is one."""
        for folder, size in reservation.folders:
            if Ledger.delete(folder):
                reservation.freed_bytes += size
            else:
                reservation.kept_folders.append((folder, size))
        for entry, index in reservation.blocks:
            if blockio.take_out(entry, range(index, index + 1)):
                reservation.freed_bytes += pages(block_length(index, entry.size))
            else:
                reservation.kept_blocks.append((entry, index))
        entry = reservation.entry
        if entry is None or not reservation.creates:
            return NO_FILES
        if reservation.freed_bytes < reservation.goal_bytes:
            return NO_FILES
        about, digest = entry.about, entry.digest
        try:
            return cachedir.create(self._root.folder(digest), about)
        except OSError as error:
            warn(f"make a folder for {about.key.path}", error)
        try:
            self._root.remove(digest)
        except OSError:
            reservation.remains = True
        return NO_FILES

    def settle(self, reservation: Reservation, files: Files) -> None:
        """Take in that `make_room` has ended, with its result."""
        self._ledger.used_bytes -= reservation.freed_bytes
        self._ledger.left(reservation.kept_folders)
        for entry, index in reservation.blocks:
            entry.state[index] = ABSENT
            entry.sums[index] = 0
        for entry, index in reservation.kept_blocks:  # they were taken out of the map
            entry.bury(block_length(index, entry.size))
        entry = reservation.entry
        if entry is not None and reservation.creates:
            entry.files = files
            reservation.stores = files is not NO_FILES
            if reservation.remains:
                entry.dead_bytes = folder_bytes(entry.size)
                entry.unreliable = True
                self._ledger.used_bytes += entry.dead_bytes
        elif reservation.freed_bytes < reservation.goal_bytes:
            reservation.stores = False
        if not reservation.stores:
            self._ledger.used_bytes -= reservation.bytes

    def give_back(self, entry: CachedObject, length: int, freed: bool) -> None:
        """Take in the outcome of `take_out` of blocks of `length` bytes together that were reserved
        and will not be published, or were forgotten."""
        if freed:
            self._ledger.used_bytes -= pages(length)
        else:
            entry.bury(length)

    def _fullest_open(self) -> CachedObject | None:
        # Where a hole could not be made, there is no point in trying again.
        candidates = (e for e in self._open.values() if not e.lent and not e.dead_bytes)
        fullest = max(candidates, key=lambda entry: len(entry.oldest), default=None)
        return fullest if fullest and fullest.oldest else None
