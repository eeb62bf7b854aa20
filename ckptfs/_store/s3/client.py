"""Requests to one bucket of an S3 server, over kept connections.

**Why this is not an AWS SDK.** Bodies go from the socket into the caller's buffer, with no copy and
no allocation in between. For 1 GiB in ranges of 8 MiB over plain HTTP, this client takes 0.45 to
0.5 s of CPU, nearly all of it for the kernel's copy. Measured side by side, pyarrow's S3 client
takes 0.7 to 1.1 s, and obstore 0.9 to 1.05 s. httpcore and obstore hand out bytes that the caller
has to copy again. The import of botocore alone takes 0.25 s of each start. Requests can also be
conditional here, which those of pyarrow's S3 client cannot.

All methods block, and any thread may call them. **A request ends** with its answer, or with an
error: when the server is silent for too long (see `answers` and `patience`), when the caller's
deadline is over, or when the caller gives the request up (see `request_context`).

**The client sends a request again** if its answer says that the bucket is in another region or has
to be in the host's name (see `address`), or if the server refused the keys and there are new ones.
All later requests use the new address and the new keys.
"""

import http.client
import math
import ssl
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone

import msgspec

from ckptfs._store.request_context import left_s
from ckptfs._store.request_metrics import (
    REQUESTS,
    Kind,
    Outcome,
    counted,
    outcome_of,
    outcome_of_status,
)
from ckptfs._store.s3.address import ELSEWHERE, BucketAddress, address_of
from ckptfs._store.s3.keys import KeySource
from ckptfs._store.s3.options import S3Options
from ckptfs._store.s3.sigv4 import Keys, encoded_query, signed
from ckptfs._store.transport.answers import Answer, Limits, read_all
from ckptfs._store.transport.connections import Connection, Connections
from ckptfs._store.transport.errors import (
    BrokenConnection,
    S3Error,
    SilentServer,
    error_of,
    region_in,
    region_in_location,
    translated,
)
from ckptfs._store.transport.patience import Patience
from ckptfs._store.transport.proxies import refused

_MOVES_MAX = 2
"""The other addresses that one request tries: another region, and the bucket in the host's name."""
_ASK_PAUSE_S = 60.0
"""The time between two questions for the bucket's address, because a server may never answer it."""
_LOCATION_BYTES_MAX = 4 << 10
_QUESTIONS: tuple[tuple[str, dict[str, str]], ...] = (("HEAD", {}), ("GET", {"location": ""}))
_NO_REASON = frozenset([301, 302, 307, 400])
"""The statuses of answers to HEAD that may mean that the bucket is in another region."""
_REFUSED = frozenset([400, 401, 403])
"""The statuses for keys that have expired or were revoked; 400 is that of ExpiredToken."""


class Asked(msgspec.Struct, frozen=True):
    """A request before it is signed.

    `key` is "" for the bucket itself. `query` is not encoded, and the names of `headers` are in
    lower case. The statuses of `expected` are not errors. `patience_s` is the longest silence
    before the first byte; None to follow the server's speed. `body_digest` stands for the SHA-256
    of the body in the signature; "" to compute it.
    """

    method: str
    key: str = ""
    query: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    body: bytes | memoryview = b""
    expected: frozenset[int] = frozenset({200})
    patience_s: float | None = None
    body_digest: str = ""

    @property
    def kind(self) -> Kind:
        """The kind of request, for the metrics."""
        kinds: dict[str, Kind] = {"HEAD": "head", "PUT": "put", "POST": "put", "DELETE": "put"}
        if self.method in kinds:
            return kinds[self.method]
        if "prefix" in self.query:
            return "list"
        return "read" if "range" in self.headers else "get"


class S3Client:
    """One bucket, or access point (by its ARN).

    `timeout_s` is the longest silence of a fast server, and the longest connect. A TLS handshake
    may take as long again.

    Attributes:
        address: The address of the bucket's requests.
        answers_are_whole: Whether all bytes of an answer are known to be of one version.
        patience: The longest wait for a first byte.

    Raises:
        OSError: The certificates cannot be read.
        LocationError: The options contradict each other, or name a service that ckptfs cannot read.
    """

    def __init__(self, bucket: str, options: S3Options, keys: KeySource, timeout_s: float) -> None:
        self._keys = keys
        self._timeout_s = timeout_s
        self.address = address_of(bucket, options)
        self.answers_are_whole = self.address.is_amazon
        self._more = {"x-amz-request-payer": "requester"} if options.requester_pays else {}
        self.patience = Patience(timeout_s)
        if self.address.scheme == "https":
            options.context()
        self._connections = Connections(options, timeout_s)
        self._has_worked = False
        self._asking = threading.Lock()  # guards _asked_s; held while the server is asked
        self._asked_s = -math.inf

    @property
    def endpoint(self) -> tuple[str, ssl.SSLContext | None]:
        """The host of requests, with its port unless that is the scheme's own, and the certificates
        to trust; None for a connection without TLS."""
        endpoint = self.address.endpoint
        tls = self._connections.network.context() if endpoint.scheme == "https" else None
        return endpoint.authority, tls

    def close(self) -> None:
        """Close the idle connections now, and the others when they become idle."""
        self._connections.close()

    @contextmanager
    def request(self, asked: Asked) -> Generator[http.client.HTTPResponse]:
        """Send a request; the context has the answer, to be read in it.

        Subclasses authorize the request for their service. Raises S3Error or BrokenConnection if
        the request fails, or the reading in the context, and AccessDenied if the client has no keys
        to sign with.
        """
        with counted(asked.kind, _outcome_of), translated():
            connection, answer = self._answer_to(asked)
            with self._connections.reading(connection, answer):
                yield answer

    def _answer_to(self, asked: Asked) -> tuple[Connection, Answer]:
        """The expected answer, perhaps from another address or with other keys."""
        moves, is_renewed = 0, False
        while True:
            address, keys = self.address, self._keys.keys()
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
        self, asked: Asked, address: BucketAddress, keys: Keys | None
    ) -> tuple[Connection, Answer]:
        endpoint, path = address.endpoint, address.path(asked.key)
        query = encoded_query(asked.query)
        headers = {**asked.headers, **self._more, "host": endpoint.authority}
        if keys is not None:
            now, body, digest = datetime.now(timezone.utc), asked.body, asked.body_digest
            region = address.region
            headers = signed(asked.method, path, query, headers, body, keys, region, now, digest)
        target = f"{path}?{query}" if query else path
        limits = self._limits(asked)
        return self._connections.send(asked.method, endpoint, target, headers, asked.body, limits)

    def _limits(self, asked: Asked) -> Limits:
        may_last = asked.kind in ("read", "get")  # late answers to the others have no use
        if asked.patience_s is not None:
            # The store may do more with content before it takes the next bytes, or answers.
            silence_s = max(self._timeout_s, asked.patience_s if asked.body else 0.0)
            return Limits(asked.patience_s, silence_s, may_last)
        first_s = self.patience.for_request(left_s())
        return Limits(first_s, self._timeout_s, may_last, self.patience)

    def _error_of(self, connection: Connection, answer: Answer) -> S3Error | BrokenConnection:
        with self._connections.reading(connection, answer):
            proxy = self._connections.proxy
            if proxy is None:
                return error_of(answer)
            if answer.status == http.client.PROXY_AUTHENTICATION_REQUIRED:
                return refused(proxy)
            may_be_proxys = connection.endpoint.scheme == "http"  # the proxy reads the requests
            return error_of(answer, proxy.endpoint.text if may_be_proxys else "")

    # -- other addresses

    def _has_moved(
        self, asked: Asked, address: BucketAddress, keys: Keys | None, error: S3Error
    ) -> bool:
        """Whether the bucket is at another address than `address`. The error says so, or the server
        says so when the client asks."""
        found = address.after(error)
        if found is None and self._tells_nothing(asked, error):
            with self._asking:  # one thread asks, and the others wait for what it learns
                if self.address == address:
                    found = self._asked_for(address, keys)
        if found is not None:
            self.address = found
            self._connections.close_idle()  # those lead to the other address
        return self.address != address

    def _tells_nothing(self, asked: Asked, error: S3Error) -> bool:
        """Whether a wrong address of the bucket may have caused an error that does not say so."""
        if error.region:
            return False
        if error.code or asked.method != "HEAD":
            return error.code in ELSEWHERE
        # Keys without rights on one object get a 403, too, but other requests have worked then.
        return error.status in _NO_REASON or (error.status == 403 and not self._has_worked)

    def _asked_for(self, address: BucketAddress, keys: Keys | None) -> BucketAddress | None:
        """The address that the server names. The client sends HEAD of the bucket, as botocore does,
        and then GET of its location, because that answer has a body."""
        if time.monotonic() - self._asked_s < _ASK_PAUSE_S:
            return None
        self._asked_s = time.monotonic()
        for method, query in _QUESTIONS:
            asked = Asked(method, query=query, expected=frozenset())
            try:
                connection, answer = self._send(asked, address, keys)
                REQUESTS.count(asked.kind, outcome_of_status(answer.status))
                if answer.status == 200:
                    error = S3Error(200, "", "", region=self._region_of(connection, answer))
                else:
                    error = self._error_of(connection, answer)
            except (OSError, http.client.HTTPException, BrokenConnection):
                return None  # the error that led to the question says more
            if isinstance(error, S3Error):
                # The region in an answer counts, whatever its status is.
                found = address.in_region(error.region) or address.after(error)
                if found is not None or error.region:
                    return found
        return None

    def _region_of(self, connection: Connection, answer: Answer) -> str:
        with self._connections.reading(connection, answer):
            body = read_all(answer, _LOCATION_BYTES_MAX)
            return region_in(answer) or region_in_location(body)


def _outcome_of(error: BaseException) -> Outcome:
    if isinstance(error, S3Error):
        return outcome_of_status(error.status)
    if isinstance(error, SilentServer):
        return "timeout"
    return "unavailable" if isinstance(error, BrokenConnection) else outcome_of(error)
