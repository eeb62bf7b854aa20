"""The results that a reader may and may not see during a fault: SEMANTICS.md as code.

A window is the time of a fault, or a moment (a kill). The verdict on a result depends on the
windows that overlap the operation, and on the events of the reader's lease. A fault that ended
before the operation excuses nothing, except for the lasting ones of SEMANTICS.md: a version that
has changed, and a lease that has ended.
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SLACK_S = 0.3
"""Between two clocks being read: a process may be off its CPU for as long."""

MEMORY_S = 6.0
"""After an error the metadata's store is not asked again for 5 s (`_daemon/metadata.py`)."""

FRESH_S = 1.0
"""A read that has failed by its deadline fails at once for as long (`_daemon/timeouts.py`)."""

STORE_ERRORS = {
    "refused": {"ETIMEDOUT"},
    "dark": {"ETIMEDOUT"},
    "reset": {"ETIMEDOUT"},
    "slow": {"ETIMEDOUT"},
    "trickle": {"ETIMEDOUT"},
    "cut": {"ETIMEDOUT"},
    "unavailable": {"ETIMEDOUT"},
    "denied": {"EACCES"},
    "garbage": {"EIO", "ETIMEDOUT"},
    "handshake cut": {"ETIMEDOUT"},
    "untrusted": {"ETIMEDOUT"},
}
"""By what the store does, what a read may end with."""

ATTACH_ERRORS = {
    **{kind: {"store-timeout", "store-unavailable"} for kind in STORE_ERRORS},
    "denied": {"access-denied"},
    "garbage": {"store", "store-timeout", "store-unavailable"},
    "cut": {"store", "store-timeout", "store-unavailable"},
}
READS = {"read", "fault", "tensors"}
METADATA = {"metadata", "set metadata", "update metadata"}
ATTACHES = {"attach", "let go"}

KILLED, STOPPED, ENDED, DETACHED = "daemon killed", "daemon stopped", "keeper killed", "detached"
"""The mount has ended after ENDED, so everything in it fails until the next attach."""

READ_ONLY, DISK_FAILS, DISK_HANGS = "disk read-only", "disk fails", "disk hangs"
REPLACED = "disk replaced"
"""No reader notices a disk that fails, but for who reads it without the daemon (passthrough). One
that does not answer holds up who needs it."""

DISK_MEMORY_S = 30.0
"""Longest time for which a process has a file open without interruption. It reads the file from the
original disk, even after a replacement of the disk."""

TIMEOUTS = {kind for kind, errors in STORE_ERRORS.items() if "ETIMEDOUT" in errors} | {DISK_HANGS}
"""The faults by which a read can time out."""

ENDED_ERRORS = {"ENOTCONN", "ECONNABORTED", "ENOENT", "ESTALE"}
DETACHED_ERRORS = {"ESTALE", "ENOENT"}
PAUSE_S = 25.0
"""Longest that a daemon may need to be noticed as stuck (10 s) and followed, on a busy machine."""


@dataclass
class Window:
    """`checkpoint`: the only one that it is about; "": all."""

    kind: str
    begin_s: float
    end_s: float = math.inf
    checkpoint: str = ""


@dataclass(frozen=True)
class Breach:
    """Something that SEMANTICS.md rules out."""

    kind: str
    at_s: float
    text: str
    told: dict[str, Any]


class Timeline:
    """The faults and their times on the monotonic clock. Safe for threads."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self._published: dict[int, list[float]] = {}  # by file, when its versions 1, 2, … came
        self._lock = threading.Lock()

    @contextmanager
    def during(self, kind: str, checkpoint: str = "") -> Iterator[Window]:
        """Something is wrong while the context lasts."""
        window = Window(kind, time.monotonic(), checkpoint=checkpoint)
        with self._lock:
            self.windows.append(window)
        try:
            yield window
        finally:
            window.end_s = time.monotonic()

    def publishing(self, index: int) -> None:
        """The next version of a file is about to be at the store."""
        with self._lock:
            self._published.setdefault(index, []).append(time.monotonic())

    def published(self, index: int) -> list[float]:
        with self._lock:
            return list(self._published.get(index, []))

    def overlapping(
        self, begin_s: float, end_s: float, checkpoint: str | None = None
    ) -> list[Window]:
        """The windows that overlap a time; of those about one checkpoint only the given one's."""
        with self._lock:
            return [
                window
                for window in self.windows
                if window.begin_s <= end_s + SLACK_S
                and window.end_s >= begin_s - SLACK_S
                and window.checkpoint in ("", checkpoint)
            ]


class Verdict:
    """The judge. With `passthrough`, the kernel may read files of the cache by itself."""

    def __init__(
        self,
        timeline: Timeline,
        *,
        read_deadline_s: float,
        attach_deadline_s: float,
        passthrough: bool,
    ) -> None:
        self._timeline = timeline
        self._read_deadline_s = read_deadline_s
        self._attach_deadline_s = attach_deadline_s
        self._passthrough = passthrough

    # -- errors

    def of_failure(self, told: dict[str, Any]) -> str:
        """Why an operation may not have failed so; "": it may."""
        begin_s, end_s = told["start_s"], told["end_s"]
        error, operation = told["error"], told["operation"]
        if operation in READS and error == "ETIMEDOUT" and self._is_early(told):
            took_s = end_s - begin_s
            return f"timed out after {took_s:.1f} s of {self._read_deadline_s:g} s"
        allowed = self._allowed(told)
        if error in allowed:
            return ""
        kinds = sorted({w.kind for w in self._timeline.overlapping(begin_s, end_s)}) or ["nothing"]
        return f"{error} in {operation} while {', '.join(kinds)}: {told['text']}"

    def _is_early(self, told: dict[str, Any]) -> bool:
        """Whether a read has timed out although neither it, nor one that failed just before it, nor
        the kernel's readahead can have waited for the deadline."""
        end_s = told["end_s"]
        least_s = self._read_deadline_s - SLACK_S
        if end_s - told["start_s"] >= least_s:
            return False
        since_s = end_s - FRESH_S - self._read_deadline_s
        windows = self._timeline.overlapping(since_s, end_s, told.get("checkpoint"))
        begun_s = [window.begin_s for window in windows if window.kind in TIMEOUTS]
        return end_s - min(begun_s, default=end_s) < least_s

    def _allowed(self, told: dict[str, Any]) -> set[str]:
        begin_s, end_s, operation = told["start_s"], told["end_s"], told["operation"]
        checkpoint = told.get("checkpoint")
        if operation in READS and told["error"] in ("ETIMEDOUT", "SIGBUS"):
            begin_s -= FRESH_S
        now = self._timeline.overlapping(begin_s, end_s, checkpoint)
        since = self._timeline.overlapping(told.get("lease_s", begin_s), end_s, checkpoint)
        allowed: set[str] = set()
        for window in since:
            if window.kind == ENDED:
                allowed |= ENDED_ERRORS | {"not-attached"}
            elif window.kind == DETACHED:
                allowed |= DETACHED_ERRORS
        if operation in READS:
            allowed |= {e for window in now for e in STORE_ERRORS.get(window.kind, ())}
            if any(window.kind == DISK_HANGS for window in now):
                allowed.add("ETIMEDOUT")
            if self._passthrough and self._has_bad_disk(begin_s - DISK_MEMORY_S, end_s):
                allowed.add("EIO")
            if "file" in told and self._has_changed(told):
                allowed.add("ESTALE")
            if operation == "fault" and allowed:
                allowed.add("SIGBUS")
        elif operation in METADATA:
            lately = self._timeline.overlapping(begin_s - MEMORY_S, end_s, checkpoint)
            if any(window.kind in STORE_ERRORS for window in lately):
                allowed |= {"EIO", "ETIMEDOUT", "EACCES"}
                allowed |= {"store", "store-unavailable", "store-timeout", "access-denied"}
                if any(window.kind == "garbage" for window in lately):
                    allowed |= {"metadata", "metadata-not-dict"}
        elif operation in ATTACHES:
            allowed |= {e for window in now for e in ATTACH_ERRORS.get(window.kind, ())}
            if any(window.kind in (KILLED, STOPPED, ENDED) for window in now):
                allowed |= {"daemon"}  # it may be killed again and again while it is asked
            bad_s = [window.begin_s for window in self._bad_disks(begin_s, end_s)]
            since_bad = self._timeline.overlapping(min(bad_s, default=end_s) - MEMORY_S, end_s)
            if bad_s and any(window.kind == ENDED for window in since_bad):
                allowed |= {"place"}  # no first daemon begins on such a disk
        elif operation == "evict" and self._has_bad_disk(begin_s - DISK_MEMORY_S, end_s):
            allowed.add("EIO")  # its file system notices an error of the disk later, too
        return allowed

    def _has_bad_disk(self, begin_s: float, end_s: float) -> bool:
        return bool(self._bad_disks(begin_s, end_s))

    def _bad_disks(self, begin_s: float, end_s: float) -> list[Window]:
        windows = self._timeline.overlapping(begin_s, end_s)
        return [window for window in windows if window.kind in (READ_ONLY, DISK_FAILS)]

    def _has_changed(self, told: dict[str, Any]) -> bool:
        """Whether the file is another version at the store than the one that the lease shows."""
        published = self._timeline.published(told["file"])
        if (version := told.get("version")) is not None:
            return len(published) > version and published[version] <= told["end_s"]
        listed_s = (told.get("attached_s") or told["lease_s"]) - self._attach_deadline_s
        return any(listed_s <= at_s <= told["end_s"] for at_s in published)

    # -- bytes and versions

    def of_wrong(self, told: dict[str, Any]) -> str:
        """Why other bytes than expected are wrong; "": they need not be. When a lease was ended,
        what its path leads to may be a newer attachment."""
        if told["scope"] == "lease" and self._may_be_newer(told, told["lease_s"]):
            return ""
        return told["text"]

    def _may_be_newer(self, told: dict[str, Any], since_s: float) -> bool:
        """Whether a path of the lease may lead to another attachment than at `since_s`."""
        since = self._timeline.overlapping(since_s, told["told_s"], told.get("checkpoint"))
        return any(window.kind in (ENDED, DETACHED) for window in since)

    def of_pin(self, told: dict[str, Any]) -> str:
        """Why a version cannot be the one that was there when the checkpoint was attached."""
        version, attached_s = told["version"], told["attached_s"]
        published = self._timeline.published(told["file"])
        if version and published[version - 1] > attached_s + SLACK_S:
            if self._may_be_newer(told, attached_s):
                return ""
            return f"version {version} came {published[version - 1] - attached_s:.2f} s after it"
        if len(published) > version:
            old_s = attached_s - self._attach_deadline_s - published[version]
            if old_s > SLACK_S:
                return f"version {version} was replaced at least {old_s:.2f} s before that"
        return ""

    def of_old_note(self, told: dict[str, Any]) -> str:
        """Why metadata must not be as old; "": the store could not be asked."""
        begin_s = told["written_s"] - MEMORY_S
        windows = self._timeline.overlapping(begin_s, told["told_s"], told.get("checkpoint"))
        return "" if any(w.kind in STORE_ERRORS for w in windows) else told["text"]

    # -- times

    def limit_s(self, operation: str, length: int, begin_s: float, end_s: float) -> float:
        """How long an operation may take. A read takes the deadline once, and twice where a busy
        machine lets the kernel ask again after more than `FRESH_S`; a large read consists of
        several."""
        if operation in ATTACHES:
            limit_s = self._attach_deadline_s + 40  # 10 s of the client; and it may start a daemon
        elif operation == "update metadata":
            limit_s = 120.0  # it asks the store itself, by the rules of its client
        else:
            limit_s = self._read_deadline_s * (2 + length // (256 << 10)) + 3
        windows = self._timeline.overlapping(begin_s, end_s)
        pauses = [w for w in windows if w.kind in (KILLED, STOPPED, ENDED, DISK_HANGS)]
        return limit_s + PAUSE_S * len(pauses)
