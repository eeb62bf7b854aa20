"""The difference between two snapshots of the daemon's counters. Pure."""

from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from ckptfs._model.counters import Counts, RequestCounts, add_to
from ckptfs._model.protocol.replies import ActivityReply, CheckpointActivity

Sort = Literal["read", "store", "reads", "errors", "name"]
SORTS: tuple[Sort, ...] = get_args(Sort)
"""The orders in which lines can be sorted."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """The activity of a checkpoint, of one of its processes, or of the node, between two snapshots.

    Attributes:
        name: A checkpoint's directory in the mount, or a process's command.
        uri: A checkpoint's URI.
        pid: A process; 0 for several processes and for prefetches.
        ended: Whether the process has ended.
        reads_per_s: Answered reads.
        read_bytes_per_s: Bytes that the daemon returned to the kernel.
        cache_bytes_per_s: Bytes of these that the node had when a program asked for them.
        store_bytes_per_s: Bytes that came from the store, with readahead.
        hit_ratio: Share of the reads that did not wait for the store; None without reads.
        p50_s: Median time of the reads.
        p99_s: The time that 99 of 100 reads did not exceed.
        waiting: Reads that wait now.
        in_flight: Requests to the store that are under way or wait; 0 for processes.
        queued: Requests to the store that wait; 0 for processes.
        open_files: Files that are open now.
        kernel_opens: Opens by passthrough since the daemon's start.
        errors: Failed reads since the daemon's start.
        failures: Failed attempts to fetch since the daemon's start; 0 for processes.
        read_bytes: Bytes that the daemon returned to the kernel, since its start.
        store_bytes: Bytes that came from the store, since the daemon's start.
        processes: Lines of a checkpoint's processes.
        processes_left_out: Number of further processes.
    """

    name: str
    uri: str = ""
    pid: int = 0
    ended: bool = False
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
    """The activity of the node and of its checkpoints between two snapshots.

    The requests are those to all stores, of every kind. `queue` has the waiting transfers, by
    priority. `uploads` has the number of uploads in the background, by state, and `uploads_bytes`
    the bytes of their files on the disk.
    """

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
    uploads: dict[str, int] = {}
    uploads_bytes: int = 0
    upload_bytes_per_s: float = 0.0


def percentile(histogram: Sequence[int], share: float) -> float | None:
    """The time in seconds that this share of the counts did not exceed; None if all counts are 0.

    Position i of the histogram counts times from 2**(i-1) to 2**i nanoseconds. The function assumes
    an even distribution between these.
    """
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
    """The activity between two snapshots. `now_s` is the time of the second, since the epoch."""
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
            failures=sum(after.counts.failures.values()),
        ),
        requests_per_s=_rate(sum(outcomes.values()), seconds),
        request_errors_per_s=_rate(failed, seconds),
        request_p50_s=percentile(times, 0.5),
        request_p99_s=percentile(times, 0.99),
        retries=after.counts.retries,
        hedged=after.hedged,
        running=after.running,
        in_flight_bytes=after.in_flight_bytes,
        queue=after.queue,
        checkpoints=_sorted(lines, sort),
        checkpoints_left_out=after.checkpoints_left_out,
        uploads=after.uploads,
        uploads_bytes=after.uploads_bytes,
        upload_bytes_per_s=_rate(after.uploaded_bytes - before.uploaded_bytes, seconds),
    )


def _checkpoint(
    before: CheckpointActivity | None, after: CheckpointActivity, seconds: float, sort: Sort
) -> Line:
    known = {(p.pid, p.command): p.counts for p in before.processes} if before else {}
    processes = [
        msgspec.structs.replace(
            _line(p.command, known.get((p.pid, p.command), Counts()), p.counts, seconds),
            pid=p.pid,
            ended=p.ended,
        )
        for p in after.processes
    ]
    line = _line(after.name, before.counts if before else Counts(), after.counts, seconds)
    return msgspec.structs.replace(
        line,
        uri=after.uri,
        in_flight=after.in_flight,
        queued=after.queued,
        failures=sum(after.counts.failures.values()),
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


def _total(requests: Sequence[RequestCounts]) -> RequestCounts:
    result = RequestCounts("")
    for each in requests:
        add_to(result.outcomes, each.outcomes)
        for power, number in enumerate(each.latency_ns):
            result.latency_ns[power] += number
    return result


def _sorted(lines: Sequence[Line], sort: Sort) -> list[Line]:
    """The busiest lines first. Equal ones follow their bytes since the start, and their names."""
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
