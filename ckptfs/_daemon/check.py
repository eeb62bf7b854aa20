"""Checking one object of the cache against its checksums, as it is on the disk.

It is read past the page cache: what is in memory says nothing of the disk, and the pages that
readers have there stay. All of this blocks, and changes nothing.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckptfs._daemon import cachedir, disk
from ckptfs._daemon.cachedir import About
from ckptfs._model.blocks import BLOCK_BYTES, block_length

if TYPE_CHECKING:
    from array import array

Block = tuple[int, int]
"""Index and checksum."""


def read_folder(folder: Path) -> "tuple[About, array[int]]":
    """Description and checksums of an object that nobody has open. Raises OSError, or ValueError if
    the folder is not whole."""
    cachedir.examine(folder)
    files, about, sums = cachedir.open_existing(folder, cachedir.read_about(folder).key)
    files.close()
    return about, sums


def damaged(folder: Path, about: About, blocks: Sequence[Block], buffer: memoryview) -> list[Block]:
    """Those of the blocks that cannot be read, or have another checksum. Raises OSError if the data
    cannot be opened.

    `buffer` has room for a block, and begins at a page.
    """
    fd = _open(folder, os.O_DIRECT)
    try:
        return [block for block in blocks if not _is_good(fd, about, block, buffer)]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        disk.close(fd)
    fd = _open(folder, 0)  # a disk with larger sectors
    try:
        return [block for block in blocks if not _is_good(fd, about, block, buffer)]
    finally:
        disk.close(fd)


def _open(folder: Path, flags: int) -> int:
    try:
        return disk.open_file(folder / "data", os.O_RDONLY | flags)
    except OSError as error:
        if not flags or error.errno != errno.EINVAL:  # a file system without O_DIRECT: open(2)
            raise
    return disk.open_file(folder / "data", os.O_RDONLY)


def _is_good(fd: int, about: About, block: Block, buffer: memoryview) -> bool:
    index, checksum = block
    length = block_length(index, about.key.size)
    done = 0
    try:
        while done < length:
            count = disk.read_direct(fd, buffer[done:], index * BLOCK_BYTES + done)
            if not count:
                return False
            done += count
    except OSError as error:
        if error.errno == errno.EINVAL and not done:
            raise
        return False
    return cachedir.checksum(about, index, buffer[:length]) == checksum
