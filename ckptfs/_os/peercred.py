"""The process at the other end of a unix socket, from the kernel (SO_PEERCRED of unix(7)).

The kernel reports a process of another user namespace by its id in ours. If it has none there, the
kernel reports the overflow id (user_namespaces(7)), which then stands for many users.
"""

import socket
import struct
from pathlib import Path
from typing import NamedTuple, Protocol

_UCRED = struct.Struct("3i")
_OVERFLOW_UID = Path("/proc/sys/kernel/overflowuid")
_UID_MAP = Path("/proc/self/uid_map")
_ALL_UIDS = 2**32 - 1


class Peer(NamedTuple):
    """Ids of the other end. `pid` is 0 if our pid namespace does not have the process."""

    pid: int
    uid: int
    gid: int


class _Connection(Protocol):
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


def peer_of(connection: _Connection) -> Peer:
    """The process that has connected, or that listens."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Peer(*_UCRED.unpack(raw))


def is_anybody(uid: int) -> bool:
    """Whether that id stands for all users whom our user namespace does not have."""
    if uid != int(_OVERFLOW_UID.read_text()):
        return False
    lengths = [int(line.split()[2]) for line in _UID_MAP.read_text().splitlines()]
    return sum(lengths) < _ALL_UIDS
