"""What `ckptfs status` and `ckptfs top` say.

Both fit into a message, whatever is attached: lists are cut, and what is left out is counted.
"""

import os
import stat
import time
from collections.abc import Iterable
from importlib.metadata import version as version_of
from typing import TypeVar

import msgspec
import trio

from ckptfs._daemon import logs, notify
from ckptfs._daemon.activity import Usage
from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.attachments import Attachments
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.handoff import Handoff
from ckptfs._daemon.limits import may_see
from ckptfs._model.config import Config
from ckptfs._model.message import LINE_BYTES_MAX
from ckptfs._model.replies import (
    ActivityReply,
    AttachmentStatus,
    CheckpointActivity,
    Counts,
    Holder,
    ProcessActivity,
    RequestActivity,
    StatusReply,
)
from ckptfs._store.requests import REQUESTS
from ckptfs._workers.counts import COUNTS

_VERSION = version_of("ckptfs")  # looked up once: an upgrade takes it away for a moment
_SKIPPED_IN_STATUS = 100
"""Skipped objects that a status lists per attachment; the count is always whole."""
_HOLDERS_IN_STATUS = 64
_PROCESSES_IN_STATUS = 16
_PROCESSES_IN_ACTIVITY = 32
_CHECKPOINTS_IN_ACTIVITY = 200
_HEAD_BYTES = 16 << 10
"""Of a message, for all but its longest list."""

S = TypeVar("S", bound=msgspec.Struct)


class Reporter:
    """Looks at all that is told. `passthrough`: "on", or why not."""

    def __init__(
        self,
        config: Config,
        attachments: Attachments,
        cache: Cache,
        fetcher: Fetcher,
        handoff: Handoff,
        passthrough: str,
    ) -> None:
        self._config = config
        self._attachments = attachments
        self._cache = cache
        self._fetcher = fetcher
        self._handoff = handoff
        self._passthrough = passthrough
        self._started_s = time.time()
        self._log = where_log_is()

    def sample(self) -> None:
        """To be called about once a second: what the rates in a status are made of."""
        self._attachments.activities.sample(trio.current_time())

    # -- status

    def status(self, uid: int) -> StatusReply:
        """The daemon's state, with the attachments that this user may see."""
        visible = [a for a in self._attachments if may_see(uid, a)]
        told = _fitting(self._status_of(a, uid) for a in visible)
        workers = COUNTS.snapshot()
        return StatusReply(
            version=_VERSION,
            pid=os.getpid(),
            mount=self._config.mount,
            cache_dir=self._config.cache_dir,
            cache_bytes=self._cache.used_bytes,
            cache_bytes_max=self._config.cache_bytes_max,
            fetched_bytes=self._fetcher.fetched_bytes,
            fetched_spans=self._fetcher.fetched_spans,
            taken_bytes=self._attachments.activities.taken_bytes,
            given_bytes=self._attachments.activities.given_bytes,
            passthrough=self._passthrough,
            restarts=self._handoff.restarts,
            attachments=told,
            left_out=len(visible) - len(told),
            log=self._log,
            workers=workers.running,
            worker_bytes=workers.memory_bytes,
        )

    def _status_of(self, attachment: Attachment, uid: int) -> AttachmentStatus:
        manifest = attachment.manifest
        cached = attachment.cached_bytes(self._cache)
        rates = attachment.activity.rates()
        return AttachmentStatus(
            name=attachment.name,
            path=f"{self._config.mount}/{attachment.name}",
            uri=attachment.location.uri,
            version=manifest.version,
            state=attachment.state(cached),
            files=attachment.file_count,
            size=attachment.size,
            cached=cached,
            holders=sorted(set(attachment.directories.values()))[:_HOLDERS_IN_STATUS],
            open_files=attachment.open_handles,
            pinned=attachment.pinned,
            attached=attachment.attached_s,
            uid=attachment.uid,
            error=attachment.error,
            skipped=list(manifest.skipped[:_SKIPPED_IN_STATUS]),
            skipped_count=len(manifest.skipped),
            processes=_holders_of(attachment, uid),
            reads_per_s=rates.reads,
            read_bytes_per_s=rates.read_bytes,
            fetched_bytes_per_s=rates.fetched_bytes,
        )

    # -- activity

    def activity(self, uid: int) -> ActivityReply:
        """What was read and fetched so far, with the attachments that this user may see."""
        visible = [a for a in self._attachments if may_see(uid, a)]
        visible.sort(key=_how_busy, reverse=True)
        told = _fitting(_activity_of(a, uid) for a in visible[:_CHECKPOINTS_IN_ACTIVITY])
        left_out = len(visible) - len(told)
        return msgspec.structs.replace(self.node(), checkpoints=told, checkpoints_left_out=left_out)

    def node(self) -> ActivityReply:
        """The same, of the node as a whole only."""
        slots = self._fetcher.slots()
        evicted_bytes, evicted_objects = self._cache.evicted
        activities = self._attachments.activities
        return ActivityReply(
            version=_VERSION,
            pid=os.getpid(),
            mount=self._config.mount,
            at_s=trio.current_time(),
            started=self._started_s,
            restarts=self._handoff.restarts,
            passthrough=self._passthrough,
            cache_bytes=self._cache.used_bytes,
            cache_bytes_max=self._config.cache_bytes_max,
            evicted_bytes=evicted_bytes,
            evicted_objects=evicted_objects,
            fetched_bytes=self._fetcher.fetched_bytes,
            fetched_spans=self._fetcher.fetched_spans,
            retries=activities.retries,
            hedged=self._fetcher.hedged_requests,
            failures=dict(activities.failures),
            running=slots.running,
            in_flight_bytes=slots.bytes,
            queue={priority.name.lower(): n for priority, n in slots.waiting.items()},
            counts=counts_of(activities.total()),
            requests=[
                RequestActivity(
                    found.kind,
                    {outcome: n for outcome, n in found.outcomes.items() if n},
                    _cut(found.latency_ns),
                )
                for found in REQUESTS.snapshot()
            ],
            checkpoints=[],
            checkpoints_left_out=0,
        )


def counts_of(usage: Usage) -> Counts:
    """What goes over the wire."""
    return Counts(
        opens=usage.opens,
        kernel_opens=usage.kernel_opens,
        open_files=usage.handles,
        waiting=usage.waiting,
        reads=usage.reads,
        read_bytes=usage.read_bytes,
        misses=usage.misses,
        missed_bytes=usage.missed_bytes,
        errors=dict(usage.errors),
        fetches=usage.fetches,
        fetched_bytes=usage.fetched_bytes,
        latency_ns=_cut(usage.latency_ns),
    )


def where_log_is(fd: int = 2) -> str:
    """Where that of this process is to be read, which goes to `fd`: a command, or a file."""
    if logs.leads_to_journal(fd):
        unit, flags = notify.unit_of_process()
        return " ".join(["journalctl", *flags, "-u", unit])
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.readlink(f"/proc/self/fd/{fd}")
    return "the standard error of ckptfs mount"


def _activity_of(attachment: Attachment, uid: int) -> CheckpointActivity:
    activity = attachment.activity
    usages = [u for u in activity.usages() if u.opens or u.fetches or u.handles]
    usages.sort(key=lambda u: (u.waiting, u.read_bytes + u.fetched_bytes), reverse=True)
    return CheckpointActivity(
        name=attachment.name,
        uri=attachment.location.uri,
        in_flight=activity.in_flight,
        queued=activity.queued,
        retries=activity.retries,
        failures=dict(activity.failures),
        counts=counts_of(activity.total()),
        processes=[
            ProcessActivity(u.pid, _command_of(u, uid), counts_of(u))
            for u in usages[:_PROCESSES_IN_ACTIVITY]
        ],
        processes_left_out=max(0, len(usages) - _PROCESSES_IN_ACTIVITY),
    )


def _how_busy(attachment: Attachment) -> tuple[int, float, float]:
    rates = attachment.activity.rates()
    return attachment.activity.in_flight, rates.read_bytes + rates.fetched_bytes, rates.reads


def _holders_of(attachment: Attachment, uid: int) -> list[Holder]:
    """The processes that hold it, and those that have files open, the first of them."""
    activity = attachment.activity
    holding = set(attachment.directories.values())
    reading = {usage.pid for usage in activity.usages() if usage.pid and usage.handles}
    found: list[Holder] = []
    for pid in sorted(holding | reading)[:_PROCESSES_IN_STATUS]:
        usage = activity.of(pid)
        found.append(
            Holder(pid, _command_of(usage, uid), usage.handles) if usage else Holder(pid, "", 0)
        )
    return found


def _command_of(usage: Usage, uid: int) -> str:
    """Only to those who may see the process."""
    return usage.command if not usage.pid or uid in (0, usage.owner) else ""


def _cut(histogram: list[int]) -> list[int]:
    end = len(histogram)
    while end and not histogram[end - 1]:
        end -= 1
    return histogram[:end]


def _fitting(items: Iterable[S]) -> list[S]:
    """The first of them, as many as a message has room for."""
    found: list[S] = []
    left_bytes = LINE_BYTES_MAX - _HEAD_BYTES
    for item in items:
        left_bytes -= len(msgspec.json.encode(item)) + 1
        if left_bytes < 0:
            break
        found.append(item)
    return found
