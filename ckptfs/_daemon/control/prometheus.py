"""Exports the daemon's counters to Prometheus, one metric for each row of ``_model.metrics``.

Only a daemon with the setting `metrics` imports prometheus_client. The library turns names, values
and labels into its formats. Its own counters are not used, because a read must not pay for them.

The event loop takes a snapshot, in a millisecond or so. A thread turns it into text.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from prometheus_client import exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.control.registry import Attachments
from ckptfs._daemon.control.status import Reporter
from ckptfs._daemon.offload import Offload
from ckptfs._model import metrics
from ckptfs._model.config import Config
from ckptfs._model.counters import Counts, total
from ckptfs._model.metrics import Histogram, Labels, Number

_BUCKETS = range(13, 37)
"""Exported limits of buckets, as powers of two in ns: from 8 µs (a read from memory takes longer)
to 69 s (longer than the read deadline)."""
_OTHER = "other"


@dataclass(eq=False)
class Exporter:
    """Makes the text of a scrape.

    `is_open` says that any user of the node can connect to the metrics' address.
    """

    config: Config
    attachments: Attachments
    reporter: Reporter
    offload: Offload
    is_open: bool

    async def text(self, accept: str) -> tuple[str, bytes]:
        """Content type and content for a client with that HTTP header `Accept`."""
        families = self.families()
        registry = SimpleNamespace(collect=lambda: families)  # as the encoders expect it

        def encoded() -> tuple[str, bytes]:
            encode, content_type = exposition.choose_encoder(accept)
            return content_type, encode(registry)  # type: ignore[arg-type]

        return await self.offload.compute(encoded)

    def families(self) -> list[Metric]:
        """A snapshot of all metrics."""
        node = self.reporter.node()
        found = [_family(metric, metric.numbers(node)) for metric in metrics.NODE]
        checkpoints = dict(self._checkpoints())
        for metric in metrics.CHECKPOINT:
            numbers = {
                (label, *labels): number
                for label, counts in checkpoints.items()
                for labels, number in metric.numbers(counts).items()
            }
            found.append(_family(metric, numbers))
        return found

    def _checkpoints(self) -> Iterator[tuple[str, Counts]]:
        """Counters of checkpoints, by label. A checkpoint that shares the label `_OTHER` keeps it
        until its end, so the sum below that label never shrinks."""
        others: list[Counts] = []
        for attachment in self.attachments:
            activity = attachment.activity
            if activity.is_named:
                yield self._label_of(attachment), activity.total()
            else:
                others += activity.usages()
        ended = self.attachments.activities.ended_unnamed
        if others or ended.opens or ended.fetches:
            yield _OTHER, total([ended, *others])

    def _label_of(self, attachment: Attachment) -> str:
        if attachment.volume is not None:
            return attachment.volume.id
        if self.is_open and self.config.allow_other:
            return attachment.name[len(attachment.location.name) + 1 :]
        return attachment.name


def _family(metric: metrics.Metric, numbers: Mapping[Labels, Number]) -> Metric:
    name = metrics.PREFIX + metric.name
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(name, metric.help, labels=metric.labels)
        for labels, number in numbers.items():
            assert isinstance(number, tuple)
            histogram.add_metric(labels, *_buckets(number))
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(name, metric.help, labels=metric.labels)
    for labels, number in numbers.items():
        assert not isinstance(number, tuple)
        family.add_metric(labels, number)
    return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Cumulated counts by upper limit in seconds, and the sum in seconds."""
    counts, total_ns = histogram
    limits = [(repr(2**power / 1e9), float(sum(counts[: power + 1]))) for power in _BUCKETS]
    return [*limits, ("+Inf", float(sum(counts)))], total_ns / 1e9
