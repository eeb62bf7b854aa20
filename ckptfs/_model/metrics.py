"""The metrics of a daemon, as Prometheus gets them: the one table of what there is.

``METRICS.md`` and ``ckptfs help metrics`` are made of it (`as_markdown`), and the daemon refuses to
export what is not in it.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: Without the suffixes that Prometheus adds to counters and histograms.
        kind: As Prometheus has them.
        help: What it is, with its unit.
        labels: What it is divided by.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


LABELS: Mapping[str, str] = {
    "by": "`daemon`, or `kernel`: the kernel reads the file by itself (passthrough)",
    "checkpoint": (
        "the checkpoint's directory in the mount; `other` for those beyond the first hundred. On a "
        "loopback address of a daemon that serves other users it is the directory's digest only, "
        "because names say what somebody trains"
    ),
    "error": "the error's code, as `--json` has it; `stale`: the checkpoint was detached",
    "kind": (
        "`list` (a page of a listing), `head` (size and version), `read` (a range), `get` (a small "
        "object), `put`"
    ),
    "le": "upper limit of a bucket, in seconds",
    "outcome": (
        "`ok`, `redirected` (to another region), `absent`, `changed`, `denied`, `unavailable`, "
        "`timeout`, `error`"
    ),
    "passthrough": "`on` or `off`",
    "priority": "`demand`, `readahead`, `prefetch`, `dark` (the store does not answer)",
    "reason": (
        "`idle`, or `died` (by itself, or killed by others), `stopped`, `still` (its library held "
        "the interpreter's lock for too long), `overdue` (its library hangs), `nonsense`"
    ),
    "source": "`cache`: the bytes were on the node when they were asked for; `store`: not yet",
    "version": "of ckptfs",
}

_NODE = (
    Metric("info", "gauge", "Always 1.", ("version", "passthrough")),
    Metric("start_time_seconds", "gauge", "When the daemon started, since the epoch."),
    Metric("restarts", "counter", "Daemons that served this mount before this one."),
    Metric("attachments", "gauge", "Checkpoints that are attached."),
    Metric("open_files", "gauge", "Files of the mount that are open."),
    Metric("opens", "counter", "Files that were opened.", ("by",)),
    Metric(
        "read_seconds",
        "histogram",
        "Reads, from when the daemon saw them to when the kernel had the answer. What the kernel "
        "reads by itself, or has in memory, is not seen.",
    ),
    Metric("read_bytes", "counter", "Bytes that the kernel was given.", ("source",)),
    Metric("read_misses", "counter", "Reads that had to wait for the store."),
    Metric("read_errors", "counter", "Reads that failed.", ("error",)),
    Metric("reads_waiting", "gauge", "Reads that wait now, for the store or the disk."),
    Metric("fetched_bytes", "counter", "Bytes that came from stores and could be used."),
    Metric("fetched_spans", "counter", "Requests for data in which they came."),
    Metric(
        "taken_bytes", "counter", "Bytes that came from other nodes, by `ckptfs.ray.broadcast`."
    ),
    Metric("given_bytes", "counter", "Bytes that were given to other nodes so."),
    Metric("fetch_retries", "counter", "Attempts to fetch after one that had failed."),
    Metric("hedged_requests", "counter", "Second requests, because the first one took long."),
    Metric("fetch_failures", "counter", "Attempts to fetch that failed.", ("error",)),
    Metric("fetches_running", "gauge", "Requests for data that are under way."),
    Metric("fetches_waiting", "gauge", "Requests for data that wait for a place.", ("priority",)),
    Metric("in_flight_bytes", "gauge", "Bytes that are being fetched, or not on the disk yet."),
    Metric(
        "store_requests",
        "counter",
        "Requests to stores, with those that were repeated. Of S3 as the server counts them; of "
        "other stores the calls of their library.",
        ("kind", "outcome"),
    ),
    Metric("store_request_seconds", "histogram", "These, until the answer was read.", ("kind",)),
    Metric("cache_bytes", "gauge", "Bytes on the disk."),
    Metric("cache_limit_bytes", "gauge", "`cache_bytes_max`; 0: only the free share limits it."),
    Metric("evicted_bytes", "counter", "Bytes that had to go because there was no room."),
    Metric("evicted_objects", "counter", "Files that went as a whole."),
    Metric("threads", "gauge", "Threads of the daemon that work, or wait for others."),
    Metric("workers", "gauge", "Processes in which libraries of stores run."),
    Metric("worker_memory_bytes", "gauge", "What these have in memory."),
    Metric("worker_starts", "counter", "Such processes that were started."),
    Metric("worker_ends", "counter", "Such processes that have ended.", ("reason",)),
)
_OF_ONE = ("checkpoint",)
_CHECKPOINT = (
    Metric("checkpoint_opens", "counter", "As `opens`.", ("checkpoint", "by")),
    Metric("checkpoint_reads", "counter", "Reads that were answered.", _OF_ONE),
    Metric("checkpoint_read_bytes", "counter", "As `read_bytes`.", ("checkpoint", "source")),
    Metric("checkpoint_read_misses", "counter", "As `read_misses`.", _OF_ONE),
    Metric("checkpoint_read_errors", "counter", "As `read_errors`.", _OF_ONE),
    Metric("checkpoint_fetched_bytes", "counter", "As `fetched_bytes`.", _OF_ONE),
    Metric("checkpoint_reads_waiting", "gauge", "As `reads_waiting`.", _OF_ONE),
)
PREFIX = "ckptfs_"
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (*_NODE, *_CHECKPOINT)}


def names(metric: Metric) -> tuple[str, ...]:
    """The names of its series."""
    name = PREFIX + metric.name
    if metric.kind == "counter":
        return (f"{name}_total",)
    if metric.kind == "histogram":
        return (f"{name}_bucket", f"{name}_count", f"{name}_sum")
    return (name,)


def as_markdown() -> str:
    """The table, for ``METRICS.md`` and the terminal."""
    lines = [
        "# Metrics",
        "",
        'A daemon with `metrics = "127.0.0.1:9467"` (or `"unix:/run/ckptfs/metrics.sock"`) in its '
        "configuration shows these to Prometheus, below `/metrics`. Counters begin at zero with "
        "each daemon. A checkpoint's own end with it; those of the node do not.",
        "",
        "| metric | kind | labels | |",
        "| --- | --- | --- | --- |",
    ]
    for metric in METRICS.values():
        name = PREFIX + metric.name + ("_total" if metric.kind == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{name}` | {metric.kind} | {labels} | {metric.help} |")
    lines += ["", "| label | |", "| --- | --- |"]
    lines += [f"| `{label}` | {text} |" for label, text in LABELS.items()]
    return "\n".join(lines) + "\n"
