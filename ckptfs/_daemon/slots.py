"""Places for transfers: bounded in number and in bytes, given out by priority."""

from enum import IntEnum
from itertools import count

import trio


class Priority(IntEnum):
    """Who goes first. A reader is waiting for DEMAND; nobody waits yet for READAHEAD; PREFETCH may
    never be read; DARK is for stores that do not answer, whoever waits: they must not keep the
    others from theirs."""

    DEMAND = 0
    READAHEAD = 1
    PREFETCH = 2
    DARK = 3


_KEPT_FOR_DEMAND = 2
"""Places that the others leave free, so that a reader does not wait for one to end."""

_serial = count()


class Ticket:
    """A request for one place and `length` bytes. `priority` may be raised while it waits."""

    def __init__(self, priority: Priority, length: int) -> None:
        self.priority = priority
        self.length = length
        self.serial = next(_serial)
        self.granted = trio.Event()


class Slots:
    """`places_max` places and `bytes_max` bytes. One transfer may always run, however large."""

    def __init__(self, places_max: int, bytes_max: int) -> None:
        self._places_max = places_max
        self._bytes_max = bytes_max
        self._places = 0
        self._bytes = 0
        self._waiting: list[Ticket] = []

    async def acquire(self, ticket: Ticket) -> None:
        """Wait for a place and room for the bytes; `release_place` and `release_bytes` give them
        back. Cancelling leaves the queue."""
        ticket.granted = trio.Event()
        self._waiting.append(ticket)
        self._grant()
        try:
            await ticket.granted.wait()
        except trio.Cancelled:
            if ticket.granted.is_set():
                self.release_place()
                self.release_bytes(ticket)
            else:
                self._waiting.remove(ticket)
                self._grant()  # it may have been in the way of smaller ones
            raise

    def release_place(self) -> None:
        """Give a place back."""
        self._places -= 1
        self._grant()

    def release_bytes(self, ticket: Ticket) -> None:
        """Give the room back."""
        self._bytes -= ticket.length
        self._grant()

    def raise_priority(self, ticket: Ticket, priority: Priority) -> None:
        """Let a waiting ticket go ahead of others."""
        if priority < ticket.priority:
            ticket.priority = priority
            self._grant()

    def _grant(self) -> None:
        while self._waiting:
            ticket = min(self._waiting, key=lambda t: (t.priority, t.serial))
            kept = 0 if ticket.priority is Priority.DEMAND else _KEPT_FOR_DEMAND
            full = self._places + kept >= self._places_max
            if self._bytes and (full or self._bytes + ticket.length > self._bytes_max):
                return
            self._waiting.remove(ticket)
            self._places += 1
            self._bytes += ticket.length
            ticket.granted.set()
