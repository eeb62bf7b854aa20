"""The cases in which bytes come from the store: one file, one tensor, many readers, small files."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmark.contenders import CKPTFS, RAW, RAY, RCLONE_FULL, RCLONE_OFF, S3FS
from benchmark.results import amount, best, ratio
from benchmark.run import Run, WorkError, wait_quiet, working
from benchmark.stores import MIB, SMALL_BYTES, SMALL_FILES

if TYPE_CHECKING:
    from benchmark.contenders import Contender, Ready
    from benchmark.results import Goal
    from benchmark.stores import Store

GIB = 1 << 30
READERS = 8
CPU_OF_DAEMON = "CPU of all processes of the daemon per GiB read cold"


def sequential(run: Run) -> None:
    """Cold sequential read of one large file, one reader."""
    case = "sequential"
    taken, cpu_s = read_large(run, case, run.store, (RAW, CKPTFS, RCLONE_FULL, RCLONE_OFF, S3FS))
    raw, own = taken.get(RAW.name), taken.get(CKPTFS.name)
    peers = best(taken, RCLONE_FULL.name, RCLONE_OFF.name, S3FS.name)
    run.report.goals += [
        ratio(case, "speed of ckptfs / raw", raw, own, at_least=0.6),
        ratio(case, "speed of ckptfs / best of rclone mount, s3fs", peers, own, at_least=3),
        amount(case, CPU_OF_DAEMON, "s", cpu_s, at_most=0.75),
    ]


def sequential_tls(run: Run) -> None:
    """The same over HTTPS."""
    case = "sequential-tls"
    taken, cpu_s = read_large(run, case, run.tls, (RAW, CKPTFS, RCLONE_FULL, S3FS))
    run.report.goals += tls_goals(case, taken, cpu_s)


def tls_goals(case: str, taken: dict[str, list[float]], cpu_s: list[float]) -> list[Goal]:
    """The goals for one reader of the large file over HTTPS, from the results of `read_large`."""
    return [
        ratio(
            case, "speed of ckptfs / raw", taken.get(RAW.name), taken.get(CKPTFS.name), at_least=0.8
        ),
        amount(case, CPU_OF_DAEMON, "s", cpu_s, at_most=1.1),
    ]


def read_large(
    run: Run,
    case: str,
    store: Store | None,
    contenders: tuple[Contender, ...],
    rounds: int | None = None,
) -> tuple[dict[str, list[float]], list[float]]:
    """Measure one reader of the large file, cold; the seconds, and the daemon's CPU per GiB."""
    size = run.objects.large_bytes
    cpu_s: list[float] = []

    def before(ready: Ready) -> None:
        assert ready.node
        cpu_s.append(-ready.node.cpu_s())

    def after(ready: Ready) -> None:
        assert ready.node
        cpu_s[-1] = (cpu_s[-1] + ready.node.cpu_s()) / (size / GIB)

    if store is None:
        return {}, []
    check = run.objects.large_check
    measures = run.cold_each(
        contenders, "sequential", run.large(), check, store, before=before, after=after
    )
    taken = run.alternate(case, measures, min(run.rounds, rounds or run.rounds))
    run.add_panel(case, f"read {size >> 20} MiB cold, one reader{store.suffix}", taken)
    return taken, cpu_s


def tensor(run: Run) -> None:
    """One tensor of the model, cold, and the bytes that the store serves for it."""
    case = "tensor"
    taken = _load_tensor(run, case, run.store)

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
        ratio(case, "Ray's way / ckptfs", taken.get(RAY.name), own, at_least=12),
        amount(case, "served for it", "MiB", served, at_most=round(1.1 * needed + 1, 1)),
    ]


def tensor_tls(run: Run) -> None:
    """The same over HTTPS, without the count."""
    if run.tls:
        _load_tensor(run, "tensor-tls", run.tls)


def _load_tensor(run: Run, case: str, store: Store) -> dict[str, list[float]]:
    contenders, check = (CKPTFS, RAY, RCLONE_FULL, S3FS), run.objects.tensor_check
    measures = run.cold_each(contenders, "tensor", run.model(), check, store)
    taken = run.alternate(case, measures)
    run.add_panel(case, f"load one tensor of 32 MiB{store.suffix}", taken)
    return taken


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
    _read_small(run, "small", run.store)


def small_tls(run: Run) -> None:
    """The same over HTTPS."""
    if run.tls:
        _read_small(run, "small-tls", run.tls)


def _read_small(run: Run, case: str, store: Store) -> None:
    check = SMALL_FILES * SMALL_BYTES
    job = {"name": "small"} | store.job()

    def bare() -> float:
        with (
            RAW.cold(store, run.temp) as ready,
            working(ready, job | {"way": "bare_files"}) as worker,
        ):
            return worker.go(check)["seconds"]

    others = run.cold_each((CKPTFS, RCLONE_FULL, S3FS), "files", job, check, store)
    measures = {"pyarrow": bare} | others
    taken = run.alternate(case, measures, max(1, run.rounds // 2))
    run.add_panel(case, f"read {SMALL_FILES} files of 10 kB cold{store.suffix}", taken)
