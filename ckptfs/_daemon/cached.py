"""One open object of the cache, and the room that is made for a write: state, without IO.

States of a block, and who may touch what: see ``cache``.
"""

from collections import deque
from typing import TYPE_CHECKING

from ckptfs._daemon.cachedir import NO_FILES, About, Files, folder_bytes, pages
from ckptfs._model.blocks import BLOCK_BYTES, block_length

if TYPE_CHECKING:
    from array import array
    from pathlib import Path

    from ckptfs._daemon.buffers import Buffer

ABSENT, STORED, VERIFIED, DOUBTED, IN_MEMORY, DYING = range(6)
ON_DISK = frozenset((STORED, VERIFIED, DOUBTED))
_READABLE = frozenset((VERIFIED, IN_MEMORY))


def disk_bytes(size: int) -> int:
    """Bytes that an object of `size` bytes takes on disk when all of it is cached."""
    return pages(size) + folder_bytes(size) if size else 0


class CachedObject:
    """One open object. `data` of a block is at its own offset in `files.data`.

    Attributes:
        files: NO_FILES until the first block is stored.
        sums: Checksums of the blocks that are on disk, else 0.
        oldest: Stored blocks, oldest first.
        memory: Blocks whose bytes are in a buffer.
        retired: Files that are lent and no longer its own, the bytes that they take, and where they
            are if they could not be removed.
        dead_bytes: On disk in its folder beside its blocks: what could not be given back, or a
            folder that can be neither opened nor removed.
        unreliable: Its disk failed: nothing more is stored there while it is open.
        orphaned: Its folder went with the cache's directory; only its files are left.
    """

    def __init__(self, digest: str, about: About, files: Files, sums: "array[int]") -> None:
        self.digest = digest
        self.about = about
        self.size = about.key.size
        self.files = files
        self.sums = sums
        self.state = bytearray(STORED if s else ABSENT for s in sums)
        self.oldest = deque(i for i, s in enumerate(sums) if s)
        self.memory: dict[int, Buffer[CachedObject]] = {}
        self.users = 0
        self.lent = 0
        self.retired: list[tuple[Files, int, Path | None]] = []
        self.dead_bytes = 0
        self.unreliable = self.orphaned = False

    def stored_bytes(self) -> int:
        """Bytes of the blocks that are on disk."""
        count = sum(map(self.state.count, ON_DISK))
        if count and self.state[-1] in ON_DISK:
            return (count - 1) * BLOCK_BYTES + block_length(len(self.state) - 1, self.size)
        return count * BLOCK_BYTES

    def disk_bytes(self) -> int:
        """Bytes that the folder takes on disk."""
        if self.files is NO_FILES:
            return self.dead_bytes
        return pages(self.stored_bytes()) + folder_bytes(self.size) + self.dead_bytes

    @property
    def verified(self) -> bool:
        """Whether all of it is on the disk and verified."""
        return self.files is not NO_FILES and self.state.count(VERIFIED) == len(self.state)

    def readable(self, blocks: range) -> bool:
        """Whether all of `blocks` can be read with no check and no fetch."""
        return _READABLE.issuperset(self.state[blocks.start : blocks.stop])

    def absent(self, blocks: range) -> list[int]:
        """Those of `blocks` that are nowhere here."""
        if self.state.find(ABSENT, blocks.start, blocks.stop) < 0:
            return []
        return [index for index in blocks if self.state[index] == ABSENT]

    def bury(self, length: int) -> None:
        """Bytes of it cannot be given back: all of its folder goes when it is closed."""
        self.dead_bytes += pages(length)
        self.unreliable = True

    def doubt(self, blocks: range) -> None:
        """Their pages are not in memory: have those that are on disk checked before the next
        read."""
        for index in blocks:
            if self.state[index] == VERIFIED:
                self.state[index] = DOUBTED


class Reservation:
    """Room for one write to `entry`, and what `reserve` decided to remove for it. None: nothing is
    to be written.

    Attributes:
        bytes: What was reserved on disk, the object's folder included where it has none yet.
        goal_bytes: What has to be freed for it, and `freed_bytes` what has been.
        stores: Whether the write may go to the disk. `settle` has the last word.
        folders: In the trash, with the bytes that they take.
        kept_folders: Those of them that could not be removed.
        kept_blocks: Those of `blocks` whose space could not be freed.
        remains: The folder was begun, and could be neither made nor removed.
    """

    def __init__(self, entry: CachedObject | None, length: int) -> None:
        self.entry = entry
        self.creates = entry is not None and entry.files is NO_FILES
        folder = folder_bytes(entry.size) if entry is not None and self.creates else 0
        self.bytes = pages(length) + folder
        self.goal_bytes = 0
        self.freed_bytes = 0
        self.stores = True
        self.folders: list[tuple[Path, int]] = []
        self.kept_folders: list[tuple[Path, int]] = []
        self.blocks: list[tuple[CachedObject, int]] = []
        self.kept_blocks: list[tuple[CachedObject, int]] = []
        self.remains = False

    @property
    def needs_work(self) -> bool:
        """Whether `make_room` and `settle` have anything to do."""
        return self.creates or bool(self.folders or self.blocks)

    def refuse(self) -> None:
        """There is no room."""
        self.bytes = 0
        self.creates = self.stores = False
