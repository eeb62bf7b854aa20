"""Requests to one bucket of an S3 server, over kept connections.

Why not an AWS SDK: bodies go from the socket into the caller's buffer here, with no copy and no
allocation in between. For a GiB in ranges of 8 MiB that takes 0.5 s of CPU, nearly all of it the
kernel's copy, where pyarrow's S3 client takes 1.1 s (measured side by side, plain HTTP); and the
requests can be conditional, which pyarrow's cannot.

All methods block, and may be called from any thread. **A request ends** with its answer, or with
an error: when the server is silent for too long (see `answers` and `patience`), when the caller's
deadline is over (see `deadline`), or when it is given up (see `progress`).

**A request is sent again** where its answer says that the bucket is in another region or has to
be in the host's name (see `s3address`), and where other keys are there by now. What was learned
counts for all later requests.
"""

import http.client
import math
import ssl
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version as version_of

import msgspec

from ckptfs._model.endpoints import Endpoint
from ckptfs._requestid import request_id
from ckptfs._store import deadline, progress
from ckptfs._store.answers import Answer, Limits, Silence, read_all, read_into
from ckptfs._store.awskeys import KeySource
from ckptfs._store.connections import Connection, Connections, ended
from ckptfs._store.patience import Patience
from ckptfs._store.proxies import parse_proxy, refused
from ckptfs._store.requests import REQUESTS, Kind, Outcome, counted, outcome_of, outcome_of_status
from ckptfs._store.s3address import ELSEWHERE, BucketAddress, address_of
from ckptfs._store.s3errors import (
    BrokenConnection,
    S3Error,
    SilentServer,
    error_of,
    region_in,
    region_in_location,
)
from ckptfs._store.s3options import S3Options
from ckptfs._store.sigv4 import Keys, encoded_query, signed
from ckptfs._store.tls import Trust
from ckptfs.errors import CkptfsError

__all__ = ["BrokenConnection", "S3Client", "S3Error", "SilentServer", "read_all", "read_into"]

_MOVES_MAX = 2
"""Other addresses that one request tries: another region, and the bucket in the host's name."""
_ASK_PAUSE_S = 60.0
"""Time between two questions where the bucket is: what says nothing of it may be so for good."""
_CHUNK_BYTES = 64 << 10
"""Of a body that is sent: each may take as long as the longest silence."""
_LOCATION_BYTES_MAX = 4 << 10
_QUESTIONS: tuple[tuple[Kind, str, dict[str, str]], ...] = (
    ("head", "HEAD", {}),
    ("get", "GET", {"location": ""}),
)
_PROGRAM = f"ckptfs/{version_of('ckptfs')}"
_PERHAPS_TLS = "check the endpoint, and write it with https:// if the server speaks TLS"
_NO_REASON = frozenset([301, 302, 307, 400])
"""What HEAD is answered with where the bucket is in another region."""
_REFUSED = frozenset([400, 401, 403])
"""What keys that have expired or were revoked are answered with; 400 is that of ExpiredToken."""


class _Asked(msgspec.Struct, frozen=True):
    """A request; see `S3Client.request`."""

    kind: Kind
    method: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    expected: frozenset[int]
    patience_s: float | None


class S3Client:
    """One bucket.

    Args:
        bucket: Its name, or the ARN of an access point.
        options: Which server, and the way to it.
        keys: Gives the keys to sign with.
        timeout_s: Longest silence of a server that is fast, and longest connect (with TLS, and a
            handshake as long again).

    Raises:
        OSError: The certificates cannot be read.
        LocationError: The options contradict each other, or name what ckptfs does not know.
    """

    def __init__(self, bucket: str, options: S3Options, keys: KeySource, timeout_s: float) -> None:
        self._keys = keys
        self._timeout_s = timeout_s
        self._address = address_of(bucket, options)
        self._more = {"x-amz-request-payer": "requester"} if options.requester_pays else {}
        self._patience = Patience(timeout_s)
        trust = Trust(
            ca_file=options.tls_ca_file_path,
            ca_dir=options.tls_ca_dir_path,
            is_verified=options.tls_verify_certificates,
            ca_text=options.tls_ca_pem,
        )
        if self._address.scheme == "https":
            trust.context()
        proxy = parse_proxy(options.proxy) if options.proxy else None
        self._connections = Connections(proxy, trust, timeout_s)
        self._has_worked = False
        self._asking = threading.Lock()  # guards _asked_s; held while the server is asked
        self._asked_s = -math.inf

    @property
    def is_amazon(self) -> bool:
        """Whether it is Amazon's S3."""
        return self._address.is_amazon

    @property
    def endpoint(self) -> tuple[str, ssl.SSLContext | None]:
        """Where requests go: the host, with its port where that is not the scheme's own, and whom
        to trust; None: the connection is plain."""
        endpoint = self._address.endpoint
        tls = self._connections.trust.context() if endpoint.scheme == "https" else None
        return endpoint.authority, tls

    @property
    def proxy(self) -> str:
        """The proxy's URL without credentials; "": there is no proxy."""
        proxy = self._connections.proxy
        return proxy.endpoint.text if proxy else ""

    @property
    def patience_s(self) -> float:
        """How long a request waits for its first byte, if the caller's deadline allows it."""
        return self._patience.seconds

    @property
    def is_slow(self) -> bool:
        """Whether answers took longer than `timeout_s` lately, so that fewer requests at the same
        time may be faster."""
        return self._patience.is_raised

    def close(self) -> None:
        """Close the connections that are idle now; those in use are closed when they are."""
        self._connections.close()

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
    ) -> Generator[http.client.HTTPResponse]:
        """Send a request; the context has the answer, to be read in it.

        Args:
            method: E.g. GET.
            key: Of the object; "" for the bucket itself.
            query: Not encoded.
            headers: With lower-case names.
            body: To send.
            expected: Statuses that are no errors.
            patience_s: Longest silence before the first byte; None: as the server's speed asks.

        Raises:
            S3Error, BrokenConnection, SilentServer: Also while the answer is read in the context.
            AccessDenied: There are no keys to sign with.
        """
        kind = _kind_of(method, query, headers)
        asked = _Asked(kind, method, key, query or {}, headers or {}, body, expected, patience_s)
        with counted(kind, _outcome_of), _translated():
            connection, answer = self._answer_to(asked)
            try:
                progress.current().expect_body()
                yield answer
                answer.end()
            except Silence:
                self._connections.was_silent(connection)
                raise
            finally:
                self._connections.give_back(connection, answer)

    def _answer_to(self, asked: _Asked) -> tuple[Connection, Answer]:
        """The expected answer, perhaps from another address or with other keys."""
        moves, is_renewed = 0, False
        while True:
            address, keys = self._address, self._keys.keys()
            connection, answer = self._send(asked, address, keys)
            if answer.status in asked.expected:
                self._has_worked = True
                return connection, answer
            error = self._error_of(connection, answer)
            if isinstance(error, BrokenConnection):
                raise error
            if moves < _MOVES_MAX and self._has_moved(asked, address, keys, error):
                moves += 1
                REQUESTS.count(asked.kind, "redirected")
            elif not is_renewed and error.status in _REFUSED and self._keys.renew(keys):
                is_renewed = True
            else:
                raise error

    def _send(
        self, asked: _Asked, address: BucketAddress, keys: Keys | None
    ) -> tuple[Connection, Answer]:
        endpoint, path = address.endpoint, address.path(asked.key)
        query = encoded_query(asked.query)
        target = f"{path}?{query}" if query else path
        if self._is_forwarded(endpoint):
            target = f"http://{endpoint.authority}{target}"
        while True:
            connection = self._connections.take(endpoint)
            headers = {**asked.headers, **self._more, "host": endpoint.authority}
            if keys is not None:
                now, body = datetime.now(timezone.utc), asked.body
                headers = signed(
                    asked.method, path, query, headers, body, keys, address.region, now
                )
            headers |= self._unsigned(asked, endpoint)
            try:
                progress.current().hold(connection.held)
                progress.current().expect_head()
                connection.limit(self._limits(asked))
                connection.request(asked.method, target, _chunks(asked.body), headers)
                answer = connection.getresponse()
                assert isinstance(answer, Answer)
                return connection, answer
            except (ConnectionError, http.client.BadStatusLine, ssl.SSLEOFError) as error:
                ended(connection)
                if connection.is_kept:  # the server has just closed it, as it may
                    continue
                if endpoint.scheme == "https" or self.proxy:
                    raise
                # Many servers that expect TLS end a connection that begins with something else.
                raise BrokenConnection(_text_of(error), _PERHAPS_TLS) from error
            except Silence:
                ended(connection)
                self._connections.was_silent(connection)
                raise
            except BaseException:
                ended(connection)
                raise

    def _is_forwarded(self, endpoint: Endpoint) -> bool:
        """Whether a proxy reads the requests."""
        return self._connections.proxy is not None and endpoint.scheme == "http"

    def _unsigned(self, asked: _Asked, endpoint: Endpoint) -> dict[str, str]:
        """Headers that something on the way may change."""
        headers = {"user-agent": _user_agent()}
        if asked.body:
            headers["content-length"] = str(len(asked.body))
        proxy = self._connections.proxy
        return headers | proxy.headers if proxy and self._is_forwarded(endpoint) else headers

    def _limits(self, asked: _Asked) -> Limits:
        may_last = asked.kind in ("read", "get")  # the others have answers of no use by then
        if asked.patience_s is not None:
            return Limits(asked.patience_s, self._timeout_s, may_last)
        first_s = self._patience.for_request(deadline.left_s())
        return Limits(first_s, self._timeout_s, may_last, self._patience)

    def _error_of(self, connection: Connection, answer: Answer) -> S3Error | BrokenConnection:
        try:
            proxy = self._connections.proxy
            if proxy is not None and answer.status == http.client.PROXY_AUTHENTICATION_REQUIRED:
                return refused(proxy)
            error = error_of(answer, self.proxy if self._is_forwarded(connection.endpoint) else "")
            answer.end()
            return error
        finally:
            self._connections.give_back(connection, answer)

    # -- other addresses

    def _has_moved(
        self, asked: _Asked, address: BucketAddress, keys: Keys | None, error: S3Error
    ) -> bool:
        """Whether the bucket is at another address than `address`, as an error says or as the
        server says when it is asked."""
        found = address.after(error)
        if found is None and self._tells_nothing(asked, error):
            with self._asking:  # one thread asks, and the others wait for what it learns
                if self._address == address:
                    found = self._asked_for(address, keys)
        if found is not None:
            self._address = found
            self._connections.close_idle()  # those lead to the other address
        return self._address != address

    def _tells_nothing(self, asked: _Asked, error: S3Error) -> bool:
        """Whether the bucket's address may be the reason of an error that does not say so."""
        if error.region:
            return False
        if error.code or asked.method != "HEAD":
            return error.code in ELSEWHERE
        # Keys without the right to an object are answered with 403, too; then others have worked.
        return error.status in _NO_REASON or (error.status == 403 and not self._has_worked)

    def _asked_for(self, address: BucketAddress, keys: Keys | None) -> BucketAddress | None:
        """The answer to the question where the bucket is: HEAD of the bucket, as botocore asks, and
        then its location, because an answer to GET has a body."""
        if time.monotonic() - self._asked_s < _ASK_PAUSE_S:
            return None
        self._asked_s = time.monotonic()
        for kind, method, query in _QUESTIONS:
            asked = _Asked(kind, method, "", query, {}, b"", frozenset(), None)
            try:
                connection, answer = self._send(asked, address, keys)
                REQUESTS.count(kind, outcome_of_status(answer.status))
                if answer.status == 200:
                    error = S3Error(200, "", "", region=self._region_of(connection, answer))
                else:
                    error = self._error_of(connection, answer)
            except (OSError, http.client.HTTPException, BrokenConnection):
                return None  # the error that led to the question says more
            if isinstance(error, S3Error):
                # Whatever the status is, what is said of the bucket's region is meant.
                found = address.in_region(error.region) or address.after(error)
                if found is not None or error.region:
                    return found
        return None

    def _region_of(self, connection: Connection, answer: Answer) -> str:
        try:
            body = read_all(answer, _LOCATION_BYTES_MAX)
            return region_in(answer) or region_in_location(body)
        finally:
            self._connections.give_back(connection, answer)


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


def _chunks(body: bytes) -> Iterator[memoryview] | None:
    if not body:
        return None
    view = memoryview(body)
    return (view[i : i + _CHUNK_BYTES] for i in range(0, len(body), _CHUNK_BYTES))
