"""The one table of the daemon's metrics: name, kind, text, labels, and the counter behind each.

The exporter (``_daemon.control.prometheus``) exports every row. ``METRICS.md``, which ``ckptfs help
metrics`` shows, has the same rows and explains the labels. A test compares them.
"""

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypeAlias

from ckptfs._model.counters import Counts
from ckptfs._model.protocol.replies import ActivityReply

Labels = tuple[str, ...]
Histogram = tuple[list[int], int]
"""Counts by power of two in nanoseconds (see `counters.BUCKETS`), and the sum in nanoseconds."""
Number: TypeAlias = "float | Histogram"
Value: TypeAlias = "Number | Mapping[str, Number] | Mapping[Labels, Number]"
"""One number, or one for each label or combination of labels."""


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: The name without the suffixes that Prometheus adds to counters and histograms.
        kind: The type in Prometheus's terms.
        help: A sentence about the value, with its unit.
        value: The counter: a field of `ActivityReply` (`NODE`) or of `Counts` (`CHECKPOINT`), or a
            function of it. "" stands for the field with the metric's name.
        labels: Names of the labels.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    value: "str | Callable[[Any], Value]" = ""
    labels: tuple[str, ...] = ()

    def numbers(self, counted: "ActivityReply | Counts") -> dict[Labels, Number]:
        """The numbers, by the values of the labels; for `CHECKPOINT` without the checkpoint's."""
        get = attrgetter(self.value or self.name) if isinstance(self.value, str) else self.value
        value: Value = get(counted)
        if not isinstance(value, Mapping):
            return {(): value}
        return {(key,) if isinstance(key, str) else key: n for key, n in value.items()}


def _counter(name: str, text: str, value: "str | Callable[[Any], Value]" = "", *by: str) -> Metric:
    return Metric(name, "counter", text, value, by)


def _gauge(name: str, text: str, value: "str | Callable[[Any], Value]" = "", *by: str) -> Metric:
    return Metric(name, "gauge", text, value, by)


def _histogram(name: str, text: str, value: "Callable[[Any], Value]", *by: str) -> Metric:
    return Metric(name, "histogram", text, value, by)


READ_ERRORS = (
    "access-denied",
    "cache",
    "limit",
    "not-found",
    "object-changed",
    "stale",
    "store",
    "store-timeout",
    "store-unavailable",
)
"""Errors of reads and fetches. Their counters exist from the start, because an alert on an increase
misses the first error of a counter that starts with it."""


def _of(get: Callable[[Counts], Value]) -> Callable[[ActivityReply], Value]:
    return lambda node: get(node.counts)


def _info(node: ActivityReply) -> Value:
    return {(node.version, node.passthrough.partition(":")[0]): 1}


def _opens(counts: Counts) -> Value:
    return {"daemon": counts.opens - counts.kernel_opens, "kernel": counts.kernel_opens}


def _read_bytes(counts: Counts) -> Value:
    return {"cache": counts.read_bytes - counts.missed_bytes, "store": counts.missed_bytes}


def _by_error(field: str) -> Callable[[ActivityReply], Value]:
    return lambda node: dict.fromkeys(READ_ERRORS, 0) | getattr(node.counts, field)


def _requests(node: ActivityReply) -> Value:
    return {(each.kind, key): n for each in node.requests for key, n in each.outcomes.items()}


def _request_times(node: ActivityReply) -> Value:
    return {each.kind: (each.latency_ns, each.total_ns) for each in node.requests}


NODE = (
    _gauge("info", "Always 1.", _info, "version", "passthrough"),
    _gauge("start_time_seconds", "Start of the daemon, in seconds since the epoch.", "started"),
    _counter("restarts", "Daemons that served this mount before this daemon."),
    _gauge("attachments", "Attached checkpoints."),
    _gauge("open_files", "Open files of the mount.", "counts.open_files"),
    _counter("opens", "Opened files.", _of(_opens), "by"),
    _histogram(
        "read_seconds",
        "Time of reads in the daemon, until the kernel has the answer. The daemon does not see "
        "reads from the page cache or by passthrough.",
        lambda node: (node.counts.latency_ns, node.counts.read_ns),
    ),
    _counter("read_bytes", "Bytes from the daemon to the kernel.", _of(_read_bytes), "source"),
    _counter("read_misses", "Reads that waited for the store.", "counts.misses"),
    _counter("read_errors", "Failed reads.", _by_error("errors"), "error"),
    _gauge("reads_waiting", "Reads that are waiting for the store or the disk.", "counts.waiting"),
    _counter("fetched_bytes", "Usable bytes from stores."),
    _counter("fetched_spans", "Requests for data that brought usable bytes."),
    _counter(
        "taken_bytes",
        "Bytes from other nodes (`ray.broadcast`), and of uploads from this one.",
        "counts.taken_bytes",
    ),
    _counter("given_bytes", "Bytes for other nodes (`ray.broadcast`).", "counts.given_bytes"),
    _counter("fetch_retries", "Attempts to fetch after a failed attempt.", "counts.retries"),
    _counter("hedged_requests", "Second requests after a slow first one.", "hedged"),
    _counter("fetch_failures", "Failed attempts to fetch.", _by_error("failures"), "error"),
    _gauge("fetches_running", "Running requests for data.", "running"),
    _gauge("fetches_waiting", "Requests for data in the queue.", "queue", "priority"),
    _gauge("in_flight_bytes", "Bytes that are in flight or not yet on the disk."),
    _counter(
        "store_requests",
        "Requests to stores, including repeated ones. For S3, Google and Azure, HTTP requests; a "
        "read in another process counts as one. For other stores, calls of their library.",
        _requests,
        "kind",
        "outcome",
    ),
    _histogram(
        "store_request_seconds", "Time until the end of the answer.", _request_times, "kind"
    ),
    _gauge("uploads", "Uploads in the background.", "uploads", "state"),
    _gauge("uploads_bytes", "Bytes of the files that these keep on the disk."),
    _counter("uploaded_bytes", "Bytes that these have brought to stores."),
    _counter("uploads_ended", "Uploads in the background that have ended.", "", "result"),
    _gauge("cache_bytes", "Bytes of the cache on the disk."),
    _gauge(
        "cache_limit_bytes",
        "`cache_bytes_max`. With 0, only the free share limits the cache.",
        "cache_bytes_max",
    ),
    _counter("evicted_bytes", "Bytes that the cache evicted to make space."),
    _counter("evicted_objects", "Files that the cache evicted completely."),
    _gauge("threads", "Threads of the daemon that run or wait for other threads."),
    _gauge("workers", "Worker processes, which read stores."),
    _gauge("worker_memory_bytes", "Memory of the worker processes."),
    _counter("worker_starts", "Started worker processes."),
    _counter("worker_ends", "Ended worker processes.", "worker_ends", "reason"),
)
CHECKPOINT = (
    _counter("checkpoint_opens", "`opens` per checkpoint.", _opens, "checkpoint", "by"),
    _counter("checkpoint_reads", "Reads that the daemon answered.", "reads", "checkpoint"),
    _counter(
        "checkpoint_read_bytes", "`read_bytes` per checkpoint.", _read_bytes, "checkpoint", "source"
    ),
    _counter("checkpoint_read_misses", "`read_misses` per checkpoint.", "misses", "checkpoint"),
    _counter(
        "checkpoint_read_errors",
        "`read_errors` per checkpoint.",
        lambda counts: sum(counts.errors.values()),
        "checkpoint",
    ),
    _counter(
        "checkpoint_fetched_bytes", "`fetched_bytes` per checkpoint.", "fetched_bytes", "checkpoint"
    ),
    _gauge("checkpoint_reads_waiting", "`reads_waiting` per checkpoint.", "waiting", "checkpoint"),
)
"""Metrics with one value for each checkpoint. The exporter adds the first label."""
PREFIX = "ckptfs_"
