"""The folder of one cached object: its files, their format, and how they are read and written.

``data`` is a sparse file of the object's size, each block at its own offset. ``map`` is a header
and then 8 bytes for each block: the xxh3-64 of its bytes, or 0 for "not here". ``about.json`` says
what it is. Everything here blocks, and trusts nothing that it reads: a folder that is not whole in
every respect raises ValueError, and its owner removes it.
"""

import ctypes
import errno
import functools
import hashlib
import os
import shutil
import struct
from array import array
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from ckptfs._model.blocks import BLOCK_BYTES, block_count

FORMAT = 1
"""Version of the layout. Folders of another version are removed at start."""

_HEADER = struct.Struct("<8sQQ")  # magic, object's size, bytes of a block
_MAGIC = b"ckptmap1"

_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01  # linux/falloc.h
_SECTOR_BYTES = 4096
"""Largest unit that a disk demands for O_DIRECT."""


class ObjectKey(msgspec.Struct, frozen=True):
    """What identifies the bytes of an object: store, full path, size and listed mtime."""

    store: str
    path: str
    size: int
    mtime_ns: int

    def digest(self) -> str:
        """32 hex digits."""
        text = f"{self.store}\0{self.path}\0{self.size}\0{self.mtime_ns}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of ``about.json``.

    Attributes:
        format: `FORMAT`.
        key: The object.
        etag: Its ETag; "" while unknown, and for stores that have none.
        settled: Whether size and mtime alone identify the version (see ``cache.SETTLED_S``).
        verified: `stamp` of the data when all of it was there and verified; "" if it never was.
    """

    format: int
    key: ObjectKey
    etag: str
    settled: bool
    verified: str = ""


class Files(NamedTuple):
    """Descriptors of an open folder: the data, the map, and the data for writing past the page
    cache (-1 where the file system has no O_DIRECT, or nothing is missing)."""

    data: int
    map: int
    direct: int

    def close(self) -> None:
        """Close them."""
        for fd in self:
            if fd >= 0:
                os.close(fd)


NO_FILES = Files(-1, -1, -1)


def checksum(data: "bytes | memoryview") -> int:
    """xxh3-64 of a block, never 0."""
    return xxhash.xxh3_64_intdigest(data) or 1


def checksums(data: memoryview) -> "array[int]":
    """The checksum of each block of `data`, whose first byte starts a block."""
    return array(
        "Q", [checksum(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES)]
    )


def read_about(folder: Path) -> About:
    """Raises OSError, or ValueError if it is not the description of this very folder."""
    about = msgspec.json.decode((folder / "about.json").read_bytes(), type=About)
    if about.format != FORMAT or about.key.digest() != folder.name:
        raise ValueError("the description is of another format or object")
    return about


def write_about(folder: Path, about: About) -> None:
    """Replace the description whole. Raises OSError."""
    partial = folder / "about.partial"
    partial.write_bytes(msgspec.json.encode(about))
    partial.rename(folder / "about.json")


def create(folder: Path, about: About) -> Files:
    """Make the folder with no block in it. Raises OSError, and then leaves nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    fds: list[int] = []
    try:
        folder.mkdir(mode=0o700, parents=True)
        for name in ("data", "map"):
            fds.append(
                os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            )
        os.truncate(fds[0], about.key.size)
        os.pwrite(fds[1], _HEADER.pack(_MAGIC, about.key.size, BLOCK_BYTES), 0)
        os.truncate(fds[1], _HEADER.size + 8 * block_count(about.key.size))
        write_about(folder, about)
    except OSError:
        for fd in fds:
            os.close(fd)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Files(fds[0], fds[1], _open_direct(folder))


def _open_direct(folder: Path) -> int:
    try:
        return os.open(folder / "data", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return -1


def open_existing(folder: Path, key: ObjectKey) -> "tuple[Files, About, array[int]]":
    """Descriptors, description and checksums (0: absent). Raises OSError or ValueError."""
    about = read_about(folder)
    if about.key != key:
        raise ValueError("the description is of another object")
    fds: list[int] = []
    try:
        for name in ("data", "map"):
            fds.append(os.open(folder / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        files = Files(fds[0], fds[1], -1)
        raw = os.pread(files.map, _HEADER.size + 8 * block_count(key.size) + 1, 0)
        if len(raw) != _HEADER.size + 8 * block_count(key.size):
            raise ValueError("the map is of another length")
        if _HEADER.unpack_from(raw) != (_MAGIC, key.size, BLOCK_BYTES):
            raise ValueError("the map is of another object")
        if os.fstat(files.data).st_size != key.size:
            raise ValueError("the data is of another length")
    except (OSError, ValueError):
        for fd in fds:
            os.close(fd)
        raise
    sums = array("Q", raw[_HEADER.size :])
    if 0 in sums:
        files = files._replace(direct=_open_direct(folder))
    return files, about, sums


def write(files: Files, offset: int, data: memoryview) -> None:
    """Write at `offset`, the start of a block. Raises OSError.

    Large writes go past the page cache: the bytes are in memory already where they are read next,
    and a copy there costs more than all other work of a span (0.4 s of CPU per GiB against 0.1, and
    2 s where the machine's free memory is not really there yet). `data` begins at a page.
    """
    done = 0
    if files.direct >= 0 and len(data) >= BLOCK_BYTES:
        whole = len(data) // _SECTOR_BYTES * _SECTOR_BYTES
        try:
            while done < whole and done % _SECTOR_BYTES == 0:
                done += os.pwrite(files.direct, data[done:whole], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a disk with larger sectors: write it below
                raise
    while done < len(data):
        done += os.pwrite(files.data, data[done:], offset + done)


def stamp(files: Files) -> str:
    """Equal as long as nobody has written to the data, and no crash of the machine can have undone
    a write. Raises OSError."""
    info = os.fstat(files.data)
    return f"{_boot_id()} {info.st_mtime_ns} {info.st_ctime_ns}"


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write_sums(files: Files, first: int, sums: "array[int]") -> None:
    """Put the checksums of consecutive blocks into the map. Raises OSError."""
    os.pwrite(files.map, sums.tobytes(), _HEADER.size + first * sums.itemsize)


def punch(files: Files, offset: int, length: int) -> None:
    """Give the space of a range back; it reads as zeros from then on. Raises OSError."""
    arguments = (ctypes.c_int64(offset), ctypes.c_int64(length))
    if _libc.fallocate(files.data, _PUNCH_HOLE_KEEP_SIZE, *arguments):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
