"""The cases in which the bytes are on this node already."""

from __future__ import annotations

import os
import random as random_numbers
import statistics
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.contenders import CKPTFS, LOCAL, RCLONE_FULL, Ready, local_directory, pinned
from benchmark.results import amount, ratio
from benchmark.run import Run, wait_quiet, working
from benchmark.stores import BUCKET, MIB, flush

if TYPE_CHECKING:
    from collections.abc import Iterator

GB = 1e9
PAGE_BYTES = 4096
WARM_READS = 2000
COLD_READS = 32


def warm(run: Run) -> None:
    """Reads of complete files of the cache, with passthrough if available."""
    case = "warm"
    with filled(run) as ready:
        assert ready.node
        state = ready.node.status().get("passthrough", "not known to this version")
        run.report.note(case, f"passthrough: {state}")
        contenders = {CKPTFS.name: ready, LOCAL: _local(run)}
        for task, title in (("sequential", "read in sequence"), ("mapped", "touch by mmap")):
            measures = {
                name: lambda each=each, task=task: _gb_per_s(run, each, task)
                for name, each in contenders.items()
            }
            taken = run.alternate(case, measures)
            run.add_panel(case, f"{title}, warm", taken, "GB/s")
            own, local = taken.get(CKPTFS.name), taken.get(LOCAL)
            goal = ratio(case, f"{title}: ckptfs / local", own, local, at_least=0.9)
            run.report.goals.append(goal)
        measures = {
            name: lambda each=each: _median_us(run, each) for name, each in contenders.items()
        }
        taken = run.alternate(case, measures)
        run.add_panel(case, "random 4 KiB, warm, median", taken, "µs")
        own, local = taken.get(CKPTFS.name), taken.get(LOCAL)
        goal = ratio(case, "random: speed of ckptfs / local", local, own, at_least=0.9)
        grown = run.alternate(case, {"in memory": lambda: _memory_share(run, ready)})
        once = amount(case, "memory taken / bytes read", "×", grown.get("in memory"), at_most=1.1)
        run.report.goals += [goal, once]


def warm_plain(run: Run) -> None:
    """The same without passthrough, and without what the kernel keeps of the mount."""
    case = "warm-plain"
    with filled(run, passthrough=False) as ready, RCLONE_FULL.cold(run.store, run.temp) as mounted:
        rclone = Ready(mounted.job | {"name": "large"})
        _gb_per_s(run, rclone, "sequential")  # fills its cache
        contenders = {CKPTFS.name: ready, LOCAL: _local(run), RCLONE_FULL.name: rclone}

        def measure(each: Ready) -> float:
            drop_mounted(each)
            return _gb_per_s(run, each, "sequential")

        taken = run.alternate(
            case,
            {name: lambda each=each: measure(each) for name, each in contenders.items()},
        )
    run.add_panel(case, "read in sequence, cached on disk, not by the kernel", taken, "GB/s")
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
        ready = Ready({"way": "bare_ranges"} | run.store.job())
        with working(ready, job) as worker:
            return statistics.median(worker.go()["us"]) / 1e3

    def cold() -> float:
        with CKPTFS.cold(run.store, run.temp) as ready, working(ready, job) as worker:
            return statistics.median(worker.go()["us"]) / 1e3

    bare_name = "one request of 1 MiB"
    taken = run.alternate(case, {bare_name: bare, CKPTFS.name: cold})
    run.add_panel(case, "random 4 KiB, cold, median", taken, "ms")
    own, base = taken.get(CKPTFS.name), taken.get(bare_name)
    run.report.goals.append(ratio(case, "cold: ckptfs / request of 1 MiB", own, base, at_most=1.4))
    with filled(run, passthrough=False) as ready:

        def again() -> float:
            drop_mounted(ready)
            return _median_us(run, ready)

        taken = run.alternate(
            case, {CKPTFS.name: again, LOCAL: lambda: _median_us(run, _local(run))}
        )
    run.add_panel(case, "random 4 KiB, cached on disk, not by the kernel, median", taken, "µs")
    run.report.goals.append(
        amount(case, "warm, without the kernel's cache", "µs", taken.get(CKPTFS.name), at_most=150)
    )


@contextmanager
def filled(run: Run, *, passthrough: bool = True, **settings: Any) -> Iterator[Ready]:
    """A node with the large file complete in its cache and in memory."""
    settings["passthrough"] = passthrough
    with pinned(run.store, run.temp, "large", **settings) as ready:
        _gb_per_s(run, ready, "sequential")
        wait_quiet(ready)
        assert ready.node
        for data in ready.node.data_files():
            flush(data)  # what is not written yet cannot be dropped, and is written as we measure
        if passthrough:  # as the next job on the node finds it: attached anew, and then in memory
            uri = run.store.uri(f"{BUCKET}/large")
            ready.node.cli("detach", uri)
            ready.node.cli("attach", uri)
            _gb_per_s(run, ready, "sequential")
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
        return statistics.median(worker.go()["us"])


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


def drop_mounted(ready: Ready) -> None:
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
