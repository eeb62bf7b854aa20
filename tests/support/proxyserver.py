"""An HTTP proxy in threads of the test: tunnels (CONNECT) and requests with a whole URL."""

from __future__ import annotations

import base64
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

from support.serverbase import accepted

if TYPE_CHECKING:
    import ssl

STOP_DEADLINE_S = 5.0
HEAD_BYTES_MAX = 64 << 10


class ProxyServer:
    """A context manager.

    Args:
        names: The hosts that the proxy alone can resolve, each with its "host:port".
        user: "user:password" that it wants; "": it serves all.
        tls: Its certificate; None: the connection to it is plain.

    Attributes:
        lines: The first line of each request to the proxy itself.
        refusal: The status line of the answer to all requests; "": they are served.
    """

    def __init__(
        self, names: dict[str, str], user: str = "", tls: ssl.SSLContext | None = None
    ) -> None:
        self.names = names
        self.lines: list[str] = []
        self.refusal = ""
        self._wanted = f"Basic {base64.b64encode(user.encode()).decode()}" if user else ""
        self._tls = tls
        self._lock = threading.Lock()  # guards the two below
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> ProxyServer:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for each in self._open:
                with suppress(OSError):
                    socket.socket.shutdown(each, socket.SHUT_RDWR)
            threads = self._threads
        for thread in threads:
            thread.join(STOP_DEADLINE_S)
            assert not thread.is_alive()

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        for client in accepted(self._listener):
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            self._noted(client)
            with client, client.makefile("rb") as incoming:
                while self._serve_one(client, incoming):
                    pass

    def _serve_one(self, client: socket.socket, incoming: BinaryIO) -> bool:
        line = incoming.readline(HEAD_BYTES_MAX).decode()
        if not line:
            return False
        head = [line]
        while (more := incoming.readline(HEAD_BYTES_MAX).decode()).strip():
            head.append(more)
        self.lines.append(line.strip())
        fields = dict(each.strip().split(": ", 1) for each in head[1:])
        if self._wanted and fields.pop("proxy-authorization", "") != self._wanted:
            return self._refuse(client, "407 Proxy Authentication Required")
        if self.refusal:
            return self._refuse(client, self.refusal)
        method, target, _ = line.split(" ")
        url = urlsplit(target if method != "CONNECT" else f"//{target}")
        assert fields["host"] == url.netloc
        host, _, port = self.names[url.netloc].rpartition(":")
        server = self._noted(socket.create_connection((host, int(port))))
        with server:
            if method != "CONNECT":
                rest = url._replace(scheme="", netloc="").geturl()
                sent = [f"{method} {rest} HTTP/1.1", *(f"{n}: {fields[n]}" for n in fields)]
                server.sendall("\r\n".join([*sent, "", ""]).encode())
                server.shutdown(socket.SHUT_WR)
                while data := server.recv(1 << 16):
                    client.sendall(data)
                return True
            client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n")
            answers = threading.Thread(target=_pump, args=(server, client), daemon=True)
            answers.start()
            _pump(client, server)
            answers.join()
        return False

    def _refuse(self, client: socket.socket, status: str) -> bool:
        client.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        return True

    def _noted(self, sock: socket.socket) -> socket.socket:
        with self._lock:
            self._open.add(sock)
        return sock


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            socket.socket.shutdown(end, socket.SHUT_RDWR)
