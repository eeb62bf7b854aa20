"""The cache believes nothing that it finds on its disk, and harms nothing that is not its own."""

import ast
import errno
import inspect
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest
import xxhash
from support.diskfaults import OPERATIONS
from support.fakes import MIB, OLD_NS, FakeStore, pattern
from support.rig import Rig, make_room, rig_in, view_in
from unit.daemon.cache.test_disk_faults import ALL, everything_on_disk

from ckptfs._daemon.cache import (
    block_io,
    cache,
    cache_dir,
    cached_object,
    disk_ops,
    eviction,
    index,
    object_dir,
)
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import STORED, VERIFIED
from ckptfs._daemon.cache.object_dir import ObjectKey
from ckptfs._model.blocks import blocks_of
from ckptfs.errors import ConfigError

SIZE = 2 * MIB + 5
SMALL = 5000
CONTENT = {"large": pattern(SIZE), "small": pattern(SMALL)}
LIMIT = 16 * MIB


@pytest.fixture
def store() -> FakeStore:
    return FakeStore(CONTENT)


def folder_of(directory: Path, store: FakeStore, name: str) -> Path:
    """Where an object of the rig is in the cache."""
    pin = store.pin(name)
    digest = ObjectKey("store", name, pin.size, pin.mtime_ns).digest()
    return directory / "cache" / "objects" / digest[:2] / digest


async def read_whole(rig: Rig, store: FakeStore, name: str) -> None:
    """Read a file, which must be right."""
    file = rig.open(store, name)
    data = b""
    for offset in range(0, len(CONTENT[name]), MIB):
        data += await rig.read(file, offset, min(MIB, len(CONTENT[name]) - offset))
    assert data == CONTENT[name]
    await rig.quiet()
    rig.fetcher.close(file)


async def fill(directory: Path, store: FakeStore) -> None:
    """Let the cache have all files, verified as a whole."""
    async with rig_in(directory) as rig:
        for name in CONTENT:
            await read_whole(rig, store, name)


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        old = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([old ^ 1 << bit % 8]))


# -- all of the disk


def test_every_operation_has_a_name() -> None:
    """Only `disk_ops` touches the disk, and the list of faults has each of its functions."""
    functions = {name for name, _ in inspect.getmembers(disk_ops, inspect.isroutine)}
    public = {name for name in functions if not name.startswith("_")}
    assert public - {"close", "is_cached", "knows_cached", "taken_bytes"} == set(OPERATIONS)
    pure = {"os.RWF_NOWAIT", "os.geteuid", "os.stat_result", "os.dup2", "os.statvfs_result"}
    for module in (block_io, cache, cached_object, object_dir, cache_dir, index, eviction):
        tree = ast.parse(inspect.getsource(module))
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not imported & {"shutil", "fcntl", "io", "tempfile"}
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert {n for n in used if n.startswith("os.") and not n.startswith("os.O_")} <= pure


# -- flipped bits


@pytest.mark.parametrize("name", ["data", "map", "about.json"])
@pytest.mark.parametrize(
    ("of", "flips"), [("small", 320 if ALL else 90), ("large", 14 if ALL else 4)]
)
async def test_a_flipped_bit_is_found_or_harmless(
    tmp_path: Path, store: FakeStore, of: str, name: str, flips: int
) -> None:
    """With CKPTFS_FAULTS=all 1,002 of them: every read is right, and the other blocks are used."""
    chance = random.Random(f"{of} {name}")
    await fill(tmp_path, store)
    path = folder_of(tmp_path, store, of) / name
    harmless = 0
    for _ in range(flips):
        flip(path, chance.randrange(path.stat().st_size * 8))
        store.calls.clear()
        async with rig_in(tmp_path, cache_bytes_max=LIMIT) as rig:
            await read_whole(rig, store, of)
            assert everything_on_disk(rig.cache.directory) <= rig.cache.index.used_bytes
        fetched_bytes = sum(call.length for call in store.reads())
        harmless += fetched_bytes == 0
        if name == "data":  # one block, and no other
            assert 0 < fetched_bytes <= min(MIB, len(CONTENT[of]))
    # There is no bit without a meaning; but the checksums of a file that was verified as a whole,
    # and not written since, are not looked at while its pages are in memory.
    assert harmless == 0 or name == "map"


async def test_bits_that_flip_on_the_disk_while_the_file_is_open_are_found(
    tmp_path: Path, store: FakeStore
) -> None:
    """Also in pages that the kernel would read ahead, next to those that it is asked for."""
    async with rig_in(tmp_path, in_flight_bytes_max=MIB, span_bytes_max=MIB) as rig:
        file = rig.open(store, "large")
        for _ in range(3):
            for offset in range(0, SIZE, MIB):
                await rig.read(file, offset, min(MIB, SIZE - offset))
            await rig.quiet()
        await read_whole(rig, store, "small")  # takes the only buffer
        rig.cache.buffers.trim()
        fd = os.open(folder_of(tmp_path, store, "large") / "data", os.O_RDWR)
        os.pwrite(fd, bytes(4096), MIB)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        for offset in range(0, SIZE, 65536):
            length = min(65536, SIZE - offset)
            for _ in range(2):
                data = await rig.read(file, offset, length)
                assert data == CONTENT["large"][offset : offset + length]


@pytest.mark.parametrize("begins", [True, False])
async def test_what_is_read_from_the_disk_ahead_of_a_reader_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    """`begins`: whether the disk can begin to read before it has to."""
    if not begins:
        monkeypatch.setattr(disk_ops, "will_need", Mock(side_effect=OSError(errno.EIO, "bad")))
    content = pattern(12 * MIB)
    store = FakeStore({"large": content})
    async with view_in(tmp_path, in_flight_bytes_max=2 * MIB, span_bytes_max=MIB) as view:
        attachment = view.attach(store)
        handle = view.vfs.open(view.stat(attachment, "large").inode)
        for offset in range(0, len(content) - MIB, MIB):  # without the last: no passthrough
            await view.rig.fetcher.fetch(attachment.files[0], blocks_of(offset, MIB))
        await view.quiet()
        entry = attachment.files[0].entry
        (data,) = (tmp_path / "cache" / "objects").glob("*/*/data")
        fd = os.open(data, os.O_RDWR)
        os.pwrite(fd, bytes(4096), 6 * MIB + 8192)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        store.calls.clear()
        for offset in range(0, 6 * MIB, MIB):
            assert await view.read(handle, offset, MIB) == content[offset : offset + MIB]
            await view.quiet()
        assert entry.state[7] == VERIFIED  # it was checked before the reader came
        assert view.vfs.read_now(handle, 7 * MIB, MIB) is not None
        for offset in range(6 * MIB, len(content), MIB):
            assert await view.read(handle, offset, MIB) == content[offset : offset + MIB]
        fetched = {call.offset // MIB for call in store.reads()}
        assert fetched == {6, 11}


def test_the_kernel_reads_no_page_that_was_not_checked(tmp_path: Path) -> None:
    """A block whose pages are not in memory is not believed again before it was loaded."""
    key = ObjectKey("store", "a", SIZE, OLD_NS)
    cache = Cache(tmp_path / "cache", 0, 0.0, 4 * MIB)
    entry = cache.open(key)
    data = pattern(SIZE)
    buffer = cache.buffers.take(SIZE)
    buffer.view[:SIZE] = data
    cache.keep(entry, range(3), buffer)
    assert make_room(cache, entry, SIZE)
    sums = block_io.write(entry.files, entry.about, 0, buffer.view[:SIZE])
    assert sums is not None
    cache.publish(entry, 0, sums)
    entry.memory.clear()
    os.fsync(entry.files.data)
    os.posix_fadvise(entry.files.data, 0, 0, os.POSIX_FADV_DONTNEED)
    assert block_io.load(entry, 0, sums[0]) == data[:MIB]
    assert cache.reads.read_now(entry, MIB, 4096) is None  # nothing was read ahead
    assert not entry.readable(range(1, 2))  # from now on the kernel may be reading it
    assert block_io.load(entry, 1, sums[1]) == data[MIB : 2 * MIB]
    cache.loaded(entry, 1, sums[1], good=True)
    views = cache.reads.read_now(entry, MIB, 4096)
    assert views is not None
    assert b"".join(views) == data[MIB : MIB + 4096]
    cache.shut()


# -- from elsewhere


async def test_a_copied_cache_is_checked_and_used(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(tmp_path, store)
    there = tmp_path / "there"
    there.mkdir()
    shutil.copytree(tmp_path / "cache", there / "cache")
    (there / "cache" / "objects").chmod(0o755)
    store.calls.clear()
    async with rig_in(there) as rig:
        file = rig.open(store, "large")
        assert set(file.entry.state) == {STORED}
        await read_whole(rig, store, "large")
    assert store.reads() == []
    assert (there / "cache" / "objects").stat().st_mode & 0o777 == 0o700
    async with rig_in(there) as rig:
        assert set(rig.open(store, "large").entry.state) == {VERIFIED}
    monkeypatch.setattr(object_dir, "_boot_id", lambda: "another machine, or start of it")
    async with rig_in(there) as rig:
        assert set(rig.open(store, "large").entry.state) == {STORED}


async def test_files_of_two_objects_that_were_swapped_are_not_believed(
    tmp_path: Path, store: FakeStore
) -> None:
    store.overwrite("other", pattern(SIZE, 1), mtime_ns=OLD_NS)
    await fill(tmp_path, store)
    async with rig_in(tmp_path) as rig:
        await rig.read(rig.open(store, "other"), 0, MIB)
        await rig.quiet()
    one, other = (folder_of(tmp_path, store, name) for name in ("large", "other"))
    for name in ("data", "map"):
        (one / name).rename(tmp_path / "aside")
        (other / name).rename(one / name)
        (tmp_path / "aside").rename(other / name)
    async with rig_in(tmp_path) as rig:
        await read_whole(rig, store, "large")


def _broken(*_: object) -> None:
    raise OSError(5, "Input/output error")


def test_bytes_of_the_last_version_that_could_not_be_removed_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a loss of power, where the new description is on the disk, and all else is not."""
    key = ObjectKey("store", "a", MIB, OLD_NS)
    cache = Cache(tmp_path / "cache", 0, 0.0, MIB)
    entry = cache.open(key)
    cache.learn(entry, "1")
    buffer = cache.buffers.take(MIB)
    cache.keep(entry, range(1), buffer)
    assert make_room(cache, entry, MIB)
    sums = block_io.write(entry.files, entry.about, 0, buffer.view)
    assert sums is not None
    cache.publish(entry, 0, sums)
    with monkeypatch.context() as patch:
        patch.setattr(object_dir, "write_sums", _broken)
        patch.setattr(disk_ops, "punch", _broken)
        cache.learn(entry, "2")
    shutil.copytree(tmp_path / "cache", tmp_path / "after")
    cache.shut()
    cache = Cache(tmp_path / "after", 0, 0.0, MIB)
    entry = cache.open(key)
    assert entry.about.etag == "2"
    assert entry.state[0] == STORED  # the map says so
    assert block_io.load(entry, 0, entry.sums[0]) is None
    cache.shut()


@pytest.mark.parametrize("number", [object_dir.FORMAT - 1, object_dir.FORMAT + 1])
async def test_another_format_is_removed(tmp_path: Path, store: FakeStore, number: int) -> None:
    await fill(tmp_path, store)
    folder = folder_of(tmp_path, store, "large")
    envelope = msgspec.json.decode((folder / "about.json").read_bytes())
    envelope["about"]["format"] = number
    body = msgspec.json.encode(envelope["about"])
    envelope["xxh3"] = f"{xxhash.xxh3_64_intdigest(body):016x}"
    (folder / "about.json").write_bytes(msgspec.json.encode(envelope))
    async with rig_in(tmp_path) as rig:
        assert not folder.exists()
        await read_whole(rig, store, "large")


# -- by another process


class Trap:
    """Content that an attacker put into a cache, and files outside that must not change."""

    def __init__(self, tmp_path: Path, folder: Path) -> None:
        self.folder = folder
        self.outside = tmp_path / "outside"
        self.outside.mkdir()
        self.precious = self.outside / "precious"
        self.precious.write_bytes(b"precious" * 1000)

    def replace(self, name: str, make: Callable[[Path], None]) -> None:
        """Put something else in the place of a file of the folder."""
        (self.folder / name).unlink()
        make(self.folder / name)

    def check(self) -> None:
        """Nothing has happened outside."""
        assert self.precious.read_bytes() == b"precious" * 1000
        assert os.listdir(self.outside) == ["precious"]


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _allocated(trap: Trap) -> None:
    """Its length is right, but there is more behind the end."""
    with (trap.folder / "data").open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE + 4 * MIB)
        file.truncate(SIZE + 4 * MIB)


def _linked_folder(trap: Trap) -> None:
    trap.folder.rename(trap.outside / "moved")
    trap.folder.symlink_to(trap.outside / "moved")
    shutil.copytree(trap.outside / "moved", trap.outside.with_name("moved"))
    shutil.rmtree(trap.outside / "moved")


def _extra(trap: Trap) -> None:
    (trap.folder / "more").write_bytes(bytes(MIB))


def _nested(trap: Trap) -> None:
    fd = os.open(trap.folder, os.O_RDONLY)
    for _ in range(3000):  # longer than a path can be
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def _json(text: bytes) -> Callable[[Trap], None]:
    return lambda trap: trap.replace("about.json", lambda path: _write(path, text))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _of_another_user(name: str) -> Callable[[Trap], None]:
    return lambda trap: os.chown(trap.folder / name, 1234, 1234)


def _replaced(name: str, make: Callable[[Trap, Path], None]) -> Callable[[Trap], None]:
    return lambda trap: trap.replace(name, lambda path: make(trap, path))


_DEEP = b'{"about":' + b"[" * 50_000 + b"]" * 50_000 + b',"xxh3":""}'
TRAPS: dict[str, Callable[[Trap], None]] = {
    **{
        f"{name} is {kind}": _replaced(name, make)
        for name in ("data", "map", "about.json")
        for kind, make in {
            "a link": lambda trap, path: path.symlink_to(trap.precious),
            "a second name": lambda trap, path: path.hardlink_to(trap.precious),
            "a FIFO": lambda _, path: os.mkfifo(path, 0o600),
            "a directory": lambda _, path: path.mkdir(),
            "huge": lambda _, path: _huge(path),
        }.items()
    },
    "folder is a link": _linked_folder,
    "more files": _extra,
    "more behind the end": _allocated,
    "nested": _nested,
    "deep JSON": _json(_DEEP),
    "deep JSON in the key": _json(_DEEP.replace(b'"about":', b'"about":{"format":2,"key":{"x":')),
    "half a surrogate": _json(b'{"about":{"etag":"\\ud800"},"xxh3":"\\udfff"}'),
    "numbers": _json(b'{"about":1e999,"xxh3":-1}'),
    "NUL": _json(bytes(1000)),
    "writable by others": lambda trap: (trap.folder / "data").chmod(0o666),
    "folder writable by others": lambda trap: trap.folder.chmod(0o777),
    "prefix writable by others": lambda trap: trap.folder.parent.chmod(0o777),
}
if os.geteuid() == 0:
    TRAPS |= {
        f"{name or 'folder'} of another user": _of_another_user(name)
        for name in ("", "data", "map", "about.json")
    }


@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
@pytest.mark.parametrize("when", ["before the start", "before it is opened"])
async def test_what_somebody_put_into_the_cache_is_neither_read_nor_followed(
    tmp_path: Path, store: FakeStore, trap: Callable[[Trap], None], when: str
) -> None:
    await fill(tmp_path, store)
    scene = Trap(tmp_path, folder_of(tmp_path, store, "large"))
    if when == "before the start":
        trap(scene)
    async with rig_in(tmp_path, cache_bytes_max=LIMIT) as rig:
        if when == "before it is opened":
            trap(scene)
        else:
            assert everything_on_disk(rig.cache.directory) <= rig.cache.index.used_bytes <= LIMIT
        for _ in range(2):
            await read_whole(rig, store, "large")
        await read_whole(rig, store, "small")
    scene.check()
    async with rig_in(tmp_path, cache_bytes_max=LIMIT):
        assert os.listdir(tmp_path / "cache" / "trash") == []


async def test_what_is_not_its_own_is_left_alone_and_counted(
    tmp_path: Path, store: FakeStore
) -> None:
    await fill(tmp_path, store)
    objects = tmp_path / "cache" / "objects"
    others = [objects / "pack" / "data", objects / "ab" / "c0ffee", objects / "file"]
    for path in others:
        path.parent.mkdir(exist_ok=True, mode=0o700)
        path.write_bytes(bytes(5 * MIB))
    async with rig_in(tmp_path, cache_bytes_max=LIMIT) as rig:
        assert everything_on_disk(rig.cache.directory) <= rig.cache.index.used_bytes
        for name in CONTENT:
            await read_whole(rig, store, name)
            assert everything_on_disk(rig.cache.directory) <= rig.cache.index.used_bytes <= LIMIT
    assert all(path.stat().st_size == 5 * MIB for path in others)


@pytest.mark.parametrize("name", ["objects", "trash"])
@pytest.mark.parametrize("kind", ["link", "file", "open to all"])
def test_a_directory_in_it_that_is_none_is_an_error_that_says_what_to_do(
    tmp_path: Path, name: str, kind: str
) -> None:
    path = tmp_path / "cache" / name
    path.parent.mkdir(mode=0o700)
    (tmp_path / "outside").mkdir()
    if kind == "link":
        path.symlink_to(tmp_path / "outside")
    elif kind == "file":
        path.touch()
    else:
        path.mkdir()
        path.chmod(0o777)
    for _ in range(2):  # it leaves no lock behind
        with pytest.raises(ConfigError, match=r"belongs to this user alone; remove it"):
            Cache(tmp_path / "cache", 0, 0.0, MIB)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "lock").symlink_to(tmp_path / "made")
    with pytest.raises(ConfigError, match="set cache_dir"):
        Cache(tmp_path / "cache", 0, 0.0, MIB)
    assert not (tmp_path / "made").exists()


# -- two daemons, and none


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Cache]:
    """A daemon's cache."""
    cache = Cache(tmp_path / "cache", 0, 0.0, MIB)
    yield cache
    cache.shut()


def test_two_daemons_do_not_share_a_directory_whose_lock_was_removed(first: Cache) -> None:
    (first.directory / "lock").unlink()
    with pytest.raises(ConfigError, match="in use by another"):
        Cache(first.directory, 0, 0.0, MIB)


@pytest.mark.parametrize("how", ["all", "content", "moved"])
async def test_a_directory_that_is_removed_is_made_again(
    tmp_path: Path, store: FakeStore, how: str
) -> None:
    directory = tmp_path / "cache"
    async with rig_in(tmp_path, cache_bytes_max=LIMIT) as rig:
        await read_whole(rig, store, "small")
        file = rig.open(store, "large")
        assert await rig.read(file, 0, MIB) == CONTENT["large"][:MIB]
        await rig.quiet()
        if how == "moved":
            directory.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(directory)
            if how == "content":
                directory.mkdir(mode=0o700)
        for offset in (MIB, 0, 2 * MIB):  # from the files that are open
            length = min(MIB, SIZE - offset)
            assert await rig.read(file, offset, length) == CONTENT["large"][offset:][:length]
        await rig.quiet()
        rig.fetcher.close(file)
        for name in CONTENT:
            await read_whole(rig, store, name)
            assert everything_on_disk(directory) <= rig.cache.index.used_bytes <= LIMIT
        assert rig.cache.index.used_bytes == sum(map(cached_object.disk_bytes, (SIZE, SMALL)))
    store.calls.clear()
    async with rig_in(tmp_path) as rig:
        for name in CONTENT:
            await read_whole(rig, store, name)
    assert store.reads() == []


async def test_a_directory_that_is_removed_and_taken_by_another_daemon_is_left_to_it(
    tmp_path: Path, store: FakeStore
) -> None:
    async with rig_in(tmp_path, cache_bytes_max=LIMIT) as rig:
        file = rig.open(store, "large")
        await rig.read(file, 0, MIB)
        await rig.quiet()
        shutil.rmtree(tmp_path / "cache")
        async with rig_in(tmp_path, cache_bytes_max=LIMIT) as other:
            await read_whole(other, store, "large")
            before = sorted((tmp_path / "cache").rglob("*"))
            rig.fetcher.close(file)
            for name in CONTENT:
                await read_whole(rig, store, name)
            assert sorted((tmp_path / "cache").rglob("*")) == before
            store.calls.clear()
            await read_whole(other, store, "large")
            assert store.reads() == []


def test_a_limit_that_became_lower_holds_from_the_start(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 0, 0.0, MIB)
    for name in "abc":
        entry = cache.open(ObjectKey("store", name, MIB, OLD_NS))
        buffer = cache.buffers.take(MIB)
        cache.keep(entry, range(1), buffer)
        assert make_room(cache, entry, MIB)
        sums = block_io.write(entry.files, entry.about, 0, buffer.view)
        assert sums is not None
        cache.publish(entry, 0, sums)
        cache.close(entry)
    cache.shut()
    limit = cached_object.disk_bytes(MIB) * 2
    cache = Cache(tmp_path / "cache", limit, 0.0, MIB)
    assert everything_on_disk(tmp_path / "cache") <= cache.index.used_bytes == limit
    cache.shut()
