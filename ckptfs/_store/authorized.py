"""Requests to a bucket of Google or a container of Azure, over the connections of `s3client`.

Google's XML API and Azure's Blob service speak the HTTP of S3: the same paths, ranges, conditions,
ETags and error bodies. Only what authorizes a request is another. So their requests are unsigned
ones of the S3 client, to which an `Authority` adds what its service wants to see.
"""

import base64
import binascii
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import datetime, timezone
from email.utils import formatdate
from http.client import HTTPResponse
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl, quote

from ckptfs._store.awskeys import FixedKeys
from ckptfs._store.deadline import left_s
from ckptfs._store.s3 import translate_error
from ckptfs._store.s3client import BrokenConnection, S3Client, S3Error
from ckptfs._store.s3options import S3Options
from ckptfs._store.tokens import TokenSource
from ckptfs.errors import LocationError, StoreUnavailable

T = TypeVar("T")

_REFUSED = frozenset([401, 403])
_NOT_MODIFIED = 304
_SECRET = re.compile(
    r"(?i)\b(sig|signature|x-goog-signature|access_token|authorization)(=|%3d|: *(?:bearer +)?)"
    r"[^&\s\"'<>]+"
)
"""What may be a secret in a server's text, wherever it has that from."""
_ATTEMPTS = 2
_PAUSE_S = 0.2
_PAUSE_S_MAX = 10.0
"""As of `s3`: tries, the pause between them, and the longest that a server may ask for."""


class Request(NamedTuple):
    """A request before it is authorized.

    Attributes:
        method: E.g. GET.
        path: As it is sent.
        query: Not encoded.
        headers: With lower-case names.
        length: Bytes of the body.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    length: int


class Authority(Protocol):
    """Authorizes requests. May be used from any thread.

    Attributes:
        secrets: Texts that no message may hold.
    """

    @property
    def secrets(self) -> Iterable[str]: ...

    def authorize(self, request: Request) -> Request:
        """The request with what authorizes it. May ask another server. Raises AccessDenied where
        there are no credentials, StoreUnavailable where that server does not answer."""
        ...

    def renew(self) -> bool:
        """The service has refused the credentials: whether there are others now."""
        ...

    def fault(self) -> str:
        """What is wrong with the credentials, for the message of a refusal; "": it is unknown."""
        ...


class AuthorizedClient(S3Client):
    """One bucket or container.

    Args:
        bucket: Its name.
        options: Which server.
        authority: Authorizes each request.
        timeout_s: As of `S3Client`.
        headers: Of each request, with lower-case names.
        object_headers: Of each request for an object.
        mark: The field that the service has in the head of each answer about an object.
        codes: The service's names of errors, each with S3's for the same.

    Raises as `S3Client`, and LocationError for a malformed endpoint.
    """

    def __init__(
        self,
        bucket: str,
        options: S3Options,
        authority: Authority,
        timeout_s: float,
        *,
        headers: Mapping[str, str] | None = None,
        object_headers: Mapping[str, str] | None = None,
        mark: str = "",
        codes: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(bucket, options, FixedKeys(None), timeout_s)
        self._authority = authority
        self._headers = headers or {}
        self._object_headers = object_headers or {}
        self._mark = mark
        self._codes = codes or {}

    @contextmanager
    def request(
        self,
        method: str,
        key: str = "",
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        expected: frozenset[int] = frozenset({200}),
        patience_s: float | None = None,
    ) -> Generator[HTTPResponse]:
        """See S3Client.request."""
        path = self._address.path(key)
        own = {**self._headers, **(self._object_headers if key else {})}
        plain = Request(method, path, query or {}, {**(headers or {}), **own}, len(body))

        def send(request: Request) -> AbstractContextManager[HTTPResponse]:
            about = request.query, request.headers
            return super(AuthorizedClient, self).request(
                method, key, *about, body, expected, patience_s
            )

        try:
            with ExitStack() as stack:
                response = self._begun(stack, plain, send)
                if key and response.status != _NOT_MODIFIED:
                    self._check_mark(response)
                yield response
        except (S3Error, BrokenConnection) as error:
            self._explain(error)
            raise

    def _begun(
        self,
        stack: ExitStack,
        plain: Request,
        send: Callable[[Request], AbstractContextManager[HTTPResponse]],
    ) -> HTTPResponse:
        """The answer, whose context is in `stack`."""
        has_renewed = False
        while True:
            try:
                return stack.enter_context(send(self._authority.authorize(plain)))
            except S3Error as error:
                if error.status not in _REFUSED or has_renewed or not self._authority.renew():
                    raise
                has_renewed = True

    def _has_moved(self, *_: Any, **__: Any) -> bool:
        """A bucket or container has one address, and what authorizes stays with its host."""
        return False

    def _check_mark(self, response: HTTPResponse) -> None:
        """Raise S3Error for an answer that the service has not made, e.g. a login page."""
        if self._mark and not response.headers.get(self._mark):
            text = f"the answer has no {self._mark}, so a proxy or login page seems to answer"
            raise S3Error(response.status, "", f"{text}; check the endpoint")

    def _explain(self, error: S3Error | BrokenConnection) -> None:
        """Give `error` S3's code, the authority's reason, and no secrets."""
        text = str(error)
        shown = scrubbed(text, self._authority.secrets)
        if isinstance(error, S3Error):
            error.code = self._codes.get(error.code, error.code)
            error.message = scrubbed(error.message, self._authority.secrets)
            fault = self._authority.fault() if error.status in _REFUSED else ""
            shown += f"; {fault}" if fault else ""
        if shown != text:
            error.args = (shown,)
            error.__cause__ = None  # it may say the same


def scrubbed(text: str, secrets: Iterable[str]) -> str:
    """`text` without these secrets, encoded or not, and without what looks like one."""
    for secret in secrets:
        for form in {secret, quote(secret, safe=""), quote(secret, safe="/")} - {""}:
            text = text.replace(form, "***")
    return _SECRET.sub(r"\1\2***", text)


def repeat(attempt: Callable[[], T], what: str) -> T:
    """Try it once more where that can help. Raises what `translate_error` makes of an error."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            return attempt()
        except (S3Error, BrokenConnection) as error:
            translated = translate_error(error, what)
            if not left or not isinstance(translated, StoreUnavailable):
                raise translated from error
            pause_s = max(_PAUSE_S, translated.retry_after_s)
            if pause_s > min(_PAUSE_S_MAX, left_s()):
                raise translated from error
            time.sleep(pause_s)
    raise AssertionError


class Anonymous:
    """Nothing authorizes the requests."""

    secrets = ()

    def authorize(self, request: Request) -> Request:
        """See Authority.authorize."""
        return request

    def renew(self) -> bool:
        """See Authority.renew."""
        return False

    def fault(self) -> str:
        """See Authority.fault."""
        return "the request was anonymous"


class Bearer:
    """OAuth tokens (RFC 6750) of a source."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source

    @property
    def secrets(self) -> Iterable[str]:
        """See Authority."""
        return self._source.known()

    def authorize(self, request: Request) -> Request:
        """See Authority.authorize."""
        more = {"authorization": f"Bearer {self._source.token()}"}
        return request._replace(headers={**request.headers, **more})

    def renew(self) -> bool:
        """See Authority.renew."""
        return self._source.renew()

    def fault(self) -> str:
        """See Authority.fault."""
        return ""


class SasToken:
    """A shared access signature of Azure. Raises LocationError for what is none."""

    def __init__(self, text: str) -> None:
        self._fields = dict(parse_qsl(text.strip().lstrip("?"), keep_blank_values=True))
        if not self._fields.get("sig"):
            raise LocationError(
                "the sas_token has no signature; give the part of the SAS URL after the '?'"
            )
        self.secrets = (self._fields["sig"],)

    def authorize(self, request: Request) -> Request:
        """See Authority.authorize."""
        return request._replace(query={**request.query, **self._fields})

    def renew(self) -> bool:
        """See Authority.renew."""
        return False

    def fault(self) -> str:
        """See Authority.fault."""
        end = self._fields.get("se", "")
        try:
            moment = datetime.fromisoformat(end.replace("Z", "+00:00"))
        except ValueError:
            return ""
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        if moment > datetime.now(timezone.utc):
            return ""
        return f"the SAS token expired at {moment:%Y-%m-%dT%H:%M:%SZ}, make a new one"


class SharedKey:
    """The key of a storage account of Azure.

    The rules are those of "Authorize with Shared Key" in Azure's Storage Services REST reference.
    Raises LocationError for a key that is none.
    """

    def __init__(self, account: str, key: str) -> None:
        try:
            self._key = base64.b64decode(key, validate=True)
        except (binascii.Error, ValueError):
            raise LocationError("the account_key is not valid base64; copy it again") from None
        self._account = account
        self.secrets = (key,)

    def authorize(self, request: Request) -> Request:
        """See Authority.authorize."""
        headers = {**request.headers, "x-ms-date": formatdate(usegmt=True)}
        text = self._to_sign(request._replace(headers=headers)).encode()
        digest = hmac.digest(self._key, text, hashlib.sha256)
        signature = base64.b64encode(digest).decode()
        headers["authorization"] = f"SharedKey {self._account}:{signature}"
        return request._replace(headers=headers)

    def _to_sign(self, request: Request) -> str:
        headers = request.headers
        names = ("content-encoding", "content-language", "length", "content-md5", "content-type")
        conditions = ("date", "if-modified-since", "if-match", "if-none-match")
        last = ("if-unmodified-since", "range")
        standard = {**headers, "length": str(request.length or "")}
        lines = [request.method, *(standard.get(n, "") for n in (*names, *conditions, *last))]
        lines += (f"{n}:{headers[n].strip()}" for n in sorted(headers) if n.startswith("x-ms-"))
        lines.append(f"/{self._account}{request.path}")
        lines += (f"{n.lower()}:{request.query[n]}" for n in sorted(request.query, key=str.lower))
        return "\n".join(lines)

    def renew(self) -> bool:
        """See Authority.renew."""
        return False

    def fault(self) -> str:
        """See Authority.fault."""
        return ""
