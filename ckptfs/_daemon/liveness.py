"""Deadlines of reads, which count from the last byte that their store gave.

A read that waits for a slow link is no failure while bytes come. So the deadline of each read moves
with the bytes of its store, also while the read waits for a place behind others. Only bytes count
that are new: a store that gives the first half of a span again and again is not alive.

The span that a read waits for has a deadline of its own, which moves with its own bytes only
(`spans`), so that a request without an answer ends although others bring bytes.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import trio


class _Wait(NamedTuple):
    scope: trio.CancelScope
    deadline_s: float


class Liveness:
    """The reads that wait now, by store."""

    def __init__(self) -> None:
        self._waits: dict[object, set[_Wait]] = {}

    @contextmanager
    def waiting(self, store: object, deadline_s: float) -> Generator[trio.CancelScope]:
        """Cancel the block when `store` gave no new byte for `deadline_s` seconds."""
        with trio.move_on_after(deadline_s) as scope:
            wait = _Wait(scope, deadline_s)
            waits = self._waits.setdefault(store, set())
            waits.add(wait)
            try:
                yield scope
            finally:
                waits.remove(wait)
                if not waits:
                    self._waits.pop(store, None)

    def came(self, store: object, at_s: float) -> None:
        """New bytes came at `at_s`, a time of the event loop."""
        for scope, deadline_s in self._waits.get(store, ()):
            scope.deadline = max(scope.deadline, at_s + deadline_s)
