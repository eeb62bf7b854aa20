"""Connections to a host with several addresses, some of which may be dead.

**Happy eyeballs** (RFC 8305). The dialer tries the addresses in turn, and alternates IPv6 and IPv4.
If a try has not succeeded after `_NEXT_S`, the next one begins beside it. If a try fails, the next
one begins at once. The first connection wins, and the dialer closes the others. All tries share one
deadline. The next time, the dialer tries the address that worked first, and a silent one last.

**The resolver.** getaddrinfo(3) has no timeout, and nothing can interrupt it. It runs in a thread
of its own, and the callers wait for it until their deadline. Callers with the same name share one
look-up. So a stuck resolver occupies one thread for each name, and `_LOOKUPS_MAX` threads in all.
"""

import errno
import os
import selectors
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from ipaddress import ip_address
from itertools import zip_longest
from typing import Any, NamedTuple

_NEXT_S = 0.25
"""RFC 8305, section 8: the recommended Connection Attempt Delay."""
_ADDRESSES_MAX = 16
"""The most addresses of one host. S3 has eight, and twelve tries can begin in 3 s, the default
longest connect."""
_LOOKUPS_MAX = 64
"""The most look-ups at the same time, because each occupies a thread, and users choose the
names."""
_SHOWN_MAX = 3


class Address(NamedTuple):
    """One address of a host from getaddrinfo(3)."""

    family: int
    kind: int
    protocol: int
    place: tuple[Any, ...]


class Dialer:
    """The connections to hosts, with the addresses that worked. Several threads may use it."""

    def __init__(self) -> None:
        # By host and port. A client has one host, or two after it has learned another region.
        self._good: dict[tuple[str, int], Address] = {}
        self._bad: dict[tuple[str, int], Address] = {}

    def dial(self, host: str, port: int, within_s: float) -> socket.socket:
        """A connected socket. Raises TimeoutError, and OSError if no address answers."""
        stop_s = time.monotonic() + within_s
        found = interleaved(resolve(host, port, within_s))[:_ADDRESSES_MAX]
        good, bad = self._good.get((host, port)), self._bad.get((host, port))
        found.sort(key=lambda address: (address == bad) - (address == good))
        sock, address = _first_of(found, host, port, stop_s, within_s)
        self._good[host, port] = address
        return sock

    def was_silent(self, host: str, port: int) -> None:
        """Try the address that worked last from now on, because it has not answered a request."""
        address = self._good.pop((host, port), None)
        if address is not None:
            self._bad[host, port] = address


def interleaved(found: list[Address]) -> list[Address]:
    """The addresses with their families alternating, each family in the resolver's order."""
    families = list(dict.fromkeys(address.family for address in found))
    groups = [[each for each in found if each.family == family] for family in families]
    return [each for row in zip_longest(*groups) for each in row if each is not None]


# -- the resolver


class _Lookup:
    def __init__(self) -> None:
        self.is_done = threading.Event()
        self.found: list[Address] = []
        self.error: OSError | None = None


_lookups: dict[tuple[int, str, int], _Lookup] = {}  # by process: a fork lacks the threads
_lock = threading.Lock()  # guards _lookups


def resolve(host: str, port: int, within_s: float) -> list[Address]:
    """The addresses of a host. Raises TimeoutError, and OSError if it has none."""
    with suppress(ValueError):
        ip_address(host)
        return _looked_up(host, port, socket.AI_NUMERICHOST)  # asks no server
    key = os.getpid(), host, port
    with _lock:
        lookup = _lookups.get(key)
        if lookup is None:
            if len(_lookups) >= _LOOKUPS_MAX:
                raise OSError("too many host names are being resolved at the same time")
            lookup = _lookups[key] = _Lookup()
            threading.Thread(
                target=_look_up, args=(key, lookup), name="ckptfs-resolver", daemon=True
            ).start()
    if not lookup.is_done.wait(within_s):
        raise TimeoutError(f"no address of {host!r} within {within_s:.3g} s: the resolver hangs")
    if lookup.error is not None:
        raise OSError(lookup.error.errno, lookup.error.strerror) from lookup.error
    return lookup.found


def _look_up(key: tuple[int, str, int], lookup: _Lookup) -> None:
    _, host, port = key
    try:
        lookup.found = _looked_up(host, port)
    except UnicodeError:
        lookup.error = OSError(errno.EINVAL, f"{host!r} is not a valid host name")
    except OSError as error:
        lookup.error = OSError(error.errno, f"cannot resolve {host!r}: {error.strerror or error}")
    finally:
        with _lock:
            del _lookups[key]
        lookup.is_done.set()


def _looked_up(host: str, port: int, flags: int = 0) -> list[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [Address(family, kind, protocol, place) for family, kind, protocol, _, place in found]


# -- happy eyeballs


def _first_of(
    found: list[Address], host: str, port: int, stop_s: float, within_s: float
) -> tuple[socket.socket, Address]:
    """The first of the addresses that connects."""
    race = _Race(found)
    try:
        while not race.is_lost:
            now_s = time.monotonic()
            if now_s >= stop_s:
                why = race.failures
                raise TimeoutError(
                    f"no connection to {host!r} port {port} within {within_s:.3g} s"
                    + (f" ({why})" if why else "")
                )
            race.start(now_s)
            if won := race.wait(stop_s):
                return won
        raise OSError(race.errno, race.failures or f"{host!r} has no address")
    finally:
        race.end()


class _Race:
    """The tries to connect that run at the same time."""

    def __init__(self, found: list[Address]) -> None:
        self._waiting = deque(found)
        self._trying: dict[socket.socket, Address] = {}
        self._next_s = 0.0
        self._failed: list[tuple[Address, int]] = []
        self._poll = selectors.PollSelector()

    @property
    def is_lost(self) -> bool:
        return not self._waiting and not self._trying

    @property
    def errno(self) -> int:
        return self._failed[-1][1] if self._failed else 0

    @property
    def failures(self) -> str:
        shown = [f"{os.strerror(code)} ({at.place[0]})" for at, code in self._failed]
        return ", ".join(shown[:_SHOWN_MAX])

    def start(self, now_s: float) -> None:
        """Begin the next try if it is due."""
        if not self._waiting or (self._trying and now_s < self._next_s):
            return
        address = self._waiting.popleft()
        self._next_s = now_s + _NEXT_S
        try:
            sock = socket.socket(address.family, address.kind, address.protocol)
        except OSError as error:  # this machine does not know the family
            self._failed.append((address, error.errno or 0))
            return
        self._trying[sock] = address
        sock.setblocking(False)
        code = sock.connect_ex(address.place)
        if code in (0, errno.EINPROGRESS):
            self._poll.register(sock, selectors.EVENT_WRITE)
        else:
            self._lose(sock, code)

    def wait(self, stop_s: float) -> tuple[socket.socket, Address] | None:
        """The first connection, if it succeeds before the next try is due."""
        until_s = min(stop_s, self._next_s) if self._waiting else stop_s
        if not self._trying:
            return None
        for key, _ in self._poll.select(max(0.0, until_s - time.monotonic())):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            self._poll.unregister(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not code:
                return sock, self._trying.pop(sock)
            self._lose(sock, code)
        return None

    def _lose(self, sock: socket.socket, code: int) -> None:
        self._failed.append((self._trying.pop(sock), code))
        self._next_s = 0.0
        sock.close()

    def end(self) -> None:
        self._poll.close()
        for sock in self._trying:
            sock.close()
