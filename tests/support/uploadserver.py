"""A server of uploads in threads of the test, whose requests of one kind meet a fault.

A fault meets each request of its operation, or (`once`) the first one only. `INSTEAD` and `BROKEN`
happen before the service has carried the request out, and `AFTER` happen after that.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from support.httpwire import Answer, error_answer, read_body, read_head
from support.serverbase import ConnectionServer
from support.wronganswers import LOGIN_PAGE

if TYPE_CHECKING:
    from typing import Any

    from support.httpwire import Head
    from support.uploadservices import CloudService, Request

STEP_S = 0.05
"""The pause between the bytes of a trickle."""


def _error(status: int, code: str, **more: str) -> Answer:
    found = error_answer(status, "planned", code)
    names = {name.replace("_", "-"): value for name, value in more.items()}
    return found._replace(fields=[*found.fields, *names.items()])


INSTEAD: dict[str, Answer] = {
    "500": _error(500, "InternalError"),
    "503": _error(503, "SlowDown"),
    "503, again in 7 s": _error(503, "SlowDown", Retry_After="7"),
    "503, again in an hour": _error(503, "SlowDown", Retry_After="3600"),
    "507": _error(507, "QuotaExceeded"),
    "403": _error(403, "AccessDenied"),
    "403 without a body": Answer(403, "Forbidden", [], b""),
    "400 expired": _error(400, "ExpiredToken"),
    "404 no upload": _error(404, "NoSuchUpload"),
    "404 no bucket": _error(404, "NoSuchBucket"),
    "login page": Answer(200, "OK", [("Content-Type", "text/html")], LOGIN_PAGE),
    "200 with an error": _error(200, "InternalError"),
}
"""Answers to requests that were not carried out."""

BROKEN = (
    *("refused", "reset", "reset in the request", "silence", "100 for ever", "no HTTP"),
    "flipped bit",
)
"""Connections that fail before the request was carried out. The last one is a request whose body
has changed on the way."""

AFTER = (
    *("lost", "lost by silence", "trickle", "cut in the head", "cut in the body"),
    *("half a body", "no body", "other ETag"),
)
"""Answers to requests that were carried out, and that do not come, or not as they were."""

SILENT = ("silence", "lost by silence", "trickle", "100 for ever")
"""Faults that only the client's patience ends."""

FAULTS = (*INSTEAD, *BROKEN, *AFTER)


class Fault(NamedTuple):
    """A fault of one operation. See ``uploadservices``."""

    kind: str
    operation: str
    once: bool = False


class UploadServer(ConnectionServer):
    """A context manager that serves `service`.

    Attributes:
        faults: What is wrong now.
        met: The operations of the requests that have met a fault.
        asked: The operations of all requests.

    `_lock` guards all three, too.
    """

    stop_deadline_s = 20.0

    def __init__(self, service: CloudService) -> None:
        super().__init__()
        self.service = service
        self.faults: list[Fault] = []
        self.met: Counter[str] = Counter()
        self.asked: list[str] = []

    def heal(self) -> None:
        """End all faults. Requests that wait for an answer lose their connection."""
        with self._lock:
            self.faults = []
        self._healed.set()
        if self._listener is None:
            self._listen()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError), connection.makefile("rb") as reader:
            while head := read_head(reader):
                if not self._exchange(connection, reader, head):
                    break

    def _exchange(self, connection: socket.socket, reader: Any, head: Head) -> bool:
        """Answer one request. Returns whether the connection serves another one."""
        kind = self._meet(self.service.operation_of(self.service.request_of(head, b"")))
        if kind == "reset in the request" and head.value("content-length"):
            reader.read(int(head.value("content-length")) // 2)
            return _reset(connection)
        body = read_body(reader, head)
        if kind == "flipped bit" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        request = self.service.request_of(head, body)
        if kind in INSTEAD:
            return _send(connection, head, INSTEAD[kind])
        if kind in ("", "flipped bit"):
            return _send(connection, head, self.service.answer(request))
        if kind in BROKEN:
            return self._break(connection, kind)
        return self._spoil(connection, request, self.service.answer(request), kind)

    def _meet(self, operation: str) -> str:
        """The kind of the fault that a request of this operation meets; "" for none."""
        with self._lock:
            self.asked.append(operation)
            for fault in self.faults:
                if fault.operation == operation:
                    self.met[operation] += 1
                    if fault.once:
                        self.faults.remove(fault)
                    return fault.kind
            return ""

    def _break(self, connection: socket.socket, kind: str) -> bool:
        if kind == "refused":
            self._close()
        elif kind == "silence":
            self._healed.wait()
        elif kind == "no HTTP":
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\0\xff\r\n")
        elif kind == "100 for ever":
            while not self._healed.wait(STEP_S):
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)
        else:
            return _reset(connection)
        return False

    def _spoil(self, connection: socket.socket, request: Request, right: Answer, kind: str) -> bool:
        """Answer a request that was carried out, in a wrong way."""
        head = request.head
        if kind == "other ETag":
            etag = '"0123456789abcdef0123456789abcdef"'
            named = right.value("etag").strip('"').encode()
            body = right.body.replace(named, etag.strip('"').encode()) if named else right.body
            return _send(connection, head, right.having("etag", etag)._replace(body=body))
        if kind == "half a body":
            return _send(connection, head, right._replace(body=right.body[: len(right.body) // 2]))
        if kind == "no body":
            return _send(connection, head, right._replace(body=b""))
        raw = right.raw(head.method)
        begin = raw.index(b"\r\n\r\n") + 4
        if kind == "cut in the head":
            connection.sendall(raw[: begin // 2])
        elif kind == "cut in the body":
            connection.sendall(raw[: begin + (len(raw) - begin) // 2])
        elif kind == "lost by silence":
            self._healed.wait()
        elif kind == "trickle":
            for i in range(len(raw)):
                connection.sendall(raw[i : i + 1])
                if self._healed.wait(STEP_S):
                    break
        return False


def _send(connection: socket.socket, head: Head, answer: Answer) -> bool:
    connection.sendall(answer.raw(head.method))
    return True


def _reset(connection: socket.socket) -> bool:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False
