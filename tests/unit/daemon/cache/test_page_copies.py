"""Copies that run after blocks were dropped fail, and never have other bytes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fakes import MIB
from support.rig import make_room
from unit.daemon.cache.test_cache import block_of, cache_in, keep, key_of, store

from ckptfs._daemon.cache import disk_ops
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import DOUBTED, DYING, VERIFIED, CachedObject
from ckptfs._daemon.cache.page_copies import Found

SIZE = 4 * MIB
FOLDER = 24 << 10


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with cache_in(tmp_path / "cache", SIZE + 2 * FOLDER) as cache:
        yield cache


@pytest.fixture
def entry(cache: Cache) -> CachedObject:
    """An object whose blocks are on the disk and in the page cache."""
    entry = cache.open(key_of("a", SIZE))
    cache.learn(entry, "1")
    for index in range(SIZE // MIB):
        assert store(cache, entry, index, block_of(entry, index))
    cache._drop_memory(entry)
    for index in range(SIZE // MIB):
        disk_ops.read(entry.files.data, MIB, index * MIB)
    return entry


def find(cache: Cache, entry: CachedObject) -> Found:
    found = cache.reads.find_now(entry, 100, MIB)
    assert found is not None
    assert len(found.copies) == 1
    return found


def test_a_copy_brings_the_bytes(cache: Cache, entry: CachedObject) -> None:
    found = find(cache, entry)
    assert found.copies[0].run()
    expected = block_of(entry, 0) + block_of(entry, 1)
    assert b"".join(found.views) == expected[100 : 100 + MIB]


def evict(cache: Cache, entry: CachedObject) -> None:
    assert make_room(cache, cache.open(key_of("b", MIB)), MIB)
    assert entry.state[0] != VERIFIED


def change_version(cache: Cache, entry: CachedObject) -> None:
    cache.learn(entry, "2")


def find_damage(cache: Cache, entry: CachedObject) -> None:
    cache.loaded(entry, 1, entry.sums[1], good=False)


def damage_what_the_kernel_reads(cache: Cache, entry: CachedObject) -> None:
    assert cache.begin_passthrough(entry)
    cache.loaded(entry, 1, entry.sums[1], good=False)
    cache.end_passthrough(entry)


def lose_the_pages(cache: Cache, entry: CachedObject) -> None:
    entry.doubt(range(1, 2))
    assert entry.state[1] == DOUBTED
    entry.state[1] = VERIFIED  # it was read again


@pytest.mark.parametrize(
    "change",
    [evict, change_version, find_damage, damage_what_the_kernel_reads, lose_the_pages],
)
def test_a_copy_that_runs_after_a_block_was_dropped_fails(
    cache: Cache, entry: CachedObject, change: Callable[[Cache, CachedObject], None]
) -> None:
    found = find(cache, entry)
    loan = cache.reads.lend(found)
    change(cache, entry)
    assert not found.copies[0].run()
    cache.reads.take_back(loan)


def test_a_copy_fails_while_its_block_is_dropped(
    cache: Cache, entry: CachedObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find(cache, entry)
    read = disk_ops.read_cached

    def read_and_drop(fd: int, view: memoryview, offset: int, flags: int) -> int:
        count = read(fd, view, offset, flags)
        cache.room._choose_blocks(MIB)
        assert DYING in entry.state
        return count

    monkeypatch.setattr(disk_ops, "read_cached", read_and_drop)
    assert not found.copies[0].run()


def test_an_object_stays_open_while_a_copy_of_it_is_lent(cache: Cache, entry: CachedObject) -> None:
    found = find(cache, entry)
    expected = (block_of(entry, 0) + block_of(entry, 1))[100 : 100 + MIB]
    loan = cache.reads.lend(found)
    cache.close(entry)
    assert cache.opened == {entry.digest: entry}
    assert found.copies[0].run()
    assert b"".join(found.views) == expected
    cache.reads.take_back(loan)
    assert cache.opened == {}


def test_a_failed_copy_has_its_blocks_checked_again(
    cache: Cache, entry: CachedObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    [copy] = find(cache, entry).copies
    monkeypatch.setattr(disk_ops, "read_cached", lambda *_: 0)
    assert not copy.run()
    cache.reads.note_failed_copy(copy)
    assert list(entry.state) == [DOUBTED, DOUBTED, VERIFIED, VERIFIED]


def test_a_copy_that_fails_for_its_number_has_no_block_checked(
    cache: Cache, entry: CachedObject
) -> None:
    [copy] = find(cache, entry).copies
    entry.renew(1)
    assert not copy.run()
    cache.reads.note_failed_copy(copy)
    assert set(entry.state) == {VERIFIED}


def test_another_block_that_is_dropped_disturbs_no_copy(cache: Cache, entry: CachedObject) -> None:
    [copy] = find(cache, entry).copies
    cache.loaded(entry, 3, entry.sums[3], good=False)
    assert copy.run()


def test_copies_run_at_once_if_the_kernel_does_not_say_what_is_in_memory(
    cache: Cache, entry: CachedObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_ops, "_cachestat", 0)
    found = cache.reads.find_now(entry, 0, MIB)
    assert found is not None
    assert found.copies == ()
    assert b"".join(found.views) == block_of(entry, 0)


def test_bytes_that_are_lent_when_their_object_has_just_closed_stay(cache: Cache) -> None:
    entry = cache.open(key_of("a", MIB))
    keep(cache, entry, 0, block_of(entry, 0))
    cache.open(key_of("b", MIB))  # the cache goes on
    views = cache.reads.read_now(entry, 0, MIB)
    assert views is not None
    cache.close(entry)
    loan = cache.reads.lend(Found(views))
    buffer = cache.buffers.take(MIB)
    buffer.view[:] = b"x" * MIB
    assert b"".join(views) == block_of(entry, 0)
    cache.reads.take_back(loan)
