"""The replies for `ckptfs status` and `ckptfs top`, and traces.

Status and top fit into a message, because their lists are cut. Each reply has the number of
left-out entries.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version as version_of
from typing import TypeVar

import msgspec
import trio

from ckptfs._daemon.attachment.attachment import Attachment, key_of
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.control.current_config import CurrentConfig
from ckptfs._daemon.control.permissions import may_see
from ckptfs._daemon.control.registry import Attachments
from ckptfs._daemon.fetch.fetcher import Fetcher
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.uploads.handing_over import HandingOver
from ckptfs._daemon.uploads.queue import Queue
from ckptfs._daemon.usage.counters import Usage
from ckptfs._model.counters import total
from ckptfs._model.location import Location
from ckptfs._model.protocol.message import LINE_BYTES_MAX
from ckptfs._model.protocol.replies import (
    ActivityReply,
    AttachmentStatus,
    CheckpointActivity,
    Holder,
    ProcessActivity,
    StatusReply,
    Trace,
)
from ckptfs._model.protocol.uploads import UploadsReply
from ckptfs._mount import logs
from ckptfs._mount.handoff import Handoff
from ckptfs._store.request_metrics import REQUESTS
from ckptfs._workers.counts import COUNTS

_VERSION = version_of("ckptfs")  # once, because an upgrade removes it for a moment
_SKIPPED_IN_STATUS = 100
"""Skipped objects that a status lists per attachment. Its count includes all of them."""
_HOLDERS_IN_STATUS = 64
_PROCESSES_IN_STATUS = 16
_PROCESSES_IN_ACTIVITY = 32
_CHECKPOINTS_IN_ACTIVITY = 200
_LIST_BYTES = LINE_BYTES_MAX - (16 << 10)
"""Space in a message for its longest list."""
_UPLOADS_BYTES = 128 << 10
"""Space in a status for uploads."""

S = TypeVar("S", bound=msgspec.Struct)


@dataclass(eq=False)
class Reporter:
    """Makes the replies. `passthrough` is the result of `passthrough.why_not`."""

    current: CurrentConfig
    attachments: Attachments
    cache: Cache
    fetcher: Fetcher
    handoff: Handoff
    offload: Offload
    passthrough: str
    uploads: Queue
    handing_over: HandingOver
    _started_s: float = field(default_factory=time.time, init=False)
    _log: str = field(default_factory=logs.where_log_is, init=False)

    def sample(self) -> None:
        """Take a sample for the rates in a status. The daemon calls this about once a second."""
        self.attachments.activities.sample(trio.current_time())

    # -- status

    def status(self, uid: int, name: str = "") -> StatusReply:
        """The daemon's state, with the attachments that this user may see, or with the one that has
        that name."""
        visible = [a for a in self.attachments if may_see(uid, a) and name in ("", a.name)]
        pending = [
            *self.uploads.statuses(uid, with_done=False),
            *self.handing_over.statuses(uid),
        ]
        uploads = _fitting(pending, _UPLOADS_BYTES)
        listed = _fitting(
            (self._status_of(a, uid) for a in visible), _LIST_BYTES - len(_encoded(uploads))
        )
        counts = self.attachments.activities.total()
        worker_bytes = COUNTS.memory_bytes()
        return StatusReply(
            version=_VERSION,
            pid=os.getpid(),
            mount=self.current.config.mount,
            cache_dir=self.current.config.cache_dir,
            cache_bytes=self.cache.index.used_bytes,
            cache_bytes_max=self.current.config.cache_bytes_max,
            fetched_bytes=counts.fetched_bytes,
            fetched_spans=counts.fetches,
            taken_bytes=counts.taken_bytes,
            given_bytes=counts.given_bytes,
            passthrough=self.passthrough,
            restarts=self.handoff.restarts,
            attachments=listed,
            left_out=len(visible) - len(listed),
            log=self._log,
            workers=len(worker_bytes),
            worker_bytes=sum(worker_bytes),
            taken_over_s=self.handoff.taken_over_s,
            host=os.uname().nodename,
            uploads=uploads,
            uploads_left_out=len(pending) - len(uploads),
        )

    def all_uploads(self, uid: int) -> UploadsReply:
        """The uploads that this user may see, also those that are done, the newest first. Raises
        CacheError before they are known."""
        self.uploads.require_restored()
        found = [*self.uploads.statuses(uid, with_done=True), *self.handing_over.statuses(uid)]
        listed = _fitting(reversed(found))
        return UploadsReply(uploads=listed, left_out=len(found) - len(listed))

    def _status_of(self, attachment: Attachment, uid: int) -> AttachmentStatus:
        manifest = attachment.manifest
        cached = attachment.cached_bytes(self.cache)
        rates = attachment.activity.rates()
        return AttachmentStatus(
            name=attachment.name,
            path=f"{self.current.config.mount}/{attachment.name}",
            uri=attachment.location.uri,
            version=manifest.version,
            state=attachment.state(cached),
            files=attachment.snapshot.file_count,
            size=attachment.snapshot.size,
            cached=cached,
            holders=attachment.leases.holders[:_HOLDERS_IN_STATUS],
            open_files=attachment.leases.open_handles,
            pinned=attachment.leases.pinned,
            attached=attachment.attached_s,
            uid=attachment.uid,
            error=attachment.error,
            skipped=list(manifest.skipped[:_SKIPPED_IN_STATUS]),
            skipped_count=len(manifest.skipped),
            volume="" if attachment.volume is None else attachment.volume.id,
            processes=_holders_of(attachment, uid),
            reads_per_s=rates.reads,
            read_bytes_per_s=rates.read_bytes,
            fetched_bytes_per_s=rates.fetched_bytes,
        )

    # -- trace

    def trace(self, uid: int, name: str, location: Location | None) -> Trace:
        """How processes have read a checkpoint, which is attached or was. Raises NotAttached."""
        traces = self.attachments.traces
        trace = traces.find(key_of(uid, location)) if location is not None else None
        attachment = None
        if trace is None or not trace.has_ended:
            attachment = self.attachments.find(uid, name, location)
            trace = traces.find(attachment.key) or traces.running(attachment.key)
            trace.named(attachment.activity.commands())
        return Trace(
            mount=self.current.config.mount,
            name="" if attachment is None or trace.has_ended else attachment.name,
            uri=trace.about.uri,
            version=trace.about.version,
            attached=trace.about.attached_s,
            file_count=trace.about.file_count,
            size=trace.about.size,
            files=trace.files(),
            processes=trace.processes(),
            accesses=trace.accesses,
            fetches=trace.fetches,
            left_out=trace.left_out,
            passthrough=sorted(trace.passthrough),
            restarts=self.handoff.restarts,
        )

    # -- activity

    def activity(self, uid: int) -> ActivityReply:
        """The counters, with the attachments that this user may see."""
        visible = [a for a in self.attachments if may_see(uid, a)]
        visible.sort(key=_how_busy, reverse=True)
        listed = _fitting(_activity_of(a, uid) for a in visible[:_CHECKPOINTS_IN_ACTIVITY])
        return msgspec.structs.replace(
            self.node(), checkpoints=listed, checkpoints_left_out=len(visible) - len(listed)
        )

    def node(self) -> ActivityReply:
        """The counters of the node as a whole."""
        in_flight = self.fetcher.scheduler.in_flight()
        worker_bytes = COUNTS.memory_bytes()
        counts = self.attachments.activities.total()
        return ActivityReply(
            version=_VERSION,
            pid=os.getpid(),
            mount=self.current.config.mount,
            at_s=trio.current_time(),
            started=self._started_s,
            restarts=self.handoff.restarts,
            passthrough=self.passthrough,
            cache_bytes=self.cache.index.used_bytes,
            cache_bytes_max=self.current.config.cache_bytes_max,
            evicted_bytes=self.cache.index.evicted_bytes,
            evicted_objects=self.cache.index.evicted_objects,
            fetched_bytes=counts.fetched_bytes,
            fetched_spans=counts.fetches,
            hedged=self.fetcher.transfers.hedged_requests,
            running=in_flight.running,
            in_flight_bytes=in_flight.bytes,
            queue={priority.name.lower(): n for priority, n in in_flight.waiting.items()},
            counts=counts,
            retries=counts.retries,
            failures=counts.failures,
            requests=REQUESTS.snapshot(),
            checkpoints=[],
            checkpoints_left_out=0,
            attachments=len(self.attachments),
            threads=self.offload.threads(),
            workers=len(worker_bytes),
            worker_memory_bytes=sum(worker_bytes),
            worker_starts=COUNTS.starts,
            worker_ends=dict(COUNTS.ends),
            uploads={"staging": self.handing_over.active(), **self.uploads.count()},
            uploads_bytes=self.uploads.kept_bytes() + self.handing_over.kept_bytes(),
            uploaded_bytes=self.uploads.sent_bytes,
            uploads_ended=dict(self.uploads.ended),
        )


def _activity_of(attachment: Attachment, uid: int) -> CheckpointActivity:
    activity = attachment.activity
    counts = activity.total()
    usages = [u for u in activity.usages() if u.opens or u.fetches or u.open_files]
    usages.sort(key=lambda u: (u.waiting, u.read_bytes + u.fetched_bytes), reverse=True)
    return CheckpointActivity(
        name=attachment.name,
        uri=attachment.location.uri,
        in_flight=activity.in_flight,
        queued=activity.queued,
        counts=counts,
        retries=counts.retries,
        failures=counts.failures,
        processes=[
            ProcessActivity(u.pid, _command_of(u, uid), total([u]), u.has_ended)
            for u in usages[:_PROCESSES_IN_ACTIVITY]
        ],
        processes_left_out=max(0, len(usages) - _PROCESSES_IN_ACTIVITY),
    )


def _how_busy(attachment: Attachment) -> tuple[int, float, float]:
    rates = attachment.activity.rates()
    return attachment.activity.in_flight, rates.read_bytes + rates.fetched_bytes, rates.reads


def _holders_of(attachment: Attachment, uid: int) -> list[Holder]:
    """The first of the processes that have its root directory or files of it open."""
    activity = attachment.activity
    holding = set(attachment.leases.holders)
    reading = {usage.pid for usage in activity.usages() if usage.pid and usage.open_files}
    found: list[Holder] = []
    for pid in sorted(holding | reading)[:_PROCESSES_IN_STATUS]:
        usage = activity.of(pid)
        found.append(
            Holder(pid, _command_of(usage, uid), usage.open_files) if usage else Holder(pid, "", 0)
        )
    return found


def _command_of(usage: Usage, uid: int) -> str:
    """The process's command, or "" if the user must not see the process."""
    return usage.command if not usage.pid or uid in (0, usage.owner) else ""


_encoded = msgspec.json.encode


def _fitting(items: Iterable[S], bytes_max: int = _LIST_BYTES) -> list[S]:
    """The first items, as many as fit into so many bytes of a message."""
    found: list[S] = []
    left_bytes = bytes_max
    for item in items:
        left_bytes -= len(_encoded(item)) + 1
        if left_bytes < 0:
            break
        found.append(item)
    return found
