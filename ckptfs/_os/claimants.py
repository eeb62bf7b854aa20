"""The owner's side of the protocol of `takeover`: the processes that want what this one owns."""

import os
import select
import socket
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from ckptfs._os.takeover import (
    OWNER,
    PROTOCOL,
    Channel,
    Claim,
    Granted,
    Offer,
    Ready,
    Refusal,
    Refused,
    Serving,
    close_all,
    name_of_container,
    wait_ended,
    why_not_peer,
)

_CLAIMANTS_MAX = 16
"""Most connections of claimants. A node has one or two."""
_PAUSE_S = 0.05
"""Time between two tries to accept a connection."""


class Heir(NamedTuple):
    """A claimant that can begin, and the process that will work for it (-1 if it needs none)."""

    channel: Channel
    name: str
    version: str
    process_fd: int

    def grant(self) -> str:
        """Say that this process has stopped, and wait until the claimant has begun. Returns "", or
        why it has not; then it never will."""
        self.channel.send(Granted())
        answer = self.channel.receive()
        if answer is not None:
            close_all(answer[1])
        self.channel.close()
        message = None if answer is None else answer[0]
        if isinstance(message, Serving):
            self._close_process()
            return ""
        if self.process_fd >= 0:
            wait_ended([self.process_fd])
        self._close_process()
        return message.reason if isinstance(message, Refused) else "it has died"

    def refuse(self, reason: str) -> None:
        """Go on as the owner."""
        self.channel.send(Refused(reason))
        self.channel.close()
        self._close_process()

    def _close_process(self) -> None:
        if self.process_fd >= 0:
            os.close(self.process_fd)


class _Claimant:
    """A connection: its claim, and whether it has an offer or was refused."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.claim: Claim | None = None
        self.has_offer = False
        self.is_refused = False


class Claimants:
    """The processes that want what this process owns, from the one that came first on. One thread
    uses it.

    Args:
        path: The socket. A file of that name is replaced.
        former: The names of the owners before this one, whose claims wait.
        offer: Returns the state and the descriptors by name. May raise Refusal.
        say: Takes a line for the log.

    Raises OSError if the socket cannot be made.
    """

    def __init__(
        self,
        path: str,
        former: Collection[str],
        offer: Callable[[], tuple[object, Mapping[str, int]]],
        say: Callable[[str], None],
    ) -> None:
        self._path = path
        self._former = set(former) - {name_of_container()}
        self._offer = offer
        self._say = say
        self._known: dict[int, _Claimant] = {}
        self._listening = _listen(path)
        self._process_fd = os.pidfd_open(os.getpid())

    def __len__(self) -> int:
        return len(self._known)

    def wait(self, timeout_s: float, *others: int) -> Heir | None:
        """Serve claimants until one can begin, one of the descriptors `others` is readable, or the
        time is over."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            poll = select.poll()
            for fd in (self._listening.fileno(), *self._known, *others):
                poll.register(fd, select.POLLIN)
            readable = [fd for fd, _ in poll.poll(1000 * max(0.0, deadline_s - time.monotonic()))]
            for fd in readable:
                if fd in self._known:
                    heir = self._hear(self._known[fd])
                    if heir is not None:
                        return heir
            if self._listening.fileno() in readable:  # last, as it may reuse a number from above
                self._accept()
            is_over = not readable or time.monotonic() >= deadline_s
            if is_over or not set(others).isdisjoint(readable):
                return None

    def offer_last(self) -> bool:
        """Make an offer to the claimant that came last, unless one has an offer. Returns whether
        one has an offer now."""
        for claimant in reversed([*self._known.values()]):
            if any(each.has_offer for each in self._known.values()):
                break
            if claimant.claim is not None:
                self._make_offer(claimant)
        return any(each.has_offer for each in self._known.values())

    def withdraw(self, reason: str) -> None:
        """Withdraw all offers, because of a change in the owner's processes."""
        for claimant in [*self._known.values()]:
            if claimant.has_offer:
                self._refuse(claimant, Refused(reason))

    def close(self, *, is_owner: bool) -> None:
        """Close all connections. An owner that has no successor also removes the socket."""
        for claimant in [*self._known.values()]:
            self._forget(claimant)
        if is_owner:
            Path(self._path).unlink(missing_ok=True)
        self._listening.close()
        os.close(self._process_fd)

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:  # the claimant has gone, or there are too many open files
            time.sleep(_PAUSE_S)  # it is readable again at once
            return
        reason = why_not_peer(connection)
        if len(self._known) >= 2 * _CLAIMANTS_MAX:
            connection.close()
            return
        if not reason and len(self._known) >= _CLAIMANTS_MAX:
            reason = "too many processes want to take over"
        claimant = _Claimant(Channel(connection))
        self._known[connection.fileno()] = claimant
        if reason:
            self._refuse(claimant, Refused(reason, lasting=True))

    def _hear(self, claimant: _Claimant) -> Heir | None:
        answer = claimant.channel.receive()
        message, fds = (None, []) if answer is None else answer
        if claimant.is_refused and message is not None:
            close_all(fds)
            return None
        known = claimant.claim
        match message:
            case Claim() if known is None and not fds:
                self._take_in(claimant, message)
            case Ready() if known is not None and claimant.has_offer and len(fds) <= 1:
                del self._known[claimant.channel.fileno()]
                self.withdraw("another process takes it over now")
                return Heir(claimant.channel, known.name, known.version, [*fds, -1][0])
            case _:
                close_all(fds)
                if isinstance(message, Refused):
                    self._say(f"{_named(known)} does not take over: {message.reason}")
                self._forget(claimant)
        return None

    def _take_in(self, claimant: _Claimant, wanted: Claim) -> None:
        claimant.claim = wanted
        if wanted.protocol != PROTOCOL:
            reason = f"it has version {PROTOCOL} of the protocol, and not {wanted.protocol}"
            self._refuse(claimant, Refused(reason, lasting=True))
        elif wanted.waits or wanted.name in self._former:
            self._say(f"{_named(wanted)} waits for the end of this process")
        else:
            self._make_offer(claimant)

    def _make_offer(self, claimant: _Claimant) -> None:
        try:
            state, given = self._offer()
        except Refusal as error:
            self._refuse(claimant, Refused(str(error), lasting=True))
            return
        fds = {OWNER: self._process_fd, **given}
        offer = Offer(msgspec.Raw(msgspec.json.encode(state)), [*fds])
        claimant.channel.send(offer, fds.values())
        claimant.has_offer = True

    def _refuse(self, claimant: _Claimant, refusal: Refused) -> None:
        self._say(f"{_named(claimant.claim)} may not take over: {refusal.reason}")
        claimant.channel.send(refusal)
        # The claimant closes the connection. If this process closed it, the kernel would drop the
        # refusal in favor of a message of the claimant that is not read yet (ECONNRESET).
        claimant.claim, claimant.has_offer, claimant.is_refused = None, False, True

    def _forget(self, claimant: _Claimant) -> None:
        del self._known[claimant.channel.fileno()]
        claimant.channel.close()


def _listen(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        Path(path).unlink(missing_ok=True)
        listening.bind(path)
        listening.listen(_CLAIMANTS_MAX)
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(mask)
    return listening


def _named(claim: Claim | None) -> str:
    return "a process" if claim is None else f"ckptfs {claim.version} on {claim.name!r}"
