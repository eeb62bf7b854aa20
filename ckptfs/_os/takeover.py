"""The protocol by which a process takes over what another process of the same user owns.

The owner listens on a unix socket. A claimant connects, and both check that the other process has
the same user. Each message is one JSON object, with descriptors where the table says so:

| message | from | meaning |
| --- | --- | --- |
| `Claim` | claimant | The claimant wants what the owner has, perhaps only at its end (`waits`). |
| `Offer` | owner | The state, and all descriptors. The owner goes on. |
| `Ready` | claimant | The claimant can begin. Descriptor: the process that will work for it. |
| `Granted` | owner | The owner has stopped. |
| `Serving` | claimant | The claimant has begun, and is the owner from now on. |
| `Refused` | both | The sender does not go on with this conversation, for that reason. |

**Deaths.** A descriptor of a process (pidfd_open(2)) tells its end, also across pid namespaces.

- The claimant dies, or gives up, before `Serving`: the owner waits for the end of the process that
  came with `Ready`, and then goes on as before.
- The owner dies after `Offer`: the claimant has all descriptors. It waits for the end of the
  owner's processes, which came with `Offer` as `OWNER` and `WORKER`, and then begins without
  `Granted`.
- No side gives up because of the time, since the other one could be about to begin. A stopped
  process holds the other one up until it is continued or killed.

So at each moment exactly one of both can begin or go on.

**The order of claimants.** A process that has given a thing away gets no say: its next claim is one
that waits. The owner also lets a claimant wait that has the name of a process which owned the thing
before (`Claimants`). So two processes never take one thing from each other in turn.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from ckptfs._os.peercred import is_anybody, peer_of

PROTOCOL = 1
"""The version of the messages. Processes of different versions do not talk."""
OWNER, WORKER = "owner", "worker"
"""Names of the descriptors of the owner's processes in an offer."""
_MESSAGE_BYTES_MAX = 64 << 10
_FDS_MAX = 16
_CLAIMANTS_MAX = 16
"""Most connections of claimants. A node has one or two."""
_END_WAIT_S = 5.0
"""Longest end of a process that the kernel has been told to kill. Until then it may be in a call to
a disk, and it cannot go on after that."""


class Claim(msgspec.Struct, frozen=True, tag="claim"):
    """A process wants to take over.

    Attributes:
        name: The name of the process's container: its host name.
        version: Its release of ckptfs, for the log.
        waits: Whether the claim is for the owner's end only.
        protocol: Its `PROTOCOL`.
    """

    name: str
    version: str
    waits: bool
    protocol: int = PROTOCOL


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """The owner's state, and the names of the descriptors that come with the message."""

    state: msgspec.Raw
    fds: list[str]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The claimant can begin."""


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    """The owner has stopped."""


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """The claimant has begun."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The sender ends the conversation. `lasting` says that a further claim would be refused, too,
    as long as the owner lives."""

    reason: str
    lasting: bool = False


Message = Claim | Offer | Ready | Granted | Serving | Refused
_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


class Refusal(Exception):
    """A claim that this process must refuse. The text is the reason."""


class Channel:
    """A connection between owner and claimant."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        """The descriptor, for poll(2)."""
        return self._connection.fileno()

    def send(self, message: Message, fds: Collection[int] = ()) -> None:
        """Send a message. Does nothing if the other process has gone, which `receive` tells."""
        with contextlib.suppress(OSError):
            socket.send_fds(self._connection, [msgspec.json.encode(message)], [*fds])

    def receive(self) -> tuple[Message, list[int]] | None:
        """Wait for a message, and return it with its descriptors. None if the other process has
        gone. A message that cannot be decoded counts as a refusal."""
        try:
            data, fds, _, _ = socket.recv_fds(
                self._connection, _MESSAGE_BYTES_MAX, _FDS_MAX, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return None
        if not data:
            return None
        try:
            return _decoder.decode(data), fds
        except msgspec.DecodeError as error:
            close_all(fds)
            return Refused(f"its message is of another version: {error}", lasting=True), []

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def close_all(fds: Collection[int]) -> None:
    """Close all descriptors."""
    for fd in fds:
        os.close(fd)


def name_of_container() -> str:
    """The name by which an owner knows this process again after its container's restart: the host
    name, which in Kubernetes is the pod's name."""
    return os.uname().nodename


def exit_on_signal() -> None:
    """Exit on SIGTERM and SIGINT while this process owns nothing. The first process of a container
    would ignore them otherwise."""

    def leave(number: int, _: object) -> None:
        sys.exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if not os.isatty(2) else signal.SIG_DFL)


# -- the claimant


class Offered:
    """What an owner has offered to this process.

    Attributes:
        state: The owner's state, as JSON.
        fds: The descriptors by name, which the receiver closes.
        is_accepted: Whether this process has said that it has begun.
    """

    def __init__(self, channel: Channel, offer: Offer, fds: list[int]) -> None:
        self._channel = channel
        self.state = offer.state
        self.is_accepted = False
        self.fds = dict(zip(offer.fds, fds, strict=False))
        close_all(fds[len(offer.fds) :])

    def ready(self, process_fd: int = -1) -> str:
        """Say that this process can begin, with the process that will work for it if it has one,
        and wait until the owner has stopped. Returns "", or why the owner goes on."""
        self._channel.send(Ready(), [process_fd] if process_fd >= 0 else [])
        answer = self._channel.receive()
        if answer is not None:
            close_all(answer[1])
            if isinstance(answer[0], Granted):
                return ""
            return answer[0].reason if isinstance(answer[0], Refused) else "it answers wrongly"
        processes = [self.fds[name] for name in (OWNER, WORKER) if name in self.fds]
        has_ended = OWNER in self.fds and wait_ended(processes)
        return "" if has_ended else "it has closed the connection"

    def serving(self) -> None:
        """Say that this process has begun."""
        self.is_accepted = True
        self._channel.send(Serving())
        self._channel.close()

    def refuse(self, reason: str) -> None:
        """Let the owner go on. This process must have ended what it had begun."""
        self._channel.send(Refused(reason))
        self._channel.close()

    def close_fds(self) -> None:
        """Close all descriptors."""
        close_all(self.fds.values())
        self.fds = {}


def claim(path: str, wanted: Claim) -> Offered | Refused | None:
    """Ask the owner that listens at `path`, and wait for its offer, for a claim that waits until
    the owner's end. None if no owner listens there any more."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    channel = Channel(connection)
    if reason := _why_not_peer(connection):
        channel.close()
        return Refused(reason, lasting=True)
    channel.send(wanted)
    answer = channel.receive()
    if answer is not None and isinstance(answer[0], Offer):
        return Offered(channel, answer[0], answer[1])
    channel.close()
    if answer is None:
        return None
    close_all(answer[1])
    return answer[0] if isinstance(answer[0], Refused) else Refused("it answers wrongly", True)


def wait_ended(process_fds: Collection[int]) -> bool:
    """Wait a moment for the end of processes. Returns whether all of them have ended."""
    deadline_s = time.monotonic() + _END_WAIT_S
    for fd in process_fds:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(1000 * max(0.0, deadline_s - time.monotonic())):
            return False
    return True


# -- the owner


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
    """A connection: its claim, and whether it has an offer."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.claim: Claim | None = None
        self.has_offer = False


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
            if not readable or not set(others).isdisjoint(readable):
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
            return
        reason = _why_not_peer(connection)
        if not reason and len(self._known) == _CLAIMANTS_MAX:
            reason = "too many processes want to take over"
        claimant = _Claimant(Channel(connection))
        self._known[connection.fileno()] = claimant
        if reason:
            self._refuse(claimant, Refused(reason, lasting=True))

    def _hear(self, claimant: _Claimant) -> Heir | None:
        answer = claimant.channel.receive()
        message, fds = (None, []) if answer is None else answer
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
        self._forget(claimant)

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


def _why_not_peer(connection: socket.socket) -> str:
    """Why the process at the other end may not be told anything, or ""."""
    uid = peer_of(connection).uid
    if uid != os.geteuid() or is_anybody(uid):
        return f"it belongs to uid {uid}, and this process to uid {os.geteuid()}"
    return ""


def _named(claim: Claim | None) -> str:
    return "a process" if claim is None else f"ckptfs {claim.version} on {claim.name!r}"
