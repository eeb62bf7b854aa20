"""The folder of one cached object: its files, their format, and how they are read and written.

``data`` is a sparse file of the object's size, each block at its own offset. ``map`` is a header
and then 8 bytes for each block: its checksum, or 0 for "not here". ``about.json`` says what it is,
and has a checksum, too. Everything here blocks, and trusts nothing that it reads: a folder that is
not whole in every respect raises ValueError, and its owner removes it.

**The checksum of a block** is xxh3-64 with a seed that is made of the object, its ETag and the
block's index. Nothing here is made to outlive a loss of power, so after one, or a copy that went
wrong, any two of these files may be of different times, and any block may be what was there before:
of another version, another place or another object. None of these has the checksum that the
description asks for.

**Ownership of files.** The cache reads only files that this user owns, that no other user can
write, and that have one name. A link or a second name would let the cache write or punch the files
of others.
"""

import contextlib
import errno
import functools
import hashlib
import os
import stat
import struct
from array import array
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from ckptfs._daemon.cache import disk_ops
from ckptfs._model.blocks import BLOCK_BYTES, block_count
from ckptfs._os.ownership import is_this_users_alone

FORMAT = 3
"""Version of the layout. Folders of another version are removed at start."""

_HEADER = struct.Struct("<8sQQ")  # magic, object's size, bytes of a block
_MAGIC = b"ckptmap1"
_NAMES = {"data", "map", "about.json"}
_PARTIAL = "about.partial"
_ABOUT_BYTES_MAX = 256 << 10
"""The longest description: a path of 4,095 bytes (S3 has 1,024) below one of 8,192 characters, as
it is, in a URI, and escaped in JSON; a store's name, and an ETag."""

_SECTOR_BYTES = 4096
"""Largest unit that a disk demands for O_DIRECT."""
PAGE_BYTES = 4096
"""Unit in which file systems give out space."""
_EXTENTS_SHIFT = 28
"""A file whose every other block is a hole needs a page of extents (340 of them on ext4) for each
340 MiB; one page for each 256 MiB is more than that."""


class ObjectKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Identity of the bytes of an object: store, full path, size and listed mtime."""

    store: str
    path: str
    size: int
    mtime_ns: int

    def digest(self) -> str:
        """32 hex digits."""
        text = f"{self.store}\0{self.path}\0{self.size}\0{self.mtime_ns}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint for which an object was cached first.

    Attributes:
        name: Its directory in the mount, without what tells users apart (`Location.directory`).
        uri: Where it is, without credentials.
        path: Its part of the object's path (see `file_of`).
        size: Bytes of all its files then.
        uid: The user who had attached it.
    """

    name: str
    uri: str
    path: str
    size: int
    uid: int

    def file_of(self, key: ObjectKey) -> str:
        """Path of an object in the checkpoint."""
        return key.path.removeprefix(f"{self.path}/")


UNKNOWN = Origin("", "", "", 0, 0)
"""Of what has no description that can be read."""


class Stored(NamedTuple):
    """Usage of an object: bytes on the disk, size of the object, when it was used last
    (seconds since the epoch), and for whom."""

    bytes: int
    size: int
    used_s: float
    origin: Origin

    @property
    def data_bytes(self) -> int:
        """Bytes of the object itself, where its folder is whole."""
        return min(self.size, max(0, self.bytes - folder_bytes(self.size)))


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The description.

    Attributes:
        format: `FORMAT`.
        key: The object.
        etag: Its ETag; "" while unknown, and for stores that have none.
        settled: Whether size and mtime alone identify the version (see ``cache.SETTLED_S``).
        origin: The checkpoint that it is of.
        verified: `stamp` of the data when all of it was there and verified; "" if it never was.
    """

    format: int
    key: ObjectKey
    etag: str
    settled: bool
    origin: Origin
    verified: str = ""


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    """Content of ``about.json``: an `About`, and the xxh3-64 of its text in 16 hex digits."""

    about: msgspec.Raw
    xxh3: str


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
                disk_ops.close(fd)


NO_FILES = Files(-1, -1, -1)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Generator[int]:
    """The descriptor of a file, which is closed with the context. Raises OSError."""
    fd = disk_ops.open_file(path, flags)
    try:
        yield fd
    finally:
        disk_ops.close(fd)


# -- space


def pages(length: int) -> int:
    """Bytes that `length` bytes take on disk."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def folder_bytes(size: int) -> int:
    """Bytes that an object of `size` bytes costs beside its blocks.

    The folder and its parent, the description and the one that replaces it, a page each, the map,
    and the extents of a file with holes.
    """
    return 5 * PAGE_BYTES + pages(_map_bytes(size)) + (size >> _EXTENTS_SHIFT) * PAGE_BYTES


def _map_bytes(size: int) -> int:
    return _HEADER.size + 8 * block_count(size)


# -- checksums


@functools.lru_cache(maxsize=4096)
def _seed(digest: str, etag: str) -> int:
    text = f"{digest}\0{etag}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def checksum(about: About, index: int, data: "bytes | memoryview") -> int:
    """Of block `index` of an object, never 0."""
    seed = _seed(about.key.digest(), about.etag) + index & 0xFFFF_FFFF_FFFF_FFFF
    return xxhash.xxh3_64_intdigest(data, seed) or 1


def checksums(about: About, first: int, data: memoryview) -> "array[int]":
    """The checksum of each block of `data`, which begins with block `first`."""
    starts = range(0, len(data), BLOCK_BYTES)
    blocks = (data[start : start + BLOCK_BYTES] for start in starts)
    return array("Q", [checksum(about, index, block) for index, block in enumerate(blocks, first)])


# -- the description


def read_about(folder: Path) -> About:
    """Raises OSError, or ValueError if it is not the description of this very folder."""
    with opened(folder / "about.json", os.O_RDONLY) as fd:
        _require_own(disk_ops.status(fd))
        text = disk_ops.read(fd, _ABOUT_BYTES_MAX + 1, 0)
    if len(text) > _ABOUT_BYTES_MAX:
        raise ValueError("the description is too long")
    try:
        envelope = msgspec.json.decode(text, type=_Envelope)
        if envelope.xxh3 != _sum_of(envelope.about):
            raise ValueError("the description is damaged")
        about = msgspec.json.decode(envelope.about, type=About)
    except RecursionError:
        raise ValueError("the description is nested too deeply") from None
    if about.format != FORMAT or about.key.digest() != folder.name:
        raise ValueError("the description is of another format or object")
    return about


def write_about(folder: Path, about: About) -> None:
    """Replace the description whole. Raises OSError."""
    body = msgspec.json.encode(about)
    text = msgspec.json.encode(_Envelope(msgspec.Raw(body), _sum_of(body)))
    partial = folder / _PARTIAL
    with opened(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        _write_whole(fd, memoryview(text), 0)
    disk_ops.rename(partial, folder / "about.json")


def _sum_of(body: "bytes | msgspec.Raw") -> str:
    return f"{xxhash.xxh3_64_intdigest(memoryview(body)):016x}"


# -- the folder


def create(folder: Path, about: About) -> Files:
    """Make the folder with no block in it. Raises OSError; what it leaves then is to be removed."""
    disk_ops.remove(folder)
    try:
        disk_ops.make_folder(folder)
    except FileNotFoundError:
        for parent in (folder.parent.parent, folder.parent):
            with contextlib.suppress(FileExistsError):
                disk_ops.make_folder(parent)
        disk_ops.make_folder(folder)
    with _closed_on_error(folder, os.O_RDWR | os.O_CREAT | os.O_EXCL) as files:
        disk_ops.set_size(files.data, about.key.size)
        disk_ops.expect_random(files.data)
        header = _HEADER.pack(_MAGIC, about.key.size, BLOCK_BYTES)
        _write_whole(files.map, memoryview(header), 0)
        disk_ops.set_size(files.map, _map_bytes(about.key.size))
        write_about(folder, about)
    return files._replace(direct=_open_direct(folder))


@contextlib.contextmanager
def _closed_on_error(folder: Path, flags: int) -> Generator[Files]:
    """Open data and map, and close them if the context fails."""
    with contextlib.ExitStack() as undo:
        fds: list[int] = []
        for name in ("data", "map"):
            fds.append(disk_ops.open_file(folder / name, flags))
            undo.callback(disk_ops.close, fds[-1])
        yield Files(fds[0], fds[1], -1)
        undo.pop_all()


def _open_direct(folder: Path) -> int:
    try:
        return disk_ops.open_file(folder / "data", os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return -1


def examine(folder: Path) -> Stored:
    """Content and cost of a folder, without opening its data. Raises OSError, or
    ValueError if it is not whole, has more in it than it should, or is not this user's alone."""
    used_s = disk_ops.status_of(folder).st_mtime
    require_own_folder(folder)
    names = set(disk_ops.list_folder(folder))
    if _PARTIAL in names:  # its writer died
        disk_ops.remove(folder / _PARTIAL)
        names.remove(_PARTIAL)
    if names != _NAMES:
        raise ValueError("it has other files than it should")
    about = read_about(folder)
    size = about.key.size
    data, sums = (disk_ops.status_of(folder / name) for name in ("data", "map"))
    for info, length in ((data, size), (sums, _map_bytes(size))):
        _require_own(info)
        if info.st_size != length:
            raise ValueError("data or map is of another length")
        if disk_ops.taken_bytes(info) > pages(length) + folder_bytes(size):
            raise ValueError("data or map takes more than its length")
    # The extents of the data are counted there, too, and are part of what a folder costs.
    on_disk = min(disk_ops.taken_bytes(data), pages(size)) + folder_bytes(size)
    return Stored(on_disk, size, used_s, about.origin)


def open_existing(folder: Path, key: ObjectKey) -> "tuple[Files, About, array[int]]":
    """Descriptors, description and checksums (0: absent). Raises OSError or ValueError.

    The kernel must not read ahead in the data: pages that come with another block's would be in
    memory without having been checked.
    """
    require_own_folder(folder)
    about = read_about(folder)
    if about.key != key:
        raise ValueError("the description is of another object")
    with _closed_on_error(folder, os.O_RDWR) as files:
        for fd in (files.data, files.map):
            _require_own(disk_ops.status(fd))
        disk_ops.expect_random(files.data)
        if disk_ops.status(files.map).st_size != _map_bytes(key.size):
            raise ValueError("the map is of another length")
        raw = read_whole(files.map, _map_bytes(key.size), 0)
        if len(raw) != _map_bytes(key.size):
            raise ValueError("the map cannot be read whole")
        if _HEADER.unpack_from(raw) != (_MAGIC, key.size, BLOCK_BYTES):
            raise ValueError("the map is of another object")
        if disk_ops.status(files.data).st_size != key.size:
            raise ValueError("the data is of another length")
    sums = array("Q", raw[_HEADER.size :])
    if 0 in sums:
        files = files._replace(direct=_open_direct(folder))
    return files, about, sums


def require_own_folder(path: Path) -> None:
    """Raises ValueError unless it is a directory, and this user's alone to write; or OSError."""
    info = disk_ops.status_of(path)
    if not stat.S_ISDIR(info.st_mode) or not is_this_users_alone(info):
        raise ValueError(f"{path.name} is not a directory that belongs to this user alone")


def _require_own(info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1 or not is_this_users_alone(info):
        raise ValueError(
            "it contains an entry that is not a regular file with one link owned by this user"
        )


# -- blocks


def read_whole(fd: int, length: int, offset: int) -> bytes:
    """The bytes, in as many parts as it takes; fewer at the end of the file. Raises OSError."""
    data = disk_ops.read(fd, length, offset)
    while 0 < len(data) < length and (
        more := disk_ops.read(fd, length - len(data), offset + len(data))
    ):
        data += more
    return data


def write(files: Files, offset: int, data: memoryview) -> None:
    """Write at `offset`, the start of a block. Raises OSError.

    Large writes go past the page cache: the bytes are in memory already where they are read next,
    and a copy there costs more than all other work of a span (0.4 s of CPU per GiB against 0.1, and
    2 s where the machine's free memory is not really there yet). `data` begins at a page.

    The call waits for bytes that go through the page cache, because a disk that refuses them later
    would have zeros in their place, and a file may be read without any check from then on
    (``passthrough``).
    """
    done = 0
    if files.direct >= 0 and len(data) >= BLOCK_BYTES:
        whole = len(data) // _SECTOR_BYTES * _SECTOR_BYTES
        try:
            while done < whole and done % _SECTOR_BYTES == 0:
                done += _some(disk_ops.write_direct(files.direct, data[done:whole], offset + done))
        except OSError as error:
            if error.errno != errno.EINVAL:  # a disk with larger sectors: write it below
                raise
    if done < len(data):
        _write_whole(files.data, data[done:], offset + done)
        disk_ops.persist(files.data, offset + done, len(data) - done)


def _write_whole(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += _some(disk_ops.write(fd, data[done:], offset + done))


def _some(count: int) -> int:
    if not count:
        raise OSError(errno.EIO, "nothing was written")
    return count


def stamp(files: Files) -> str:
    """A text that stays equal as long as no process has written to the data, and no crash of the
    machine can have undone a write. Raises OSError."""
    info = disk_ops.status(files.data)
    return f"{_boot_id()} {info.st_mtime_ns} {info.st_ctime_ns}"


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write_sums(files: Files, first: int, sums: "array[int]") -> None:
    """Put the checksums of consecutive blocks into the map. Raises OSError."""
    _write_whole(files.map, memoryview(sums.tobytes()), _HEADER.size + first * sums.itemsize)
