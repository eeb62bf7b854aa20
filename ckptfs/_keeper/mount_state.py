"""The state of a mount, which outlives the keeper's program, and under a service manager also the
keeper.

The keeper saves the state as JSON in memory (memfd_create(2)), with the numbers of the descriptors.
A program that replaces another one has the same numbers. The next keeper of a service gets new
numbers, by the descriptors' names. `Held.save` appends the state, and then the first bytes get its
position, so no reader gets half of it.
"""

import os
import struct
from collections.abc import Mapping

import msgspec

from ckptfs._model.config import Config
from ckptfs._mount import handoff
from ckptfs._os import takeover

CONTROL = "control"
"""Name of the descriptor that comes from the socket unit (``FileDescriptorName=``)."""
_ITSELF, _LISTEN, _CACHE_LOCK = "held", "listen", "cache-lock"
_FORMER_MAX = 32
_PLACE = struct.Struct("<QQ")
"""Offset and length of the saved state."""


class MountOffer(msgspec.Struct, frozen=True):
    """The state that a keeper of any release gets if it takes the mount over. A field that a later
    release adds has a default, and unknown fields are ignored.

    Attributes:
        device: The mount's ``major:minor``.
        allow_other: Whether the mount lets other users in.
        cache_dir: The cache, for a keeper that has none configured.
        made_mount, passthrough, resend, former: As in `Held`.
    """

    device: str
    allow_other: bool
    cache_dir: str
    made_mount: bool
    passthrough: bool
    resend: bool
    former: list[str] = []


class Held(msgspec.Struct):
    """A mount's state and descriptors, each -1 until it exists.

    Attributes:
        config: The configuration.
        made_mount: Whether the keeper has made the mount's directory.
        passthrough, resend: The kernel's features (`session.Features`).
        made_socket: Whether the keeper has made the socket, and not the service manager.
        itself: The memory with the saved state.
        lock, fuse, listen, memory: The lock, the session, the control socket, and `handoff`.
        cache_lock: The lock by which the keeper has a default cache directory (`launch`); -1 for a
            configured one.
        former: The names of the containers whose keepers have owned the mount, the last one at the
            end (`succession`).
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
    cache_lock: int = -1
    former: list[str] = []

    def named(self) -> dict[str, int]:
        """All descriptors by name, without a socket that the service manager has made."""
        table, (log0, log1) = self.memory
        named = {_ITSELF: self.itself, "lock": self.lock, "fuse": self.fuse, _LISTEN: self.listen}
        named |= {"table": table, "log0": log0, "log1": log1}
        if not self.made_socket:
            del named[_LISTEN]
        return named

    def fds(self) -> list[int]:
        """All descriptors."""
        found = {*self.named().values(), self.listen, self.cache_lock}
        return [fd for fd in found if fd >= 0]

    def offer(self, device: str) -> MountOffer:
        """The state for a keeper that takes the mount over. `device` is the mount's."""
        return MountOffer(
            device=device,
            allow_other=self.config.allow_other,
            cache_dir=self.config.cache_dir,
            made_mount=self.made_mount,
            passthrough=self.passthrough,
            resend=self.resend,
            former=[*self.former, takeover.name_of_container()],
        )

    def offered(self) -> dict[str, int]:
        """The descriptors that belong to the offer, by name."""
        found = {**self.named(), _CACHE_LOCK: self.cache_lock}
        return {name: fd for name, fd in found.items() if name != _ITSELF and fd >= 0}

    def set_inheritable(self, inheritable: bool) -> None:
        """Let a program that replaces this one have the descriptors, or no longer."""
        for fd in self.fds():
            os.set_inheritable(fd, inheritable)

    def save(self) -> None:
        """Save the state."""
        if self.itself < 0:
            self.itself = os.memfd_create("ckptfs-held")
        data = msgspec.json.encode(self)
        begin = max(os.fstat(self.itself).st_size, _PLACE.size)
        os.pwrite(self.itself, data, begin)
        os.pwrite(self.itself, _PLACE.pack(begin, len(data)), 0)


def load(fd: int) -> Held:
    """The state in `fd`. Raises msgspec.DecodeError if another version has saved it."""
    begin, length = _PLACE.unpack(os.pread(fd, _PLACE.size, 0))
    return msgspec.json.decode(os.pread(fd, length, begin), type=Held)


def handed_back(given: Mapping[str, int]) -> Held | None:
    """The state of an earlier keeper, with the descriptors that the service manager has kept. None
    if a part is missing, so the state cannot be used."""
    if _ITSELF not in given:
        return None
    try:
        held = load(given[_ITSELF])
        held.itself, held.lock, held.fuse = given[_ITSELF], given["lock"], given["fuse"]
        held.made_socket = CONTROL not in given
        held.listen = given[_LISTEN if held.made_socket else CONTROL]
        held.memory = handoff.Fds(given["table"], (given["log0"], given["log1"]))
        held.cache_lock = -1  # it ended with that keeper
    except (KeyError, msgspec.DecodeError):
        return None
    return held


def taken_from(offer: MountOffer, fds: Mapping[str, int], config: Config) -> Held:
    """The state of a mount that a keeper offers, with this keeper's own configuration.

    Raises:
        Refusal: This keeper cannot use it: a descriptor is missing, or the layout of the memory is
            that of another release.
    """
    try:
        held = Held(
            config,
            made_mount=offer.made_mount,
            passthrough=offer.passthrough,
            resend=offer.resend,
            lock=fds["lock"],
            fuse=fds["fuse"],
            listen=fds[_LISTEN],
            memory=handoff.Fds(fds["table"], (fds["log0"], fds["log1"])),
            former=offer.former[-_FORMER_MAX:],
        )
    except KeyError as missing:
        raise takeover.Refusal(f"its offer lacks the descriptor {missing}") from None
    if not handoff.has_this_layout(held.memory):
        raise takeover.Refusal("the state of its daemon has the layout of another ckptfs version")
    if config.cache_dir == offer.cache_dir:
        held.cache_lock = fds.get(_CACHE_LOCK, -1)
    return held
