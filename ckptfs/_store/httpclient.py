"""Requests over HTTP(S), by urllib3 (botocore brings it), and what their failures mean.

A request ends when `timeout_s` pass in silence, when less than `_PROGRESS_BYTES` come in twice that
time, or when the caller's deadline is over (see `deadline`). Bodies come as they are stored: each
request asks for the encoding "identity", and nothing is decoded here.

Headers that a filesystem brings may hold credentials. They go to the host that they are for, and
to no other that it redirects to.
"""

import functools
import math
import re
import ssl
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from importlib.metadata import version as version_of
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import msgspec
import urllib3
from urllib3.exceptions import (
    HTTPError,
    InsecureRequestWarning,
    LocationParseError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    SSLError,
)
from urllib3.exceptions import TimeoutError as HttpTimeout

from ckptfs._model.manifest import printable
from ckptfs._store import progress
from ckptfs._store.deadline import left_s
from ckptfs._store.requests import Kind, counted
from ckptfs.errors import (
    AccessDenied,
    CheckpointNotFound,
    CkptfsError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

_IDLE_MAX = 32
"""Connections kept: as many as `connections_max` and the version checks use at the same time."""
_REDIRECTS_MAX = 5
_REDIRECTED = frozenset([301, 302, 303, 307, 308])
_DRAINED_BYTES_MAX = 64 << 10
"""Of a body that has no use, as pages that say 404: reading it is less than a new connection."""
_PIECE_BYTES = 256 << 10
_PROGRESS_BYTES = 4 << 10
_RETRY_AFTER_S_MAX = 3600.0
_PROGRAM = f"ckptfs/{version_of('ckptfs')}"
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")  # RFC 9110, 14.4
_SECOND_TAG = re.compile(r'"([0-9a-f]+)-([0-9a-f]+)"')


class HttpOptions(msgspec.Struct, frozen=True):
    """How to reach a server.

    Attributes:
        headers: Sent with each request to the server.
        proxy: URL of the proxy to use, which may hold credentials; "": there is none.
        tls_ca_file_path: Certificates to trust instead of the system's.
        tls_ca_dir_path: A directory of such certificates.
        tls_ca_pem: Such certificates themselves.
        tls_verify_certificates: False: any certificate counts.
    """

    headers: dict[str, str] = {}
    proxy: str = ""
    tls_ca_file_path: str = ""
    tls_ca_dir_path: str = ""
    tls_ca_pem: str = ""
    tls_verify_certificates: bool = True

    def __repr__(self) -> str:
        return "HttpOptions()"  # headers and proxy hold secrets


class Missing(CheckpointNotFound):
    """The server has nothing at a URL (404 or 410)."""


class Range(NamedTuple):
    """What a Content-Range says; `total`: -1 where it does not say it."""

    first: int
    last: int
    total: int


class Head:
    """What the head of an answer says of an object.

    Attributes:
        status: Of HTTP.
        url: Where the answer came from, after redirects.
        is_redirected: Whether that is another place than was asked for.
        size: Bytes of the whole object; None: the answer does not say it.
        mtime_ns: From Last-Modified, in nanoseconds since the epoch; 0: there is none.
        etag: Without the sign of weakness; "": there is none.
        is_weak: Whether the ETag had that sign.
        encoding: Content-Encoding; "": as asked for.
        media_type: Content-Type without parameters, in lower case.
        range: Content-Range; None: there is none, or it is malformed.
    """

    def __init__(self, status: int, headers: Mapping[str, str], url: str, asked_url: str) -> None:
        self.status = status
        self.url = url
        self.is_redirected = _place_of(url) != _place_of(asked_url)
        self.mtime_ns = _time_ns(headers.get("Last-Modified", ""))
        etag = headers.get("ETag", "")
        self.is_weak = etag.startswith("W/")
        self.etag = etag.removeprefix("W/")
        encoding = headers.get("Content-Encoding", "").lower()
        self.encoding = "" if encoding == "identity" else encoding
        self.media_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        self.range = _range_of(headers.get("Content-Range", ""))
        length = headers.get("Content-Length", "")
        self.size: int | None = None
        if self.range is not None:
            self.size = self.range.total if self.range.total >= 0 else None
        elif length.isdecimal() and "Transfer-Encoding" not in headers and status == 200:
            self.size = int(length)
        self._sent_ns = _time_ns(headers.get("Date", ""))

    @property
    def is_html(self) -> bool:
        """Whether it is a page for people."""
        return self.media_type in ("text/html", "application/xhtml+xml")

    @property
    def has_exact_version(self) -> bool:
        """Whether the ETag tells two versions within one second apart. nginx makes it of second
        and size."""
        if not self.etag or self.is_weak:
            return False
        of_second = _SECOND_TAG.fullmatch(self.etag)
        return of_second is None or int(of_second[1], 16) != self.mtime_ns // 10**9

    @property
    def is_young(self) -> bool:
        """Whether a later version could still be written in the same second. The server's clock
        counts; the times of its files may lag behind that."""
        if self.has_exact_version or not self.mtime_ns:
            return False
        sent_ns = self._sent_ns or time.time_ns()
        return 0 <= sent_ns - self.mtime_ns < 2 * 10**9


class Response:
    """An answer, whose body can be read once."""

    def __init__(self, raw: urllib3.BaseHTTPResponse, head: Head, timeout_s: float) -> None:
        self.head = head
        self.has_end = "Content-Length" in raw.headers or "Transfer-Encoding" in raw.headers
        self._raw = raw
        self._timeout_s = timeout_s
        self._window_s = time.monotonic()
        self._window_bytes = 0

    def some(self, length_max: int) -> bytes:
        """The next bytes, as soon as there are some; none at the end. Raises of urllib3."""
        if left_s() <= 0:
            raise HttpTimeout("the deadline is over")
        data = self._raw.read1(min(length_max, _PIECE_BYTES), decode_content=False)
        progress.current().came(len(data))
        self._window_bytes += len(data)
        now_s = time.monotonic()
        if self._window_bytes >= _PROGRESS_BYTES:
            self._window_s, self._window_bytes = now_s, 0
        elif data and now_s - self._window_s > 2 * self._timeout_s:
            raise HttpTimeout(f"less than {_PROGRESS_BYTES} bytes in {2 * self._timeout_s:g} s")
        return data

    def fill(self, buffer: memoryview) -> int:
        """Read into `buffer`; returns how many bytes came before the end. Raises of urllib3."""
        done = 0
        while done < len(buffer) and (data := self.some(len(buffer) - done)):
            buffer[done : done + len(data)] = data
            done += len(data)
        return done


class HttpClient:
    """Requests with the same options. May be used by several threads. Opens no connection.

    Raises OSError, ValueError: The certificates or the proxy cannot be used.
    """

    def __init__(self, options: HttpOptions, timeout_s: float) -> None:
        self._headers = dict(options.headers)
        self._timeout_s = timeout_s
        tls = _context(options)
        if options.proxy:
            parts = urlsplit(options.proxy)
            url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
            login = unquote(f"{parts.username}:{parts.password or ''}") if parts.username else None
            headers = urllib3.make_headers(proxy_basic_auth=login) if login else None
            self._pool: urllib3.PoolManager = urllib3.ProxyManager(
                url,
                proxy_headers=headers,
                maxsize=_IDLE_MAX,
                ssl_context=tls,
                proxy_ssl_context=tls,
            )
        else:
            self._pool = urllib3.PoolManager(maxsize=_IDLE_MAX, ssl_context=tls)

    @contextmanager
    def request(
        self,
        kind: Kind,
        method: str,
        url: str,
        what: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        expected: frozenset[int] = frozenset([200]),
    ) -> Generator[Response]:
        """One request, after redirects.

        Args:
            kind: Counted as.
            method: Of HTTP.
            url: Percent-encoded.
            what: Names what is asked for, in messages.
            headers: Further ones.
            body: To send.
            expected: Statuses to return with; each other one is an error.

        Raises:
            Missing, AccessDenied, StoreError: The server's answer, or that there is none; also for
                exceptions of urllib3 that leave the context.
        """
        with counted(kind):
            raw: urllib3.BaseHTTPResponse | None = None
            try:
                raw, last_url = self._answered(method, url, headers or {}, body)
                head = Head(raw.status, raw.headers, last_url, url)
                if raw.status not in expected:
                    raise _refused(raw, head, what)
                yield Response(raw, head, self._timeout_s)
            except HTTPError as error:
                raise _translated(error, what) from error
            finally:
                if raw is not None:
                    _give_back(raw)

    def _answered(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> tuple[urllib3.BaseHTTPResponse, str]:
        asked_url = url
        for _ in range(_REDIRECTS_MAX + 1):
            own = {"User-Agent": _PROGRAM, "Accept-Encoding": "identity", **headers}
            if _may_see_headers(asked_url, url):
                own |= self._headers
            raw = self._once(method, url, own, body)
            location = raw.headers.get("Location", "")
            if raw.status not in _REDIRECTED or not location:
                return raw, url
            raw.close()
            url = _led_to(url, location)
        raise ProtocolError(f"the server redirects more than {_REDIRECTS_MAX} times")

    def _once(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> urllib3.BaseHTTPResponse:
        patience_s = min(self._timeout_s, left_s())
        if patience_s <= 0:
            raise HttpTimeout("the deadline is over")
        return self._pool.urlopen(  # pyright: ignore[reportUnknownMemberType]
            method,
            url,
            redirect=False,
            retries=False,
            preload_content=False,
            decode_content=False,
            timeout=urllib3.Timeout(connect=patience_s, read=patience_s),
            headers=headers,
            body=body,
        )

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.clear()


@functools.cache
def _default_context() -> ssl.SSLContext:
    """That of the system's certificates, which takes some 20 ms to make."""
    return ssl.create_default_context()


def _context(options: HttpOptions) -> ssl.SSLContext:
    named = options.tls_ca_file_path or options.tls_ca_dir_path or options.tls_ca_pem
    if options.tls_verify_certificates and not named:
        return _default_context()
    tls = ssl.create_default_context(
        cafile=options.tls_ca_file_path or None,
        capath=options.tls_ca_dir_path or None,
        cadata=options.tls_ca_pem or None,
    )
    if not options.tls_verify_certificates:
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
        # The user has said so; urllib3 would warn at each request.
        urllib3.disable_warnings(InsecureRequestWarning)
    return tls


def _give_back(raw: urllib3.BaseHTTPResponse) -> None:
    """Keep the connection of an answer of which little is left to read, and close that of
    another."""
    left: int | None = getattr(raw, "length_remaining", None)
    if left is not None and left <= _DRAINED_BYTES_MAX:
        raw.drain_conn()
    else:
        raw.close()  # has no effect where the body was read to its end


def _place_of(url: str) -> tuple[str, str]:
    """Host and path, which for a directory may end in a slash or not."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.path.rstrip("/")


def _led_to(url: str, location: str) -> str:
    """The target of a redirect. Raises LocationParseError."""
    try:
        target = urljoin(url, location)
        if urlsplit(target).scheme in ("http", "https"):
            return target
    except ValueError:
        pass
    raise LocationParseError("of a redirect")


def _may_see_headers(asked_url: str, url: str) -> bool:
    """Whether `url` is at the server that was asked, or is that with TLS."""
    asked, now = urlsplit(asked_url), urlsplit(url)
    if (asked.scheme, asked.netloc) == (now.scheme, now.netloc):
        return True
    return (asked.hostname, asked.scheme, now.scheme) == (now.hostname, "http", "https")


def _time_ns(text: str) -> int:
    try:
        time_s = parsedate_to_datetime(text).timestamp() if text else 0
        return int(time_s) * 10**9
    except (ValueError, OverflowError):
        return 0


def _range_of(text: str) -> Range | None:
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None:
        return None
    total = -1 if match[3] == "*" else int(match[3])
    return Range(int(match[1] or 0), int(match[2] or -1), total)


def _retry_after_s(text: str) -> float:
    try:
        seconds_s = float(text)
    except ValueError:
        at_ns = _time_ns(text)
        seconds_s = at_ns / 1e9 - datetime.now(timezone.utc).timestamp() if at_ns else 0.0
    return min(max(0.0, seconds_s), _RETRY_AFTER_S_MAX) if math.isfinite(seconds_s) else 0.0


def _refused(raw: urllib3.BaseHTTPResponse, head: Head, what: str) -> CkptfsError:
    """What a status means that was not expected."""
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
        error.retry_after_s = _retry_after_s(raw.headers.get("Retry-After", ""))
        return error
    if status in _REDIRECTED:
        return StoreError(f"{what}: a redirect that leads nowhere ({cause}); check the URL")
    return StoreError(f"{what}: the server's answer cannot be used ({cause}); check the URL")


def shown(url: str) -> str:
    """A URL for messages: its query may hold a signature, its authority a password."""
    parts = urlsplit(url)
    return printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def _translated(error: HTTPError, what: str) -> CkptfsError:
    """The exception of ours that says what urllib3's `error` means."""
    if isinstance(error, ProxyError):
        original = error.original_error
        cause = printable(str(original))
        if re.search(r"\b(401|403|407)\b", cause):
            return AccessDenied(
                f"{what}: the proxy refused access ({cause}); check its credentials"
            )
        return StoreUnavailable(f"{what}: the proxy cannot be used ({cause}); check its address")
    cause = printable(str(error).rpartition(": ")[2] or type(error).__name__)
    if isinstance(error, NewConnectionError):  # which is a timeout to urllib3
        return StoreUnavailable(f"{what}: cannot reach the server ({cause}); check the URL")
    if isinstance(error, HttpTimeout):
        return StoreTimeout(f"{what}: the server did not answer in time ({cause}); check the URL")
    if isinstance(error, SSLError):
        return _of_tls(str(error), what)
    if isinstance(error, LocationParseError):
        return StoreError(f"{what}: the URL is malformed ({cause}); check it")
    return StoreUnavailable(f"{what}: the answer is missing or cut ({cause}); check the server")


def _of_tls(text: str, what: str) -> CkptfsError:
    cause = printable(text.rpartition("] ")[2])
    if "CERTIFICATE_VERIFY_FAILED" in text or "doesn't match" in text:
        advice = "name the certificate's authority in SSL_CERT_FILE or tls_ca_file_path"
        return StoreError(f"{what}: the certificate is not trusted ({cause}); {advice}")
    if re.search("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|HTTP_REQUEST|PACKET_LENGTH", text):
        return StoreError(f"{what}: the server does not speak TLS ({cause}); write http://")
    return StoreUnavailable(f"{what}: TLS failed ({cause}); check the server")
