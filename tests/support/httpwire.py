"""HTTP/1.1 as bytes, for the proxies of the tests: requests as they come, and answers to them."""

from __future__ import annotations

import re
import socket
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

HEAD_BYTES_MAX = 64 << 10
"""A longer head is not HTTP; without a limit the parser would collect it for ever."""


class Head:
    """A request's head."""

    def __init__(self, lines: list[str]) -> None:
        self.method, self.target, _ = lines[0].split(" ")
        parts = [line.partition(":") for line in lines[1:]]
        self.fields = [(name, value.strip()) for name, _, value in parts]

    def value(self, name: str) -> str:
        return next((value for key, value in self.fields if key.lower() == name), "")

    @property
    def range(self) -> str:
        """The range that is asked for; Azure has a field of its own."""
        return self.value("x-ms-range") or self.value("range")

    @property
    def operation(self) -> str:
        """The operation that the request means to S3, Google, Azure and HTTP servers alike.

        It is "list", "head" (the attributes of an object), "read" (a range), "get" (a whole
        object), "put" or "delete".
        """
        if self.method in ("PUT", "POST", "PATCH"):
            return "put"
        if self.method in ("HEAD", "DELETE"):
            return self.method.lower()
        url = urlsplit(self.target)
        query = parse_qs(url.query, keep_blank_values=True)
        lists = query.keys() & {"list-type", "delimiter", "marker", "encoding-type", "max-keys"}
        if lists or query.get("comp") == ["list"] or url.path.endswith("/"):
            return "list"
        if re.fullmatch(r"/storage/v1/b/[^/]+/o", url.path):
            return "list"
        if url.path.startswith("/storage/v1/b/") and query.get("alt") != ["media"]:
            return "head"
        return "read" if self.range else "get"


class Answer(NamedTuple):
    """An answer. An answer to HEAD has no body, and its length is among the fields."""

    status: int
    reason: str
    fields: list[tuple[str, str]]
    body: bytes

    def value(self, name: str) -> str:
        return next((value for key, value in self.fields if key.lower() == name), "")

    def without(self, *names: str) -> Answer:
        """Without these fields."""
        return self._replace(fields=[each for each in self.fields if each[0].lower() not in names])

    def having(self, name: str, value: str) -> Answer:
        """With another value of a field that it has; as it is where it has none."""
        return self._replace(
            fields=[(key, value if key.lower() == name else old) for key, old in self.fields]
        )

    def raw(self, method: str) -> bytes:
        """The bytes of it, with the right length."""
        found = self if method == "HEAD" else self.without("transfer-encoding", "content-length")
        lines = [f"HTTP/1.1 {found.status} {found.reason}"]
        lines += [f"{name}: {value}" for name, value in found.fields]
        if method != "HEAD":
            lines.append(f"Content-Length: {len(found.body)}")
        elif not found.value("content-length"):
            lines.append("Content-Length: 0")
        body = b"" if method == "HEAD" else found.body
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def error_answer(status: int, reason: str, code: str) -> Answer:
    """An error as S3 writes it."""
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{reason}</Message></Error>"
    return Answer(status, reason, [("Content-Type", "application/xml")], text.encode())


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


def has_hung_up(client: socket.socket) -> bool:
    """Whether the client has closed the connection: what it has asked for must not happen later."""
    client.settimeout(0)
    try:
        return socket.socket.recv(client, 1, socket.MSG_PEEK) == b""  # of TLS, too
    except BlockingIOError:
        return False
    finally:
        client.settimeout(None)
