"""The cases in which little or no content is read, and the one with a prefetch beside."""

from __future__ import annotations

import os
import statistics
import subprocess
import time

from benchmark.contenders import CKPTFS, LOCAL, Ready, pinned
from benchmark.node import CKPTFS as CKPTFS_COMMAND
from benchmark.node import Node, running_node
from benchmark.results import amount, ratio
from benchmark.run import Run, WorkError, working
from benchmark.stores import BUCKET, FEW_FILES, MANY_FILES, MIB


def tree(run: Run) -> None:
    """Find and stat all files of a checkpoint with many, a second time."""
    case = "tree"
    job = {"task": "tree", "again": 2}

    def second(ready: Ready) -> float:
        with working(ready, job) as worker:
            return min(worker.go(MANY_FILES)["each_s"][1:])

    with pinned(run.store, run.temp, "many") as ready:
        local = Ready({"way": "place", "endpoint": "", "place": str(run.objects.folder)})
        local = Ready(local.job | {"name": "many"})
        taken = run.alternate(
            case, {LOCAL: lambda: second(local), CKPTFS.name: lambda: second(ready)}
        )
    run.add_panel(case, f"find and stat {MANY_FILES:,} files, the second time", taken)
    own, base = taken.get(CKPTFS.name), taken.get(LOCAL)
    run.report.goals.append(ratio(case, "ckptfs / local", own, base, at_most=3))


def attach(run: Run) -> None:
    """Until `as_directory()` returns."""
    case, times = "attach", 10
    few = {"way": "attaching", "name": "few", "times": times} | run.store.job()
    many = few | {"name": "many", "times": 1}
    first: list[float] = []

    def attached() -> float:
        with pinned(run.store, run.temp, "few") as ready, working(ready, few) as worker:
            lease = os.open(f"{ready.job['place']}/{ready.job['name']}", os.O_RDONLY)
            try:
                ms = worker.go(FEW_FILES)["ms"]
            finally:
                os.close(lease)
            first.append(ms[0])
            return statistics.median(ms[1:])

    def unused() -> float:
        with pinned(run.store, run.temp, "few") as ready, working(ready, few) as worker:
            return statistics.median(worker.go(FEW_FILES)["ms"][1:])

    over_listing: list[float] = []

    def running() -> float:
        with CKPTFS.cold(run.store, run.temp) as ready, working(ready, few) as worker:
            result = worker.go(FEW_FILES)
            bare = statistics.median(result["bare_ms"][1:])
            over_listing.append(statistics.median(result["ms"][1:]) - bare)
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
        {
            "attached already": attached,
            "attached without users: listed again": unused,
            "daemon runs": running,
            "no daemon": absent,
        },
    )
    taken_many = run.alternate(case, {CKPTFS.name: of_many}, min(run.rounds, 3))
    if first:
        taken["attached already, first of a process"] = first
    run.add_panel(case, f"as_directory() of {FEW_FILES} files", taken, "ms")
    series = {"bare listing": listed_ms} | taken_many
    run.add_panel(case, f"as_directory() of {MANY_FILES:,} files", series, "ms")
    run.report.goals += [
        amount(case, "attached already", "ms", taken.get("attached already"), at_most=3),
        amount(case, "daemon runs: over a bare listing", "ms", over_listing, at_most=10),
        amount(case, "no daemon", "ms", taken.get("no daemon"), at_most=350),
    ]


def prefetch(run: Run) -> None:
    """Cold sequential read while another checkpoint is being prefetched, and without that."""
    case = "prefetch"

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
    run.add_panel(case, "cold sequential read", taken)
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


def _own(run: Run, node: Node, name: str) -> Ready:
    job = {"way": "ckptfs", "name": name} | run.store.job()
    return Ready(job, node.environment, node)
