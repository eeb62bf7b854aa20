"""Requests over HTTP(S) on the connections of `transport`, and the meaning of their failures.

A request ends when `timeout_s` pass in silence, when almost no bytes come in twice that time, or
when the caller's deadline is over (see ``transport.answers``). Bodies come as they are stored: each
request asks for the encoding "identity", and the client decodes nothing.

The headers of a filesystem may contain credentials. The client sends them to the filesystem's host,
and not to another host of a redirect.
"""

import http.client
import re
import ssl
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import cast
from urllib.parse import quote, urljoin, urlsplit

import msgspec

from ckptfs._model.endpoints import Endpoint, Scheme
from ckptfs._model.manifest import printable
from ckptfs._store.request_metrics import Kind, counted
from ckptfs._store.transport.answers import Answer, Limits
from ckptfs._store.transport.connections import Connections
from ckptfs._store.transport.errors import BrokenConnection, S3Error, SilentServer, translated
from ckptfs._store.transport.tls import NO_TLS, Network
from ckptfs._store.versions import content_range_in, retry_after_s, time_ns_in
from ckptfs.errors import (
    AccessDenied,
    CheckpointNotFound,
    CkptfsError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

_REDIRECTS_MAX = 5
_REDIRECTED = frozenset([301, 302, 303, 307, 308])
_DRAINED_BYTES_MAX = 64 << 10
"""The most bytes of a useless body, such as a 404 page, that are cheaper than a new connection."""
_URL_CHARACTERS = "/%:=&?~#+!$,;'@()*[]"
"""The characters of a redirect's URL that stay as they are (RFC 3986, 2.2, and "%")."""
_SECOND_TAG = re.compile(r'"([0-9a-f]+)-([0-9a-f]+)"')


class HttpOptions(Network, frozen=True):
    """The way to a server, and the headers of each request to it."""

    headers: dict[str, str] = msgspec.field(default_factory=dict[str, str])


class Missing(CheckpointNotFound):
    """The server has nothing at a URL (404 or 410)."""


class Head:
    """The fields of an answer's head about an object.

    Attributes:
        status: The HTTP status.
        url: The URL of the answer, after redirects.
        is_redirected: Whether that is another URL than the requested one.
        size: The bytes of the whole object; None if the answer does not say it.
        mtime_ns: Last-Modified in nanoseconds since the epoch; 0 if it is missing.
        etag: The ETag without the sign of weakness; "" if it is missing.
        is_weak: Whether the ETag had that sign.
        encoding: Content-Encoding; "" for the requested identity.
        media_type: Content-Type without parameters, in lower case.
        range: Content-Range; None if it is missing or malformed.
        has_end: Whether the head says where the body ends.
    """

    def __init__(self, answer: Answer, url: str, asked_url: str) -> None:
        headers = answer.headers
        self.status = answer.status
        self.url = url
        self.is_redirected = _place_of(url) != _place_of(asked_url)
        self.mtime_ns = time_ns_in(headers.get("Last-Modified", ""))
        etag = headers.get("ETag", "")
        self.is_weak = etag.startswith("W/")
        self.etag = etag.removeprefix("W/")
        encoding = headers.get("Content-Encoding", "").lower()
        self.encoding = "" if encoding == "identity" else encoding
        self.media_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        self.range = content_range_in(headers)
        length = headers.get("Content-Length", "")
        self.size: int | None = None
        if self.range is not None:
            self.size = self.range.size if self.range.size >= 0 else None
        elif length.isdecimal() and "Transfer-Encoding" not in headers and self.status == 200:
            self.size = int(length)
        self.has_end = "Content-Length" in headers or "Transfer-Encoding" in headers
        self._sent_ns = time_ns_in(headers.get("Date", ""))

    @property
    def is_html(self) -> bool:
        """Whether the answer is an HTML page."""
        return self.media_type in ("text/html", "application/xhtml+xml")

    @property
    def has_exact_version(self) -> bool:
        """Whether the ETag distinguishes two versions of one second. nginx makes it of second and
        size."""
        if not self.etag or self.is_weak:
            return False
        of_second = _SECOND_TAG.fullmatch(self.etag)
        return of_second is None or int(of_second[1], 16) != self.mtime_ns // 10**9

    @property
    def is_young(self) -> bool:
        """Whether a writer could still write a later version in the same second, by the server's
        clock. The times of its files may be later than the clock."""
        if self.has_exact_version or not self.mtime_ns:
            return False
        sent_ns = self._sent_ns or time.time_ns()
        return 0 <= sent_ns - self.mtime_ns < 2 * 10**9


class HttpClient:
    """A client for requests with the same options. Several threads may use it. Raises OSError or
    LocationError if the certificates or the proxy cannot be used."""

    def __init__(self, options: HttpOptions, timeout_s: float) -> None:
        self._headers = {name.lower(): value for name, value in options.headers.items()}
        self._timeout_s = timeout_s
        options.context()
        self._connections = Connections(options, timeout_s)

    @contextmanager
    def request(
        self,
        kind: Kind,
        method: str,
        url: str,
        what: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        expected: frozenset[int] = frozenset([200]),
    ) -> Generator[tuple[Head, Answer]]:
        """Send a request, and follow redirects. The context has the answer, to be read in it.

        `url` is percent-encoded, and the names of `headers` are in lower case. `what` is the
        object, for messages. The statuses of `expected` are not errors.

        Raises Missing, AccessDenied or StoreError if the request fails, or the reading in the
        context.
        """
        limits = Limits(self._timeout_s, self._timeout_s, may_last=kind in ("read", "get"))
        with counted(kind), _explained(what), translated():
            last_url = url
            for _ in range(_REDIRECTS_MAX + 1):
                endpoint, target = _server_and_target(last_url, what)
                own = {"accept-encoding": "identity", **(headers or {})}
                if _may_see_headers(url, last_url):
                    own |= self._headers
                connection, answer = self._connections.send(
                    method, endpoint, target, own, body, limits
                )
                location = answer.headers.get("location", "")
                if answer.status not in _REDIRECTED or not location:
                    break
                with self._connections.reading(connection, answer):
                    _drain(answer)
                last_url = _led_to(last_url, location, what)
            else:
                raise BrokenConnection(
                    f"the server redirects more than {_REDIRECTS_MAX} times", "check the URL"
                )
            with self._connections.reading(connection, answer):
                head = Head(answer, last_url, url)
                if answer.status in expected:
                    yield head, answer
                _drain(answer)
                if answer.status not in expected:
                    raise _refused(answer, head, what)

    def close(self) -> None:
        """Close the idle connections now, and the others when they become idle."""
        self._connections.close()


def _drain(answer: Answer) -> None:
    """Read the rest of the body if it is short, so that the connection can be kept."""
    if answer.length is not None and answer.length <= _DRAINED_BYTES_MAX:
        with suppress(OSError, http.client.HTTPException):
            answer.read()


def _server_and_target(url: str, what: str) -> tuple[Endpoint, str]:
    """The server that a URL names, and the target of the request. Raises StoreError."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        endpoint = Endpoint(cast("Scheme", parts.scheme), host, parts.port)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        # The URL of a redirect may have bytes that http.client reads as Latin-1.
        return endpoint, quote(target, safe=_URL_CHARACTERS, encoding="latin-1") or "/"
    except ValueError as error:
        raise StoreError(f"{what}: the URL is malformed ({error}); check it") from None


def _place_of(url: str) -> tuple[str, str]:
    """The host and the path of a URL, without the slash at the end of a directory."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.path.rstrip("/")


def _led_to(url: str, location: str, what: str) -> str:
    """The target of a redirect. Raises StoreError."""
    with suppress(ValueError):
        target = urljoin(url, location)
        if urlsplit(target).scheme in ("http", "https"):
            return target
    raise StoreError(f"{what}: the server redirects to a bad URL; check the URL")


def _may_see_headers(asked_url: str, url: str) -> bool:
    """Whether `url` is at the requested server, or at the same one with TLS."""
    asked, now = urlsplit(asked_url), urlsplit(url)
    if (asked.scheme, asked.netloc) == (now.scheme, now.netloc):
        return True
    return (asked.hostname, asked.scheme, now.scheme) == (now.hostname, "http", "https")


def _refused(answer: Answer, head: Head, what: str) -> CkptfsError:
    """The error for an unexpected status."""
    status = head.status
    cause = f"HTTP status {status}"
    if head.is_redirected:
        cause += f" of {shown(head.url)}"
    if status in (404, 410):
        return Missing(f"{what} does not exist ({cause}); check the path")
    if status in (401, 403, 407):
        whom = "the proxy" if status == 407 else "the server"
        return AccessDenied(f"{what}: {whom} refused access ({cause}); check the credentials")
    if status == 408:
        return StoreTimeout(f"{what}: the server did not wait ({cause}); try again")
    if status == 429 or (status >= 500 and status not in (501, 505)):
        error = StoreUnavailable(f"{what}: the server is overloaded or down ({cause}); try again")
        error.retry_after_s = retry_after_s(answer.headers.get("Retry-After", ""))
        return error
    if status in _REDIRECTED:
        return StoreError(f"{what}: the server redirects to a bad URL ({cause}); check the URL")
    return StoreError(f"{what}: the server's answer cannot be used ({cause}); check the URL")


def shown(url: str) -> str:
    """A URL for messages, without the query and the password, which may be secrets."""
    parts = urlsplit(url)
    return printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


@contextmanager
def _explained(what: str) -> Generator[None]:
    """Turn the errors of requests in this context into the exceptions of ckptfs about `what`."""
    try:
        yield
    except S3Error as error:
        cause = printable(error.message)
        raise AccessDenied(
            f"{what}: the proxy refused access ({cause}); check its credentials"
        ) from None
    except SilentServer as error:
        raise StoreTimeout(
            f"{what}: the server did not answer in time ({printable(str(error))}); {error.advice}"
        ) from error
    except BrokenConnection as error:
        cause, tls = printable(str(error)), error.__cause__
        if isinstance(tls, ssl.SSLCertVerificationError):
            advice = "name the certificate's authority in SSL_CERT_FILE or tls_ca_file_path"
            raise StoreError(f"{what}: {cause}; {advice}") from error
        if isinstance(tls, ssl.SSLError) and tls.reason in NO_TLS:
            raise StoreError(f"{what}: {cause}; write http://") from error
        raise StoreUnavailable(
            f"{what}: cannot reach the server, or its answer is cut ({cause}); {error.advice}"
        ) from error
