"""Plans: half of a model's tensors, in an order of their own, by a process that has to import."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from benchmark.contenders import CKPTFS
from benchmark.results import amount, ratio
from benchmark.run import working
from benchmark.stores import BUCKET, Store

if TYPE_CHECKING:
    from pathlib import Path

    from benchmark.contenders import Ready
    from benchmark.run import Run

PLANNED = f"{CKPTFS.name}, by a plan"


def plan(run: Run) -> None:
    """The next checkpoint of a job, restored with and without the plan of the one before; from
    `as_directory()` to the last tensor, with the import of torch in between."""
    case = "plan"
    store = run.capped or run.store
    names = _picked(run)
    job: dict[str, Any] = {"name": "model", "tensors": names}
    check, needed_bytes = _sum_of(run, names)
    file = run.temp / "plan.json"
    _make_plan(run, store, job, check, file)
    spare: list[float] = []

    def count(ready: Ready) -> None:
        assert ready.node
        fetched_bytes = ready.node.status()["fetched_bytes"]
        spare.append(100 * (fetched_bytes - needed_bytes) / needed_bytes)

    planned = run.cold(
        CKPTFS, "restore", job | {"plan": os.fspath(file)}, check, store=store, after=count
    )
    plain = run.cold(CKPTFS, "restore", job, check, store=store)
    taken = run.alternate(case, {CKPTFS.name: plain, PLANNED: planned})
    where = "capped store" if run.capped else "open store"
    mib = needed_bytes >> 20
    run.add_panel(case, f"import torch and restore {mib} MiB of tensors, {where}", taken)
    without, with_ = taken.get(CKPTFS.name), taken.get(PLANNED)
    run.report.goals += [
        ratio(case, "time with a plan / without", with_, without, at_most=0.6),
        amount(case, "fetched by the plan, and not needed", " %", spare, at_most=5),
    ]


def _picked(run: Run) -> list[tuple[str, str]]:
    """Every second tensor of each shard, the last ones first: file and name."""
    by_shard: list[list[tuple[str, str]]] = []
    for shard in run.objects.shards():
        with safe_open(run.objects.folder / "model" / shard, framework="np") as file:
            by_shard.append([(shard, name) for name in sorted(file.keys())[::2]])
    rows = [list(row) for row in zip(*by_shard, strict=True)]
    return [each for row in reversed(rows) for each in row]


def _sum_of(run: Run, names: list[tuple[str, str]]) -> tuple[int, int]:
    """The sum of all their numbers, and their bytes."""
    check = size = 0
    for shard, name in names:
        with safe_open(run.objects.folder / "model" / shard, framework="np") as file:
            tensor = file.get_tensor(name)
        check, size = check + int(tensor.sum()), size + tensor.nbytes
    return check, size


def _make_plan(run: Run, store: Store, job: dict[str, Any], check: int, file: Path) -> None:
    with (
        CKPTFS.cold(store, run.temp) as ready,
        working(ready, {"task": "restore"} | job) as worker,
    ):
        worker.go(check)
        ready.node.cli("plan", "save", store.uri(f"{BUCKET}/model"), "--output", os.fspath(file))
