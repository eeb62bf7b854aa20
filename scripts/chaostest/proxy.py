"""The HTTP proxy between ckptfs and the S3 server, which does what networks and stores do.

A process of its own: `python -m chaostest.proxy HOST:PORT SEED [PEM PEM]`, with TLS where it gets
two certificates: the store's, and one that nobody trusts. It takes one JSON object per line
on standard input and answers each with a line: `{"fault": KIND, "share": P, …}` makes requests
fail, `{}` ends that, `{"pause": true}` and `{"pause": false}` are around a change of the objects:
in between no request is at the server, so that each of its answers is of one version, as Amazon's
are (rclone hashes and reads a file in two steps). `{"count": true}` asks how many requests each
kind has met.

A share of the requests, taken by chance, meets the fault; with share 1 all. Faults of TLS are met
by connections, so all that there are end when one begins.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import ssl
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HEAD_BYTES_MAX = 64 << 10
PIECE_BYTES = 16 << 10
PIECE_PAUSE_S = 0.2
"""A trickle: 80 KB a second, never silent, and nothing ever gets finished."""

UPSTREAM_TIMEOUT_S = 20.0
HANDSHAKE_TIMEOUT_S = 5.0

UNAVAILABLE = 503, "Slow Down", "SlowDown"
DENIED = 403, "Forbidden", "AccessDenied"
GARBAGE = b"<html><body>Welcome to the airport. Please accept our terms.</body></html>"
FAULTS = (
    *("refused", "dark", "reset", "slow", "trickle", "cut"),
    *("unavailable", "denied", "garbage"),
)
TLS_FAULTS = "handshake cut", "untrusted"


class Proxy:
    """The other end: starts the process, as a context manager, and commands it."""

    endpoint: str

    def __init__(self, upstream: str, seed: int, certificates: Sequence[Path] = ()) -> None:
        self._arguments = upstream, str(seed), *map(str, certificates)
        self._asking = threading.Lock()
        self._cleanup = ExitStack()

    def __enter__(self) -> Proxy:
        command = [sys.executable, "-m", "chaostest.proxy", *self._arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.endpoint = self.ask({})["endpoint"]
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """One command and its answer."""
        assert self._process.stdin
        assert self._process.stdout
        with self._asking:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the proxy has died")
        return json.loads(line)


# The process.


class Gate:
    """Shared by exchanges with the server, exclusive for a change of its objects."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more, and wait until all are out."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._inside)

    def open(self) -> None:
        with self._changed:
            self._closed = False
            self._changed.notify_all()


class Server:
    """Accepts connections; a thread for each."""

    def __init__(self, upstream: str, seed: int, certificates: Sequence[str] = ()) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = host, int(port)
        self._chance = random.Random(f"{seed} proxy")
        self._gate = Gate()
        self._lock = threading.Lock()  # guards the three below
        self._fault: dict[str, Any] = {}
        self._met: dict[str, int] = {}
        self._open: set[socket.socket] = set()
        self._fault_over = threading.Event()
        self._tls = [tls_of(path) for path in certificates]  # the right one first
        self._port = 0
        self._listen()

    def command(self, said: dict[str, Any]) -> dict[str, Any]:
        """Carry out a command; returns the answer."""
        if "pause" in said:
            (self._gate.close if said["pause"] else self._gate.open)()
        elif "count" not in said:
            self._set_fault(said)
        with self._lock:
            return {"endpoint": f"127.0.0.1:{self._port}", "met": self._met}

    def _set_fault(self, fault: dict[str, Any]) -> None:
        with self._lock:
            old, self._fault = self._fault, fault
            over, self._fault_over = self._fault_over, threading.Event()
        over.set()
        if old.get("fault") == "refused" and fault.get("fault") != "refused":
            self._listen()
        elif fault.get("fault") == "refused":
            with suppress(OSError):  # shutdown wakes the thread that accepts
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._end_connections()
        elif fault.get("fault") in TLS_FAULTS:
            self._end_connections()

    def _end_connections(self) -> None:
        with self._lock:
            for end in self._open:
                with suppress(OSError):
                    socket.socket.shutdown(end, socket.SHUT_RDWR)  # of TLS, too, by another thread

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=128)
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self._tls:
            try:
                client = self._shaken_hands(client)
            except (OSError, ValueError):
                client.close()
                return
        upstream = http.client.HTTPConnection(*self._upstream, timeout=UPSTREAM_TIMEOUT_S)
        with self._lock:
            self._open.add(client)
        try:
            reader = client.makefile("rb")
            while head := read_head(reader):
                if not self._answer(client, reader, upstream, head):
                    break
        except (OSError, http.client.HTTPException, ValueError):
            pass  # the client has gone away, or did not speak HTTP
        finally:
            upstream.close()
            with self._lock:
                self._open.discard(client)
            client.close()

    def _shaken_hands(self, client: socket.socket) -> socket.socket:
        """Raises OSError, ValueError: the client does not trust us, has gone, or must go."""
        kind = self._meet(TLS_FAULTS)[0].get("fault", "")
        client.settimeout(HANDSHAKE_TIMEOUT_S)
        if kind == "handshake cut":
            client.recv(1)  # it has begun
            raise ConnectionResetError
        secured = self._tls[kind == "untrusted"].wrap_socket(client, server_side=True)
        secured.settimeout(None)
        return secured

    def _answer(
        self, client: socket.socket, reader: Any, upstream: http.client.HTTPConnection, head: Head
    ) -> bool:
        """Answer one request; False: the connection is over."""
        if head.value("expect"):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = read_body(reader, head)
        fault, over = self._meet(FAULTS)
        kind = fault.get("fault", "")
        if kind == "dark":
            over.wait()
            if has_hung_up(client):  # else TCP sends again what was lost on the way
                return False
        elif kind == "slow":
            over.wait(fault["delay_s"])
            if has_hung_up(client):
                return False
        elif kind == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        elif kind == "unavailable":
            client.sendall(error_answer(head, *UNAVAILABLE))
            return True
        elif kind == "denied":
            client.sendall(error_answer(head, *DENIED))
            return True
        elif kind == "garbage":
            client.sendall(answer(200, "OK", [("Content-Type", "text/html")], GARBAGE, head))
            return True
        with self._gate:
            message = self._exchange(upstream, head, body)
        if kind == "cut":
            start = message.index(b"\r\n\r\n") + 4
            client.sendall(message[: self._chance.randrange(start, len(message) + 1)])
            return False
        if kind == "trickle":
            while message and not over.wait(PIECE_PAUSE_S):
                client.sendall(message[:PIECE_BYTES])
                message = message[PIECE_BYTES:]
        client.sendall(message)
        return True

    def _meet(self, kinds: Sequence[str]) -> tuple[dict[str, Any], threading.Event]:
        """The fault of these kinds that is met now, if any, and what says that it is over."""
        with self._lock:
            fault, over = self._fault, self._fault_over
            if fault.get("fault") not in kinds or self._chance.random() >= fault["share"]:
                return {}, over
            self._met[fault["fault"]] = self._met.get(fault["fault"], 0) + 1
            return fault, over

    def _exchange(self, upstream: http.client.HTTPConnection, head: Head, body: bytes) -> bytes:
        upstream.putrequest(head.method, head.target, skip_host=True, skip_accept_encoding=True)
        for name, value in head.fields:
            if name.lower() not in ("expect", "transfer-encoding", "content-length"):
                upstream.putheader(name, value)
        if body or head.method in ("PUT", "POST"):
            upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body or None)
        found = upstream.getresponse()
        data = found.read()
        fields = found.getheaders()
        if head.method != "HEAD":
            left_out = ("transfer-encoding", "content-length")
            fields = [field for field in fields if field[0].lower() not in left_out]
        return answer(found.status, found.reason, fields, data, head)


def has_hung_up(client: socket.socket) -> bool:
    """Whether the client has closed the connection: what it has asked for must not happen later."""
    client.settimeout(0)
    try:
        return socket.socket.recv(client, 1, socket.MSG_PEEK) == b""  # of TLS, too
    except BlockingIOError:
        return False
    finally:
        client.settimeout(None)


class Head:
    """A request's head."""

    def __init__(self, lines: list[str]) -> None:
        self.method, self.target, _ = lines[0].split(" ")
        parts = [line.partition(":") for line in lines[1:]]
        self.fields = [(name, value.strip()) for name, _, value in parts]

    def value(self, name: str) -> str:
        return next((value for key, value in self.fields if key.lower() == name), "")


def tls_of(path: str) -> ssl.SSLContext:
    """Of a server that has this key and certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def read_head(reader: Any) -> Head | None:
    """The next request's head; None at the connection's end."""
    lines: list[str] = []
    length = 0
    while (line := reader.readline(HEAD_BYTES_MAX)) not in (b"\r\n", b""):
        lines.append(line.decode("latin-1").rstrip("\r\n"))
        length += len(line)
        if length > HEAD_BYTES_MAX:
            raise ValueError("the head does not end")
    return Head(lines) if lines and line else None


def read_body(reader: Any, head: Head) -> bytes:
    """The request's body, also one in chunks."""
    if not head.value("transfer-encoding"):
        return _exactly(reader, int(head.value("content-length") or 0))
    parts: list[bytes] = []
    while length := int(reader.readline(HEAD_BYTES_MAX), 16):
        parts.append(_exactly(reader, length))
        reader.readline(HEAD_BYTES_MAX)
    while reader.readline(HEAD_BYTES_MAX) not in (b"\r\n", b""):
        pass
    return b"".join(parts)


def _exactly(reader: Any, length: int) -> bytes:
    """So many bytes. Raises ValueError where the client has gone away before: what it had begun to
    send must not pass for a request with less in it."""
    data = reader.read(length)
    if len(data) < length:
        raise ValueError(f"the client has gone away after {len(data)} of {length} bytes")
    return data


def answer(
    status: int, reason: str, fields: list[tuple[str, str]], body: bytes, head: Head
) -> bytes:
    """A whole answer. That to HEAD has no body, and its length is among the fields."""
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in fields)]
    if head.method == "HEAD":
        body = b""
        if not any(name.lower() == "content-length" for name, _ in fields):
            lines.append("Content-Length: 0")
    else:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def error_answer(head: Head, status: int, reason: str, code: str) -> bytes:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{reason}</Message></Error>"
    return answer(status, reason, [("Content-Type", "application/xml")], text.encode(), head)


def main() -> None:
    server = Server(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    for line in sys.stdin:
        print(json.dumps(server.command(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
