"""From two looks at the daemon's counters to what happened in between. Pure."""

from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from ckptfs._model.replies import ActivityReply, CheckpointActivity, Counts, RequestActivity

Sort = Literal["read", "store", "reads", "errors", "name"]
SORTS: tuple[Sort, ...] = get_args(Sort)
"""What lines can be sorted by."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint, a process of it, or the node did in the time between.

    Attributes:
        name: Of a checkpoint, its directory in the mount; of a process, what it runs.
        uri: Of a checkpoint.
        pid: Of a process; 0: it is none, or several.
        reads_per_s: Reads that were answered.
        read_bytes_per_s: Bytes that the kernel was given; `cache_bytes_per_s`: of these, what was
            on the node when it was asked for.
        store_bytes_per_s: Bytes that came from the store, also ahead of the reads.
        hit_ratio: Share of the reads that did not have to wait for the store; None: there were
            none.
        p50_s, p99_s: Half of the reads took no longer than that, and 99 of 100.
        waiting: Reads that wait now.
        in_flight, queued: Requests to the store that are under way or wait, and that wait; only of
            checkpoints and the node.
        open_files: Now.
        kernel_opens: Files that were opened for the kernel to read by itself, so far.
        errors: Reads that failed, so far; `failures`: attempts to fetch; the latter only of
            checkpoints and the node.
        read_bytes, store_bytes: So far.
    """

    name: str
    uri: str = ""
    pid: int = 0
    reads_per_s: float
    read_bytes_per_s: float
    cache_bytes_per_s: float
    store_bytes_per_s: float
    hit_ratio: float | None
    p50_s: float | None
    p99_s: float | None
    waiting: int
    in_flight: int = 0
    queued: int = 0
    open_files: int
    kernel_opens: int
    errors: int
    failures: int = 0
    read_bytes: int
    store_bytes: int
    processes: "list[Line]" = []
    processes_left_out: int = 0


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. The requests are those to all stores, of every kind; `queue` by priority."""

    interval_s: float
    version: str
    pid: int
    mount: str
    up_s: float
    restarts: int
    passthrough: str
    cache_bytes: int
    cache_bytes_max: int
    evicted_bytes: int
    node: Line
    requests_per_s: float
    request_errors_per_s: float
    request_p50_s: float | None
    request_p99_s: float | None
    retries: int
    hedged: int
    running: int
    in_flight_bytes: int
    queue: dict[str, int]
    checkpoints: list[Line]
    checkpoints_left_out: int


def percentile(histogram: Sequence[int], share: float) -> float | None:
    """Seconds that this share of the counts stays below, where position i counts what took from
    2**(i-1) to 2**i nanoseconds; between these, counts are taken to lie evenly. None: all are 0."""
    wanted = share * sum(histogram)
    if not wanted:
        return None
    for power, count in enumerate(histogram):
        if count and wanted <= count:
            low = 2 ** (power - 1) if power else 0
            return (low + (2**power - low) * wanted / count) / 1e9
        wanted -= count
    raise AssertionError


def picture(before: ActivityReply, after: ActivityReply, now_s: float, sort: Sort) -> Picture:
    """What happened between two looks; `now_s`: the time of the second, since the epoch."""
    if before.pid != after.pid:  # the next daemon counts from zero
        before = msgspec.structs.replace(after, checkpoints=[])
    seconds = after.at_s - before.at_s
    known = {checkpoint.name: checkpoint for checkpoint in before.checkpoints}
    lines = [_checkpoint(known.get(c.name), c, seconds, sort) for c in after.checkpoints]
    requests = _total(before.requests), _total(after.requests)
    times = _difference(requests[0].latency_ns, requests[1].latency_ns)
    outcomes = {k: n - requests[0].outcomes.get(k, 0) for k, n in requests[1].outcomes.items()}
    failed = sum(n for outcome, n in outcomes.items() if outcome not in ("ok", "redirected"))
    fetched = after.fetched_bytes - before.fetched_bytes
    node = _line("", before.counts, after.counts, seconds)
    return Picture(
        interval_s=seconds,
        version=after.version,
        pid=after.pid,
        mount=after.mount,
        up_s=now_s - after.started,
        restarts=after.restarts,
        passthrough=after.passthrough,
        cache_bytes=after.cache_bytes,
        cache_bytes_max=after.cache_bytes_max,
        evicted_bytes=after.evicted_bytes,
        node=msgspec.structs.replace(
            node,
            store_bytes_per_s=_rate(fetched, seconds),
            store_bytes=after.fetched_bytes,
            in_flight=after.running,
            queued=sum(after.queue.values()),
            failures=sum(after.failures.values()),
        ),
        requests_per_s=_rate(sum(outcomes.values()), seconds),
        request_errors_per_s=_rate(failed, seconds),
        request_p50_s=percentile(times, 0.5),
        request_p99_s=percentile(times, 0.99),
        retries=after.retries,
        hedged=after.hedged,
        running=after.running,
        in_flight_bytes=after.in_flight_bytes,
        queue=after.queue,
        checkpoints=_sorted(lines, sort),
        checkpoints_left_out=after.checkpoints_left_out,
    )


def _checkpoint(
    before: CheckpointActivity | None, after: CheckpointActivity, seconds: float, sort: Sort
) -> Line:
    known = {(p.pid, p.command): p.counts for p in before.processes} if before else {}
    processes = [
        msgspec.structs.replace(
            _line(p.command, known.get((p.pid, p.command), Counts()), p.counts, seconds), pid=p.pid
        )
        for p in after.processes
    ]
    line = _line(after.name, before.counts if before else Counts(), after.counts, seconds)
    return msgspec.structs.replace(
        line,
        uri=after.uri,
        in_flight=after.in_flight,
        queued=after.queued,
        failures=sum(after.failures.values()),
        processes=_sorted(processes, sort),
        processes_left_out=after.processes_left_out,
    )


def _line(name: str, before: Counts, after: Counts, seconds: float) -> Line:
    reads, misses = after.reads - before.reads, after.misses - before.misses
    read_bytes = after.read_bytes - before.read_bytes
    missed_bytes = after.missed_bytes - before.missed_bytes
    times = _difference(before.latency_ns, after.latency_ns)
    return Line(
        name=name,
        reads_per_s=_rate(reads, seconds),
        read_bytes_per_s=_rate(read_bytes, seconds),
        cache_bytes_per_s=_rate(read_bytes - missed_bytes, seconds),
        store_bytes_per_s=_rate(after.fetched_bytes - before.fetched_bytes, seconds),
        hit_ratio=1 - min(1.0, misses / reads) if reads else None,
        p50_s=percentile(times, 0.5),
        p99_s=percentile(times, 0.99),
        waiting=after.waiting,
        open_files=after.open_files,
        kernel_opens=after.kernel_opens,
        errors=sum(after.errors.values()),
        read_bytes=after.read_bytes,
        store_bytes=after.fetched_bytes,
    )


def _rate(count: float, seconds: float) -> float:
    return max(0.0, count) / seconds if seconds > 0 else 0.0


def _difference(before: Sequence[int], after: Sequence[int]) -> list[int]:
    padded = [*before, *[0] * (len(after) - len(before))]
    return [max(0, now - then) for now, then in zip(after, padded, strict=False)]


def _total(requests: Sequence[RequestActivity]) -> RequestActivity:
    outcomes: dict[str, int] = {}
    length = max((len(kind.latency_ns) for kind in requests), default=0)
    times = [0] * length
    for kind in requests:
        for outcome, count in kind.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
        for position, count in enumerate(kind.latency_ns):
            times[position] += count
    return RequestActivity("", outcomes, times)


def _sorted(lines: Sequence[Line], sort: Sort) -> list[Line]:
    """The busiest ones first; those that are alike by what they did so far, and by name."""
    if sort == "name":
        return sorted(lines, key=lambda line: (line.name, line.pid))

    def key(line: Line) -> tuple[float, float, str, int]:
        values = {
            "read": line.read_bytes_per_s,
            "store": line.store_bytes_per_s,
            "reads": line.reads_per_s,
            "errors": line.errors + line.failures,
        }
        return -values[sort], -(line.read_bytes + line.store_bytes), line.name, line.pid

    return sorted(lines, key=key)
