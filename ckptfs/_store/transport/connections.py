"""The connections of one client, which wait for the next request.

A connection serves one request at a time. It stays open if the answer was read to its end. It may
lead through a proxy (see `proxies`) and use TLS (see `tls`).
"""

import functools
import http.client
import select
import socket
import ssl
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version as version_of
from typing import Any

from ckptfs._model.endpoints import Endpoint
from ckptfs._model.request_id import request_id
from ckptfs._store.request_context import current_progress, left_s
from ckptfs._store.transport.answers import Answer, Limits, Silence
from ckptfs._store.transport.dialing import Dialer
from ckptfs._store.transport.errors import BrokenConnection, SilentServer, text_of
from ckptfs._store.transport.proxies import open_tunnel, parse_proxy
from ckptfs._store.transport.tls import Network, secured

_IDLE_MAX = 160
"""The most idle connections: as many as the largest `connections_max` by "auto" and the version
checks use at the same time."""
_IDLE_S = 15.0
"""The longest time that a connection is idle. S3 closes connections after some 20 s."""
_PORTS = {"http": 80, "https": 443}
_CHUNK_BYTES = 256 << 10
"""The pieces of a body that is sent. Each may take as long as the longest silence."""
_PROGRAM = f"ckptfs/{version_of('ckptfs')}"
_PERHAPS_TLS = "check the endpoint, and write it with https:// if the server speaks TLS"


class Connection(http.client.HTTPConnection):
    """A connection.

    Attributes:
        endpoint: The endpoint of requests on it.
        held: The socket below TLS, which another thread may shut down.
        idle_since_s: The time of `time.monotonic` when its last request ended; 0 before that.
    """

    def __init__(self, endpoint: Endpoint, sock: Any, held: socket.socket) -> None:
        super().__init__(endpoint.host, endpoint.port or _PORTS[endpoint.scheme])
        self.sock = sock
        self.endpoint = endpoint
        self.held = held
        self.idle_since_s = 0.0

    def limit(self, limits: Limits) -> None:
        """Set the limits of the next request."""
        self.sock.settimeout(min(limits.silence_s, positive_left_s()))
        self.response_class = functools.partial(Answer, limits)  # type: ignore[assignment]

    @property
    def is_quiet(self) -> bool:
        """Whether the server has sent nothing since the last answer. It could only send the end."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)


class Connections:
    """The connections of one client. Several threads may use it.

    `timeout_s` is the longest connect, and the longest silence in a handshake. Raises LocationError
    for a malformed proxy.
    """

    def __init__(self, network: Network, timeout_s: float) -> None:
        self.proxy = parse_proxy(network.proxy) if network.proxy else None
        self.network = network
        self._timeout_s = timeout_s
        self._dialer = Dialer()
        self._is_open = True
        self._lock = threading.Lock()  # guards _idle; never held during IO
        self._idle: list[Connection] = []  # oldest first

    def close(self) -> None:
        """Close the idle connections now, and the others when they become idle."""
        self._is_open = False
        self.close_idle()

    def close_idle(self) -> None:
        """Close the connections that are idle now."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def send(
        self,
        method: str,
        endpoint: Endpoint,
        target: str,
        headers: Mapping[str, str],
        body: bytes | memoryview,
        limits: Limits,
    ) -> tuple[Connection, Answer]:
        """Send a request, and read the head of its answer.

        `target` is the encoded path and query, and the names of `headers` are in lower case. Raises
        BrokenConnection, S3Error, OSError or http.client.HTTPException if the server or the proxy
        does not answer.
        """
        sent = {"user-agent": _user_agent(), **headers}  # unsigned, because a proxy may change it
        if body:
            sent["content-length"] = str(len(body))
        if self.proxy is not None and endpoint.scheme == "http":  # the proxy reads the request
            target = f"http://{endpoint.authority}{target}"
            sent |= self.proxy.headers
        while True:
            connection = self._take(endpoint)
            try:
                current_progress().hold(connection.held)
                current_progress().is_in_head = True
                connection.limit(limits)
                return connection, _exchange(connection, method, target, body, sent)
            except (ConnectionError, http.client.BadStatusLine, ssl.SSLEOFError) as error:
                _end(connection)
                if connection.idle_since_s:  # the server has just closed it, as it may
                    if method != "POST":
                        continue
                    self.close_idle()  # it may have carried the request out, so callers repeat it
                    raise
                if endpoint.scheme == "https" or self.proxy:
                    raise
                # Many servers that expect TLS close a connection that begins without it.
                raise BrokenConnection(text_of(error), _PERHAPS_TLS) from error
            except BaseException as error:
                _end(connection)
                if isinstance(error, Silence):
                    self._was_silent(connection)
                raise

    @contextmanager
    def reading(self, connection: Connection, answer: Answer) -> Generator[None]:
        """Read the body of an answer in this context, and then keep or close its connection."""
        try:
            current_progress().is_in_head = False
            yield
            answer.incoming.end()
        except Silence:
            self._was_silent(connection)
            raise
        finally:
            self._give_back(connection, answer)

    def _take(self, endpoint: Endpoint) -> Connection:
        """A connection to `endpoint`. Raises OSError if the server cannot be reached, and the
        errors of `secured` and `open_tunnel`."""
        found = None
        with self._lock:
            fresh_s = time.monotonic() - _IDLE_S
            dropped = [each for each in self._idle if each.idle_since_s <= fresh_s]
            self._idle = [each for each in self._idle if each.idle_since_s > fresh_s]
            for idle in reversed(self._idle.copy()):
                if found is None and idle.endpoint == endpoint:
                    self._idle.remove(idle)
                    if idle.is_quiet:
                        found = idle
                    else:
                        dropped.append(idle)
        for connection in dropped:
            connection.close()
        return self._opened(endpoint) if found is None else found

    def _give_back(self, connection: Connection, response: Answer) -> None:
        """Keep or close a connection whose request has ended."""
        current_progress().let_go()
        if response.length == 0:
            response.close()
        if response.length or not response.isclosed() or response.will_close:
            connection.close()  # the answer was not read to its end, or is the last one
            response.close()  # the connection does not close its last answer
            return
        connection.idle_since_s = time.monotonic()
        with self._lock:
            self._idle.append(connection)
            is_full = len(self._idle) > _IDLE_MAX or not self._is_open
            dropped = self._idle.pop(0) if is_full else None
        if dropped is not None:
            dropped.close()

    def _was_silent(self, connection: Connection) -> None:
        """Close the idle connections and distrust the server's address, because a request on
        `connection` got no answer."""
        self.close_idle()
        host, port = self._first_hop(connection.endpoint)
        self._dialer.was_silent(host, port)

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
        host, port = self._first_hop(endpoint)
        try:
            return self._dialer.dial(host, port, self._patience_s())
        except OSError as error:
            if self.proxy is None:
                raise
            kind = SilentServer if isinstance(error, TimeoutError) else BrokenConnection
            text = f"the proxy {self.proxy.endpoint.text}: {error.strerror or error}"
            raise kind(text, "check the proxy") from error

    def _secured(self, sock: Any, host: str) -> Any:
        sock.settimeout(self._patience_s())
        return secured(sock, host, self.network.context())

    def _patience_s(self) -> float:
        """The longest wait for the next event, > 0. Raises TimeoutError."""
        return min(self._timeout_s, positive_left_s())


def positive_left_s() -> float:
    """The time until the caller's deadline, > 0. Raises TimeoutError."""
    left = left_s()
    if left <= 0:
        raise TimeoutError("the time for the request is over")
    return left


def _end(connection: Connection) -> None:
    """Close a connection that cannot serve another request."""
    current_progress().let_go()
    connection.close()


def _user_agent() -> str:
    """The user agent for the server's access logs, with the id of the ckptfs request behind it."""
    asked = request_id.get()
    return f"{_PROGRAM} request/{asked}" if asked else _PROGRAM


def _exchange(
    connection: Connection,
    method: str,
    target: str,
    body: bytes | memoryview,
    headers: Mapping[str, str],
) -> Answer:
    """Send a request, and read the head of its answer."""
    is_cut = False
    try:
        connection.request(method, target, _chunks(body) if body else None, headers)
    except (ConnectionError, ssl.SSLEOFError):
        # A server that refuses a request may answer and close before it has the whole body.
        is_cut = bool(body)
        if not is_cut:
            raise
    answer = connection.getresponse()
    assert isinstance(answer, Answer)
    answer.will_close |= is_cut
    return answer


def _chunks(body: bytes | memoryview) -> Iterator[memoryview]:
    view, progress = memoryview(body), current_progress()
    for i in range(0, len(body), _CHUNK_BYTES):
        progress.goes(len(chunk := view[i : i + _CHUNK_BYTES]))
        yield chunk
