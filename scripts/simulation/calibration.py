"""The model beside real runs of ``scripts/benchmark/cluster.py``, kept in tests/bench/cluster.json.

There all nodes, the server and the proxy that slows it share one machine. They cost it CPU time,
which the runs have counted. The eight CPU costs come from these counts in the runs of `FITTED`. No
constant comes from a duration, and the model predicts all durations. This is not a blind test,
because the stages of `ways` were corrected by means of these runs.

Connections and CPUs limited these runs, so they do not test links, disks, limits of the store, and
the window, the driver and Ray's transfers between machines of a broadcast.

The file is a list of the outputs of ``--json`` (``jq --slurp . FILE…``) on a machine without other
work. Beside other work, two sets of runs were 20 to 50 % slower.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from simulation import ways

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

KEPT = Path(__file__).parents[2] / "tests" / "bench" / "cluster.json"
FITTED = ((2, 8e6), (4, 8e6))
"""Nodes and rate of the runs that the costs come from: none of those that are to be predicted."""
WAYS = {"ray": ways.copy, "mount": ways.mount, "broadcast": ways.broadcast}
LATENCY_S = 0.01
"""Of a request to the server there, through the proxy: an assumption, and of little weight."""
TOLERANCE, SENT_TOLERANCE = 0.25, 0.02


class Round(msgspec.Struct, frozen=True):
    """As cluster.py has it. Where `others` is missing, the CPU time is the whole machine's."""

    there_s: float
    read_s: float
    there_cpu_s: float
    read_cpu_s: float
    sent_bytes: float
    others: float = 0.0


class Run(msgspec.Struct, frozen=True):
    """An output of cluster.py."""

    nodes: int
    size: int = msgspec.field(name="bytes")
    shards: int
    connection_bytes_per_s: float
    object_store_bytes: float
    host: dict[str, str | int]
    start: dict[str, list[Round]]
    rounds: dict[str, list[Round]]

    def median(self, way: str) -> Round:
        """Of each figure, of all rounds."""
        rounds = map(msgspec.structs.astuple, self.rounds[way])
        return Round(*map(statistics.median, zip(*rounds, strict=True)))

    def cpu_s(self, way: str) -> tuple[float, float]:
        """Until all is there, and until it is read; the least, as a disturbance only adds to it."""
        rounds = self.rounds[way]
        return min(r.there_cpu_s for r in rounds), min(r.read_cpu_s for r in rounds)

    def start_cpu_s(self, way: str) -> float:
        """Before the first byte; the least, as the first round also starts Ray's workers."""
        return min(one.read_cpu_s for one in self.start[way])

    def scenario(self, way: str) -> ways.Scenario:
        """The same for the model, without the CPU time of other processes."""
        return ways.Scenario(
            nodes=self.nodes,
            size=self.size,
            files=self.shards,
            connection=self.connection_bytes_per_s,
            latency_s=LATENCY_S,
            store=float("inf"),
            requests=float("inf"),
            link=float("inf"),
            disk=float("inf"),
            cpus=int(self.host["cpus"]) * (1 - self.median(way).others),
            is_one_machine=True,
            import_s=0.0,
            readers=1,
            object_store=self.object_store_bytes,
            spread=0.0,
        )


@dataclass(frozen=True)
class Figure:
    """One of a run: seconds, or a multiple of the checkpoint."""

    run: Run
    way: str
    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def is_foretold(self) -> bool:
        """Whether the costs come from other runs than this one."""
        return (self.run.nodes, self.run.connection_bytes_per_s) not in FITTED

    @property
    def is_good(self) -> bool:
        """Whether it is near enough, if it is foretold."""
        allowed = SENT_TOLERANCE if self.name == "sent" else TOLERANCE
        return not self.is_foretold or abs(self.error) <= allowed


def read(path: Path = KEPT) -> list[Run]:
    return msgspec.json.decode(path.read_bytes(), type=list[Run])


def fit(runs: Iterable[Run]) -> ways.Costs:
    """The costs of these runs: the mean of what each of them says."""
    runs = list(runs)

    def mean(cost: Callable[[Run], float]) -> float:
        return statistics.mean(cost(run) for run in runs)

    def there(run: Run, way: str) -> float:
        return run.cpu_s(way)[0] - run.start_cpu_s(way)

    def reading(run: Run, way: str) -> float:
        return (run.cpu_s(way)[1] - run.cpu_s(way)[0]) / run.nodes / run.size

    def mounted(run: Run) -> float:
        return (run.cpu_s("mount")[1] - run.start_cpu_s("mount")) / run.nodes / run.size

    return ways.Costs(
        copy=mean(lambda run: there(run, "ray") / run.nodes / run.size) / 2,
        mount=mean(mounted),
        bring=mean(lambda run: there(run, "broadcast") / run.nodes / run.size),
        local=mean(lambda run: reading(run, "ray")),
        cached=mean(lambda run: reading(run, "broadcast")),
        start={way: mean(lambda run, way=way: run.start_cpu_s(way) / run.nodes) for way in WAYS},
    )


def predict(run: Run, costs: ways.Costs) -> list[Figure]:
    """All figures of a run but those that are nothing."""
    figures: list[Figure] = []
    for way, model in WAYS.items():
        measured, predicted = run.median(way), model(run.scenario(way), costs)
        if way != "mount":
            figures.append(Figure(run, way, "there", predicted.there_s, measured.there_s))
        figures.append(Figure(run, way, "read", predicted.read_s, measured.read_s))
        sent = measured.sent_bytes / run.size
        figures.append(Figure(run, way, "sent", predicted.sent, sent))
    return figures


def check(path: Path = KEPT) -> list[Figure]:
    """All figures of all runs, with the costs of those that are `FITTED`."""
    runs = read(path)
    costs = fit(run for run in runs if (run.nodes, run.connection_bytes_per_s) in FITTED)
    return [figure for run in runs for figure in predict(run, costs)]


def of_real_nodes() -> ways.Costs:
    """The costs of a node that has the memory at hand, and no server on its CPUs. Per GiB, as
    ``ARCHITECTURE.md`` has it: 1.3 s of CPU of a daemon that fetches for a reader, of which 0.3 s
    of Python and 0.3 s of the copy to the reader are in its event loop; 0.4 s for the kernel's
    copy from a socket, or into the page cache; 0.3 s for one out of it. Giving and taking are put
    at a fetch and two more copies, and at three copies and checksums. Starts are as measured.
    """
    gib = 1 << 30
    starts = fit(run for run in read() if (run.nodes, run.connection_bytes_per_s) in FITTED).start
    return ways.Costs(
        copy=0.4 / gib,
        mount=1.3 / gib,
        bring=1.5 / gib,
        local=0.3 / gib,
        cached=0.3 / gib,
        start=starts,
        loop=0.6 / gib,
    )
