"""The small HTTP server for Prometheus: GET /metrics, one request per connection.

It listens on a loopback address or a unix socket only, so its clients are processes of this node.
A client may be slow or ask without end. Therefore a connection lasts some seconds, at most
`_CONNECTIONS_MAX` are open at the same time, and requests within one second get the same answer.

If the address is in use, e.g. by another daemon of the same configuration, the server logs that and
tries again, because the mount has to serve its readers without metrics, too.
"""

import contextlib
import logging
import os
import socket
import stat

import trio

from ckptfs._daemon.control.prometheus import Exporter

log = logging.getLogger(__name__)

_CONNECTIONS_MAX = 8
_CONNECTION_S = 10.0
_HEAD_BYTES_MAX = 8 << 10
_FRESH_S = 1.0
_AGAIN_S = 5.0
_BACKLOG = 16


def is_open(address: str) -> bool:
    """Whether any user of the node can connect to the address."""
    return not address.startswith("unix:")


def listen(address: str) -> socket.socket:
    """A socket that listens at an address in the form of the setting `metrics`. Raises OSError."""
    if not is_open(address):
        return _listen_unix(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if int(port) > 65535:
            raise OSError(f"port {port} is above 65535")
        listening.bind((host, int(port)))
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _listen_unix(path: str) -> socket.socket:
    """Listen on a unix socket. It replaces a socket without a listener, and no other file."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError("the file exists, and it is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise OSError("another process listens on it")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listening.bind(path)
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    finally:
        os.umask(mask)
    return listening


class MetricsServer:
    """Serves the text of an exporter at the address of the setting `metrics`."""

    def __init__(self, exporter: Exporter, address: str) -> None:
        self._exporter = exporter
        self._address = address
        self._places = trio.CapacityLimiter(_CONNECTIONS_MAX)
        self._last: dict[str, tuple[float, str, bytes]] = {}  # by format: time, type, text

    async def serve(self) -> None:
        """Answer until cancelled."""
        listening = await self._listen()
        try:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
            log.info("metrics on %s", self._address)
            await trio.serve_listeners(self._connection, [listener])
        finally:
            if not is_open(self._address):
                with contextlib.suppress(OSError):
                    os.unlink(self._address.removeprefix("unix:"))

    async def _listen(self) -> socket.socket:
        while True:
            try:
                return listen(self._address)
            except OSError as error:
                cause = error.strerror or str(error)
                about = {"event": "no-metrics", "file": self._address}
                log.error("cannot serve metrics on %s: %s", self._address, cause, extra=about)
                await trio.sleep(_AGAIN_S)

    async def _connection(self, stream: trio.SocketStream) -> None:
        try:
            self._places.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            await stream.aclose()
            return
        try:
            with trio.move_on_after(_CONNECTION_S):
                head = await _head_of(stream)
                if head:
                    await stream.send_all(await self._answer(head))
        except trio.BrokenResourceError:
            pass  # the client has closed the connection
        except Exception:  # it must not end the daemon
            log.exception("unexpected error while serving metrics")
        finally:
            self._places.release_on_behalf_of(stream)
            with trio.CancelScope(shield=True):
                await stream.aclose()

    async def _answer(self, head: list[str]) -> bytes:
        method, _, rest = head[0].partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if path != "/metrics":
            return _response("404 Not Found", "text/plain", b"the metrics are at /metrics\n")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "text/plain", b"GET only\n")
        fields = [line.partition(":") for line in head[1:]]
        accept = next((value for name, _, value in fields if name.lower() == "accept"), "")
        content_type, content = await self._text(accept.strip())
        return _response("200 OK", content_type, content, with_body=method == "GET")

    async def _text(self, accept: str) -> tuple[str, bytes]:
        now_s = trio.current_time()
        key = "openmetrics" if "openmetrics" in accept else "text"
        known = self._last.get(key)
        if known is None or now_s - known[0] >= _FRESH_S:
            known = self._last[key] = now_s, *await self._exporter.text(accept)
        return known[1], known[2]


async def _head_of(stream: trio.SocketStream) -> list[str]:
    """The lines of a request's head; [] if the head is incomplete or too long."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some(_HEAD_BYTES_MAX)
        data += more
        if not more or len(data) > _HEAD_BYTES_MAX:
            return []
    return data.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")


def _response(status: str, content_type: str, body: bytes, *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("latin-1") + (body if with_body else b"")
