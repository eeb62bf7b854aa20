"""One open object of the cache: its state, without IO.

``cache`` explains the states of a block, and the threads that may change them.
"""

from array import array
from collections import deque
from typing import TYPE_CHECKING

from ckptfs._daemon.cache.object_dir import NO_FILES, About, Files, folder_bytes, pages
from ckptfs._model.blocks import BLOCK_BYTES, block_length

if TYPE_CHECKING:
    from pathlib import Path

    from ckptfs._daemon.cache.buffer_pool import Buffer

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
        generations: A number for each block, which `renew` changes (see ``page_copies``).
        kept: How many attachments have waited for it, so that it stays (`kept`).
        passthroughs: Number of inodes whose data file the kernel reads by itself.
        retired: Replaced files that the kernel still reads by passthrough, the bytes that they
            take, and where they are if they could not be removed.
        dead_bytes: Bytes of its folder beside its blocks: space that the disk did not free, or a
            folder that can be neither opened nor removed.
        unreliable: Whether its disk has failed. Then nothing more is stored while it is open.
        orphaned: Whether its folder went with the cache's directory, so that only files are left.
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
        self.generations = array("Q", bytes(8 * len(sums)))
        self.users = 0
        self.passthroughs = 0
        self.kept = 0
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
        """Those of `blocks` that are neither on the disk nor in memory."""
        if self.state.find(ABSENT, blocks.start, blocks.stop) < 0:
            return []
        return [index for index in blocks if self.state[index] == ABSENT]

    def bury(self, length: int) -> None:
        """Count bytes that the disk does not free. The whole folder goes when it is closed."""
        self.dead_bytes += pages(length)
        self.unreliable = True

    def renew(self, index: int) -> None:
        """Let the copies of a block that threads make now fail, before its bytes change."""
        self.generations[index] += 1

    def doubt(self, blocks: range) -> None:
        """Have VERIFIED blocks checked before the next read, because their pages have left
        memory."""
        for index in blocks:
            if self.state[index] == VERIFIED:
                self.renew(index)
                self.state[index] = DOUBTED
