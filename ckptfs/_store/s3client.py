"""Requests to one bucket of an S3 server, over kept connections.

Why not an AWS SDK: bodies go from the socket into the caller's buffer here, with no copy and no
allocation in between. For a GiB in ranges of 8 MiB that takes 0.5 s of CPU, nearly all of it the
kernel's copy, where pyarrow's S3 client takes 1.1 s (measured side by side, plain HTTP); and the
requests can be conditional, which pyarrow's cannot.

A connection serves one request at a time, and is kept for the next one if its answer was read to
the end. All methods block, and may be called from any thread.

**A request ends** with its answer, or with an error: when `timeout_s` pass in silence, when less
comes than `_PROGRESS_BYTES` in twice that time, and in any case when the caller's deadline is over
(see `deadline`), or it is given up (see `progress`). What has no limit of its own is the resolver:
getaddrinfo(3) gives up when resolv.conf(5) says so.
"""

import functools
import http.client
import io
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from importlib.metadata import version as version_of
from typing import Any, cast
from xml.etree import ElementTree

from ckptfs._requestid import request_id
from ckptfs._store import deadline, progress
from ckptfs._store.awskeys import KeySource
from ckptfs._store.requests import (
    REQUESTS,
    Kind,
    Outcome,
    counted,
    outcome_of,
    outcome_of_status,
)
from ckptfs._store.s3options import S3Options
from ckptfs._store.sigv4 import Keys, encoded, encoded_query, signed
from ckptfs.errors import CkptfsError

_IDLE_MAX = 32
"""Connections kept: as many as `connections_max` and the version checks use at the same time."""
_IDLE_S = 15.0
"""How long one is kept: S3 ends those that are idle for longer than 20 s or so."""
_PROGRESS_BYTES = 4 << 10
"""Less than that in twice the longest silence (6 s) is as good as nothing: at such a speed all of
the default's 16 connections together bring no block of 1 MiB within the default read deadline."""
_ADDRESSES_MAX = 3
"""Of one host, among which a connect shares its time: S3 has eight, and they rarely fail apart."""
_RETRY_AFTER_S_MAX = 3600.0
_ERROR_BYTES_MAX = 64 << 10
"""Of an answer that is an error, of which only code and message are of interest."""
_PROGRAM = f"ckptfs/{version_of('ckptfs')}"
_REQUEST_ID = re.compile(r"[A-Za-z0-9/+=_-]{1,128}")
_REFUSED = frozenset([400, 401, 403])
"""What keys that have expired or were revoked are answered with; 400 is that of ExpiredToken."""
_REGION = re.compile(r"[a-z0-9-]{1,40}")
_OWN_REGION = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What a location may say: it becomes a part of a host's name, and must not lead to another one."""
_BUCKET_IN_HOST = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
"""Buckets whose names can be in the host's: RFC 1123, and no dot, because a certificate's wildcard
stands for one label."""


class S3Error(Exception):
    """The server's answer is an error.

    Attributes:
        status: Of HTTP.
        code: S3's name for it; "" where the server gave none (as always with HEAD).
        message: What the server said.
        retry_after_s: How long the server asks to be left alone; 0: it did not say.

    `request_id`: what the server calls the request, for whoever runs it; "": it did not say.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        retry_after_s: float = 0.0,
        request_id: str = "",
    ) -> None:
        text = f"{code or f'HTTP status {status}'}{': ' if message else ''}{message}"
        super().__init__(f"{text} [request {request_id}]" if request_id else text)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


class BrokenConnection(Exception):
    """There was no answer, or only a part of one."""


class SilentServer(BrokenConnection):
    """The server did not answer in time."""


class S3Client:
    """One bucket.

    Args:
        bucket: Its name.
        options: Which server.
        keys: Gives the keys to sign with.
        timeout_s: Longest silence, and longest connect (with TLS, and a handshake as long again).

    Raises OSError: The certificates cannot be read; ValueError: The region cannot be one.
    """

    def __init__(self, bucket: str, options: S3Options, keys: KeySource, timeout_s: float) -> None:
        if options.region and not _OWN_REGION.fullmatch(options.region):
            raise ValueError(f"{options.region!r} is no region")
        self._bucket = bucket
        self._keys = keys
        self._timeout_s = timeout_s
        scheme, _, host = options.endpoint_override.rstrip("/").rpartition("://")
        is_plain = (scheme or options.scheme) == "http"
        self._tls = None if is_plain else _tls_context(options.tls_ca_file_path)
        self._endpoint = host
        self._virtual = not host or options.force_virtual_addressing
        self._virtual &= bool(_BUCKET_IN_HOST.fullmatch(bucket))
        self._region = options.region or "us-east-1"
        self._is_open = True
        self._lock = threading.Lock()  # guards _idle; never held during IO
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []  # oldest first

    @property
    def is_amazon(self) -> bool:
        """Whether it is Amazon's S3."""
        return not self._endpoint

    @property
    def endpoint(self) -> tuple[str, ssl.SSLContext | None]:
        """Where requests go: the host, with its port where that is not the scheme's own, and whom
        to trust; None: the connection is plain."""
        return self._address("")[0], self._tls

    def close(self) -> None:
        """Close the connections that are idle now; those in use are closed when they are."""
        self._is_open = False
        self._close_idle()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    @contextmanager
    def request(
        self,
        method: str,
        key: str = "",
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        expected: frozenset[int] = frozenset({200}),
    ) -> Generator[http.client.HTTPResponse]:
        """Send a request; the context has the answer, to be read in it.

        Args:
            method: E.g. GET.
            key: Of the object; "" for the bucket itself.
            query: Not encoded.
            headers: With lower-case names.
            body: To send.
            expected: Statuses that are no errors.

        Raises:
            S3Error, BrokenConnection, SilentServer: Also while the answer is read in the context.
            AccessDenied: There are no keys to sign with.
        """
        kind = _kind_of(method, query, headers)
        with counted(kind, _outcome_of), _translated():
            keys = self._keys.keys()
            connection, response = self._send(method, key, query, headers, body, keys)
            if region := self._other_region(response):
                REQUESTS.count(kind, "redirected")
                _close(connection)
                self._region = region
                self._close_idle()  # those may lead to a host of the other region
                connection, response = self._send(method, key, query, headers, body, keys)
            elif response.status in _REFUSED and self._has_other_keys(keys, connection):
                keys = self._keys.keys()
                connection, response = self._send(method, key, query, headers, body, keys)
            try:
                if response.status not in expected:
                    raise _error_of(response)
                yield response
            finally:
                self._give_back(connection, response)

    def _send(
        self,
        method: str,
        key: str,
        query: Mapping[str, str] | None,
        headers: Mapping[str, str] | None,
        body: bytes,
        keys: Keys | None,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        host, path = self._address(key)
        text = encoded_query(query or {})
        target = f"{path}?{text}" if text else path
        while True:
            connection, is_kept = self._take(host)
            all_headers = {**(headers or {}), "host": host}
            if keys is not None:
                now = datetime.now(timezone.utc)
                all_headers = signed(method, path, text, all_headers, body, keys, self._region, now)
            all_headers["user-agent"] = _user_agent()  # not signed: a proxy may change it
            try:
                progress.current().hold(connection.sock)
                connection.sock.settimeout(self._patience_s())
                connection.request(method, target, body or None, all_headers)
                return connection, connection.getresponse()
            except (ConnectionError, http.client.BadStatusLine, ssl.SSLEOFError):
                _close(connection)
                if not is_kept:  # else the server has just closed it, as it may
                    raise
            except BaseException:
                _close(connection)
                raise

    def _has_other_keys(self, refused: Keys | None, connection: http.client.HTTPConnection) -> bool:
        """Whether to try again; the connection is of no more use then."""
        renewed = True
        try:
            renewed = self._keys.renew(refused)
        finally:
            if renewed:
                connection.close()
        return renewed

    def _address(self, key: str) -> tuple[str, str]:
        """Host (with its port, where that is not the scheme's own) and encoded path."""
        suffix = ".cn" if self._region.startswith("cn-") else ""
        host = self._endpoint or f"s3.{self._region}.amazonaws.com{suffix}"
        path = "/" + encoded(key, "/")
        if self._virtual:
            return f"{self._bucket}.{host}", path
        host, _, base = host.partition("/")
        bucket = f"/{base}/{encoded(self._bucket)}" if base else "/" + encoded(self._bucket)
        return host, bucket + path if key else bucket

    def _other_region(self, response: http.client.HTTPResponse) -> str:
        """The bucket's region, if the answer says that it is another one; "" otherwise."""
        region = response.headers.get("x-amz-bucket-region", "")
        if response.status in (301, 307, 400) and _REGION.fullmatch(region):
            return region if region != self._region else ""
        return ""

    # -- connections

    def _take(self, host: str) -> tuple[http.client.HTTPConnection, bool]:
        """A connection, to `host` if it is a new one, and whether it served before."""
        dropped: list[http.client.HTTPConnection] = []
        found = None
        with self._lock:
            while self._idle and found is None:
                since_s, connection = self._idle.pop()
                if time.monotonic() - since_s < _IDLE_S and _is_quiet(connection):
                    found = connection
                else:
                    dropped.append(connection)
        for connection in dropped:
            connection.close()
        return (self._connected(host), False) if found is None else (found, True)

    def _connected(self, host: str) -> http.client.HTTPConnection:
        kind = http.client.HTTPConnection if self._tls is None else http.client.HTTPSConnection
        connection = kind(host)
        sock = self._connect(connection.host, connection.port)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock.settimeout(self._patience_s())
                sock = self._tls.wrap_socket(sock, server_hostname=connection.host)
        except BaseException:
            sock.close()
            raise
        connection.sock = sock
        connection.response_class = functools.partial(_Answer, self._timeout_s)  # type: ignore[assignment]
        return connection

    def _connect(self, host: str, port: int) -> socket.socket:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:_ADDRESSES_MAX]
        except UnicodeError:
            raise OSError(f"{host!r} is no name of a host") from None
        failure = OSError("the host has no address")
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self._patience_s() / len(found))
                sock.connect(address)
            except OSError as error:
                sock.close()
                failure = error
            else:
                return sock
        raise failure

    def _patience_s(self) -> float:
        """Longest wait for the next thing to happen, > 0. Raises TimeoutError."""
        return min(self._timeout_s, _left_s())

    def _give_back(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> None:
        progress.current().let_go()
        if response.length == 0:
            response.close()
        if response.length or not response.isclosed() or response.will_close:
            connection.close()  # the answer was not read to its end, or is the last one
            response.close()  # which the connection does not do where it is the last one
            return
        with self._lock:
            self._idle.append((time.monotonic(), connection))
            is_full = len(self._idle) > _IDLE_MAX or not self._is_open
            dropped = self._idle.pop(0)[1] if is_full else None
        if dropped is not None:
            dropped.close()


def _close(connection: http.client.HTTPConnection) -> None:
    progress.current().let_go()
    connection.close()


def read_all(response: http.client.HTTPResponse, bytes_max: int) -> bytes:
    """The answer's body, or its first `bytes_max` bytes. To be called in the context of the
    request. Raises BrokenConnection where it ends early, which `HTTPResponse.read` does not say."""
    data = response.read(bytes_max)
    if response.length and len(data) < bytes_max:
        raise BrokenConnection(f"the answer ended {response.length} bytes early")
    return data


class _Answer(http.client.HTTPResponse):
    """One whose reads end, see the module's text."""

    def __init__(self, timeout_s: float, sock: socket.socket, *args: Any, **more: Any) -> None:
        super().__init__(sock, *args, **more)
        self._incoming = _Incoming(self.fp.detach(), sock, timeout_s)
        self.fp = io.BufferedReader(cast("io.RawIOBase", self._incoming))

    def begin(self) -> None:
        """Read the head. What is missing of one that is cut would be taken to be absent."""
        super().begin()
        if self._incoming.has_ended:
            raise http.client.IncompleteRead(b"")


class _Incoming(io.RawIOBase):
    """The bytes that come from the server for one answer; `raw` reads them from `sock`, whose own
    timeout is that of silence."""

    def __init__(self, raw: Any, sock: socket.socket, timeout_s: float) -> None:
        self._raw = raw
        self._sock = sock
        self._timeout_s = timeout_s
        self._deadline_s = deadline.deadline_s()
        self._progress = progress.current()
        self._counted_s = time.monotonic()  # since when `_count` bytes came
        self._count = 0
        self.has_ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if self._deadline_s - time.monotonic() < self._timeout_s:
            self._sock.settimeout(_left_s())
        count: int = self._raw.readinto(buffer)
        self._count += count
        self._progress.came(count)
        self.has_ended = not count
        now_s = time.monotonic()
        if count and now_s - self._counted_s > 2 * self._timeout_s:
            if self._count < _PROGRESS_BYTES:
                raise TimeoutError(
                    f"no more than {self._count} bytes in {now_s - self._counted_s:.1f} s"
                )
            self._counted_s, self._count = now_s, 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left_s() -> float:
    left_s = deadline.left_s()
    if left_s <= 0:
        raise TimeoutError("the time for the request is over")
    return left_s


def read_into(response: http.client.HTTPResponse, buffer: memoryview) -> int:
    """Fill `buffer` with the answer's body; returns how many bytes there were. To be called in the
    context of the request."""
    done = 0
    while done < len(buffer):
        count = response.readinto(buffer[done:])
        if not count:
            break
        done += count
    return done


@contextmanager
def _translated() -> Generator[None]:
    try:
        yield
    except CkptfsError:  # some are builtin errors, too
        raise
    except TimeoutError as error:
        raise SilentServer(str(error) or "timed out") from error
    except (OSError, http.client.HTTPException) as error:
        raise BrokenConnection(_text_of(error)) from error


def _text_of(error: Exception) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended in the middle of an answer"
    text = error.strerror if isinstance(error, OSError) else str(error)
    return text or str(error) or type(error).__name__


def _error_of(response: http.client.HTTPResponse) -> S3Error:
    found = {"Code": "", "Message": ""}
    with suppress(ElementTree.ParseError):
        root = ElementTree.fromstring(response.read(_ERROR_BYTES_MAX))
        for child in root:
            name = child.tag.rpartition("}")[2]
            if name in found:
                found[name] = (child.text or "").strip()
    text = response.headers.get("x-amz-request-id", "")
    name = text if _REQUEST_ID.fullmatch(text) else ""
    more = _retry_after_s(response), name
    return S3Error(response.status, found["Code"], found["Message"], *more)


def _kind_of(
    method: str, query: Mapping[str, str] | None, headers: Mapping[str, str] | None
) -> Kind:
    kinds: dict[str, Kind] = {"HEAD": "head", "PUT": "put", "POST": "put"}
    if method in kinds:
        return kinds[method]
    if "prefix" in (query or {}):
        return "list"
    return "read" if "range" in (headers or {}) else "get"


def _outcome_of(error: BaseException) -> Outcome:
    if isinstance(error, S3Error):
        return outcome_of_status(error.status)
    if isinstance(error, SilentServer):
        return "timeout"
    return "unavailable" if isinstance(error, BrokenConnection) else outcome_of(error)


def _user_agent() -> str:
    """S3's access logs have it; with the id of the request of ours that it is made for."""
    asked = request_id.get()
    return f"{_PROGRAM} request/{asked}" if asked else _PROGRAM


def _retry_after_s(response: http.client.HTTPResponse) -> float:
    """RFC 9110, 10.2.3: seconds, or a date."""
    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return min(float(text), _RETRY_AFTER_S_MAX)
    try:
        left_s = (parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, TypeError):  # the latter: a date of no time zone
        return 0.0
    return min(max(left_s, 0.0), _RETRY_AFTER_S_MAX)


def _is_quiet(connection: http.client.HTTPConnection) -> bool:
    """Whether nothing came from the server, which could only be the end of the connection."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return not poll.poll(0)


@functools.cache
def _tls_context(ca_file: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file or None)
