"""The cases in which the bytes come from the store."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmark.contenders import (
    CKPTFS,
    RAW,
    RAY,
    RCLONE_FULL,
    RCLONE_OFF,
    RUNAI,
    S3FS,
    S3TORCH,
    S5CMD,
)
from benchmark.results import amount, ratio
from benchmark.run import Run, WorkError, nothing, wait_quiet, working
from benchmark.stores import MIB, SMALL_BYTES, SMALL_FILES
from ckptfs._model.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmark.contenders import Contender, Ready
    from benchmark.stores import Store

MB, GB = 1e6, 1e9
READERS = 8


def sequential(run: Run) -> None:
    """Cold sequential read of one large file, one reader."""
    case, size = "sequential", run.objects.large_bytes
    cpu_s: list[float] = []

    def before(ready: Ready) -> None:
        assert ready.node
        cpu_s.append(-ready.node.cpu_s())

    def after(ready: Ready) -> None:
        assert ready.node
        cpu_s[-1] = (cpu_s[-1] + ready.node.cpu_s()) / (size / GB)

    contenders = (RAW, CKPTFS, RCLONE_FULL, RCLONE_OFF, S3FS)
    measures = {
        each.name: run.cold(
            each,
            "sequential",
            run.large(),
            run.objects.large_check,
            before=before if each is CKPTFS else nothing,
            after=after if each is CKPTFS else nothing,
        )
        for each in contenders
    }
    taken = run.alternate(case, measures)
    run.add_panel(case, f"read {size >> 20} MiB cold, one reader", taken)
    raw, own = taken.get(RAW.name), taken.get(CKPTFS.name)
    peers = best(taken, RCLONE_FULL, RCLONE_OFF, S3FS)
    run.report.goals += [
        ratio(case, "speed of ckptfs / raw", raw, own, at_least=0.6),
        ratio(case, "speed of ckptfs / best of rclone mount, s3fs", peers, own, at_least=3),
        amount(case, "CPU of the daemon per GB read cold", "s", cpu_s, at_most=1.0),
    ]


def load(run: Run) -> None:
    """Cold load of all tensors of the model."""
    case = "load"
    memory: dict[str, list[float]] = {"idle": [], "loaded": []}
    with CKPTFS.cold(run.store, run.temp) as ready:
        memory["idle"].append(ready.node.resident_bytes() / MB)

    def after(ready: Ready) -> None:
        assert ready.node
        memory["loaded"].append(ready.node.resident_bytes(peak=True) / MB)

    taken = _loads(run, case, None, after)
    own = taken.get(CKPTFS.name)
    in_flight = Config(socket="/", mount="/", cache_dir="/").in_flight_bytes_max / MB
    run.report.goals += [
        ratio(case, "Ray's way / ckptfs", taken.get(RAY.name), own, at_least=2),
        *(
            ratio(case, f"{each.name} / ckptfs", taken.get(each.name), own, at_least=1)
            for each in (S5CMD, S3TORCH, RUNAI)
        ),
        amount(case, "memory of the daemon, idle", "MB", memory["idle"], at_most=120),
        amount(
            case,
            "most memory of the daemon, loaded",
            "MB",
            memory["loaded"],
            at_most=round(120 + in_flight),
        ),
    ]


def capped(run: Run) -> None:
    """The same where each connection has a limit, and each request a latency."""
    case = "capped"
    taken = _loads(run, case, run.capped, nothing) if run.capped else {}
    own = taken.get(CKPTFS.name)
    run.report.goals += [
        ratio(case, "Ray's way / ckptfs", taken.get(RAY.name), own, at_least=8),
        ratio(case, "speed of ckptfs / raw", taken.get(RAW.name), own, at_least=0.8),
    ]


def _loads(
    run: Run, case: str, store: Store | None, after: Callable[[Ready], None]
) -> dict[str, list[float]]:
    contenders = (RAW, CKPTFS, RAY, RCLONE_FULL, S3FS, S5CMD, S3TORCH, RUNAI)
    measures = {
        each.name: run.cold(
            each,
            "load",
            run.model(),
            run.objects.model_check,
            store=store,
            after=after if each is CKPTFS else nothing,
        )
        for each in contenders
    }
    taken = run.alternate(case, measures, min(run.rounds, 3) if store else None)
    where = "capped store" if store else "open store"
    run.add_panel(case, f"load {run.objects.large_bytes >> 20} MiB in 4 shards, {where}", taken)
    return taken


def tensor(run: Run) -> None:
    """One tensor of the model, cold, and what is served for it."""
    case = "tensor"
    contenders = (CKPTFS, RAY, RCLONE_FULL, S3FS)
    measures = {
        each.name: run.cold(each, "tensor", run.model(), run.objects.tensor_check)
        for each in contenders
    }
    taken = run.alternate(case, measures)
    run.add_panel(case, "load one tensor of 32 MiB", taken)

    store, proxy = run.counted
    served: list[float] = []

    def count() -> float:
        with (
            CKPTFS.cold(store, run.temp) as ready,
            working(ready, run.model() | {"task": "tensor"}) as worker,
        ):
            proxy.reset()
            worker.go(run.objects.tensor_check)
            wait_quiet(ready)
            served.append(proxy.snapshot().bytes_to_client / MIB)
        return served[-1]

    run.alternate(case, {CKPTFS.name: count}, 1)
    needed = needed_bytes(run) / MIB
    own = taken.get(CKPTFS.name)
    run.report.note(case, f"the tensor and its file's header are {needed:.2f} MiB")
    run.report.goals += [
        ratio(case, "Ray's way / ckptfs", taken.get(RAY.name), own, at_least=10),
        amount(case, "served for it", "MiB", served, at_most=round(1.1 * needed + 1, 1)),
    ]


def needed_bytes(run: Run) -> int:
    """Bytes that a load of the tensor needs: those of the header and the tensor itself."""
    with (run.objects.folder / "model" / run.objects.tensor_shard).open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(header_bytes))[run.objects.tensor]["data_offsets"]
    return 8 + header_bytes + end - start


def eight(run: Run) -> None:
    """Eight processes read the whole model at the same time, cold, against one."""
    case, shards = "eight", run.objects.shards()
    sizes = sum((run.objects.folder / "model" / shard).stat().st_size for shard in shards)

    def readers(count: int, store: Store = run.store) -> float:
        with CKPTFS.cold(store, run.temp) as ready, ExitStack() as stack:
            job = run.model() | {"task": "whole"}
            workers = [stack.enter_context(working(ready, job)) for _ in range(count)]
            start_s = time.perf_counter()
            for worker in workers:
                worker.start()
            checks = {worker.result()["check"] for worker in workers}
            if len(checks) > 1:
                raise WorkError("the readers have read different bytes")
            return time.perf_counter() - start_s

    one, many = "one process", f"{READERS} processes"
    taken = run.alternate(case, {one: lambda: readers(1), many: lambda: readers(READERS)})
    run.add_panel(case, "read the whole model cold", taken)
    store, proxy = run.counted
    served: list[float] = []

    def count() -> float:
        proxy.reset()
        readers(READERS, store)
        served.append(proxy.snapshot().bytes_to_client / sizes)
        return served[-1]

    run.alternate(case, {many: count}, 1)
    run.report.goals += [
        ratio(case, f"{many} / one", taken.get(many), taken.get(one), at_most=1.3),
        amount(case, "served / size of the model", "×", served, at_most=1.02),
    ]


def small(run: Run) -> None:
    """Many small files, cold, one after the other."""
    case, check = "small", SMALL_FILES * SMALL_BYTES
    job = {"name": "small", "endpoint": run.store.endpoint}

    def bare() -> float:
        with (
            RAW.cold(run.store, run.temp) as ready,
            working(ready, job | {"way": "bare_files"}) as worker,
        ):
            return worker.go(check)["seconds"]

    contenders = (CKPTFS, RCLONE_FULL, S3FS)
    measures = {"pyarrow": bare} | {
        each.name: run.cold(each, "files", job, check) for each in contenders
    }
    taken = run.alternate(case, measures, max(1, run.rounds // 2))
    run.add_panel(case, f"read {SMALL_FILES} files of 10 kB cold", taken)


def best(taken: dict[str, list[float]], *contenders: Contender) -> list[float] | None:
    """The series with the least median of these."""
    found = [taken[each.name] for each in contenders if taken.get(each.name)]
    return min(found, key=lambda series: sorted(series)[len(series) // 2]) if found else None
