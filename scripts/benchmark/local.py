"""The cases in which the bytes are on this node already, or are no content."""

from __future__ import annotations

import os
import random as random_numbers
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.contenders import (
    CKPTFS,
    LOCAL,
    RCLONE_FULL,
    Ready,
    ckptfs_node,
    local_directory,
)
from benchmark.node import CKPTFS as CKPTFS_COMMAND
from benchmark.node import knows_command, knows_setting, running_node
from benchmark.remote import add_panel
from benchmark.results import amount, ratio
from benchmark.run import Run, WorkError, wait_quiet, working
from benchmark.stores import BUCKET, FEW_FILES, MANY_FILES, MIB, flush

if TYPE_CHECKING:
    from collections.abc import Iterator

GB = 1e9
PAGE_BYTES = 4096
WARM_READS = 2000
COLD_READS = 32


def warm(run: Run) -> None:
    """What is complete in the cache, through passthrough where there is such."""
    case = "warm"
    with _filled(run) as ready:
        state = ready.node.status().get("passthrough", "not known to this version")
        run.report.note(case, f"passthrough: {state}")
        contenders = {CKPTFS.name: ready, LOCAL: _local(run)}
        for task, title in (("sequential", "read in sequence"), ("mapped", "touch by mmap")):
            measures = {
                name: lambda each=each, task=task: _gb_per_s(run, each, task)
                for name, each in contenders.items()
            }
            taken = run.alternate(case, measures)
            add_panel(run, case, f"{title}, warm", taken, "GB/s")
            own, local = taken.get(CKPTFS.name), taken.get(LOCAL)
            goal = ratio(case, f"{title}: ckptfs / local", own, local, at_least=0.9)
            run.report.goals.append(goal)
        measures = {
            name: lambda each=each: _median_us(run, each) for name, each in contenders.items()
        }
        taken = run.alternate(case, measures)
        add_panel(run, case, "random 4 KiB, warm, median", taken, "µs")
        own, local = taken.get(CKPTFS.name), taken.get(LOCAL)
        goal = ratio(case, "random: speed of ckptfs / local", local, own, at_least=0.9)
        grown = run.alternate(case, {"in memory": lambda: _memory_share(run, ready)}, 1)
        once = amount(case, "memory taken / bytes read", "×", grown.get("in memory"), at_most=1.1)
        run.report.goals += [goal, once]


def warm_plain(run: Run) -> None:
    """The same without passthrough, and without what the kernel keeps of the mount."""
    case = "warm-plain"
    with _filled(run, plain=True) as ready, RCLONE_FULL.cold(run.store, run.temp) as mounted:
        rclone = Ready(mounted.job | {"name": "large"})
        _gb_per_s(run, rclone, "sequential")  # fills its cache
        contenders = {CKPTFS.name: ready, LOCAL: _local(run), RCLONE_FULL.name: rclone}

        def measure(each: Ready) -> float:
            _drop_mounted(each)
            return _gb_per_s(run, each, "sequential")

        taken = run.alternate(
            case,
            {name: lambda each=each: measure(each) for name, each in contenders.items()},
        )
    add_panel(run, case, "read in sequence, cached on disk, not by the kernel", taken, "GB/s")
    own, local = taken.get(CKPTFS.name), taken.get(LOCAL)
    if local and sorted(local)[len(local) // 2] < 6:  # half of it is less than 3 GB/s
        goal = ratio(case, "ckptfs / local", own, local, at_least=0.5)
    else:
        goal = amount(case, "ckptfs", "GB/s", own, at_least=3)
    rclone = taken.get(RCLONE_FULL.name)
    run.report.goals += [
        goal,
        ratio(case, "ckptfs / rclone mount, full", own, rclone, at_least=2),
    ]


def random(run: Run) -> None:
    """Pages of 4 KiB here and there, cold and warm."""
    case = "random"
    job = run.large() | {"task": "random", "offsets": _offsets(run, COLD_READS)}

    def bare() -> float:
        ready = Ready({"way": "bare_ranges", "endpoint": run.store.endpoint})
        with working(ready, job) as worker:
            return _median(worker.go()["us"]) / 1e3

    def cold() -> float:
        with CKPTFS.cold(run.store, run.temp) as ready, working(ready, job) as worker:
            return _median(worker.go()["us"]) / 1e3

    bare_name = "one request of 1 MiB"
    taken = run.alternate(case, {bare_name: bare, CKPTFS.name: cold})
    add_panel(run, case, "random 4 KiB, cold, median", taken, "ms")
    own, base = taken.get(CKPTFS.name), taken.get(bare_name)
    run.report.goals.append(ratio(case, "cold: ckptfs / request of 1 MiB", own, base, at_most=1.15))
    with _filled(run, plain=True) as ready:

        def again() -> float:
            _drop_mounted(ready)
            return _median_us(run, ready)

        taken = run.alternate(
            case, {CKPTFS.name: again, LOCAL: lambda: _median_us(run, _local(run))}
        )
    add_panel(run, case, "random 4 KiB, cached on disk, not by the kernel, median", taken, "µs")
    run.report.goals.append(
        amount(case, "warm, without the kernel's cache", "µs", taken.get(CKPTFS.name), at_most=150)
    )


def tree(run: Run) -> None:
    """Find and stat all files of a checkpoint with many, a second time."""
    case = "tree"
    job = {"task": "tree", "again": 2}

    def second(ready: Ready) -> float:
        with working(ready, job) as worker:
            return min(worker.go(MANY_FILES)["each_s"][1:])

    with _pinned(run, "many") as ready:
        local = Ready({"way": "place", "endpoint": "", "place": str(run.objects.folder)})
        local = Ready(local.job | {"name": "many"})
        taken = run.alternate(
            case, {LOCAL: lambda: second(local), CKPTFS.name: lambda: second(ready)}
        )
    add_panel(run, case, f"find and stat {MANY_FILES:,} files, the second time", taken)
    own, base = taken.get(CKPTFS.name), taken.get(LOCAL)
    run.report.goals.append(ratio(case, "ckptfs / local", own, base, at_most=3))


def attach(run: Run) -> None:
    """Until `as_directory()` returns."""
    case, times = "attach", 10
    few = {"way": "attaching", "name": "few", "times": times, "endpoint": run.store.endpoint}
    many = few | {"name": "many", "times": 1}
    first: list[float] = []

    def attached() -> float:
        with _pinned(run, "few") as ready, working(ready, few) as worker:
            ms = worker.go(FEW_FILES)["ms"]
            first.append(ms[0])
            return _median(ms[1:])

    over_listing: list[float] = []

    def running() -> float:
        with CKPTFS.cold(run.store, run.temp) as ready, working(ready, few) as worker:
            result = worker.go(FEW_FILES)
            bare = _median(result["bare_ms"][1:])
            over_listing.append(_median(result["ms"][1:]) - bare)
            return bare + over_listing[-1]

    def absent() -> float:
        with (
            running_node(run.temp, start=False) as node,
            working(_own(run, node, "few"), {"task": "nothing"}) as worker,
        ):
            return worker.go()["path_s"] * 1e3

    listed_ms: list[float] = []

    def of_many() -> float:
        with CKPTFS.cold(run.store, run.temp) as ready, working(ready, many) as worker:
            result = worker.go(MANY_FILES)
            listed_ms.append(result["bare_ms"][0])
            return result["ms"][0]

    taken = run.alternate(
        case,
        {"attached already": attached, "daemon runs": running, "no daemon": absent},
    )
    taken_many = run.alternate(case, {CKPTFS.name: of_many}, min(run.rounds, 3))
    if first:
        taken["attached already, first of a process"] = first
    add_panel(run, case, f"as_directory() of {FEW_FILES} files", taken, "ms")
    series = {"bare listing": listed_ms} | taken_many
    add_panel(run, case, f"as_directory() of {MANY_FILES:,} files", series, "ms")
    run.report.goals += [
        amount(case, "attached already", "ms", taken.get("attached already"), at_most=3),
        amount(case, "daemon runs: over a bare listing", "ms", over_listing, at_most=10),
        amount(case, "no daemon", "ms", taken.get("no daemon"), at_most=800),
    ]


def prefetch(run: Run) -> None:
    """Cold sequential read while another checkpoint is being prefetched, and without that."""
    case = "prefetch"
    if not knows_command("prefetch"):
        run.report.note(case, "not measured: this version has no `ckptfs prefetch`")
        return

    def read(*, disturbed: bool) -> float:
        with CKPTFS.cold(run.store, run.temp) as ready:
            job = run.large() | {"task": "sequential"}
            with working(ready, job) as worker:
                other = None
                if disturbed:
                    command = [CKPTFS_COMMAND, "prefetch", run.store.uri(f"{BUCKET}/model")]
                    environment = os.environ | ready.environment
                    other = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
                    _wait_fetching(ready)
                try:
                    return worker.go(run.objects.large_check)["seconds"]
                finally:
                    if other:
                        other.kill()
                        other.wait()

    taken = run.alternate(
        case,
        {"alone": lambda: read(disturbed=False), "beside a prefetch": lambda: read(disturbed=True)},
    )
    add_panel(run, case, "cold sequential read", taken)
    beside, alone = taken.get("beside a prefetch"), taken.get("alone")
    run.report.goals.append(ratio(case, "beside a prefetch / alone", beside, alone, at_most=1.1))


def _wait_fetching(ready: Ready) -> None:
    """Wait until the prefetch has begun."""
    assert ready.node
    deadline_s = time.monotonic() + 10
    while ready.node.status()["fetched_bytes"] < MIB:
        if time.monotonic() > deadline_s:
            raise WorkError("the prefetch has not begun within 10 s")
        time.sleep(0.01)


def _own(run: Run, node: Any, name: str) -> Ready:
    job = {"way": "ckptfs", "endpoint": run.store.endpoint, "name": name}
    return Ready(job, node.environment, node)


@contextmanager
def _pinned(run: Run, name: str, **settings: Any) -> Iterator[Ready]:
    """A node with the checkpoint attached until the end; jobs use its directory as it is."""
    with ckptfs_node(run.store, run.temp, **settings) as ready:
        assert ready.node
        path = Path(ready.node.cli("attach", run.store.uri(f"{BUCKET}/{name}")).strip())
        job = {"way": "place", "endpoint": "", "place": str(path.parent), "name": path.name}
        yield Ready(job, ready.environment, ready.node)


@contextmanager
def _filled(run: Run, *, plain: bool = False) -> Iterator[Ready]:
    """A node with the large file complete in its cache, and that in memory.

    With `plain`, without passthrough, where this version knows it.
    """
    settings = {"passthrough": False} if plain and knows_setting("passthrough") else {}
    with _pinned(run, "large", **settings) as ready:
        _gb_per_s(run, ready, "sequential")
        wait_quiet(ready)
        assert ready.node
        for data in ready.node.data_files():
            flush(data)  # what is not written yet cannot be dropped, and is written as we measure
        yield ready


def _local(run: Run) -> Ready:
    with local_directory(run.objects.folder) as ready:
        return Ready(ready.job | {"name": "large"})


def _gb_per_s(run: Run, ready: Ready, task: str) -> float:
    job = {"file": "data.bin", "task": task}
    with working(ready, job) as worker:
        result = worker.go(run.objects.large_check)
    return run.objects.large_bytes / (result["seconds"] - result["path_s"]) / GB


def _median_us(run: Run, ready: Ready) -> float:
    job = {"file": "data.bin", "task": "random", "offsets": _offsets(run, WARM_READS)}
    with working(ready, job) as worker:
        return _median(worker.go()["us"])


def _offsets(run: Run, count: int) -> list[int]:
    """Offsets of pages, each in a block of its own as long as there are enough."""
    numbers = random_numbers.Random(count)
    blocks = run.objects.large_bytes // MIB
    picked = numbers.sample(range(blocks), min(count, blocks))
    picked += numbers.choices(range(blocks), k=count - len(picked))
    return [block * MIB + numbers.randrange(MIB // PAGE_BYTES) * PAGE_BYTES for block in picked]


def _drop(path: Path) -> None:
    """Let the kernel forget what it has cached of one file."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _drop_mounted(ready: Ready) -> None:
    """Let the kernel forget what it has of a mounted file, and have its cache's own in memory."""
    path = Path(ready.job["place"], ready.job["name"], "data.bin")
    if os.path.ismount(path.parents[1]):
        _drop(path)
    if ready.node:
        for data in ready.node.data_files():
            _read_through(data)


def _read_through(path: Path) -> None:
    buffer = bytearray(8 * MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _memory_share(run: Run, ready: Ready) -> float:
    """How much the page cache grows when the file is read that was nowhere in it, per byte."""
    assert ready.node
    _drop(Path(ready.job["place"], ready.job["name"], "data.bin"))
    for data in ready.node.data_files():
        _drop(data)
    with working(ready, {"file": "data.bin", "task": "sequential"}) as worker:
        before = _cached_bytes()
        worker.go(run.objects.large_check)
        return (_cached_bytes() - before) / run.objects.large_bytes


def _cached_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Cached:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/meminfo has no line Cached")


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
