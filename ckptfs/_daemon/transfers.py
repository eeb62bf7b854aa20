"""Transfers: a range of an object from the store into a buffer."""

from typing import NamedTuple

import trio

from ckptfs._daemon.buffers import Buffer, Buffers
from ckptfs._daemon.cached import CachedObject
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.slots import Slots, Ticket
from ckptfs._store.base import Pin, Store


class Transferred(NamedTuple):
    """What a transfer has brought: `buffer` begins with the bytes, which `ticket` counts as in
    flight. `is_confirmed`: the store's answer has named their version."""

    buffer: Buffer[CachedObject]
    ticket: Ticket
    is_confirmed: bool


class Transfers:
    """Reads from stores, in threads, into `buffers`. `slots`: whose places they have."""

    def __init__(self, offload: Offload, slots: Slots, buffers: Buffers[CachedObject]) -> None:
        self._offload = offload
        self._slots = slots
        self._buffers = buffers

    async def read(
        self, store: Store, pin: Pin, offset: int, length: int, ticket: Ticket
    ) -> Transferred:
        """Read `length` bytes. `ticket` has been granted, and gives its place back when this ends;
        its bytes, too, if it fails. One that is cancelled abandons its thread (see `offload`), and
        with it the buffer, which nobody else may have while that thread may write into it.

        Raises what a Store raises.
        """
        buffer = self._buffers.take(length)
        try:
            call = self._offload.data(store.read_into, pin, offset, buffer.view[:length])
            return Transferred(buffer, ticket, await call)
        except BaseException as error:
            self._slots.release_bytes(ticket)
            if isinstance(error, trio.Cancelled):
                self._buffers.abandon(buffer)
            else:
                self._buffers.release(buffer)
            raise
        finally:
            self._slots.release_place(ticket)

    def give_up(self, transferred: Transferred) -> None:
        """The bytes are of no use."""
        self._slots.release_bytes(transferred.ticket)
        self._buffers.release(transferred.buffer)
