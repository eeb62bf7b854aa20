"""The connections to one server, kept for the next request.

A connection serves one request at a time. It is kept if the answer was read to its end. The way to
the server may lead through a proxy (see `proxies`) and TLS (see `tls`).
"""

import functools
import http.client
import select
import socket
import threading
import time
from typing import Any, NamedTuple

from ckptfs._model.endpoints import Endpoint
from ckptfs._store import deadline, progress
from ckptfs._store.answers import Answer, Limits
from ckptfs._store.dialing import Dialer
from ckptfs._store.proxies import Proxy, open_tunnel
from ckptfs._store.s3errors import BrokenConnection, SilentServer
from ckptfs._store.tls import Trust, secured

_IDLE_MAX = 32
"""Connections kept: as many as `connections_max` and the version checks use at the same time."""
_IDLE_S = 15.0
"""How long one is kept: S3 ends those that are idle for longer than 20 s or so."""
_PORTS = {"http": 80, "https": 443}


class Connection(http.client.HTTPConnection):
    """A connection.

    Attributes:
        endpoint: Where requests on it go.
        held: The socket below, which another thread may shut down.
        is_kept: Whether it has served a request.
    """

    def __init__(self, endpoint: Endpoint, sock: Any, held: socket.socket) -> None:
        super().__init__(endpoint.host, endpoint.port or _PORTS[endpoint.scheme])
        self.sock = sock
        self.endpoint = endpoint
        self.held = held
        self.is_kept = False

    def limit(self, limits: Limits) -> None:
        """Set the limits of the next request."""
        self.sock.settimeout(min(limits.silence_s, left_s()))
        self.response_class = functools.partial(Answer, limits)  # type: ignore[assignment]

    @property
    def is_quiet(self) -> bool:
        """Whether nothing came from the server, which could only be the end of the connection."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)


class _Idle(NamedTuple):
    since_s: float
    connection: Connection


class Connections:
    """The connections of one client. May be used by several threads.

    Args:
        proxy: On the way; None: there is none.
        trust: Whom to trust.
        timeout_s: Longest connect, and longest silence in a handshake.
    """

    def __init__(self, proxy: Proxy | None, trust: Trust, timeout_s: float) -> None:
        self.proxy = proxy
        self.trust = trust
        self._timeout_s = timeout_s
        self._dialer = Dialer()
        self._is_open = True
        self._lock = threading.Lock()  # guards _idle; never held during IO
        self._idle: list[_Idle] = []  # oldest first

    def close(self) -> None:
        """Close the connections that are idle now; those in use are closed when they are."""
        self._is_open = False
        self.close_idle()

    def close_idle(self) -> None:
        """Close the connections that are idle now."""
        with self._lock:
            idle, self._idle = self._idle, []
        for each in idle:
            each.connection.close()

    def take(self, endpoint: Endpoint) -> Connection:
        """A connection to `endpoint`.

        Raises: What `secured` and `open_tunnel` raise; OSError: there is no connection.
        """
        dropped: list[Connection] = []
        found = None
        with self._lock:
            while self._idle and found is None:
                since_s, connection = self._idle.pop()
                is_fresh = time.monotonic() - since_s < _IDLE_S
                if is_fresh and connection.endpoint == endpoint and connection.is_quiet:
                    found = connection
                else:
                    dropped.append(connection)
        for connection in dropped:
            connection.close()
        return self._opened(endpoint) if found is None else found

    def give_back(self, connection: Connection, response: http.client.HTTPResponse) -> None:
        """The request on a connection has ended."""
        progress.current().let_go()
        if response.length == 0:
            response.close()
        if response.length or not response.isclosed() or response.will_close:
            connection.close()  # the answer was not read to its end, or is the last one
            response.close()  # which the connection does not do where it is the last one
            return
        connection.is_kept = True
        with self._lock:
            self._idle.append(_Idle(time.monotonic(), connection))
            is_full = len(self._idle) > _IDLE_MAX or not self._is_open
            dropped = self._idle.pop(0).connection if is_full else None
        if dropped is not None:
            dropped.close()

    def was_silent(self, connection: Connection) -> None:
        """A request on a connection got no answer: the kept ones may be as dead, and so may be the
        server's address."""
        self.close_idle()
        self._dialer.was_silent(*self._first_hop(connection.endpoint))

    def _first_hop(self, endpoint: Endpoint) -> tuple[str, int]:
        hop = self.proxy.endpoint if self.proxy else endpoint
        return hop.host, hop.port or _PORTS[hop.scheme]

    def _opened(self, endpoint: Endpoint) -> Connection:
        sock = self._dialed(endpoint)
        held = sock
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.proxy is not None and self.proxy.endpoint.scheme == "https":
                held = sock = self._secured(sock, self.proxy.endpoint.host)
            if endpoint.scheme == "https":
                if self.proxy is not None:
                    limits = Limits(self._timeout_s, self._timeout_s)
                    open_tunnel(sock, self.proxy, endpoint, limits)
                sock = self._secured(sock, endpoint.host)
                held = sock if isinstance(sock, socket.socket) else held
        except BaseException:
            sock.close()
            raise
        return Connection(endpoint, sock, held)

    def _dialed(self, endpoint: Endpoint) -> Any:
        hop = self._first_hop(endpoint)
        try:
            return self._dialer.dial(*hop, self._patience_s())
        except OSError as error:
            if self.proxy is None:
                raise
            kind = SilentServer if isinstance(error, TimeoutError) else BrokenConnection
            text = f"the proxy {self.proxy.endpoint.text}: {error.strerror or error}"
            raise kind(text, "check the proxy") from error

    def _secured(self, sock: Any, host: str) -> Any:
        sock.settimeout(self._patience_s())
        return secured(sock, host, self.trust)

    def _patience_s(self) -> float:
        """Longest wait for the next thing to happen, > 0. Raises TimeoutError."""
        return min(self._timeout_s, left_s())


def left_s() -> float:
    """The time until the caller's deadline, > 0. Raises TimeoutError."""
    left = deadline.left_s()
    if left <= 0:
        raise TimeoutError("the time for the request is over")
    return left


def ended(connection: Connection) -> None:
    """The connection is of no more use."""
    progress.current().let_go()
    connection.close()
