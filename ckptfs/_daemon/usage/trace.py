"""The trace of an attachment: its reads and their fetches, from the beginning.

The daemon always records it, so a user can look at a slow restore afterwards, also when the
attachment has ended. An ended trace is dropped when its memory is needed. Consecutive reads are one
entry, and the number of entries is bounded for each attachment and for all of them together, which
keeps traces small. Further reads and fetches are only counted, because a restore is at the
beginning.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ckptfs._daemon.usage import procfs
from ckptfs._model.manifest import ListedFile
from ckptfs._model.plans.trace import Access, Fetch, Purpose, TracedFile, TracedProcess

ENTRIES_MAX = 20_000
"""Entries of one attachment, of each kind. A restore of 2,000 shards by eight processes needs that
many. An entry takes some 400 bytes of memory."""
ENTRIES_OF_ALL_MAX = 100_000
"""Entries of all attachments together, of both kinds. They take 40 MB."""
_PAUSE_S = 0.25
"""Reads further apart are two entries, so the trace shows the pause."""
_CURSORS = 4
"""Threads of one process that read one file at different offsets and have entries of their own."""
_ERROR_LENGTH_MAX = 200
_PROCESSES_MAX = 1000
"""Processes whose names a trace has."""


Key = tuple[int, str, str]
"""See ``Attachment.key``."""


class About(NamedTuple):
    """The head of a trace, see ``AttachmentStatus``."""

    uri: str
    version: str
    attached_s: float
    file_count: int
    size: int


class Trace:
    """The trace of one attachment.

    Args:
        traces: All traces, which bound the number of entries.
        about: The attachment.
        listed: Returns the attachment's files.
        now_s: Its beginning, by ``time.perf_counter``.

    Attributes:
        accesses: Consecutive reads, in the order of their first reads.
        fetches: Fetches, in the order of their ends.
        left_out: Number of reads and fetches that were not recorded.
        passthrough: Positions of files that the kernel has read by itself, unseen.
    """

    def __init__(
        self,
        traces: "Traces",
        about: About,
        listed: Callable[[], Sequence[ListedFile]],
        now_s: float,
    ) -> None:
        self._traces = traces
        self.about = about
        self._listed = listed
        self._zero_s = now_s
        self.accesses: list[Access] = []
        self.fetches: list[Fetch] = []
        self.left_out = 0
        self.passthrough: set[int] = set()
        self._latest: dict[tuple[int, int], deque[Access]] = {}  # by file and process
        self._commands: dict[int, str] = {}  # by process
        self._ranks: dict[int, int] = {}  # by process
        self._files: list[TracedFile] | None = None  # when it has ended

    def joined(self, pid: int, rank: int) -> None:
        """Record that a process has attached the checkpoint as that rank of its job."""
        if rank >= 0 and pid and len(self._ranks) < _PROCESSES_MAX:
            self._ranks[pid] = rank

    def read(
        self, file: int, pid: int, start: int, stop: int, began_s: float, ended_s: float
    ) -> None:
        """Record an answered read.

        Args:
            file: Position in `listed`.
            pid: The process that opened the file.
            start: Begin of the bytes.
            stop: End of the bytes.
            began_s: When the daemon received it, by ``time.perf_counter``.
            ended_s: When the daemon answered it after a wait for bytes; 0 if it did not wait.
        """
        began_s -= self._zero_s
        waits, waited_s = 0, 0.0
        if ended_s:
            waits, waited_s = 1, ended_s - self._zero_s - began_s
        latest = self._latest.get((file, pid))
        if latest is not None:
            for access in latest:
                # Requests of the kernel's readahead can come in another order.
                if access.start <= start <= access.stop and began_s - access.ended_s <= _PAUSE_S:
                    if stop > access.stop:
                        access.stop = stop
                    access.reads += 1
                    access.waits += waits
                    access.waited_s += waited_s
                    access.ended_s = max(access.ended_s, began_s + waited_s)
                    return
        if not self._admit(len(self.accesses)):
            return
        access = Access(file, pid, start, stop, 1, waits, waited_s, began_s, began_s + waited_s)
        self.accesses.append(access)
        if latest is None:
            latest = self._latest[file, pid] = deque(maxlen=_CURSORS)
            if pid and pid not in self._commands and len(self._commands) < _PROCESSES_MAX:
                self._commands[pid] = procfs.name(pid)
        latest.appendleft(access)

    def fetched(
        self,
        file: int,
        start: int,
        stop: int,
        purpose: Purpose,
        tries: int,
        error: str,
        times_s: tuple[float, float, float],
    ) -> None:
        """Record an ended span. The arguments are those of ``Fetch``, with times by
        ``time.perf_counter``."""
        if self._admit(len(self.fetches)):
            times = (at_s - self._zero_s for at_s in times_s)
            error = error[:_ERROR_LENGTH_MAX]
            self.fetches.append(Fetch(file, start, stop, purpose, tries, error, *times))

    def note_passthrough(self, file: int) -> None:
        """Record that the kernel reads that file by itself from now on."""
        if len(self.passthrough) < ENTRIES_MAX:
            self.passthrough.add(file)

    def _admit(self, entries: int) -> bool:
        admitted = entries < ENTRIES_MAX and self._files is None and self._traces.take_one()
        self.left_out += not admitted
        return admitted

    @property
    def has_ended(self) -> bool:
        """Whether its attachment has ended."""
        return self._files is not None

    @property
    def entries(self) -> int:
        """The number of its entries."""
        return len(self.accesses) + len(self.fetches)

    def files(self) -> list[TracedFile]:
        """The files that its entries name."""
        if self._files is not None:
            return self._files
        used = {a.file for a in self.accesses} | {f.file for f in self.fetches} | self.passthrough
        listed = self._listed()
        return [TracedFile(i, listed[i].path, listed[i].size) for i in sorted(used)]

    def processes(self) -> list[TracedProcess]:
        """The processes that its entries name."""
        return [
            TracedProcess(pid, command, self._ranks.get(pid, -1))
            for pid, command in self._commands.items()
        ]

    def named(self, commands: Mapping[int, str]) -> None:
        """Take in the commands of processes, as far as they are known by now."""
        for pid, command in commands.items():
            if pid in self._commands and command:
                self._commands[pid] = command

    def end(self) -> None:
        """Take in the end of the attachment, and keep only the files that entries name."""
        self._files = self.files()
        self._listed = lambda: ()
        self._latest.clear()


class Traces:
    """The traces of all attachments, and of ended ones until their memory is needed.

    Args:
        entries_max: Bound for the entries of all traces together.
    """

    def __init__(self, entries_max: int = ENTRIES_OF_ALL_MAX) -> None:
        self._left = entries_max
        self._running: dict[Key, Trace] = {}
        self._ended: dict[Key, Trace] = {}  # the oldest end first

    def begin(self, key: Key, about: About, listed: Callable[[], Sequence[ListedFile]]) -> Trace:
        """The trace of a new attachment with that ``Attachment.key``."""
        trace = self._running[key] = Trace(self, about, listed, time.perf_counter())
        return trace

    def running(self, key: Key) -> Trace:
        """The trace of an attachment that has not ended."""
        return self._running[key]

    def end(self, key: Key) -> None:
        """Take in the end of an attachment. An empty trace is dropped, so a brief look at a
        checkpoint does not replace the trace of its restore."""
        trace = self._running.pop(key, None)
        if trace is not None and trace.entries:
            trace.end()
            self._drop(key)
            self._ended[key] = trace

    def find(self, key: Key) -> Trace | None:
        """The latest trace that has entries."""
        running = self._running.get(key)
        return running if running is not None and running.entries else self._ended.get(key)

    def take_one(self) -> bool:
        """Count one more entry, if necessary in place of the oldest ended trace. Returns whether
        the bound permits it."""
        while self._left <= 0 and self._ended:
            self._drop(next(iter(self._ended)))
        if self._left <= 0:
            return False
        self._left -= 1
        return True

    def _drop(self, key: Key) -> None:
        if (old := self._ended.pop(key, None)) is not None:
            self._left += old.entries
