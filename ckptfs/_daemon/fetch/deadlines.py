"""Deadlines of reads, which count from the last byte that their store gave.

A read that waits for a slow link has not failed while bytes come. So the deadline of each read
moves with the bytes of its store, also while the read waits for a slot behind other reads. Only new
bytes count. A store that sends the first half of a span again and again moves no deadline.

The span that a read waits for has a deadline of its own, which moves with the span's own bytes only
(`spans`). So a request without an answer ends although other requests bring bytes.
"""

from collections.abc import Generator
from contextlib import contextmanager

import trio


class ReadDeadlines:
    """The deadlines of the reads that wait now, by store."""

    def __init__(self) -> None:
        self._waits: dict[object, dict[trio.CancelScope, float]] = {}

    @contextmanager
    def waiting(self, store: object, deadline_s: float) -> Generator[trio.CancelScope]:
        """Cancel the block when `store` gave no new byte for `deadline_s` seconds."""
        with trio.move_on_after(deadline_s) as scope:
            waits = self._waits.setdefault(store, {})
            waits[scope] = deadline_s
            try:
                yield scope
            finally:
                del waits[scope]
                if not waits:
                    self._waits.pop(store, None)

    def came(self, store: object, at_s: float) -> None:
        """Move the deadlines, because new bytes came at `at_s`, a time of the event loop."""
        for scope, deadline_s in self._waits.get(store, {}).items():
            scope.deadline = max(scope.deadline, at_s + deadline_s)
