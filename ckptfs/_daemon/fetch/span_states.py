"""One span: its states, its deadline, and the waits of its callers.

The text of `spans` explains the life of a span.
"""

import math
import time
from enum import Enum, auto
from typing import NamedTuple

import trio

from ckptfs._daemon.cache.buffer_pool import capacity_of
from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.fetch.scheduler import Priority, Ticket
from ckptfs._daemon.fetch.transfers import Transferred
from ckptfs._daemon.usage.counters import Usage
from ckptfs._model.blocks import BLOCK_BYTES, blocks_length
from ckptfs._model.plans.trace import Purpose
from ckptfs.errors import CkptfsError, StoreUnavailable

_PURPOSES: dict[Priority, Purpose] = {
    Priority.DEMAND: "demand",
    Priority.READAHEAD: "readahead",
    Priority.PREFETCH: "prefetch",
}
_NEW_BYTES = 4 << 10
"""Fewer new bytes do not move a deadline, so that a server that trickles does not hold up a reader.
The S3 client ends a request that brings less in twice the longest silence."""


class SpanState(Enum):
    """The states of a span, in the order of its life."""

    WANTED = auto()
    RUNNING = auto()
    DONE = auto()
    FAILED = auto()
    ENDED = auto()


_NEXT_STATES = {
    SpanState.WANTED: {SpanState.RUNNING, SpanState.FAILED, SpanState.ENDED},
    SpanState.RUNNING: {SpanState.WANTED, SpanState.DONE, SpanState.FAILED, SpanState.ENDED},
    SpanState.DONE: {SpanState.FAILED, SpanState.ENDED},
    SpanState.FAILED: {SpanState.ENDED},
    SpanState.ENDED: set[SpanState](),
}
"""A span ends without having failed only after it is done, or when the daemon ends."""


class Span:
    """A run of blocks that one request fetches. Its methods change its state.

    Attributes:
        file: The file that was the first to want the span.
        entry: The blocks of the file.
        blocks: The blocks of the span.
        usage: The counters of the first caller.
        length: The bytes of the span.
        ticket: The place of the span in the scheduler.
        state: The state of the span.
        scope: The scope of the requests, with the span's deadline.
        done: The event that the blocks are readable, or that the span has failed.
        ended: The event that the blocks are also stored, if they can be.
        error: The error of a failed span.
        transferred: The bytes of a span that is done.
        is_dropped: Whether the last prefetch that wanted the span was cancelled.
        deadline_s: The time without new bytes that ends the span.
    """

    def __init__(
        self, file: RemoteFile, entry: CachedObject, blocks: range, priority: Priority, usage: Usage
    ) -> None:
        self.file = file
        self.usage = usage
        self.entry = entry
        self.blocks = blocks
        self.length = blocks_length(blocks, entry.size)
        self.ticket = Ticket(priority, capacity_of(self.length), file.store, file.user)
        self.state = SpanState.WANTED
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.ended = trio.Event()
        self.error: CkptfsError | None = None
        self.transferred: Transferred | None = None
        self.is_dropped = False
        self.deadline_s = math.inf
        self._tries = 0
        self._bytes_most = 0  # of all tries
        self._wanted_s = self._begun_s = self._done_s = time.perf_counter()

    @property
    def offset(self) -> int:
        """The first byte of the span in its file."""
        return self.blocks.start * BLOCK_BYTES

    # -- its states

    def _change(self, state: SpanState) -> None:
        assert state in _NEXT_STATES[self.state], (self.state, state)
        self.state = state

    def queue(self) -> None:
        """The span waits for a slot, maybe after a request that has failed."""
        if self.state is not SpanState.WANTED:
            self._change(SpanState.WANTED)

    def begin(self, *, asks_store: bool) -> None:
        """The span has a slot. Only requests to a store count as tries."""
        self._change(SpanState.RUNNING)
        self._tries += asks_store
        self._begun_s = time.perf_counter()

    def arrive(self, transferred: Transferred) -> None:
        """The blocks are readable."""
        self._change(SpanState.DONE)
        self.transferred = transferred
        self._done_s = time.perf_counter()
        self.done.set()

    def fail(self, error: CkptfsError) -> None:
        """No request for the span follows."""
        self._change(SpanState.FAILED)
        self.error = error

    def drop(self) -> None:
        """Cancel the span, because no caller wants it any more."""
        self.is_dropped = True
        self.scope.cancel()

    def end(self) -> None:
        """The span has ended."""
        self._change(SpanState.ENDED)
        self._trace()
        self.done.set()
        self.ended.set()

    # -- its deadline

    def start_clock(self, deadline_s: float) -> None:
        """Start the deadline, unless it is started: the wait for the first slot does not count."""
        if self.scope.deadline == math.inf:
            self.deadline_s = deadline_s
            self.scope.deadline = trio.current_time() + deadline_s

    def heard(self, count: int, at_s: float) -> bool:
        """The running request has `count` bytes since `at_s`. Returns whether some are new."""
        if count < self._bytes_most + _NEW_BYTES:
            return False
        self._bytes_most = count
        self.scope.deadline = max(self.scope.deadline, at_s + self.deadline_s)
        return True

    def _trace(self) -> None:
        trace = self.file.trace
        if trace is None or not self._tries:
            return
        if self.error is not None:
            self._done_s = time.perf_counter()
        trace.fetched(
            self.file.index,
            self.offset,
            self.offset + self.length,
            _PURPOSES[self.ticket.wanted],
            self._tries,
            "" if self.error is None else str(self.error),
            (self._wanted_s, self._begun_s, self._done_s),
        )


class Claim(NamedTuple):
    """A span that one caller waits for.

    Attributes:
        span: The span.
        file: The file of the caller.
        is_joined: Whether the span was under way before the caller wanted its blocks.
        is_overtaken: Whether the span was done before, and its blocks are absent again. Then the
            caller waits until the span has stopped writing.
    """

    span: Span
    file: RemoteFile
    is_joined: bool
    is_overtaken: bool

    async def wait(self, *, until_stored: bool) -> bool:
        """Wait until the blocks are readable, or stored. Raises the error of the span.

        Returns:
            Whether the blocks were there. False means that the error was not the caller's, so that
            the caller should want the blocks again. It was not if the caller has joined the span,
            and the error is temporary, or of another attachment with other credentials (and maybe
            with another version).
        """
        span = self.span
        await (span.ended if until_stored or self.is_overtaken else span.done).wait()
        if span.error is None:
            return True
        is_foreign = span.file is not self.file
        if self.is_joined and (is_foreign or isinstance(span.error, StoreUnavailable)):
            return False
        raise span.error
