"""Objects that are overwritten in the middle of reads, 1,000 times: no read has bytes of two.

Stronger than that: what a read gives is what the object held when it was attached, or ESTALE's
exception. All of it follows from a seed.
"""

import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fakes import MIB, FakeStore, pattern
from support.faultserver import FaultServer, Object
from support.quirkserver import QuirkServer
from support.rig import Rig, rig_in

from ckptfs._daemon.cache.object_dir import ObjectKey
from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.offload import Offload
from ckptfs._model.location import Location
from ckptfs._store.base import Pin, Store, pin_of
from ckptfs._store.resolve import open_store
from ckptfs.errors import ObjectChanged

SIZE = MIB + 200_000
OVERWRITES = 1000
CHANGES = ("same size and second", "same size", "longer", "shorter", "deleted")
_serial = itertools.count()

Write = Callable[["bytes | None", bool], None]
"""Puts another version there (None: none), in the same second as the last or not."""


class Changes:
    """Decides what happens at each moment, and counts."""

    def __init__(self, seed: int, write: Write) -> None:
        self._random = random.Random(seed)
        self._write = write
        self.done: dict[str, int] = dict.fromkeys(CHANGES, 0)
        self.active = False

    def moment(self) -> None:
        """Perhaps overwrite the object."""
        if not self.active or self._random.random() < 0.6:
            return
        change = self._random.choice(CHANGES)
        self.done[change] += 1
        size = {"longer": SIZE + 1, "shorter": SIZE // 2}.get(change, SIZE)
        data = None if change == "deleted" else pattern(size, next(_serial))
        self._write(data, change == "same size and second")
        self.active = False  # one in each read: what comes after a change is no news

    @property
    def count(self) -> int:
        return sum(self.done.values())


async def read_while_it_changes(
    rig: Rig,
    store: Store,
    seed: int,
    changes: Changes,
    now: Callable[[], "tuple[Pin, bytes]"],
    count: int = OVERWRITES // 4,
) -> "tuple[int, int]":
    """Attach again and again and read; returns how many reads were right, and how many stale."""
    chance = random.Random(seed + 1)
    right = stale = 0
    while changes.count < count:
        pin, content = now()
        file = RemoteFile(store, ObjectKey("store", "a", pin.size, pin.mtime_ns), pin)
        rig.files = [file]
        with rig.fetcher.opened(file):
            for _ in range(4):
                offset = chance.randrange(pin.size)
                length = min(chance.choice([1, 4096, MIB, SIZE]), pin.size - offset)
                changes.active = True
                try:
                    got = await rig.read(file, offset, length)
                except ObjectChanged:
                    stale += 1
                    break
                finally:
                    changes.active = False
                assert got == content[offset : offset + length]
                right += 1
        await rig.quiet()
    return right, stale


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize(
    "is_disk", [False, pytest.param(True, marks=pytest.mark.long)], ids=["S3", "disk"]
)
async def test_a_thousand_overwrites_in_the_middle_of_reads(
    tmp_path: Path, is_disk: bool, seed: int
) -> None:
    """Through the S3 client; half of them with a server whose answers change on the way."""
    with FaultServer(is_disk=is_disk) as server:
        done, right, stale = await read_from(tmp_path, server, seed, OVERWRITES // 4)
    assert min(done.values()) > 30
    assert right > 50
    assert stale > 100


@pytest.mark.long
@pytest.mark.parametrize(
    "quirk",
    [
        "weak ETags in listings",
        "other ETags in listings",
        "other ETags in HEAD",
        "no ETags but in listings",
        "If-Match is never met",
        "conditions are 501",
    ],
)
async def test_overwrites_with_other_etags_in_listings_are_noticed(
    tmp_path: Path, quirk: str
) -> None:
    with QuirkServer(quirk) as server:
        done, right, stale = await read_from(tmp_path, server, 1, OVERWRITES // 20)
    assert min(done.values()) > 3
    assert right > 1
    assert stale > 20


async def read_from(
    folder: Path, server: FaultServer, seed: int, count: int
) -> "tuple[dict[str, int], int, int]":
    """How often each change was made, how many reads were right, and how many stale."""
    times = itertools.count(1_500_000_000)

    def write(data: "bytes | None", same_second: bool) -> None:
        before = server.objects.pop("bucket/run/a", None)
        if data is not None:
            mtime_s = before.mtime_s if before and same_second else next(times)
            server.objects["bucket/run/a"] = Object(data, mtime_s)

    changes = Changes(seed, write)
    server.during = lambda _: changes.moment()
    options = {"endpoint_override": server.endpoint, "scheme": "http", "region": "x"}
    place = Location("s3", "bucket/run", options, {"access_key": "k", "secret_key": "s"})
    store = open_store(place, 20)

    def now() -> "tuple[Pin, bytes]":
        write(pattern(SIZE, next(_serial)), False)  # or all of it may be cached
        [listed] = store.list(9).files
        return pin_of(listed), server.objects["bucket/run/a"].data

    async with rig_in(folder, Offload(4)) as rig:
        right, stale = await read_while_it_changes(rig, store, seed, changes, now, count)
    store.close()
    assert changes.count == count
    return changes.done, right, stale


@pytest.mark.parametrize("seed", range(2))
async def test_a_thousand_overwrites_of_a_store_without_conditions(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, where each moment before, in and after a read and a check can be met."""
    store = FakeStore({"a": pattern(SIZE)})

    def write(data: "bytes | None", same_second: bool) -> None:
        if data is None:
            store.delete("a")
        else:
            mtime_ns = store.pin("a").mtime_ns if same_second else None
            store.overwrite("a", data, mtime_ns=mtime_ns)

    changes = Changes(seed, write)
    monkeypatch.setattr(store, "_moment", changes.moment)

    def now() -> "tuple[Pin, bytes]":
        store.overwrite("a", pattern(SIZE, next(_serial)))  # or all of it may be cached
        content = store.content("a")
        assert content is not None
        pin = store.pin("a")
        return Pin(pin.path, pin.size, pin.mtime_ns, store.etag("a")), content

    async with rig_in(tmp_path) as rig:
        right, stale = await read_while_it_changes(rig, store, seed, changes, now)
    assert changes.count == OVERWRITES // 4
    assert min(changes.done.values()) > 30
    assert right > 50
    assert stale > 100


@pytest.mark.long
@pytest.mark.parametrize("seed", [0])
async def test_a_thousand_overwrites_of_a_local_disk(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each file's tick too: replaced and in place, with new times and with old ones."""
    top, path = tmp_path / "top", tmp_path / "top" / "a"
    top.mkdir()
    chance, read_part = random.Random(seed), os.preadv

    def write(data: "bytes | None", same_second: bool) -> None:
        if data is None:
            path.unlink()
            return
        before = path.stat() if path.exists() else None
        target = path if before and chance.random() < 0.5 else top / "fresh"
        target.write_bytes(data)
        if before and same_second:
            os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
        target.replace(path)

    changes = Changes(seed, write)

    def preadv(file: int, buffers: "list[memoryview]", offset: int) -> int:
        changes.moment()
        return read_part(file, [buffers[0][:700_000]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    store = open_store(Location("local", str(top)), 20)

    def now() -> "tuple[Pin, bytes]":
        write(pattern(SIZE, next(_serial)), False)  # or all of it may be cached
        [listed] = store.list(9).files
        return pin_of(listed), path.read_bytes()

    async with rig_in(tmp_path / "rig") as rig:
        right, stale = await read_while_it_changes(rig, store, seed, changes, now)
    assert changes.count == OVERWRITES // 4
    assert min(changes.done.values()) > 30
    assert right > 50
    assert stale > 100
