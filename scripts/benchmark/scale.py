"""The case of many readers of as many files, from a server that costs little."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from support.serverbase import free_port

from benchmark.contenders import CKPTFS, ckptfs_node
from benchmark.nginx import Site, serving
from benchmark.run import WorkError, working
from benchmark.stores import shard_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmark.run import Run

GB = 1e9
CPUS_OF_LARGE = 8
READERS, FEW_READERS = (1, 8, 32), (1, 2, 4)
FOLDER = "scale"
ROUNDS = 3


def scale(run: Run) -> None:
    """Many readers, each of a file of its own, cold: GB/s of all together."""
    case, cpus = "scale", len(os.sched_getaffinity(0))
    counts = readers_for(cpus)
    if counts != READERS:
        few, many = (", ".join(map(str, each)) for each in (counts, READERS))
        run.report.note(
            case, f"{cpus} CPUs: the case runs small, with {few} readers instead of {many}"
        )
    size = _make_files(run, counts[-1])
    with _static(run) as endpoint:

        def measure(count: int) -> float:
            with ckptfs_node(run.store, run.temp) as ready, ExitStack() as stack:
                assert ready.node
                path = ready.node.cli("attach", f"http://{endpoint}/{FOLDER}").strip()
                place, _, name = path.rpartition("/")
                job = {"way": "place", "place": place, "name": name, "task": "sequential"}
                workers = [
                    stack.enter_context(working(ready, job | {"file": file_name(index)}))
                    for index in range(count)
                ]
                ready.node.wait_idle()
                start_s = time.perf_counter()
                for worker in workers:
                    worker.start()
                checks = {worker.result()["check"] for worker in workers}
                taken_s = time.perf_counter() - start_s
            if len(checks) != 1:
                raise WorkError("the readers have read different bytes")
            return count * size / taken_s / GB

        names = {f"{CKPTFS.name}, {n} reader{'s' if n > 1 else ''}": n for n in counts}
        measures = {name: lambda n=n: measure(n) for name, n in names.items()}
        taken = run.alternate(case, measures, min(run.rounds, ROUNDS))
    run.add_panel(case, f"read a file of {size >> 20} MiB each, cold, static files", taken, "GB/s")


def readers_for(cpus: int) -> tuple[int, ...]:
    """The numbers of readers on a machine with so many CPUs."""
    return READERS if cpus >= CPUS_OF_LARGE else FEW_READERS


def file_name(index: int) -> str:
    return f"{index:02}.bin"


def _make_files(run: Run, count: int) -> int:
    """Make `count` names of one shard of the model; its size. They are links, which cost no disk
    and little memory."""
    folder = run.objects.folder.parent / FOLDER / FOLDER
    folder.mkdir(parents=True)
    shard = run.objects.folder / "model" / shard_name(0)
    for index in range(count):
        os.link(shard, folder / file_name(index))
    return shard.stat().st_size


@contextmanager
def _static(run: Run) -> Iterator[str]:
    """nginx as an HTTP store of these files; its address."""
    site = Site(f"127.0.0.1:{free_port()}", root=_root(run), workers="auto")
    with serving(site, run.temp / "nginx-scale"):
        yield site.endpoint


def _root(run: Run) -> Path:
    return run.objects.folder.parent / FOLDER
