"""Google's and Azure's test servers, each with a bucket, and a proxy that changes their answers."""

from __future__ import annotations

import http.client
import random
import threading
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlencode

import pytest
from support import servers

from ckptfs._model.location import Location
from ckptfs._store.base import Store, pin_of
from ckptfs.errors import ObjectChanged

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from typing_extensions import Self

START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 5.0
_POLL_S = 0.01
"""How often the proxy looks whether it is to end."""
ACCOUNT, ACCOUNT_KEY = servers.Azurite.account, servers.Azurite.key
BUCKET = "bucket"


class FakeGcs(servers.FakeGcs):
    """fake-gcs-server with `BUCKET`; it takes every credential."""

    kind = "gcs"

    def __enter__(self) -> Self:
        super().__enter__()
        self._ask("POST", "/storage/v1/b?project=p", b'{"name": "%s"}' % BUCKET.encode())
        return self

    def _ask(self, method: str, target: str, body: bytes = b"") -> None:
        connection = http.client.HTTPConnection(self.endpoint)
        with closing(connection):
            connection.request(method, target, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            assert answer.status in (200, 204), answer.read()

    def put(self, key: str, data: bytes, *, gzip: bool = False) -> None:
        """Make or replace an object; `gzip`: with Content-Encoding gzip."""
        query = {"uploadType": "media", "name": key}
        query |= {"contentEncoding": "gzip"} if gzip else {}
        target = f"/upload/storage/v1/b/{BUCKET}/o?{urlencode(query, quote_via=quote)}"
        self._ask("POST", target, data)

    def delete(self, key: str) -> None:
        """Delete an object."""
        self._ask("DELETE", f"/storage/v1/b/{BUCKET}/o/{quote(key, safe='')}")

    def location(self, path: str, endpoint: str = "", **secrets: str) -> Location:
        """The location of a path in the bucket; `endpoint`: another way to it."""
        where = {"scheme": "http", "endpoint_override": endpoint or self.endpoint}
        options = where if secrets else {**where, "anonymous": True}
        return Location("gcs", f"{BUCKET}/{path}", options, secrets)


class Azurite(servers.Azurite):
    """Azurite with the container `BUCKET`. Its client is of Azure's own library."""

    kind = "azure"

    def __enter__(self) -> Self:
        from azure.storage.blob import BlobServiceClient

        super().__enter__()
        place = f"http://{self.endpoint}/{ACCOUNT}"
        self.client = BlobServiceClient(place, credential=ACCOUNT_KEY)
        self.container = self.client.create_container(BUCKET)
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        super().__exit__(*error)

    def put(self, key: str, data: bytes, *, gzip: bool = False) -> None:
        """Make or replace a blob; `gzip`: with Content-Encoding gzip."""
        from azure.storage.blob import ContentSettings

        settings = ContentSettings(content_encoding="gzip") if gzip else None
        self.container.upload_blob(key, data, overwrite=True, content_settings=settings)

    def delete(self, key: str) -> None:
        """Delete a blob."""
        self.container.delete_blob(key)

    def location(self, path: str, endpoint: str = "", **secrets: str) -> Location:
        """The location of a path in the container; `endpoint`: another way to it."""
        authority = endpoint or self.endpoint
        options = {
            "account_name": ACCOUNT,
            "blob_storage_authority": authority,
            "dfs_storage_authority": authority,
            "blob_storage_scheme": "http",
            "dfs_storage_scheme": "http",
        }
        return Location(
            "azure", f"{BUCKET}/{path}", options, secrets or {"account_key": ACCOUNT_KEY}
        )


@contextmanager
def cloud_server(kind: str) -> Generator[Any]:
    """The server of a kind of store; skips the test where this machine lacks it."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(FakeGcs() if kind == "gcs" else Azurite())
        except servers.Missing as missing:
            pytest.skip(str(missing))
        yield server


def sas_token(hours: float = 1) -> str:
    """A shared access signature for `BUCKET` of Azurite that ends in so many hours."""
    from azure.storage.blob import ContainerSasPermissions, generate_container_sas

    now = datetime.now(timezone.utc)
    return str(
        generate_container_sas(
            ACCOUNT,
            BUCKET,
            account_key=ACCOUNT_KEY,
            permission=ContainerSasPermissions(read=True, write=True, list=True),
            start=now - timedelta(hours=2),
            expiry=now + timedelta(hours=hours),
        )
    )


class Seen(NamedTuple):
    """A request that the proxy has passed on; header names are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def operation(self) -> str:
        """The name of what is asked for: list, head, read (a range), get or put."""
        if self.method in ("HEAD", "PUT", "POST"):
            return "head" if self.method == "HEAD" else "put"
        if "prefix=" in self.target:
            return "list"
        return "read" if "range" in self.headers else "get"


class Reply(NamedTuple):
    """The answer of the server.

    `length` is the length of the body that the head announces. With None, the head announces no
    length, and the body ends with the connection.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    length: int | None


class CloudProxy:
    """An HTTP proxy in front of `upstream` ("host:port"), as a context manager.

    Attributes:
        seen: The requests so far.
        change: Makes of each request and its answer the answer that is sent; None: no answer comes
            before the context ends.
        latency_s: Added to each answer.
    """

    endpoint: str

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.seen: list[Seen] = []
        self.change: Callable[[Seen, Reply], Reply | None] = lambda _, reply: reply
        self.latency_s = 0.0
        self._barrier: threading.Barrier | None = None
        self._ends = threading.Event()

    def __enter__(self) -> CloudProxy:
        proxy = self

        class Handler(_Handler):
            def answer(self) -> None:
                proxy.serve(self)

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(STOP_DEADLINE_S)

    def operations(self) -> list[str]:
        """Of the requests so far, and forget them."""
        seen, self.seen = self.seen, []
        return [each.operation for each in seen]

    @contextmanager
    def hold(self, count: int) -> Generator[None]:
        """Answer no request before `count` of them have come."""
        self._barrier = threading.Barrier(count, timeout=START_DEADLINE_S)
        yield
        self._barrier = None

    def serve(self, handler: _Handler) -> None:
        """Pass a request on, and the answer back."""
        headers = {name.lower(): value for name, value in handler.headers.items()}
        seen = Seen(handler.command, handler.path, headers)
        self.seen.append(seen)
        body = handler.rfile.read(int(headers.get("content-length", "0")))
        if self._barrier is not None:
            self._barrier.wait()
        reply = self.change(seen, self._pass_on(seen, body))
        self._ends.wait(self.latency_s)
        if reply is None:
            self._ends.wait()
            handler.close_connection = True
            return
        handler.send_response_only(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        if reply.length is not None:
            handler.send_header("Content-Length", str(reply.length))
        handler.end_headers()
        data = b"" if seen.method == "HEAD" else reply.body
        handler.wfile.write(data)
        if seen.method != "HEAD" and reply.length != len(data):
            handler.close_connection = True

    def _pass_on(self, seen: Seen, body: bytes) -> Reply:
        connection = http.client.HTTPConnection(self._upstream)
        with closing(connection):
            # fake-gcs-server knows Google's XML API under its own name only.
            headers = {**seen.headers, "host": self._upstream}
            connection.request(seen.method, seen.target, body or None, headers)
            answer = connection.getresponse()
            data = answer.read()
            left_out = ("content-length", "connection", "keep-alive", "transfer-encoding")
            kept = {n: v for n, v in answer.getheaders() if n.lower() not in left_out}
            length = int(answer.headers.get("content-length", len(data)))
            return Reply(answer.status, kept, data, length)


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object, **__: object) -> None:
        """Clients may go away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def log_message(self, *_: object, **__: object) -> None:
        """Say nothing."""


def overwrite_while_reading(
    cloud: Any, proxy: CloudProxy, store: Store, rounds: int, seed: int
) -> tuple[int, int]:
    """Overwrite an object with one of the same size while it is read in pieces, `rounds` times.

    The moment is before or during a request, as `seed` has it. Each byte that is read must be one
    of the pinned version. Returns how many pieces were read, and how many were refused because the
    object had changed.
    """
    chance = random.Random(seed)
    step, pieces = 10_007, 4
    whole = changed = 0
    key = f"{store_prefix(store)}/x"
    for i in range(rounds):
        old, new = bytes([2 * i % 256]) * step * pieces, bytes([(2 * i + 1) % 256]) * step * pieces
        cloud.put(key, old)
        pin = next(pin_of(file) for file in store.list(10).files)
        moment, is_during = chance.randrange(pieces), chance.random() < 0.5

        def overwrite(_: Seen, reply: Reply, new: bytes = new) -> Reply:
            cloud.put(key, new)
            proxy.change = lambda _, reply: reply
            return reply

        for piece in range(pieces):
            if piece == moment and is_during:
                proxy.change = overwrite
            elif piece == moment:
                cloud.put(key, new)
            buffer = bytearray(step)
            try:
                store.read_into(pin, piece * step, memoryview(buffer))
            except ObjectChanged:
                changed += 1
                continue
            assert bytes(buffer) == old[:step], f"round {i}, piece {piece}"
            whole += 1
    return whole, changed


def store_prefix(store: Store) -> str:
    """The last component of the directory of `store`."""
    return store.name.partition("?")[0].rpartition("/")[2]
