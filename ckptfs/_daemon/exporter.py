"""Metrics for Prometheus: from what the daemon counts to the text that a scrape gets.

prometheus_client is imported only where metrics are on. It turns names, values and labels into its
formats; its own counters are not used, because a read must not pay for them.

A snapshot is taken in the event loop, in a millisecond or so; it is turned into text in a thread.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from ckptfs._daemon.activity import Activity, Usage, total
from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.attachments import Attachments
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.status import Reporter
from ckptfs._model.config import Config
from ckptfs._model.metrics import METRICS, PREFIX
from ckptfs._model.replies import ActivityReply
from ckptfs._store.requests import REQUESTS
from ckptfs._workers.counts import COUNTS

Labels = tuple[str, ...]
Values = Mapping[Labels, float]

_BUCKETS = range(13, 37)
"""Upper limits that are exported, as powers of two in ns: 8 µs (a read from memory takes more) to
69 s (longer than the read deadline)."""
_OTHER = "other"


class Families:
    """What a scrape gets, as prometheus_client wants it. Raises KeyError for a metric that is not
    in the table."""

    def __init__(self) -> None:
        self._found: list[Metric] = []

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client.registry.Collector."""
        return self._found

    def add(self, name: str, values: Values | float) -> None:
        """A counter or gauge: its value for each combination of its labels."""
        metric = METRICS[name]
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = kind(PREFIX + name, metric.help, labels=metric.labels)
        for labels, value in (values if isinstance(values, Mapping) else {(): values}).items():
            family.add_metric(labels, value)
        self._found.append(family)

    def add_histogram(self, name: str, values: Mapping[Labels, tuple[list[int], int]]) -> None:
        """A histogram: counts by power of two in ns, and the sum of all in ns."""
        metric = METRICS[name]
        family = HistogramMetricFamily(PREFIX + name, metric.help, labels=metric.labels)
        for labels, (counts, total_ns) in values.items():
            buckets = [(_seconds(i), float(sum(counts[: i + 1]))) for i in _BUCKETS]
            buckets.append(("+Inf", float(sum(counts))))
            family.add_metric(labels, buckets, total_ns / 1e9)
        self._found.append(family)


def _seconds(power: int) -> str:
    return repr(2**power / 1e9)


class Exporter:
    """Makes the text. `is_open`: who scrapes may be any user of the node."""

    def __init__(
        self,
        config: Config,
        attachments: Attachments,
        reporter: Reporter,
        offload: Offload,
        *,
        is_open: bool,
    ) -> None:
        self._attachments = attachments
        self._reporter = reporter
        self._offload = offload
        self._hides_names = is_open and config.allow_other

    async def text(self, accept: str) -> tuple[str, bytes]:
        """Content type and content for a client that accepts that (the header of HTTP)."""
        families = self.families()

        def encoded() -> tuple[str, bytes]:
            encode, content_type = exposition.choose_encoder(accept)
            return content_type, encode(families)  # type: ignore[arg-type]

        return await self._offload.compute(encoded)

    def families(self) -> Families:
        """A snapshot."""
        found = Families()
        now = self._reporter.node()
        self._add_node(found, now)
        self._add_reads(found)
        self._add_fetches(found, now)
        self._add_workers(found)
        self._add_checkpoints(found)
        return found

    def _add_node(self, found: Families, now: ActivityReply) -> None:
        found.add("info", {(now.version, now.passthrough.split(":")[0]): 1})
        found.add("start_time_seconds", now.started)
        found.add("restarts", now.restarts)
        found.add("attachments", len(self._attachments))
        found.add("threads", self._offload.threads())
        found.add("cache_bytes", now.cache_bytes)
        found.add("cache_limit_bytes", now.cache_bytes_max)
        found.add("evicted_bytes", now.evicted_bytes)
        found.add("evicted_objects", now.evicted_objects)

    def _add_reads(self, found: Families) -> None:
        usage = self._attachments.activities.total()
        found.add("open_files", usage.handles)
        found.add("opens", _opens(usage))
        found.add_histogram("read_seconds", {(): (usage.latency_ns, usage.read_ns)})
        found.add("read_bytes", _sources(usage))
        found.add("read_misses", usage.misses)
        found.add("read_errors", {(code,): n for code, n in usage.errors.items()})
        found.add("reads_waiting", usage.waiting)

    def _add_fetches(self, found: Families, now: ActivityReply) -> None:
        activities = self._attachments.activities
        found.add("fetched_bytes", now.fetched_bytes)
        found.add("fetched_spans", now.fetched_spans)
        found.add("taken_bytes", activities.taken_bytes)
        found.add("given_bytes", activities.given_bytes)
        found.add("fetch_retries", activities.retries)
        found.add("hedged_requests", now.hedged)
        found.add("fetch_failures", {(code,): n for code, n in activities.failures.items()})
        found.add("fetches_running", now.running)
        found.add("fetches_waiting", {(name,): n for name, n in now.queue.items()})
        found.add("in_flight_bytes", now.in_flight_bytes)
        requests = REQUESTS.snapshot()
        outcomes = {
            (kind.kind, outcome): n for kind in requests for outcome, n in kind.outcomes.items()
        }
        found.add("store_requests", outcomes)
        times = {(kind.kind,): (kind.latency_ns, kind.total_ns) for kind in requests}
        found.add_histogram("store_request_seconds", times)

    def _add_workers(self, found: Families) -> None:
        workers = COUNTS.snapshot()
        found.add("workers", workers.running)
        found.add("worker_memory_bytes", workers.memory_bytes)
        found.add("worker_starts", workers.starts)
        found.add("worker_ends", {(reason,): n for reason, n in workers.ends.items()})

    def _add_checkpoints(self, found: Families) -> None:
        usages = dict(self._usages())

        def each(value: Callable[[Usage], float]) -> Values:
            return {(label,): value(usage) for label, usage in usages.items()}

        def each_of(values: Callable[[Usage], Values]) -> Values:
            return {
                (label, *more): value
                for label, usage in usages.items()
                for more, value in values(usage).items()
            }

        found.add("checkpoint_opens", each_of(_opens))
        found.add("checkpoint_reads", each(lambda usage: usage.reads))
        found.add("checkpoint_read_bytes", each_of(_sources))
        found.add("checkpoint_read_misses", each(lambda usage: usage.misses))
        found.add("checkpoint_read_errors", each(lambda usage: sum(usage.errors.values())))
        found.add("checkpoint_fetched_bytes", each(lambda usage: usage.fetched_bytes))
        found.add("checkpoint_reads_waiting", each(lambda usage: usage.waiting))

    def _usages(self) -> Iterator[tuple[str, Usage]]:
        """By label. Those without one of their own never come to have one, so that their sum does
        not shrink."""
        others: list[Activity] = []
        for attachment in self._attachments:
            activity = attachment.activity
            if activity.is_named:
                yield self._label_of(attachment), activity.total()
            else:
                others.append(activity)
        ended = self._attachments.activities.ended_unnamed
        if others or ended.opens or ended.fetches:
            yield _OTHER, total([ended, *(usage for a in others for usage in a.usages())])

    def _label_of(self, attachment: Attachment) -> str:
        name = attachment.name
        return name[len(attachment.location.name) + 1 :] if self._hides_names else name


def _opens(usage: Usage) -> Values:
    return {("daemon",): usage.opens - usage.kernel_opens, ("kernel",): usage.kernel_opens}


def _sources(usage: Usage) -> Values:
    return {("cache",): usage.read_bytes - usage.missed_bytes, ("store",): usage.missed_bytes}
