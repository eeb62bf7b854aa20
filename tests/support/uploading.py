"""A client whose answers a test writes, for the uploads of S3, Google and Azure."""

from __future__ import annotations

import http.client
from contextlib import contextmanager
from io import BytesIO
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptfs._store.transport.errors import S3Error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ckptfs._store.s3.client import Asked


class Reply(NamedTuple):
    """An answer of the store."""

    status: int = 200
    headers: Mapping[str, str] = {}
    body: bytes = b""


def refusal(status: int, code: str) -> S3Error:
    """An answer that refuses a request."""
    return S3Error(status, code, "planned")


class ScriptedClient:
    """Gives the answers in their order, and keeps the requests."""

    def __init__(self, *answers: Reply | Exception) -> None:
        self.answers: list[Reply | Exception] = list(answers)
        self.asked: list[Asked] = []
        self.bodies: list[bytes] = []
        self.address = SimpleNamespace(bucket="bucket")

    @contextmanager
    def request(self, asked: Asked) -> Iterator[Any]:
        self.asked.append(asked)
        self.bodies.append(bytes(asked.body))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer.status not in asked.expected:
            raise refusal(answer.status, "Unexpected")
        headers = http.client.HTTPMessage()
        for name, value in answer.headers.items():
            headers[name] = value
        body = BytesIO(answer.body)
        yield SimpleNamespace(headers=headers, read=body.read, length=0, status=answer.status)
