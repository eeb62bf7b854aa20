"""The cases in which a program loads the whole model, from each kind of store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmark.contenders import CKPTFS, RAW, RAY, RCLONE_FULL, RUNAI, S3FS, S3TORCH, S5CMD
from benchmark.results import amount, best, ratio
from benchmark.run import Run, nothing
from ckptfs._daemon.fetch.limits import limits_of
from ckptfs._model.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmark.contenders import Contender, Ready
    from benchmark.results import Goal
    from benchmark.stores import Store

MB = 1e6
WORKER_MB = 40
"""Memory that each process with the library of a store may add."""

PEERS = (S5CMD, RUNAI, S3FS, RCLONE_FULL)
"""The alternatives that the goals compare with: the best of them counts."""

LOADERS = (RAW, CKPTFS, RAY, RCLONE_FULL, S3FS, S5CMD, S3TORCH, RUNAI)
CAPPED_TLS_LOADERS = (RAW, CKPTFS, *PEERS)
"""Without those that take longest, and that no goal names: a run has 20 minutes."""


def load(run: Run) -> None:
    """Cold load of all tensors of the model."""
    case = "load"
    idle, loaded, bounds = [], [], []
    in_flight = limits_of(Config(socket="/", mount="/", cache_dir="/")).in_flight_bytes / MB
    with CKPTFS.cold(run.store, run.temp) as ready:
        idle.append(ready.node.memory_bytes() / MB)

    def after(ready: Ready) -> None:
        assert ready.node
        loaded.append(ready.node.peak_bytes() / MB)
        bounds.append(round(120 + in_flight + WORKER_MB * ready.node.worker_count()))

    taken = measure_loads(run, case, run.store, after=after)
    own = taken.get(CKPTFS.name)
    memory, most = (
        "memory of all processes of the daemon",
        max(bounds, default=round(120 + in_flight)),
    )
    run.report.goals += [
        ratio(case, "Ray's way / ckptfs", taken.get(RAY.name), own, at_least=2),
        *(
            ratio(case, f"{each.name} / ckptfs", taken.get(each.name), own, at_least=1)
            for each in (S5CMD, S3TORCH, RUNAI)
        ),
        amount(case, f"{memory}, idle", "MB", idle, at_most=120),
        amount(case, f"most {memory}, loaded", "MB", loaded, at_most=most),
    ]


def load_tls(run: Run) -> None:
    """The same over HTTPS."""
    case = "load-tls"
    taken = measure_loads(run, case, run.tls)
    run.report.goals.append(against_peers(case, taken, at_least=1.05))


def capped(run: Run) -> None:
    """The same where each connection has a limit, and each request a latency."""
    case = "capped"
    taken = measure_loads(run, case, run.capped)
    own = taken.get(CKPTFS.name)
    run.report.goals += [
        ratio(case, "Ray's way / ckptfs", taken.get(RAY.name), own, at_least=8),
        ratio(case, "speed of ckptfs / raw", taken.get(RAW.name), own, at_least=0.8),
        against_peers(case, taken, at_least=1.0),
    ]


def capped_tls(run: Run) -> None:
    """The same with these limits over HTTPS."""
    case = "capped-tls"
    taken = measure_loads(run, case, run.capped_tls, CAPPED_TLS_LOADERS)
    run.report.goals.append(against_peers(case, taken, at_least=1.0))


def against_peers(case: str, taken: dict[str, list[float]], *, at_least: float) -> Goal:
    """The goal for the best of the alternatives over ckptfs."""
    peers = best(taken, *(each.name for each in PEERS))
    text = f"best of {', '.join(each.name for each in PEERS)} / ckptfs"
    return ratio(case, text, peers, taken.get(CKPTFS.name), at_least=at_least)


def measure_loads(
    run: Run,
    case: str,
    store: Store | None,
    contenders: tuple[Contender, ...] = LOADERS,
    rounds: int = 3,
    after: Callable[[Ready], None] = nothing,
) -> dict[str, list[float]]:
    """The seconds of a cold load by each contender; none if the store does not run."""
    if store is None:
        return {}
    check = run.objects.model_check
    measures = run.cold_each(contenders, "load", run.model(), check, store, after=after)
    taken = run.alternate(case, measures, min(run.rounds, rounds))
    mib = run.objects.large_bytes >> 20
    run.add_panel(case, f"load {mib} MiB in 4 shards, {store.name} store", taken)
    return taken
