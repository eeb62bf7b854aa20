"""The blocks of an open object on the disk. Everything here blocks, and is no reader's error.

States of a block, and who may touch what: see ``cache``.
"""

import contextlib
from array import array

from ckptfs._daemon import cachedir, disk
from ckptfs._daemon.cached import CachedObject
from ckptfs._daemon.cachedir import PAGE_BYTES, About, pages
from ckptfs._daemon.cacheroot import warn
from ckptfs._model.blocks import BLOCK_BYTES, block_length, blocks_length, runs


def load(entry: CachedObject, index: int, checksum: int) -> bytes | None:
    """The bytes of a block, read from the disk and checked; None: they are wrong."""
    length = block_length(index, entry.size)
    try:
        data = cachedir.read_whole(entry.files.data, length, index * BLOCK_BYTES)
    except OSError as error:
        warn(f"read a block of {entry.about.key.path}", error)
        return None
    return data if cachedir.checksum(entry.about, index, data) == checksum else None


def check(entry: CachedObject, blocks: range, checksums: "array[int]") -> list[bool]:
    """Bring consecutive blocks from the disk into the page cache: which of them are as they should
    be."""
    with contextlib.suppress(OSError):  # the reads will tell
        length = blocks_length(blocks, entry.size)
        disk.will_need(entry.files.data, blocks.start * BLOCK_BYTES, length)
    return [
        load(entry, index, checksum) is not None
        for index, checksum in zip(blocks, checksums, strict=True)
    ]


def write(entry: CachedObject, about: About, first: int, data: memoryview) -> "array[int] | None":
    """Write consecutive blocks from `first` on, and then their checksums to the map.

    `about` says which version they are. Returns the checksums; None if the disk refuses. What
    will not be published is for `take_out`.
    """
    sums = cachedir.checksums(about, first, data)
    try:
        cachedir.write(entry.files, first * BLOCK_BYTES, data)
    except OSError as error:
        warn("write; reading without storing", error)
        return None
    _record(entry, first, sums)
    return sums


def take_out(entry: CachedObject, blocks: range) -> bool:
    """Remove blocks from map and disk; False: their space could not be freed."""
    _record(entry, blocks.start, array("Q", bytes(8 * len(blocks))))
    length = blocks_length(blocks, entry.size)
    try:
        disk.punch(entry.files.data, blocks.start * BLOCK_BYTES, length)
    except OSError as error:
        warn(f"free a block of {entry.about.key.path}", error)
        return False
    return True


def _record(entry: CachedObject, first: int, sums: "array[int]") -> None:
    """Put checksums into the map, so that the blocks survive a restart."""
    try:
        cachedir.write_sums(entry.files, first, sums)
    except OSError as error:  # they are fetched again after a restart
        warn(f"write the map of {entry.about.key.path}", error)


def free_unrecorded(entry: CachedObject, on_disk: int) -> None:
    """Free what a daemon that died had written but not recorded: nobody counts it."""
    unrecorded = 0
    try:
        taken = disk.taken_bytes(disk.status(entry.files.data))
        unrecorded = taken - pages(entry.stored_bytes()) - PAGE_BYTES  # the file system's own
        if unrecorded > 0:
            absent = (index for index, s in enumerate(entry.sums) if not s)
            for run in runs(absent, len(entry.sums)):
                length = blocks_length(run, entry.size)
                disk.punch(entry.files.data, run.start * BLOCK_BYTES, length)
    except OSError as error:
        warn(f"free space of {entry.about.key.path}", error)
        entry.bury(unrecorded or max(0, on_disk - entry.disk_bytes()))
