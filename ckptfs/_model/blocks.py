"""Block arithmetic: the unit of caching, of checksums and of single flight is one block."""

from collections.abc import Iterable

BLOCK_BYTES = 1 << 20
"""Bytes of a block (the last one of a file may be shorter). 1 MiB is the largest request that the
kernel sends (256 pages), and what a store delivers in about one round trip."""


def block_count(size: int) -> int:
    """Number of blocks of a file of `size` bytes."""
    return -(-size // BLOCK_BYTES)


def blocks_of(offset: int, length: int) -> range:
    """Indices of the blocks that hold bytes [offset, offset + length); `length` >= 1."""
    return range(offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES + 1)


def block_length(index: int, size: int) -> int:
    """Bytes in block `index` of a file of `size` bytes."""
    return min(BLOCK_BYTES, size - index * BLOCK_BYTES)


def blocks_length(blocks: range, size: int) -> int:
    """Bytes in the consecutive, non-empty `blocks` of a file of `size` bytes."""
    return min(blocks.stop * BLOCK_BYTES, size) - blocks.start * BLOCK_BYTES


def runs(blocks: Iterable[int], length_max: int) -> list[range]:
    """Join ascending block indices into consecutive ranges of at most `length_max` blocks."""
    result: list[range] = []
    for index in blocks:
        if result and result[-1].stop == index and len(result[-1]) < length_max:
            result[-1] = range(result[-1].start, index + 1)
        else:
            result.append(range(index, index + 1))
    return result
