"""The blocks of an object on the disk. Everything here blocks, and is no reader's error.

``cache`` explains the states of a block, and the threads that may change them.
"""

import contextlib
import errno
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from ckptfs._daemon.cache import disk_ops, object_dir
from ckptfs._daemon.cache.cache_dir import warn
from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._daemon.cache.object_dir import PAGE_BYTES, About, Files, pages
from ckptfs._model.blocks import BLOCK_BYTES, block_length, blocks_length, runs

CHECK_BLOCKS = 8
"""Blocks of a run that are looked up in the page cache, or read from the disk, together."""
Block = tuple[int, int]
"""Index and checksum."""


def load(entry: CachedObject, index: int, checksum: int) -> bytes | None:
    """The bytes of a block, read from the disk; None if they are damaged."""
    length = block_length(index, entry.size)
    try:
        data = object_dir.read_whole(entry.files.data, length, index * BLOCK_BYTES)
    except OSError as error:
        warn(f"read a block of {entry.about.key.path}", error)
        return None
    return data if object_dir.checksum(entry.about, index, data) == checksum else None


def check(entry: CachedObject, blocks: range, checksums: "array[int]") -> list[bool]:
    """Bring consecutive blocks from the disk into the page cache. Returns for each whether it is
    undamaged."""
    with contextlib.suppress(OSError):  # the reads will tell
        length = blocks_length(blocks, entry.size)
        disk_ops.will_need(entry.files.data, blocks.start * BLOCK_BYTES, length)
    return [
        load(entry, index, checksum) is not None
        for index, checksum in zip(blocks, checksums, strict=True)
    ]


def write(files: Files, about: About, first: int, data: memoryview) -> "array[int] | None":
    """Write consecutive blocks from `first` on, and then their checksums to the map.

    `about` names their version. Returns the checksums; None if the disk refuses. Blocks that will
    not be published are for `take_out`.
    """
    sums = object_dir.checksums(about, first, data)
    try:
        object_dir.write(files, first * BLOCK_BYTES, data)
    except OSError as error:
        warn("write; reading without storing", error)
        return None
    _record(files, about, first, sums)
    return sums


def take_out(files: Files, about: About, blocks: range) -> bool:
    """Remove blocks from map and disk. Returns whether the disk has freed their space."""
    _record(files, about, blocks.start, array("Q", bytes(8 * len(blocks))))
    length = blocks_length(blocks, about.key.size)
    try:
        disk_ops.punch(files.data, blocks.start * BLOCK_BYTES, length)
    except OSError as error:
        warn(f"free a block of {about.key.path}", error)
        return False
    return True


def _record(files: Files, about: About, first: int, sums: "array[int]") -> None:
    """Put checksums into the map, so that the blocks survive a restart."""
    try:
        object_dir.write_sums(files, first, sums)
    except OSError as error:  # they are fetched again after a restart
        warn(f"write the map of {about.key.path}", error)


def free_unrecorded(entry: CachedObject, on_disk: int) -> None:
    """Free the blocks that a crashed daemon wrote but did not record: the index misses them."""
    unrecorded = 0
    try:
        taken = disk_ops.taken_bytes(disk_ops.status(entry.files.data))
        unrecorded = taken - pages(entry.stored_bytes()) - PAGE_BYTES  # the file system's own
        if unrecorded > 0:
            absent = (index for index, s in enumerate(entry.sums) if not s)
            for run in runs(absent, len(entry.sums)):
                length = blocks_length(run, entry.size)
                disk_ops.punch(entry.files.data, run.start * BLOCK_BYTES, length)
    except OSError as error:
        warn(f"free space of {entry.about.key.path}", error)
        entry.bury(unrecorded or max(0, on_disk - entry.disk_bytes()))


# -- closed objects, for `ckptfs cache verify`


def read_folder(folder: Path) -> "tuple[About, array[int]]":
    """Description and checksums of a closed object. Raises OSError, or ValueError if
    the folder is not whole."""
    object_dir.examine(folder)
    files, about, sums = object_dir.open_existing(folder, object_dir.read_about(folder).key)
    files.close()
    return about, sums


def damaged(
    folder: Path,
    about: About,
    blocks: Sequence[Block],
    buffer: memoryview,
    cache_flag: int = os.O_DIRECT,
) -> list[Block]:
    """Those of the blocks that cannot be read, or have another checksum.

    This reads past the page cache, whose pages say nothing of the disk, and stay there for readers.
    `buffer` has room for a block, and begins at a page.

    Raises OSError if the data cannot be opened.
    """
    try:
        with object_dir.opened(folder / "data", os.O_RDONLY | cache_flag) as fd:
            return [block for block in blocks if not _is_good(fd, about, block, buffer)]
    except OSError as error:
        if not cache_flag or error.errno != errno.EINVAL:
            raise
    # A file system without O_DIRECT (open(2)), or a disk with larger sectors.
    return damaged(folder, about, blocks, buffer, 0)


def _is_good(fd: int, about: About, block: Block, buffer: memoryview) -> bool:
    index, checksum = block
    length = block_length(index, about.key.size)
    done = 0
    try:
        while done < length:
            count = disk_ops.read_direct(fd, buffer[done:], index * BLOCK_BYTES + done)
            if not count:
                return False
            done += count
    except OSError as error:
        if error.errno == errno.EINVAL and not done:
            raise
        return False
    return object_dir.checksum(about, index, buffer[:length]) == checksum
