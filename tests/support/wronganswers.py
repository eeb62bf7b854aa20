"""Answers that a server should not give, made from the right ones: one table for all servers.

A fault may leave an answer as it is, e.g. where the field that it would take away is not there.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from support.httpwire import Answer, error_answer

if TYPE_CHECKING:
    from collections.abc import Callable

LOGIN_PAGE = b"<html><body>Welcome to the airport. Please accept our terms.</body></html>"
ERROR_PAGE = b"<html><head><title>%d</title></head><body><h1>nginx</h1><br></body></html>"


def _page(status: int, reason: str) -> Callable[[Answer], Answer]:
    body = LOGIN_PAGE if status == 200 else ERROR_PAGE % status
    return lambda _: Answer(status, reason, [("Content-Type", "text/html")], body)


def _error(status: int, reason: str, code: str) -> Callable[[Answer], Answer]:
    return lambda _: error_answer(status, reason, code)


def _azure(code: str, text: str) -> Callable[[Answer], Answer]:
    fields = [("Content-Type", "application/xml"), ("x-ms-error-code", code)]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>"
    return lambda _: Answer(403, text, fields, body.encode())


def _google(status: int, reason: str, code: str) -> Callable[[Answer], Answer]:
    error = {"code": status, "message": reason, "errors": [{"reason": code}]}
    fields = [("Content-Type", "application/json; charset=UTF-8")]
    return lambda _: Answer(status, reason, fields, json.dumps({"error": error}).encode())


def _without(*names: str) -> Callable[[Answer], Answer]:
    return lambda right: right.without(*names)


def _having(name: str, value: str) -> Callable[[Answer], Answer]:
    return lambda right: right.having(name, value)


def _cut(right: Answer) -> Answer:
    """Half a document, in a whole answer."""
    return right._replace(body=right.body[: len(right.body) // 2])


def _shifted(right: Answer) -> Answer:
    """The range beside the one that was asked for, by its own account."""
    numbers = re.search(r"bytes (\d+)-(\d+)/(.*)", right.value("content-range"))
    if numbers is None:
        return right
    first, last, size = int(numbers[1]) + 1, int(numbers[2]) + 1, numbers[3]
    return right.having("content-range", f"bytes {first}-{last}/{size}")


def _renamed(right: Answer) -> Answer:
    """As of another version: by its ETag, Google's generation, and its time."""
    for name, value in (
        ("etag", '"0123456789abcdef0123456789abcdef"'),
        ("x-goog-generation", "1234567890123456"),
        ("last-modified", "Thu, 01 Jan 2015 00:00:00 GMT"),
    ):
        right = right.having(name, value)
    return right


INSTEAD: dict[str, Callable[[Answer], Answer]] = {
    "unavailable": _error(503, "Slow Down", "SlowDown"),
    "denied": _error(403, "Forbidden", "AccessDenied"),
    "garbage": _page(200, "OK"),
    "html 500": _page(500, "Internal Server Error"),
    "html 403": _page(403, "Forbidden"),
    "xml 403 without a body": lambda _: Answer(
        403, "Forbidden", [("Content-Type", "application/xml")], b""
    ),
}
"""An answer that has nothing of the right one: what the request asked for has not been done."""

CHANGED: dict[str, Callable[[Answer], Answer]] = {
    "empty body": lambda right: right._replace(body=b""),
    "cut document": _cut,
    "wrong type": _having("content-type", "text/html"),
    "no type": _without("content-type"),
    "no etag": _without("etag", "x-goog-generation", "x-goog-hash"),
    "another version": _renamed,
    "no content-range": _without("content-range"),
    "another range": _shifted,
    "a range of unknown size": lambda right: right.having(
        "content-range", re.sub("/[0-9]+$", "/*", right.value("content-range"))
    ),
    "no last-modified": _without("last-modified", "date"),
    "last-modified that is no date": _having("last-modified", "yesterday"),
}
"""The right answer but for one thing."""

REFUSALS: dict[str, Callable[[Answer], Answer]] = {
    "s3 expired": _error(400, "Bad Request", "ExpiredToken"),
    "azure denied": _azure("AuthorizationFailure", "not authorized to perform this operation"),
    "azure expired": _azure("AuthenticationFailed", "Signature not valid in the time frame"),
    "google denied": _google(403, "Forbidden", "forbidden"),
    "google expired": _google(401, "Unauthorized", "authError"),
}
"""How one kind of server refuses credentials; to be given instead of the right answer."""

ANSWERS = INSTEAD | CHANGED | REFUSALS
