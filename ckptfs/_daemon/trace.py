"""The trace of an attachment: how it was read, and what was fetched for that, from its beginning.

It is always kept, so that one can look at a restore after it was slow; also when nobody holds the
checkpoint any more, until the room is needed. So it is small: reads that follow one another are one
entry, and there is a most for each attachment and for all of them. What is over that is counted and
left out: a restore is at the beginning.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ckptfs._daemon import processes
from ckptfs._model.manifest import ListedFile
from ckptfs._model.trace import Access, Fetch, Purpose, TracedFile, TracedProcess

ENTRIES_MAX = 20_000
"""Of one attachment, of each kind: a restore of 2,000 shards by eight processes. An entry takes
some 400 bytes of memory."""
ENTRIES_OF_ALL_MAX = 100_000
"""Of all attachments together, both kinds: 40 MB."""
_PAUSE_S = 0.25
"""Reads further apart than that are two entries, so that the pause is seen."""
_CURSORS = 4
"""Threads of one process that read one file at places of their own, and are kept apart."""
_ERROR_LENGTH_MAX = 200
_PROCESSES_MAX = 1000
"""Whose names are kept."""


Key = tuple[int, str]
"""See ``Attachment.key``."""


class About(NamedTuple):
    """What is remembered of an attachment; see ``AttachmentStatus``."""

    uri: str
    version: str
    attached_s: float
    file_count: int
    size: int


class Trace:
    """Of one attachment.

    Args:
        traces: Where it belongs to.
        about: What it is of.
        listed: Gives the attachment's files.
        now_s: When it begins, by ``time.perf_counter``.

    Attributes:
        accesses: In the order of their first reads.
        fetches: In the order of their ends.
        left_out: How many reads and fetches were not recorded.
        lent: Which files were lent to the kernel, which reads them unseen.
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
        self.lent: set[int] = set()
        self._latest: dict[tuple[int, int], deque[Access]] = {}  # by file and process
        self._commands: dict[int, str] = {}  # by process
        self._ranks: dict[int, int] = {}  # by process
        self._files: list[TracedFile] | None = None  # once it has ended

    def joined(self, pid: int, rank: int) -> None:
        """A process has attached the checkpoint, and says that it is that rank of its job."""
        if rank >= 0 and pid and len(self._ranks) < _PROCESSES_MAX:
            self._ranks[pid] = rank

    def read(
        self, file: int, pid: int, start: int, stop: int, began_s: float, ended_s: float
    ) -> None:
        """A read was answered.

        Args:
            file: Position in `listed`.
            pid: Which process has opened it.
            start: Of the bytes.
            stop: Of the bytes.
            began_s: When it came, by ``time.perf_counter``.
            ended_s: When it was answered, if it had to wait for bytes; 0: it had not.
        """
        began_s -= self._zero_s
        waits, waited_s = 0, 0.0
        if ended_s:
            waits, waited_s = 1, ended_s - self._zero_s - began_s
        latest = self._latest.get((file, pid))
        if latest is not None:
            for access in latest:
                # Requests that the kernel sends ahead can come in another order.
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
                self._commands[pid] = processes.name(pid)
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
        """A span has ended; the arguments are those of ``Fetch``, times by ``perf_counter``."""
        if self._admit(len(self.fetches)):
            times = (at_s - self._zero_s for at_s in times_s)
            error = error[:_ERROR_LENGTH_MAX]
            self.fetches.append(Fetch(file, start, stop, purpose, tries, error, *times))

    def lend(self, file: int) -> None:
        """From now on the kernel reads that file unseen."""
        if len(self.lent) < ENTRIES_MAX:
            self.lent.add(file)

    def _admit(self, entries: int) -> bool:
        admitted = entries < ENTRIES_MAX and self._files is None and self._traces.take_one()
        self.left_out += not admitted
        return admitted

    @property
    def has_ended(self) -> bool:
        """Whether its attachment has."""
        return self._files is not None

    @property
    def entries(self) -> int:
        """How many it has."""
        return len(self.accesses) + len(self.fetches)

    def files(self) -> list[TracedFile]:
        """The files that its entries name."""
        if self._files is not None:
            return self._files
        used = {a.file for a in self.accesses} | {f.file for f in self.fetches} | self.lent
        listed = self._listed()
        return [TracedFile(i, listed[i].path, listed[i].size) for i in sorted(used)]

    def processes(self) -> list[TracedProcess]:
        """The processes that its entries name."""
        return [
            TracedProcess(pid, command, self._ranks.get(pid, -1))
            for pid, command in self._commands.items()
        ]

    def named(self, commands: Mapping[int, str]) -> None:
        """What these processes run, as far as it is known by now."""
        for pid, command in commands.items():
            if pid in self._commands and command:
                self._commands[pid] = command

    def end(self) -> None:
        """Nothing comes any more: keep only what `files` needs."""
        self._files = self.files()
        self._listed = lambda: ()
        self._latest.clear()


class Traces:
    """The traces of all attachments, and of ended ones as long as there is room.

    Args:
        entries_max: Of all of them.
    """

    def __init__(self, entries_max: int = ENTRIES_OF_ALL_MAX) -> None:
        self._left = entries_max
        self._running: dict[Key, Trace] = {}
        self._ended: dict[Key, Trace] = {}  # the oldest end first

    def begin(self, key: Key, about: About, listed: Callable[[], Sequence[ListedFile]]) -> Trace:
        """The trace of a new attachment; `key`: of whom and of which place (``Attachment.key``)."""
        trace = self._running[key] = Trace(self, about, listed, time.perf_counter())
        return trace

    def running(self, key: Key) -> Trace:
        """That of an attachment that has not ended."""
        return self._running[key]

    def end(self, key: Key) -> None:
        """That attachment has ended. A trace with nothing in it is not kept, so that looking at a
        checkpoint does not hide how it was restored."""
        trace = self._running.pop(key, None)
        if trace is not None and trace.entries:
            trace.end()
            self._drop(key)
            self._ended[key] = trace

    def find(self, key: Key) -> Trace | None:
        """The latest one that has anything in it."""
        running = self._running.get(key)
        return running if running is not None and running.entries else self._ended.get(key)

    def take_one(self) -> bool:
        """Have room for one more entry, at the cost of the oldest that has ended."""
        while self._left <= 0 and self._ended:
            self._drop(next(iter(self._ended)))
        if self._left <= 0:
            return False
        self._left -= 1
        return True

    def _drop(self, key: Key) -> None:
        if (old := self._ended.pop(key, None)) is not None:
            self._left += old.entries
