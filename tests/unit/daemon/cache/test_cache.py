"""The cache serves only what was written and verified, and never takes more than its limit."""

import contextlib
import itertools
import os
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fakes import MIB, OLD_NS, pattern
from support.rig import bytes_on_disk, make_room
from unit.daemon.cache.test_object_dir import DAMAGES

from ckptfs._daemon.cache import block_io, object_dir
from ckptfs._daemon.cache.cache import SETTLED_S, Cache
from ckptfs._daemon.cache.cached_object import ABSENT, IN_MEMORY, STORED, VERIFIED, CachedObject
from ckptfs._daemon.cache.object_dir import ObjectKey
from ckptfs._model.blocks import BLOCK_BYTES, block_count, block_length
from ckptfs.errors import ConfigError

FOLDER = 24 << 10
"""Bytes that the index counts for an object's folder."""


def key_of(path: str, size: int = 3 * MIB + 5, mtime_ns: int = OLD_NS) -> ObjectKey:
    return ObjectKey("store", path, size, mtime_ns)


def keep(cache: Cache, entry: CachedObject, index: int, data: bytes) -> None:
    """Make blocks readable that are in memory only."""
    buffer = cache.buffers.take(len(data))
    buffer.view[: len(data)] = data
    cache.keep(entry, range(index, index + block_count(len(data))), buffer)
    cache.buffers.keep(buffer)


def store(cache: Cache, entry: CachedObject, index: int, data: bytes) -> bool:
    """Store blocks as `fetch` does; False: they are kept in memory only."""
    keep(cache, entry, index, data)
    if not make_room(cache, entry, len(data)):
        return False
    sums = block_io.write(entry.files, entry.about, index, memoryview(data))
    assert sums is not None
    cache.publish(entry, index, sums)
    return True


def read_now(cache: Cache, entry: CachedObject, offset: int, length: int) -> bytes | None:
    """Read without waiting."""
    views = cache.reads.read_now(entry, offset, length)
    return None if views is None else b"".join(views)


def block_of(entry: CachedObject, index: int) -> bytes:
    """The bytes that block `index` of an object should have."""
    return pattern(block_length(index, entry.size), hash((entry.about.key.path, index)) % 97)


def fill(cache: Cache, key: ObjectKey) -> bytes:
    """Store a whole object, block by block, and close it."""
    entry = cache.open(key)
    blocks = [block_of(entry, index) for index in range(block_count(key.size))]
    for index, data in enumerate(blocks):
        store(cache, entry, index, data)
    cache.close(entry)
    return b"".join(blocks)


def load(cache: Cache, entry: CachedObject, index: int) -> bytes | None:
    """Read a block that is on disk as `fetch` does; None: it is lost."""
    checksum = entry.sums[index]
    data = block_io.load(entry, index, checksum)
    cache.loaded(entry, index, checksum, data is not None)
    return data


@contextlib.contextmanager
def cache_in(
    directory: Path,
    bytes_max: int = 0,
    free_share_min: float = 0.0,
    memory_bytes_max: int = 64 * MIB,
) -> Iterator[Cache]:
    cache = Cache(directory, bytes_max, free_share_min, memory_bytes_max)
    try:
        yield cache
    finally:
        cache.shut()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(directory: Path) -> Iterator[Cache]:
    with cache_in(directory) as cache:
        yield cache


# -- what is written is there, also for the next daemon


def test_a_published_block_is_read_without_waiting(cache: Cache) -> None:
    entry = cache.open(key_of("a"))
    data = block_of(entry, 1)
    assert store(cache, entry, 1, data)
    assert bytes(entry.state) == bytes([ABSENT, VERIFIED, ABSENT, ABSENT])
    assert read_now(cache, entry, MIB + 10, 1000) == data[10:1010]


def test_blocks_survive_a_restart_and_are_checked(directory: Path) -> None:
    key = key_of("a")
    with cache_in(directory) as cache:
        entry = cache.open(key)
        store(cache, entry, 0, block_of(entry, 0) + block_of(entry, 1))
        store(cache, entry, 3, block_of(entry, 3))
        used = cache.index.used_bytes
    with cache_in(directory) as cache:
        assert cache.stored_bytes(key.digest()) >= 2 * MIB + 5
        entry = cache.open(key)
        assert cache.index.used_bytes == used == 2 * MIB + 4096 + FOLDER
        assert bytes(entry.state) == bytes([STORED, STORED, ABSENT, STORED])
        assert not entry.readable(range(1))  # not before it was checked
        for index in (0, 1, 3):
            assert load(cache, entry, index) == block_of(entry, index)
        assert entry.readable(range(2))
        assert cache.stored_bytes(key.digest()) == 2 * MIB + 5


def test_a_block_written_but_not_recorded_is_absent_after_a_crash(directory: Path) -> None:
    key = key_of("a")
    with cache_in(directory) as cache:
        entry = cache.open(key)
        store(cache, entry, 0, block_of(entry, 0))
        assert make_room(cache, entry, MIB)
        object_dir.write(entry.files, MIB, memoryview(block_of(entry, 1)))
    with cache_in(directory) as cache:
        entry = cache.open(key)
        assert bytes(entry.state) == bytes([STORED, ABSENT, ABSENT, ABSENT])
        assert bytes_on_disk(cache.directory) <= cache.index.used_bytes


def test_a_flipped_bit_is_found_and_only_its_block_is_dropped(directory: Path) -> None:
    key = key_of("a")
    with cache_in(directory) as cache:
        data = fill(cache, key)
        path = cache.directory / "objects" / key.digest()[:2] / key.digest() / "data"
    with path.open("r+b") as file:
        file.seek(MIB + 77)
        file.write(bytes([data[MIB + 77] ^ 4]))
    with cache_in(directory) as cache:
        entry = cache.open(key)
        assert load(cache, entry, 1) is None
        assert entry.state[1] == ABSENT
        assert b"".join(load(cache, entry, i) or b"?" for i in (0, 2, 3)) == (
            data[:MIB] + data[2 * MIB :]
        )
        assert bytes_on_disk(cache.directory) <= cache.index.used_bytes
        assert store(cache, entry, 1, data[MIB : 2 * MIB])
    with cache_in(directory) as cache:
        assert load(cache, cache.open(key), 1) == data[MIB : 2 * MIB]


def test_a_dropped_block_stays_dropped_after_a_restart(directory: Path) -> None:
    key = key_of("a")
    with cache_in(directory) as cache:
        fill(cache, key)
        entry = cache.open(key)
        cache.loaded(entry, 2, entry.sums[2], good=False)
    with cache_in(directory) as cache:
        entry = cache.open(key)
        assert bytes(entry.state) == bytes([STORED, STORED, ABSENT, STORED])


def test_an_outdated_verdict_says_nothing_about_a_newer_block(cache: Cache) -> None:
    entry = cache.open(key_of("a"))
    store(cache, entry, 0, block_of(entry, 0))
    cache.loaded(entry, 0, entry.sums[0] ^ 1, good=False)
    assert entry.state[0] == VERIFIED
    cache.loaded(entry, 1, 0, good=True)
    assert entry.state[1] == ABSENT


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_dropped(directory: Path, damage: Callable[[Path], None]) -> None:
    # The damages were made for the object of test_object_dir, which has the same size.
    key, good = ObjectKey("store", "bucket/a/model", 3 * MIB + 5, 7), key_of("good")
    with cache_in(directory) as cache:
        fill(cache, key)
        content = fill(cache, good)
        folder = cache.directory / "objects" / key.digest()[:2] / key.digest()
    damage(folder)
    with cache_in(directory) as cache:
        entry = cache.open(key)
        assert not any(entry.state)
        assert store(cache, entry, 0, block_of(entry, 0))
        assert bytes_on_disk(cache.directory) <= cache.index.used_bytes
        other = cache.open(good)
        assert load(cache, other, 2) == content[2 * MIB : 3 * MIB]
    with cache_in(directory) as cache:
        assert load(cache, cache.open(key), 0) == block_of(entry, 0)


def test_garbage_and_trash_are_removed_at_start(directory: Path) -> None:
    with cache_in(directory) as cache:
        fill(cache, key_of("good"))
        used = cache.index.used_bytes
    garbage = directory / "objects" / "ab" / f"ab{0:030}"
    garbage.mkdir(parents=True)
    (garbage / "data").write_bytes(b"x" * 5000)
    (directory / "trash" / "7").mkdir()
    (directory / "trash" / "7" / "data").write_bytes(b"x")
    with cache_in(directory) as cache:
        assert not garbage.exists()
        assert not list((directory / "trash").iterdir())
        assert cache.index.used_bytes == used


def test_what_was_verified_as_a_whole_is_not_checked_again(directory: Path) -> None:
    key = key_of("a")
    with cache_in(directory) as cache:
        data = fill(cache, key)
        entry = cache.open(key)
        assert set(entry.state) == {VERIFIED}
        cache.close(entry)
    with cache_in(directory) as cache:  # another daemon
        assert set(cache.open(key).state) == {VERIFIED}
    with (directory / "objects" / key.digest()[:2] / key.digest() / "data").open("r+b") as file:
        file.write(data[:1])  # the same byte, but another process wrote it
    with cache_in(directory) as cache:
        assert set(cache.open(key).state) == {STORED}


# -- passthrough


def test_only_what_is_whole_and_verified_is_lent(directory: Path) -> None:
    key = key_of("a", 2 * MIB)
    with cache_in(directory) as cache:
        entry = cache.open(key)
        assert not cache.begin_passthrough(entry)
        store(cache, entry, 0, block_of(entry, 0))
        assert not cache.begin_passthrough(entry)
        keep(cache, entry, 1, block_of(entry, 1))
        assert not cache.begin_passthrough(entry)  # one block is in memory only
        store(cache, entry, 1, block_of(entry, 1))
        assert cache.begin_passthrough(entry)
        cache.end_passthrough(entry)
        empty = cache.open(key_of("empty", 0))
        assert not cache.begin_passthrough(empty)


def test_what_is_lent_loses_no_block_and_stays_open(directory: Path) -> None:
    with cache_in(directory, 4 * MIB + 2 * FOLDER) as cache:
        lent = cache.open(key_of("lent", 3 * MIB))
        for index in range(3):
            store(cache, lent, index, block_of(lent, index))
        assert cache.begin_passthrough(lent)
        cache.close(lent)  # its last reader has gone, the kernel has not
        other = cache.open(key_of("other", 8 * MIB))
        for index in range(8):
            store(cache, other, index, block_of(other, index))
            used = cache.index.used_bytes
            assert bytes_on_disk(cache.directory) <= used <= cache.index.bytes_max
        assert set(lent.state) == {VERIFIED}
        assert other.stored_bytes() == MIB
        content = b"".join(block_of(lent, index) for index in range(3))
        assert os.pread(lent.files.data, 3 * MIB, 0) == content
        cache.end_passthrough(lent)
        store(cache, other, 1, block_of(other, 1))
        assert cache.stored_bytes(lent.digest) == 0


@pytest.mark.parametrize("why", ["damage", "another version"])
def test_what_is_lent_is_never_punched(cache: Cache, why: str) -> None:
    entry = cache.open(key_of("a", 2 * MIB))
    cache.learn(entry, "1")
    content = b""
    for index in range(2):
        store(cache, entry, index, block_of(entry, index))
        content += block_of(entry, index)
    assert cache.begin_passthrough(entry)
    old = entry.files.data
    if why == "damage":
        cache.loaded(entry, 1, entry.sums[1], good=False)
    else:
        cache.learn(entry, "2")
    assert set(entry.state) == {ABSENT}
    assert cache.index.used_bytes == 2 * MIB + FOLDER  # until the kernel lets go
    assert os.pread(old, 2 * MIB, 0) == content
    keep(cache, entry, 0, b"x" * MIB)
    assert read_now(cache, entry, 0, MIB) == b"x" * MIB
    cache.end_passthrough(entry)
    cache.close(entry)
    assert cache.index.used_bytes == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(old)


# -- the directory


def test_one_cache_per_directory(directory: Path) -> None:
    with cache_in(directory), pytest.raises(ConfigError, match="in use by another"):
        Cache(directory, 0, 0, MIB)
    with cache_in(directory):
        pass


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_can_write_is_refused(directory: Path, mode: int) -> None:
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(ConfigError, match="writable by no other user"):
        Cache(directory, 0, 0, MIB)


def test_a_directory_that_cannot_be_made_is_an_error(directory: Path) -> None:
    directory.write_text("a file")
    for path in (directory, directory / "below"):
        with pytest.raises(ConfigError, match="cache_dir"):
            Cache(path, 0, 0, MIB)


def test_the_folders_are_private(directory: Path) -> None:
    with cache_in(directory) as cache:
        fill(cache, key_of("a"))
    for path in (directory, *directory.rglob("*")):
        if len(path.relative_to(directory).parts) != 2:  # objects/ab is inside a private folder
            assert path.stat().st_mode & 0o077 == 0 or path.suffix == ".json", path


# -- memory


def test_a_block_in_memory_is_never_read_from_the_hole(directory: Path) -> None:
    with cache_in(directory, memory_bytes_max=2 * MIB) as cache:
        entry = cache.open(key_of("a"))
        blocks = [block_of(entry, index) for index in range(4)]
        store(cache, entry, 0, blocks[0])
        store(cache, entry, 3, blocks[3])
        keep(cache, entry, 1, blocks[1] + blocks[2])  # takes the memory of the others
        assert bytes(entry.state) == bytes([VERIFIED, IN_MEMORY, IN_MEMORY, VERIFIED])
        assert set(entry.memory) == {1, 2}
        content = b"".join(blocks)
        assert entry.readable(range(4))
        places = [(0, MIB), (MIB, MIB), (MIB + 5, MIB), (2 * MIB - 1, 2), (3 * MIB, 5)]
        # Partly here, partly there:
        places += [(MIB - 1, 2), (5, MIB), (3 * MIB - 1, 3), (2 * MIB, MIB + 5), (5, 2 * MIB)]
        for offset, length in places:
            os.pread(entry.files.data, length, offset)  # what is on the disk is in the page cache
            assert read_now(cache, entry, offset, length) == content[offset : offset + length]
        assert cache.reads.in_buffer(entry, 1) == blocks[1]
        assert cache.reads.in_buffer(entry, 0) is None


def test_memory_is_bounded_and_forgets_the_oldest(directory: Path) -> None:
    size = 40 * MIB
    with cache_in(directory, memory_bytes_max=32 * MIB) as cache:
        entry = cache.open(key_of("a", size))
        for index in range(40):
            keep(cache, entry, index, bytes([index]) * MIB)
        states = bytes(entry.state)
        assert states == bytes([ABSENT] * 8 + [IN_MEMORY] * 32)
        assert cache.buffers.total_bytes == 32 * MIB
        cache.close(entry)
        assert cache.buffers.total_bytes == 0
        assert not any(cache.open(key_of("a", size)).state)


# -- versions


def test_blocks_of_another_etag_are_dropped(directory: Path) -> None:
    key = key_of("a")
    with cache_in(directory) as cache:
        entry = cache.open(key)
        cache.learn(entry, '"1"')
        store(cache, entry, 0, block_of(entry, 0) + block_of(entry, 1))
        cache.learn(entry, '"1"')
        assert entry.state[0] == VERIFIED
        keep(cache, entry, 2, block_of(entry, 2))
        cache.learn(entry, '"2"')
        assert not any(entry.state)
        assert cache.reads.in_buffer(entry, 2) is None
        assert entry.about.etag == '"2"'
        assert bytes_on_disk(cache.directory) <= cache.index.used_bytes == FOLDER
        store(cache, entry, 1, block_of(entry, 1))
    with cache_in(directory) as cache:
        entry = cache.open(key)
        assert entry.about.etag == '"2"'
        assert bytes(entry.state) == bytes([ABSENT, STORED, ABSENT, ABSENT])


@pytest.mark.parametrize(
    ("age_s", "settled"),
    [(SETTLED_S + 60, True), (SETTLED_S - 60, False), (0, False), (-3600, False)],
)
def test_size_and_time_identify_a_version_only_when_it_is_old(
    directory: Path, age_s: float, settled: bool
) -> None:
    key = key_of("a", mtime_ns=int((time.time() - age_s) * 1e9))
    with cache_in(directory) as cache:
        entry = cache.open(key)
        assert not entry.about.settled
        cache.learn(entry, '"1"')
        store(cache, entry, 0, block_of(entry, 0))
    with cache_in(directory) as cache:
        assert cache.open(key).about.settled is settled


def test_an_object_without_a_time_is_never_settled(cache: Cache) -> None:
    entry = cache.open(key_of("a", mtime_ns=0))
    cache.learn(entry, "")
    assert not entry.about.settled


# -- room


def test_what_was_not_used_longest_goes_first(directory: Path) -> None:
    with cache_in(directory, 3 * (MIB + FOLDER)) as cache:
        keys = [key_of(name, MIB) for name in "abcd"]
        for key in keys[:3]:
            fill(cache, key)
        cache.close(cache.open(keys[0]))  # used again
        fill(cache, keys[3])
        stored = [cache.stored_bytes(key.digest()) for key in keys]
        assert stored == [MIB, 0, MIB, MIB]


def test_the_order_of_use_survives_a_restart(directory: Path) -> None:
    keys = [key_of(name, MIB) for name in "abc"]
    with cache_in(directory) as cache:
        for key in keys:
            fill(cache, key)
    for age, key in zip((1, 3, 2), keys, strict=True):
        folder = directory / "objects" / key.digest()[:2] / key.digest()
        os.utime(folder, (OLD_NS / 1e9 - age, OLD_NS / 1e9 - age))
    with cache_in(directory, 3 * (MIB + FOLDER)) as cache:
        fill(cache, key_of("d", MIB))
        assert [cache.stored_bytes(key.digest()) for key in keys] == [MIB, 0, MIB]


def test_open_objects_lose_their_oldest_blocks_and_only_after_closed_ones(directory: Path) -> None:
    with cache_in(directory, 5 * MIB + 3 * FOLDER) as cache:
        fill(cache, key_of("closed", MIB))
        entry = cache.open(key_of("open", 8 * MIB))
        for index in (2, 0, 1, 3):
            store(cache, entry, index, block_of(entry, index))
        assert cache.stored_bytes(key_of("closed", MIB).digest()) == MIB
        store(cache, entry, 4, block_of(entry, 4))
        assert cache.stored_bytes(key_of("closed", MIB).digest()) == 0
        assert bytes(entry.state[:5]) == bytes([VERIFIED] * 5)
        store(cache, entry, 5, block_of(entry, 5))
        assert bytes(entry.state[:6]) == bytes([VERIFIED, VERIFIED, ABSENT] + [VERIFIED] * 3)
        store(cache, entry, 6, block_of(entry, 6))
        assert bytes(entry.state[:3]) == bytes([ABSENT, VERIFIED, ABSENT])
        assert read_now(cache, entry, 6 * MIB, MIB) == block_of(entry, 6)


def test_a_block_cannot_be_read_while_its_hole_is_made(directory: Path) -> None:
    with cache_in(directory, MIB + FOLDER) as cache:
        entry = cache.open(key_of("a", 2 * MIB))
        store(cache, entry, 0, block_of(entry, 0))
        meanwhile: list[bool] = []

        def look() -> None:
            assert not entry.readable(range(1))
            assert entry.state[0] != ABSENT  # nor fetched again
            used = cache.index.used_bytes
            assert used >= bytes_on_disk(cache.directory)  # counted until it is gone
            meanwhile.append(True)

        assert make_room(cache, entry, MIB, look)
        assert meanwhile
        assert entry.state[0] == ABSENT
        cache.room.give_back(entry, MIB, freed=True)


def test_an_object_larger_than_the_limit_flows_through(directory: Path) -> None:
    limit = 3 * MIB + FOLDER
    with cache_in(directory, limit) as cache:
        entry = cache.open(key_of("a", 20 * MIB))
        for index in range(20):
            assert store(cache, entry, index, block_of(entry, index))
            assert read_now(cache, entry, index * MIB, MIB) == block_of(entry, index)
            assert bytes_on_disk(cache.directory) <= cache.index.used_bytes <= limit
        assert entry.stored_bytes() == 3 * MIB


@pytest.mark.parametrize(("limit", "share"), [(MIB, 0.0), (FOLDER, 0.0), (0, 1.0)])
def test_what_does_not_fit_is_kept_in_memory(directory: Path, limit: int, share: float) -> None:
    with cache_in(directory, limit, share) as cache:
        entry = cache.open(key_of("a", 2 * MIB))
        assert not store(cache, entry, 0, block_of(entry, 0))
        assert cache.index.used_bytes == 0
        assert read_now(cache, entry, 0, MIB) == block_of(entry, 0)
        assert bytes_on_disk(cache.directory) == 0


def test_a_folder_that_cannot_be_made_is_not_counted(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    entry = cache.open(key_of("a", 2 * MIB))
    with monkeypatch.context() as patch:
        patch.setattr(object_dir, "create", refuse)
        assert not store(cache, entry, 0, block_of(entry, 0))
    assert cache.index.used_bytes == 0
    assert read_now(cache, entry, 0, MIB) == block_of(entry, 0)
    assert store(cache, entry, 1, block_of(entry, 1))  # the disk has room again


def test_a_discarded_write_frees_its_space(cache: Cache) -> None:
    entry = cache.open(key_of("a"))
    store(cache, entry, 0, block_of(entry, 0))
    used = cache.index.used_bytes
    assert make_room(cache, entry, 2 * MIB)
    block_io.write(entry.files, entry.about, 1, memoryview(pattern(2 * MIB)))
    cache.room.give_back(entry, 2 * MIB, block_io.take_out(entry.files, entry.about, range(1, 3)))
    assert cache.index.used_bytes == used >= bytes_on_disk(cache.directory)
    assert read_now(cache, entry, 0, MIB) == block_of(entry, 0)


def test_an_object_with_no_blocks_leaves_no_folder(cache: Cache) -> None:
    entry = cache.open(key_of("a"))
    assert make_room(cache, entry, MIB)
    cache.room.give_back(entry, MIB, freed=True)
    cache.close(entry)
    assert cache.index.used_bytes == 0
    assert not list((cache.directory / "objects").glob("*/*"))


_SIZES = [3 * MIB + 5, 5, 2 * MIB]
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["open", "close", "store", "store", "store", "damage", "damage", "learn", "restart"]
        ),
        st.integers(0, len(_SIZES) - 1),
        st.integers(0, 3),
    ),
    min_size=8,
    max_size=40,
)
_serial = itertools.count()


@given(_STEPS, st.sampled_from([FOLDER, 2 * MIB, 4 * MIB, 8 * MIB]))
def test_the_limit_holds_at_every_step(
    tmp_path_factory: pytest.TempPathFactory, steps: "list[tuple[str, int, int]]", limit: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / f"limit{next(_serial)}"
    keys = [key_of(str(number), size) for number, size in enumerate(_SIZES)]
    cache = Cache(directory, limit, 0.0, 8 * MIB)
    entries: dict[int, CachedObject] = {}

    def opened(which: int) -> CachedObject:
        if which not in entries:
            entries[which] = cache.open(keys[which])
        return entries[which]

    for number, (step, which, value) in enumerate(steps):
        if step == "open":
            opened(which)
        elif step == "close" and which in entries:
            cache.close(entries.pop(which))
        elif step == "store":
            entry = opened(which)
            index = value % len(entry.state)
            if entry.state[index] == ABSENT:
                store(cache, entry, index, block_of(entry, index))
                assert entry.readable(range(index, index + 1))
        elif step == "damage":
            entry = opened(which)
            index = value % len(entry.state)
            cache.loaded(entry, index, entry.sums[index], good=False)
        elif step == "learn":
            cache.learn(opened(which), str(number if value == 0 else 0))
        elif step == "restart":
            cache.shut()
            entries.clear()
            cache = Cache(directory, limit, 0.0, 8 * MIB)
        assert bytes_on_disk(cache.directory) <= cache.index.used_bytes <= limit
    for entry in entries.values():
        for index, state in enumerate(entry.state):
            if state in (STORED, VERIFIED):
                assert load(cache, entry, index) == block_of(entry, index)
        cache.close(entry)
    assert bytes_on_disk(cache.directory) <= cache.index.used_bytes <= limit
    last = cache.open(key_of("last", 10 * limit))
    assert not make_room(cache, last, 10 * limit)  # more than there can be: all else goes
    assert cache.index.used_bytes == 0
    assert bytes_on_disk(cache.directory) == 0
    cache.shut()


def test_recorded_zero_means_absent(directory: Path) -> None:
    key = key_of("a")
    with cache_in(directory) as cache:
        fill(cache, key)
        entry = cache.open(key)
        object_dir.write_sums(entry.files, 0, array("Q", [0]))
    with cache_in(directory) as cache:
        assert cache.open(key).state[0] == ABSENT


def test_sizes_of_blocks_are_whole_pages(cache: Cache) -> None:
    entry = cache.open(key_of("a", BLOCK_BYTES + 1))
    store(cache, entry, 1, block_of(entry, 1))
    assert entry.stored_bytes() == 1
    assert cache.index.used_bytes == 4096 + FOLDER
    cache.close(entry)
    entry = cache.open(msgspec.structs.replace(entry.about.key))
    assert cache.index.used_bytes == 4096 + FOLDER
