"""The HTTP proxy between ckptfs and a server, which counts, and does what networks and stores do.

A process of its own: `python -m support.faultproxy UPSTREAM SEED [PEM PEM]`, with TLS where it gets
    two certificates: the store's, and one without a trusted authority. UPSTREAM is "host:port",
    "https://…" in front of it for TLS to there. It takes one JSON object per line on standard input
    and answers each with a line:

- `{"fault": KIND, "share": P}` makes requests fail, and `{}` ends that;
- `{"faults": [{"fault": KIND, "operation": NAME, "within": TEXT}, …]}` does so with several. Each
  is met by requests of that operation (see `httpwire.Head`) whose decoded target holds the text;
- `{"pause": true}` and `{"pause": false}` are around a change of the objects: in between no request
  is at the server, so that each of its answers is of one version, as Amazon's are (rclone hashes
  and reads a file in two steps);
- `{"count": true}` asks how many requests each kind has met;
- `{"traffic": "all"}` asks for the requests since the last `{"traffic": "reset"}`;
- `{"upstream": UPSTREAM}` leads to another server from the next request on.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from support.httpwire import Answer, Head, has_hung_up, read_body, read_head
from support.serverbase import accepted
from support.wronganswers import ANSWERS, CHANGED, INSTEAD, REFUSALS

if TYPE_CHECKING:
    from collections.abc import Sequence

PIECE_BYTES = 16 << 10
PIECE_PAUSE_S = 0.2
"""A trickle: 80 KB a second, never silent, and nothing ever gets finished."""

UPSTREAM_TIMEOUT_S = 20.0
HANDSHAKE_TIMEOUT_S = 5.0

FAULTS = (
    *("refused", "dark", "reset", "slow", "trickle", "cut"),
    *("unavailable", "denied", "garbage"),
)
"""The faults that scripts/chaos lets happen."""
CONNECTIONS = ("dark", "slow", "reset", "trickle", "cut", "no length", "whole object")
"""Faults that are no other answer, but another way to give it."""
NOTHING = Answer(200, "OK", [], b"")
TLS_FAULTS = "handshake cut", "untrusted"


class Proxy:
    """The other end: starts the process, as a context manager, and commands it."""

    endpoint: str

    def __init__(self, upstream: str, seed: int, certificates: Sequence[Path] = ()) -> None:
        self._arguments = upstream, str(seed), *map(str, certificates)
        self._asking = threading.Lock()
        self._cleanup = ExitStack()

    def __enter__(self) -> Proxy:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.faultproxy", *self._arguments],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
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
        """Accept no new requests, and wait until the running ones have ended."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._inside)

    def open(self) -> None:
        with self._changed:
            self._closed = False
            self._changed.notify_all()


class Upstream:
    """One client's connection to the server, made when it is needed."""

    def __init__(self) -> None:
        self._to = ""
        self._connection: http.client.HTTPConnection | None = None

    def exchange(self, to: str, head: Head, body: bytes) -> Answer:
        """Raises OSError, HTTPException."""
        was_open = self._connection is not None and to == self._to
        try:
            return self._exchange(to, head, body)
        except (ConnectionError, http.client.BadStatusLine):
            self.close()
            if not was_open:
                raise
        return self._exchange(to, head, body)  # the server had closed it, being idle

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _exchange(self, to: str, head: Head, body: bytes) -> Answer:
        if self._connection is None or to != self._to:
            self.close()
            self._to, self._connection = to, _connection(to)
        upstream = self._connection
        upstream.putrequest(head.method, head.target, skip_host=True, skip_accept_encoding=True)
        for name, value in head.fields:
            if name.lower() not in ("expect", "transfer-encoding", "content-length"):
                upstream.putheader(name, value)
        if body or head.method in ("PUT", "POST"):
            upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body or None)
        found = upstream.getresponse()
        return Answer(found.status, found.reason, found.getheaders(), found.read())


def _connection(to: str) -> http.client.HTTPConnection:
    scheme, _, endpoint = to.rpartition("://")
    host, _, port = endpoint.rpartition(":")
    if scheme != "https":
        return http.client.HTTPConnection(host, int(port), timeout=UPSTREAM_TIMEOUT_S)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the tests' own server
    return http.client.HTTPSConnection(host, int(port), timeout=UPSTREAM_TIMEOUT_S, context=context)


class Server:
    """Accepts connections; a thread for each."""

    def __init__(self, upstream: str, seed: int, certificates: Sequence[str] = ()) -> None:
        self._upstream = upstream
        self._chance = random.Random(f"{seed} proxy")
        self._gate = Gate()
        self._lock = threading.Lock()  # guards the four below
        self._faults: list[dict[str, Any]] = []
        self._met: dict[str, int] = {}
        self._traffic: list[dict[str, Any]] = []
        self._open: set[socket.socket] = set()
        self._fault_over = threading.Event()
        self._tls = [tls_of(path) for path in certificates]  # the right one first
        self._port = 0
        self._listen()

    def command(self, said: dict[str, Any]) -> dict[str, Any]:
        """Carry out a command; returns the answer."""
        if "pause" in said:
            (self._gate.close if said["pause"] else self._gate.open)()
        elif "upstream" in said:
            self._upstream = said["upstream"]
        elif "traffic" in said:
            with self._lock:
                if said["traffic"] == "reset":
                    self._traffic = []
                return {"traffic": self._traffic}
        elif "count" not in said:
            self._set_faults(said.get("faults", [said] if said else []))
        with self._lock:
            return {"endpoint": f"127.0.0.1:{self._port}", "met": self._met}

    def _set_faults(self, faults: list[dict[str, Any]]) -> None:
        with self._lock:
            old = {fault["fault"] for fault in self._faults}
            self._faults = faults
            over, self._fault_over = self._fault_over, threading.Event()
        over.set()
        new = {fault["fault"] for fault in faults}
        if "refused" in old - new:
            self._listen()
        elif "refused" in new - old:
            with suppress(OSError):  # shutdown wakes the thread that accepts
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._end_connections()
        elif new & {*TLS_FAULTS}:
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
        for client in accepted(listener):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self._tls:
            try:
                client = self._shaken_hands(client)
            except (OSError, ValueError):
                client.close()
                return
        upstream = Upstream()
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

    def _answer(self, client: socket.socket, reader: Any, upstream: Upstream, head: Head) -> bool:
        """Answer one request; False: the connection is over."""
        if head.value("expect"):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = read_body(reader, head)
        fault, over = self._meet((*CONNECTIONS, *ANSWERS), head)
        kind = fault.get("fault", "")
        if kind in ("dark", "slow"):
            over.wait(fault["delay_s"] if kind == "slow" else None)
            if has_hung_up(client):  # else TCP sends again what was lost on the way
                return False
        elif kind == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        elif kind == "whole object":
            head.fields = [
                field for field in head.fields if field[0].lower() not in ("range", "x-ms-range")
            ]
        if kind in INSTEAD | REFUSALS:
            found = ANSWERS[kind](NOTHING)
        else:
            with self._gate:
                found = upstream.exchange(self._upstream, head, body)
            if kind in CHANGED:
                found = CHANGED[kind](found)
        self._note(head, found)
        return self._send(client, found.raw(head.method), kind, over)

    def _send(
        self, client: socket.socket, message: bytes, kind: str, over: threading.Event
    ) -> bool:
        """Send the answer, in the way of `kind`; False: the connection is over."""
        start = message.index(b"\r\n\r\n") + 4
        if kind == "cut":
            client.sendall(message[: self._chance.randrange(start, len(message) + 1)])
            return False
        if kind == "no length":
            lines = message[:start].split(b"\r\n")
            kept = [line for line in lines if not line.lower().startswith(b"content-length:")]
            client.sendall(b"\r\n".join(kept) + message[start:])
            return False
        if kind == "trickle":
            while message and not over.wait(PIECE_PAUSE_S):
                client.sendall(message[:PIECE_BYTES])
                message = message[PIECE_BYTES:]
        client.sendall(message)
        return True

    def _note(self, head: Head, found: Answer) -> None:
        """Count a request; before the client has its answer, so that what it counts is complete."""
        noted = {
            "operation": head.operation,
            "method": head.method,
            "target": head.target,
            "range": head.range,
            "status": found.status,
            "body_bytes": 0 if head.method == "HEAD" else len(found.body),
        }
        with self._lock:
            self._traffic.append(noted)

    def _meet(
        self, kinds: Sequence[str], head: Head | None = None
    ) -> tuple[dict[str, Any], threading.Event]:
        """The fault of these kinds that is met now, if any, and what says that it is over."""
        with self._lock:
            for fault in self._faults:
                if (
                    fault["fault"] in kinds
                    and (head is None or _is_aimed(fault, head))
                    and self._chance.random() < fault.get("share", 1)
                ):
                    self._met[fault["fault"]] = self._met.get(fault["fault"], 0) + 1
                    return fault, self._fault_over
            return {}, self._fault_over


def _is_aimed(fault: dict[str, Any], head: Head) -> bool:
    """Whether a fault is for this request."""
    if fault.get("operation", head.operation) != head.operation:
        return False
    return fault.get("within", "") in unquote(head.target)


def tls_of(path: str) -> ssl.SSLContext:
    """Of a server that has this key and certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def main() -> None:
    server = Server(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    for line in sys.stdin:
        print(json.dumps(server.command(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
