"""An S3 server in threads of the test that has one fault, until it is healed.

It makes each answer of one version, and looks at conditions, as Amazon's does; `is_disk` makes it
like the servers that hand out files of a disk, whose answers may change on the way.
"""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import suppress
from email.utils import formatdate
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from support.serverbase import ConnectionServer

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable


STEP_S = 0.1
"""Between the bytes of a trickle: never silent for as long as the tests' `store_timeout_s`."""


class Answer(NamedTuple):
    """The right answer to a request, before a fault changes it."""

    status: int
    headers: dict[str, str]
    body: bytes
    has_body: bool

    def raw(self) -> bytes:
        head = f"HTTP/1.1 {self.status} Because\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return head.encode() + b"\r\n" + (self.body if self.has_body else b"")


class Object(NamedTuple):
    """One version of an object; times are in whole seconds, as S3 gives them."""

    data: bytes
    mtime_s: int

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"'


def _error(code: str, status: int, **headers: str) -> Callable[[Answer], Answer]:
    body = f"<Error><Code>{code}</Code><Message>planned</Message></Error>".encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda right: Answer(
        status, {**named, "Content-Length": str(len(body))}, body, right.has_body
    )


def _shifted(right: Answer) -> Answer:
    def shift(match: re.Match[str]) -> str:
        return f"bytes {int(match[1]) + 1}-{int(match[2]) + 1}/"

    where = re.sub(r"bytes (\d+)-(\d+)/", shift, right.headers.get("Content-Range", ""))
    return right._replace(headers={**right.headers, **({"Content-Range": where} if where else {})})


def _longer(right: Answer) -> Answer:
    if "Content-Range" not in right.headers:
        return right
    body = right.body + b"and more"
    return right._replace(headers={**right.headers, "Content-Length": str(len(body))}, body=body)


def _shorter(right: Answer) -> Answer:
    if "Content-Range" not in right.headers:
        return right
    body = right.body[: len(right.body) // 2]
    return right._replace(headers={**right.headers, "Content-Length": str(len(body))}, body=body)


ANSWERS: dict[str, Callable[[Answer], Answer]] = {
    "503": _error("SlowDown", 503),
    "503, again in 1 s": _error("SlowDown", 503, Retry_After="1"),
    "503, again in an hour": _error("SlowDown", 503, Retry_After="3600"),
    "500": _error("InternalError", 500),
    "403 expired": _error("ExpiredToken", 403),
    "400 expired": _error("ExpiredToken", 400),
    "301 elsewhere": _error("PermanentRedirect", 301, Location="http://192.0.2.1/"),
    "wrong range": _shifted,
    "longer body": _longer,
    "shorter body": _shorter,
}
"""Faults that are another answer."""

CONNECTIONS = (
    "black hole",
    "refused",
    "trickle",
    "trickling body",
    "cut in the body",
    "cut in the head",
    "garbage",
    "100 for ever",
)
"""Faults of a connection."""


class FaultServer(ConnectionServer):
    """A context manager. `fault` is one of `ANSWERS` or `CONNECTIONS`, or "".

    Attributes:
        objects: By bucket and key, "bucket/key".
        during: Called with the moment ("begin", "middle") of each answer to a GET of an object.
    """

    def __init__(self, fault: str = "", *, is_disk: bool = False) -> None:
        super().__init__()
        self.fault = fault
        self.is_disk = is_disk
        self.objects: dict[str, Object] = {}
        self.during: Callable[[str], None] = lambda _: None

    def break_down(self) -> None:
        """Let the fault begin."""
        self._healed.clear()
        if self.fault == "refused":
            self._close()

    def heal(self) -> None:
        """Let it end; who waits because of it loses the connection."""
        fault, self.fault = self.fault, ""
        self._healed.set()
        if fault == "refused":
            self._listen()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError), connection.makefile("rb") as incoming:
            while line := incoming.readline():
                method, target, _ = line.decode().split(" ")
                headers: dict[str, str] = {}
                while (line := incoming.readline().strip()) != b"":
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = incoming.read(int(headers.get("content-length", "0")))
                right = self._answer(method, target, headers, body)
                if self.fault in ANSWERS and not self._healed.is_set():
                    right = ANSWERS[self.fault](right)
                elif self.fault and not self._healed.is_set():
                    self._misbehave(connection, right)
                    break
                raw = right.raw()
                if method == "GET" and "Content-Range" in right.headers:
                    self._send_in_halves(connection, target, right)
                else:
                    connection.sendall(raw)

    def _send_in_halves(self, connection: socket.socket, target: str, right: Answer) -> None:
        half = len(right.body) // 2
        connection.sendall(right._replace(body=right.body[:half]).raw())
        self.during("middle")
        rest = right.body[half:]
        if self.is_disk:  # what stands in the file now, as far as it goes
            found = self.objects.get(unquote(urlsplit(target).path).lstrip("/"))
            start = int(re.findall(r"\d+", right.headers["Content-Range"])[0]) + half
            now = b"" if found is None else found.data[start : start + len(rest)]
            rest = now.ljust(len(rest), b"\0") if now else rest
        connection.sendall(rest)

    def _misbehave(self, connection: socket.socket, right: Answer) -> None:
        raw = right.raw()
        head = len(raw) - len(right.body) if right.has_body else len(raw)
        if self.fault == "black hole":
            self._healed.wait()
        elif self.fault == "garbage":
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\0\xff\r\n")
        elif self.fault == "cut in the head":
            connection.sendall(raw[: head // 2])
        elif self.fault == "cut in the body":
            connection.sendall(raw[: head + (len(raw) - head) // 2])
        elif self.fault == "100 for ever":
            while not self._healed.wait(STEP_S / 10):
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)
        else:
            begin = head if self.fault == "trickling body" else 0
            connection.sendall(raw[:begin])
            for i in range(begin, len(raw)):
                connection.sendall(raw[i : i + 1])
                if self._healed.wait(STEP_S):
                    break

    # -- what would be right

    def _answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        url = urlsplit(target)
        name = unquote(url.path).lstrip("/")
        query = parse_qs(url.query)
        if "list-type" in query:
            return _whole(200, self._listing(name, query.get("prefix", [""])[0]), {}, method)
        if method == "PUT":
            before = self.objects.get(name)
            self.objects[name] = Object(body, before.mtime_s + 1 if before else 1_600_000_000)
            return _whole(200, b"", {"ETag": self.objects[name].etag}, method)
        if method == "GET":
            self.during("begin")
        found = self.objects.get(name)
        if found is None:
            return _error("NoSuchKey", 404)(Answer(0, {}, b"", method == "GET"))
        about = {"ETag": found.etag, "Last-Modified": formatdate(found.mtime_s, usegmt=True)}
        if not self.is_disk and headers.get("if-none-match") == found.etag:
            return Answer(304, about, b"", False)
        if not self.is_disk and headers.get("if-match", found.etag) != found.etag:
            return _error("PreconditionFailed", 412)(Answer(0, {}, b"", method == "GET"))
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", "")):
            start, stop = int(wanted[1]), int(wanted[2]) + 1
            part = found.data[start:stop]
            if not part:
                return _error("InvalidRange", 416)(Answer(0, {}, b"", True))
            where = f"bytes {start}-{start + len(part) - 1}/{len(found.data)}"
            return _whole(206, part, {**about, "Content-Range": where}, method)
        return _whole(200, found.data, about, method)

    def _listing(self, bucket: str, prefix: str) -> bytes:
        items = "".join(
            f"<Contents><Key>{escape(name[len(bucket) + 1 :])}</Key><Size>{len(found.data)}</Size>"
            f"<ETag>{escape(found.etag)}</ETag><LastModified>{_iso(found.mtime_s)}</LastModified>"
            "</Contents>"
            for name, found in list(self.objects.items())
            if name.startswith(f"{bucket}/{prefix}")
        )
        end = "<IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{end}{items}</ListBucketResult>".encode()


def _whole(status: int, body: bytes, headers: dict[str, str], method: str) -> Answer:
    return Answer(status, {**headers, "Content-Length": str(len(body))}, body, method != "HEAD")


def _iso(time_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time_s))
