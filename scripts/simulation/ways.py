"""The ways to restore a checkpoint on many nodes, as stages of a flow. Pure functions.

Numbers of ckptfs are those of its code, as ARCHITECTURE.md and the named modules state them. Not
in the model: faults, stalls and hedging, readers that are not sequential, several jobs, TLS, short
memory, a network that is narrower inside than at the nodes' links.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from simulation.flow import Stage, run, wait

MIB = 1 << 20
GB = 1e9

REQUESTS_MAX = 16
"""Requests of a daemon at the same time (`_model.config`)."""
SPAN_BYTES = 8 * MIB
"""One request of a daemon that reads ahead (`_daemon.fetch.readahead`)."""
WINDOW_BYTES = 64 * MIB
"""Longest distance of a fetch ahead of a reader (`_daemon.fetch.readahead`)."""
CAREFUL_BYTES = 4 * MIB
"""After so much of the first file its window is four times what was read, and not block by block
(`_daemon.fetch.readahead`): a few requests of 1 MiB, one after the other."""
CHUNK_BYTES = (4 * MIB, 64 * MIB)
CHUNKS_OF_A_NODE, CHUNKS_ENOUGH = 32, 256
"""A broadcast is cut into so many chunks per node, and no more than that in all, of 4 to 64 MiB
(`ray._broadcast`)."""
GIVEN_BYTES_MAX = 128 * MIB
"""Most bytes that a node of a broadcast reads at a time, in 16 chunks (`ray._broadcast`)."""
WINDOW_SHARE = 4
"""A quarter of the object store may be under way in a broadcast (`ray._broadcast`)."""

COPY_CONNECTIONS = 8
"""Files that Ray copies at the same time: pyarrow's threads for IO (`io_thread_count`)."""
COPY_BYTES = 64 * MIB
"""One request of it, which is then written, and then comes the next (`chunk_size` of
`_pyarrow_fs_copy_files` in ray/train/_internal/storage.py, Ray 2.60; with its requests counted)."""
COPY_ROUNDS = 4
"""With more requests than that per connection, these are so many longer rounds."""

ACTORS_PER_S = 550.0
"""Actors that a cluster starts (release/perf_metrics/benchmarks/many_actors.json of
ray-project/ray)."""


@dataclass(frozen=True)
class Costs:
    """CPU seconds of the daemon, Ray and the program.

    Attributes:
        copy: Per byte that Ray's copy fetches, and as much again for writing it.
        mount: Per byte that a program reads through a mount that fetches it.
        bring: Per byte of a broadcast, of the node that gives it, and of each that takes it.
        local, cached: Per byte that is read of a copy, and of the cache after a broadcast.
        start: By way, seconds of a node, all of it on one CPU, before the first byte.
        loop: Per byte that a daemon fetches, of its event loop, which is one thread.
    """

    copy: float
    mount: float
    bring: float
    local: float
    cached: float
    start: dict[str, float]
    loop: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """Where it happens. Bytes and seconds.

    Attributes:
        nodes: How many.
        size: Of the checkpoint, in `files` of the same size. Every node reads all of it.
        connection: Bytes per second of one connection to the store: 85 to 90 MB/s, says Amazon
            ("Best practices design patterns: optimizing Amazon S3 performance").
        latency_s: Of a request, until its first byte. There: 100 to 200 ms; 20 ms are those of
            scripts/bench.
        store: Bytes per second of the store: Google's default quota is 200 Gbit/s per region
            ("Cloud Storage quotas and limits").
        requests: Per second, of the store: 5,500 for each prefix, says Amazon there.
        link: Bytes per second of a node's network, each way: 25 Gbit/s as of AWS's p3.16xlarge;
            100 and more are usual, too.
        disk: Bytes per second of a node's disk, writing or reading.
        cpus: Of a node.
        is_one_machine: Whether all nodes share the disk and the CPUs of one.
        import_s: What a program does before it can read: it imports torch.
        readers: Processes of a node that read at the same time, different files.
        object_store: Bytes of a node's, of Ray: it takes 30 % of the memory by default.
        calls: Of actors, with an argument, that the driver of a broadcast makes in a second: Ray's
            own benchmark has 2,800 of them, and 8,000 without arguments
            (release/perf_metrics/microbenchmark.json of ray-project/ray).
        spread: Standard deviation of connections and starts, as a share of the mean.
    """

    nodes: int
    size: float = 100 * GB
    files: int = 24
    connection: float = 90e6
    latency_s: float = 0.02
    store: float = 25e9
    requests: float = 5500.0
    link: float = 25e9 / 8
    disk: float = 3e9
    cpus: float = 32
    is_one_machine: bool = False
    import_s: float = 10.0
    readers: int = 8
    object_store: float = 60 * GB
    calls: float = 2800.0
    spread: float = 0.2

    def shared(self) -> dict[str, float]:
        """The resources that all nodes share, per second."""
        ours = {"cpu": self.cpus, "disk": self.disk} if self.is_one_machine else {}
        return {"store": self.store, "requests": self.requests} | ours

    def request_rate(self, length: float) -> float:
        """Bytes per second of a connection with one request of `length` after the other."""
        return length / (self.latency_s + length / self.connection)

    def moving(
        self,
        amount: float,
        limit: float = np.inf,
        *,
        cpu: float = 0.0,
        request: float = 0.0,
        connections: float = 1.0,
        disk: float = 1.0,
        link: float = 1.0,
    ) -> Stage:
        """A stage that moves bytes.

        Args:
            cpu: Seconds per byte.
            request: Length of a request to the store; 0: it is not asked.
            connections: Over how many the differences between them even out.
            disk, link: What of a byte is written or read there.
        """
        costs = {"store": 1.0, "requests": 1 / request} if request else {}
        limit = min(limit, self.link / link if link else np.inf)
        if self.is_one_machine:
            costs |= {"cpu": cpu, "disk": disk}
        else:
            limit = min(limit, self.disk / disk if disk else np.inf, _most(cpu, self.cpus))
        spread = self.spread / max(1.0, connections) ** 0.5
        return Stage(amount, limit, costs, spread if request else 0.0)


@dataclass(frozen=True)
class Result:
    """Seconds until the last node has the bytes, and has read them; what the store has sent, as a
    multiple of the checkpoint."""

    there_s: float
    read_s: float
    sent: float


def copy(scenario: Scenario, costs: Costs, seed: int = 0) -> Result:
    """``ray.train.Checkpoint.to_directory`` on every node, after the import; then all is read."""
    stages = [_import(scenario), _start(scenario, costs, "ray")]
    connections = min(scenario.files, COPY_CONNECTIONS)
    share = scenario.size / connections
    for length, count in _rounds(scenario.size / scenario.files, share):
        amount, rate = connections * length * count, scenario.request_rate(length)
        stages += [
            scenario.moving(
                amount,
                connections * rate,
                cpu=costs.copy,
                request=length,
                connections=connections,
                disk=0,
            ),
            scenario.moving(amount, _most(costs.copy, connections), cpu=costs.copy, link=0),
        ]
    there = len(stages) - 1
    stages.append(_reading(scenario, costs.local, disk=0))
    ends = run(stages, scenario.nodes, scenario.shared(), seed)
    return Result(ends[there].max(), ends[-1].max(), scenario.nodes)


def _rounds(file_bytes: float, share: float) -> list[tuple[float, float]]:
    """The requests of a connection that gets `share` bytes: length and how many in a round."""
    whole, rest = divmod(file_bytes, COPY_BYTES)
    lengths = [(COPY_BYTES, 1.0)] * int(whole) + [(rest, 1.0)] * (rest > 0)
    if share == file_bytes and len(lengths) <= COPY_ROUNDS:
        return lengths
    mean = file_bytes / len(lengths)
    return [(mean, share / mean / COPY_ROUNDS)] * COPY_ROUNDS


def mount(scenario: Scenario, costs: Costs, seed: int = 0) -> Result:
    """Every node reads through its mount, once it is imported."""
    stages = [
        _import(scenario),
        _start(scenario, costs, "mount"),
        *_read_ahead(scenario, costs),
    ]
    ends = run(stages, scenario.nodes, scenario.shared(), seed)
    return Result(0.0, ends[-1].max(), scenario.nodes)


def _read_ahead(scenario: Scenario, costs: Costs) -> list[Stage]:
    """Files in sequence, by readers of which each has its window (`_daemon.fetch.readahead`). It
    grows in the first file, all of it runs ahead in the others, and one more file is begun
    meanwhile. All readers have the same number of files."""
    readers = min(scenario.readers, scenario.files)
    count = ceil(scenario.files / readers)
    length = scenario.size / readers / count
    head, window = min(WINDOW_BYTES, length), WINDOW_BYTES // SPAN_BYTES
    careful, growing = min(CAREFUL_BYTES, length), min(5 * CAREFUL_BYTES, length)
    beside = min(length - head, WINDOW_BYTES)
    steps = [  # how often, bytes, requests at the same time, length of one
        (1, careful, 1, MIB),
        (1, growing - careful, 2, SPAN_BYTES),
        (1, length - growing, window, SPAN_BYTES),
        (min(1, count - 1), head * min(2, count - 1), 2 * window, SPAN_BYTES),  # of the second
        (min(2, count - 1), beside, 2 * window, SPAN_BYTES),
        (max(0, count - 3), beside + head, 2 * window, SPAN_BYTES),
        (count - 1, length - head - beside, window, SPAN_BYTES),
    ]
    return [
        _fetching(scenario, costs, amount * readers, requests * readers, request, times)
        for times, amount, requests, request in steps
        if times * amount > 0
    ]


def _fetching(
    scenario: Scenario,
    costs: Costs,
    amount: float,
    requests: float,
    request: float,
    times: int = 1,
) -> Stage:
    """By a daemon, `times` after each other: so many bytes, by at most so many requests at the
    same time of that length each."""
    together = max(1.0, min(requests, REQUESTS_MAX, amount / request))
    return scenario.moving(
        times * amount,
        min(together * scenario.request_rate(request), _most(costs.loop)),
        cpu=costs.mount,
        request=request,
        connections=together,
    )


def plan(scenario: Scenario, costs: Costs, seed: int = 0) -> Result:
    """A mount with a plan of all that is read: it is fetched while the program is imported."""
    stages = [
        _start(scenario, costs, "mount"),
        _fetching(scenario, costs, scenario.size, REQUESTS_MAX, SPAN_BYTES),
    ]
    there = run(stages, scenario.nodes, scenario.shared(), seed)[-1]
    reading = [_import(scenario), _reading(scenario, costs.cached)]
    read = run(reading, scenario.nodes, scenario.shared(), seed + 1)[-1]
    return Result(there.max(), np.maximum(there, read).max(), scenario.nodes)


def broadcast(scenario: Scenario, costs: Costs, seed: int = 0) -> Result:
    """``ckptfs.ray.broadcast``, before the program is started; then all is read from the cache."""
    one_s = costs.start["broadcast"]
    if scenario.is_one_machine:
        begin = wait(one_s, scenario.nodes * one_s)
    else:
        begin = wait(one_s + scenario.nodes / ACTORS_PER_S)
    bringing = [begin, _bringing(scenario, costs)]
    there_s = run(bringing, 1, scenario.shared(), seed)[-1, 0]
    reading = [_import(scenario), _reading(scenario, costs.cached)]
    read_s = run(reading, scenario.nodes, scenario.shared(), seed + 1)[-1].max()
    return Result(there_s, there_s + read_s, 1.0)


def _bringing(scenario: Scenario, costs: Costs) -> Stage:
    """A broadcast as one stage of the whole cluster: the checkpoint's bytes, each to all nodes.

    A chunk is under way from when it is asked for until all nodes have it, and the window holds
    only so many. They are asked for at once, so they come at once and are carried at once, and no
    chunk is read meanwhile. The node that gave one sends it to each of the others: 1 GiB to 50
    nodes, which takes Ray 16.9 s (release/perf_metrics/scalability/object_store.json of
    ray-project/ray), is 49 copies on one link of 25 Gbit/s.
    """
    nodes, takers = scenario.nodes, scenario.nodes - 1
    window, chunk = scenario.object_store / WINDOW_SHARE, chunk_bytes(scenario)
    request = min(chunk, SPAN_BYTES)
    requests = min(REQUESTS_MAX, GIVEN_BYTES_MAX / request)
    reading_s = scenario.latency_s + request / scenario.connection
    here_s = window * costs.bring * (nodes if scenario.is_one_machine else 1) / scenario.cpus
    carrying_s = here_s + window * takers / nodes / scenario.link
    limit = min(
        window / (reading_s + carrying_s),
        nodes * requests * scenario.request_rate(request),
        nodes / max(1, takers) * scenario.link,
        chunk * scenario.calls / nodes,
        scenario.disk if not scenario.is_one_machine else np.inf,
        _most(costs.bring, scenario.cpus) if not scenario.is_one_machine else np.inf,
    )
    here = {"cpu": nodes * costs.bring, "disk": nodes} if scenario.is_one_machine else {}
    return Stage(scenario.size, limit, {"store": 1.0, "requests": 1 / request} | here)


def chunk_bytes(scenario: Scenario) -> float:
    """Of a broadcast: each node is to have some, as long as these are not too many."""
    count = min(scenario.nodes * CHUNKS_OF_A_NODE, CHUNKS_ENOUGH)
    fair = max(CHUNK_BYTES[0], scenario.size / count)
    return min(fair, CHUNK_BYTES[1], scenario.object_store / WINDOW_SHARE**2)


def _import(scenario: Scenario) -> Stage:
    return wait(scenario.import_s, spread=scenario.spread)


def _start(scenario: Scenario, costs: Costs, way: str) -> Stage:
    return wait(costs.start[way], costs.start[way], scenario.spread)


def _reading(scenario: Scenario, cpu: float, disk: float = 1.0) -> Stage:
    """Reads of bytes on the node; `disk` is the share of them that is not in memory."""
    return scenario.moving(scenario.size, _most(cpu, scenario.readers), cpu=cpu, disk=disk, link=0)


def _most(cost: float, cpus: float = 1.0) -> float:
    """Bytes per second that so many CPUs manage at that cost of each."""
    return cpus / cost if cost else np.inf
