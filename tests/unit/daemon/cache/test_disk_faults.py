"""Whatever the cache's disk does, each byte that is read is right, and what it takes is counted."""

import functools
import itertools
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.diskfaults import FAULTS, MOMENTS, OPERATIONS, Fault, Plan, can, planned
from support.fakes import MIB, FakeStore, pattern
from support.rig import Rig, rig_in

from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 5 * MIB
SIZES = {"a": 3 * MIB + 5, "b": 2 * MIB, "c": 7 * MIB + 4097, "d": 5000, "e": 1}
ALL = os.environ.get("CKPTFS_FAULTS") == "all"
"""Whether to take some minutes, and not some seconds."""
NEVER_SETTLED_NS = 4_102_444_800 * 10**9
"""In the year 2100: the store is asked for the version of what is cached."""
MATRIX = [
    Fault(operation, kind, moment)
    for operation, kind, moment in itertools.product(OPERATIONS, FAULTS, MOMENTS)
    if operation != "read_direct" and can(operation, kind)
]
"""All cells, of what readers need: `read_direct` is for ckptfs cache verify. A run of the suite
takes a part of them, in which each operation meets each kind of fault that is told apart;
CKPTFS_FAULTS=all takes all."""
AT_START = ("make_folders", "open_folder", "lock", "keep_private", "list_folder", "status_of")
"""Operations that a daemon needs at its start: they fail from there on."""
_TOLD_APART = ("ENOSPC", "EIO", "ENOENT", "EMFILE", "short", "torn", "garbage")
CELLS = [
    fault
    for number, fault in enumerate(MATRIX)
    if ALL or (fault.kind in _TOLD_APART and fault.moment == MOMENTS[number * 5 // 16 % 4])
]


@functools.cache
def content_of(name: str, seed: int) -> bytes:
    return pattern(SIZES[name], seed)


def everything_on_disk(directory: Path) -> int:
    """Bytes that objects and trash really take, the directories of both aside."""
    total = 0
    folders = [str(directory / name) for name in ("objects", "trash")]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return total


RARE = "punch", "remove_empty", "will_need"
"""Operations that not every session needs."""


class Scenario:
    """Seeded reads of a store's files, through one cache after the other."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.uncounted_bytes = 0
        self.same_times = False  # whether new versions are many, and mostly of the same time
        self.on_change: Callable[[], None] = lambda: None  # called when the store has changed
        self.chance = random.Random(seed)
        objects = {name: content_of(name, 9) for name in SIZES}
        self.store = FakeStore(objects, mtime_ns=NEVER_SETTLED_NS)

    def check(self, rig: Rig) -> None:
        """The index counts all bytes on the disk, and they stay within the limit."""
        on_disk = everything_on_disk(rig.cache.directory) - self.uncounted_bytes
        assert on_disk <= rig.cache.index.used_bytes
        assert on_disk <= LIMIT

    async def read(self, rig: Rig, file: RemoteFile, offset: int, length: int) -> None:
        """Read some bytes, which must be right."""
        wanted = self.store.content(file.pin.path)
        assert wanted is not None
        for start in range(offset, min(offset + length, len(wanted)), MIB):  # as the kernel asks
            stop = min(start + MIB, offset + length, len(wanted))
            rig.fetcher.access(file, start, stop - start)
            assert await rig.read(file, start, stop - start) == wanted[start:stop]

    async def session(self, plan: Plan | None = None, steps: int = 12) -> None:
        """One daemon's life. Faults begin after its start, which they could end."""
        settings: dict[str, Any] = {
            "cache_bytes_max": LIMIT,
            "in_flight_bytes_max": 2 * MIB,
            "span_bytes_max": MIB,
        }
        if plan and plan.fault.operation in AT_START:
            (self.directory / "cache" / "objects").chmod(0o755)
            plan.active = True
        async with rig_in(self.directory, **settings) as rig:
            if plan:
                plan.active = True
                if plan.fault.operation == "remove_empty":  # at most 256 empty directories
                    self.uncounted_bytes = 256 * 4096
            for name in SIZES:  # what is there is opened
                file = rig.open(self.store, name)
                await self.read(rig, file, 0, 1)
                await rig.quiet()
                rig.fetcher.close(file)
            for _ in range(steps):
                name = self.chance.choice("aabbccde")
                file = rig.open(self.store, name)
                for _ in range(self.chance.randrange(1, 4)):
                    offset = self.chance.randrange(SIZES[name])
                    await self.read(rig, file, offset, self.chance.choice([10, MIB, 3 * MIB]))
                if self.chance.random() < 0.3:
                    await self.read(rig, file, 0, SIZES[name])
                await rig.quiet()
                self.check(rig)
                if self.chance.random() < 0.8:
                    rig.fetcher.close(file)
                if self.chance.random() < 0.2 and not self.same_times:
                    self.store.overwrite(name, content_of(name, self.chance.randrange(5)))
                elif self.chance.random() < (
                    0.7 if self.same_times else 0.2
                ):  # the version changes and neither size nor time
                    mtime_ns = self.store.pin(name).mtime_ns
                    data = content_of(name, self.chance.randrange(5))
                    self.store.overwrite(name, data, mtime_ns=mtime_ns)
                self.on_change()
                if self.chance.random() < 0.3:
                    self._drop_pages()
                if self.chance.random() < 0.2:
                    digest, index = file.key.digest(), rig.cache.index
                    with suppress(OSError):  # the disk may refuse
                        if digest not in rig.cache.opened and (folder := index.evict(digest)):
                            await index.delete(rig.offload.disk, [folder])
                self.check(rig)
            for file in rig.files:
                while file.opened.count:
                    rig.fetcher.close(file)
            self.check(rig)
        if plan:
            plan.active = False

    def _drop_pages(self) -> None:
        """Take the data of all objects out of memory."""
        for path in (self.directory / "cache" / "objects").glob("*/*/data"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("fault", CELLS, ids=lambda fault: "-".join(fault))
async def test_no_fault_of_the_disk_reaches_a_reader(tmp_path: Path, fault: Fault) -> None:
    """The fault matrix: a good session, one with the fault, and one where it is gone again."""
    scenario = Scenario(tmp_path, seed=MATRIX.index(fault))
    with planned(fault) as plan:
        await scenario.session(steps=2)
        try:
            await scenario.session(plan, steps=6)
        except ConfigError as error:  # it cannot start, and says what to do
            if fault.operation not in AT_START or "set cache_dir" not in str(error):
                raise
            plan.active = False
        if fault.moment == "always" and fault.operation not in RARE:
            assert plan.hits
        await scenario.session(steps=2)
    async with rig_in(
        tmp_path, cache_bytes_max=LIMIT, in_flight_bytes_max=MIB
    ) as rig:  # the cache is used again
        file = rig.open(scenario.store, "b")
        await scenario.read(rig, file, 0, SIZES["b"])
        await rig.quiet()
        assert rig.cache.stored_bytes(file.key.digest()) == SIZES["b"]
