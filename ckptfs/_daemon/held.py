"""What a mount consists of. It outlives the program that the keeper runs, and under a service
manager also the keeper.

It is written down as JSON in memory (memfd_create(2)), with the numbers of its descriptors. A
program that replaces another one has the same numbers; a keeper that is started after another one
gets new ones, by their names. What is written is added at the end, and then the first bytes say
where it is, so that half of it is never read.
"""

import os
import struct
from collections.abc import Mapping

import msgspec

from ckptfs._daemon import handoff
from ckptfs._model.config import Config

CONTROL = "control"
"""Name of the descriptor that comes from the socket unit (``FileDescriptorName=``)."""
_ITSELF, _LISTEN = "held", "listen"
_PLACE = struct.Struct("<QQ")
"""Where it is written down: offset and length."""


class Held(msgspec.Struct):
    """A mount's state and descriptors; -1: there is none yet.

    Attributes:
        config: Its settings.
        made_mount: Whether the mount's directory was made for it.
        passthrough, resend: What the kernel agreed to (`session.Features`).
        made_socket: Whether the socket is ours, and not the service manager's.
        itself: Where this is written down.
        lock, fuse, listen, memory: The lock, the session, the control socket, and `handoff`.
    """

    config: Config
    made_mount: bool = False
    passthrough: bool = False
    resend: bool = False
    made_socket: bool = True
    itself: int = -1
    lock: int = -1
    fuse: int = -1
    listen: int = -1
    memory: handoff.Fds = handoff.Fds(-1, (-1, -1))

    def named(self) -> dict[str, int]:
        """All descriptors but a socket of the service manager's own, by name."""
        table, (log0, log1) = self.memory
        named = {_ITSELF: self.itself, "lock": self.lock, "fuse": self.fuse, _LISTEN: self.listen}
        named |= {"table": table, "log0": log0, "log1": log1}
        if not self.made_socket:
            del named[_LISTEN]
        return named

    def fds(self) -> list[int]:
        """All descriptors."""
        return [*{*self.named().values(), self.listen}]

    def save(self) -> None:
        """Write it down."""
        if self.itself < 0:
            self.itself = os.memfd_create("ckptfs-held")
        data = msgspec.json.encode(self)
        begin = max(os.fstat(self.itself).st_size, _PLACE.size)
        os.pwrite(self.itself, data, begin)
        os.pwrite(self.itself, _PLACE.pack(begin, len(data)), 0)


def load(fd: int) -> Held:
    """What is written down in `fd`. Raises msgspec.DecodeError: by a version that is another."""
    begin, length = _PLACE.unpack(os.pread(fd, _PLACE.size, 0))
    return msgspec.json.decode(os.pread(fd, length, begin), type=Held)


def handed_back(given: Mapping[str, int]) -> Held | None:
    """What an earlier keeper had, with the descriptors that the service manager has kept; None:
    something is missing, so that it cannot be used."""
    if _ITSELF not in given:
        return None
    try:
        held = load(given[_ITSELF])
        memory = handoff.Fds(given["table"], (given["log0"], given["log1"]))
        held.itself, held.lock, held.fuse = given[_ITSELF], given["lock"], given["fuse"]
        held.made_socket = CONTROL not in given
        held.listen = given[_LISTEN if held.made_socket else CONTROL]
    except (KeyError, msgspec.DecodeError):
        return None
    held.memory = memory
    return held
