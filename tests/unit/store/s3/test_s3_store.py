"""The store over S3: against moto, and against a server that answers whatever a test wants."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import pytest
from support.reading import read_range
from support.servers import Moto

from ckptfs._model.location import Location
from ckptfs._model.request_id import request_id
from ckptfs._store.base import Pin, Store, pin_of
from ckptfs._store.request_context import ends_in
from ckptfs._store.request_metrics import REQUESTS
from ckptfs._store.resolve import open_store
from ckptfs.errors import (
    AccessDenied,
    CheckpointIsFile,
    CheckpointNotFound,
    CkptfsError,
    LimitExceeded,
    LocationError,
    ObjectChanged,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 5.0
SECRETS = {"access_key": "key", "secret_key": "S3CR3T"}


_opened: list[Any] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


def store_at(
    endpoint: str,
    path: str = "bucket/run",
    secrets: dict[str, str] = SECRETS,
    timeout_s: float = TIMEOUT_S,
    **options: Any,
) -> Any:
    known = {"endpoint_override": endpoint, "scheme": "http", "region": "us-east-1"}
    _opened.append(open_store(Location("s3", path, known | options, secrets), timeout_s))
    return _opened[-1]


# -- with a server that has conditional reads


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    with Moto() as server:
        yield server


@pytest.fixture
def bucket(moto: Moto) -> Iterator[Callable[[str, bytes], None]]:
    client = moto.client()
    client.create_bucket(Bucket="bucket")
    yield lambda key, data: client.put_object(Bucket="bucket", Key=key, Body=data) and None
    found = client.list_objects_v2(Bucket="bucket").get("Contents", [])
    for item in found:
        client.delete_object(Bucket="bucket", Key=item["Key"])
    client.delete_bucket(Bucket="bucket")


Put = Callable[[str, bytes], None]


@pytest.fixture
def store(moto: Moto) -> Store:
    return store_at(moto.endpoint)


def test_s3_listing_has_etags_and_only_the_prefix(store: Store, bucket: Put) -> None:
    for key in ("run/a", "run/b/c d+%ü", "run/b/\x01", "run-2/x", "run/empty/"):
        bucket(key, key.encode())
    bucket("run/marker/", b"")
    listing = store.list(10)
    assert sorted(file.path for file in listing.files) == ["a", "b/\x01", "b/c d+%ü"]
    assert all(len(file.etag) == 34 and file.mtime_ns > 0 for file in listing.files)
    assert sorted(listing.directories) == ["empty", "marker"]
    assert [skipped.name for skipped in listing.skipped] == ["empty/"]
    with pytest.raises(LimitExceeded, match="files_max = 2"):
        store.list(2)


def test_s3_listing_of_missing_or_file_is_an_error(moto: Moto, bucket: Put) -> None:
    bucket("run/file", b"x")
    for path, error in (
        ("bucket/none", CheckpointNotFound),
        ("bucket/ru", CheckpointNotFound),
        ("bucket/run/file", CheckpointIsFile),
        ("nothing-here", CheckpointNotFound),
        ("nothing-here/run", CheckpointNotFound),
    ):
        store = store_at(moto.endpoint, path)
        with pytest.raises(error):
            store.list(10)


def test_reads_need_no_check_once_conditions_are_known_to_count(store: Store, bucket: Put) -> None:
    bucket("run/a", b"0123456789")
    [file] = store.list(10).files
    pin = pin_of(file)
    assert read_range(store, pin, 3, 4) == (b"3456", False)
    confirmed = store.confirm(pin)
    assert (confirmed.etag, confirmed.etag_of) == (pin.etag, "answers")
    assert read_range(store, confirmed, 0, 10) == (b"0123456789", True)
    without = Pin("a", 10, 0)
    assert read_range(store, without, 9, 1) == (b"9", False)
    assert store.confirm(without).etag == pin.etag


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("data", [b"abcdefghij", b"abc", b"", b"more than there was", None])
def test_another_version_is_never_read(
    store: Store, bucket: Put, moto: Moto, data: bytes | None, known: bool
) -> None:
    bucket("run/a", b"0123456789")
    [file] = store.list(10).files
    pin = pin_of(file) if known else Pin("a", 10, file.mtime_ns)
    confirmed = store.confirm(pin)
    pin = confirmed if known else pin
    if data is None:
        moto.client().delete_object(Bucket="bucket", Key="run/a")
    else:
        bucket("run/a", data)
    if known or data != b"abcdefghij":
        with pytest.raises(ObjectChanged):
            read_range(store, pin, 2, 8)
    if known:
        with pytest.raises(ObjectChanged):
            store.confirm(pin)


def test_small_objects(store: Store, bucket: Put) -> None:
    assert (store.get("m"), store.find("m")) == (None, None)
    store.put("m", b"{}")
    assert store.get("m") == b"{}"
    found = store.find("m")
    assert found
    assert (found.path, found.size, found.etag) == ("m", 2, store.list(9).files[0].etag)
    assert store.find("") is None


def test_put_without_a_bucket(moto: Moto) -> None:
    store = store_at(moto.endpoint, "nothing-here/run")
    with pytest.raises(CheckpointNotFound):
        store.put("m", b"")


# -- keys


def test_keys_of_the_chain(
    moto: Moto, bucket: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket("run/a", b"x")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    store = store_at(moto.endpoint, secrets={})
    with pytest.raises(AccessDenied, match="there are no AWS credentials; set AWS_ACCESS_KEY_ID"):
        store.list(9)
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = key\naws_secret_access_key = S3CR3T\n"
    )
    store = store_at(moto.endpoint, secrets={})
    assert len(store.list(9).files) == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://{moto.endpoint}")
    role_arn = "arn:aws:iam::123456789012:role/reader"
    store = store_at(moto.endpoint, role_arn=role_arn)
    assert len(store.list(9).files) == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:1")
    store = store_at(moto.endpoint, role_arn=role_arn)
    with pytest.raises(AccessDenied, match="cannot get AWS credentials"):
        store.list(9)


# -- with a server that does as it is told


class Answer:
    """One answer. `cut`: only so many bytes of the body are sent, and the connection ends."""

    def __init__(
        self, status: int = 200, body: bytes = b"", cut: int | None = None, **headers: str
    ) -> None:
        self.status = status
        self.body = body
        self.cut = cut
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def error(status: int, code: str, **headers: str) -> Answer:
    text = f"<Error><Code>{code}</Code><Message>told so</Message></Error>"
    return Answer(status, text.encode(), None, **headers)


def ranged(start: int, body: bytes, size: int, etag: str = '"v1"', **more: Any) -> Answer:
    where = f"bytes {start}-{start + len(body) - 1}/{size}"
    return Answer(206, body, ETag=etag, Content_Range=where, **more)


class Scripted(ThreadingHTTPServer):
    """Gives the answers in their order; the last one again and again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.connections = 0
        self.endpoint = f"127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, Scripted)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.command, self.path, headers))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: answer.cut])
        self.close_connection |= answer.cut is not None

    do_HEAD = do_GET

    def log_message(self, *_: object, **__: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


PIN = Pin("a", 10, 0, '"v1"')


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ranged(2, b"2345", 10), None),
        (ranged(2, b"2345", 10, etag='"v2"'), ObjectChanged),
        (ranged(2, b"2345", 11), ObjectChanged),
        (ranged(3, b"3456", 10), StoreError),
        (ranged(2, b"23456", 10), StoreError),
        (ranged(2, b"2345", 10, cut=3), StoreUnavailable),
        (Answer(200, b"0123456789", ETag='"v1"'), StoreError),  # it knows no ranges
        (Answer(200, b"2345", ETag='"v1"', Content_Range="bytes 2-5/10"), None),
        (Answer(206, b"2345", Content_Range="bytes 2-5/10"), None),  # to be confirmed
        (Answer(200, b"<html>login</html>"), StoreError),  # a web page on the way
        (error(412, "PreconditionFailed"), ObjectChanged),
        (error(404, "NoSuchKey"), ObjectChanged),
        (error(404, "NoSuchBucket"), CheckpointNotFound),
        (error(416, "InvalidRange"), ObjectChanged),
        (error(403, "AccessDenied"), AccessDenied),
        (error(400, "ExpiredToken"), AccessDenied),
        (error(401, ""), AccessDenied),
        (error(503, "SlowDown"), StoreUnavailable),
        (error(500, "InternalError"), StoreUnavailable),
        (error(400, "RequestTimeout"), StoreUnavailable),
        (error(429, ""), StoreUnavailable),
        (error(400, "InvalidArgument"), StoreError),
        (Answer(418, b"<not XML"), StoreError),
        (Answer(301, b"", Location="http://other/"), StoreError),
    ],
)
def test_each_answer_to_a_read(
    server: Scripted, answer: Answer, expected: type[CkptfsError] | None
) -> None:
    server.answers = [answer]
    store = store_at(server.endpoint)
    if expected is None:
        assert read_range(store, PIN, 2, 4) == (b"2345", False)
    else:
        with pytest.raises(CkptfsError) as caught:
            read_range(store, PIN, 2, 4)
        assert type(caught.value) is expected, caught.value
        assert "\n" not in str(caught.value)
    [(method, path, headers)] = server.requests
    assert (method, path) == ("GET", "/bucket/run/a")
    assert (headers["range"], headers["if-match"]) == ("bytes=2-5", '"v1"')


def test_s3_reads_are_pinned_only_after_a_304(server: Scripted) -> None:
    store = store_at(server.endpoint)
    server.answers = [Answer(200, b"0123456789", ETag='"v1"')]
    assert store.confirm(PIN) == PIN
    server.answers = [ranged(0, b"01", 10)]
    assert read_range(store, PIN, 0, 2) == (b"01", False)
    server.answers = [Answer(304)]
    assert store.confirm(PIN) == PIN
    assert server.requests[-1][2]["if-none-match"] == '"v1"'
    server.answers = [ranged(0, b"01", 10)]
    assert read_range(store, PIN, 0, 2) == (b"01", True)


def page(*keys: str, token: str = "", **fields: str) -> Answer:
    items = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>1</Size><ETag>v</ETag>"
        "<LastModified>2026-01-02T03:04:05.67Z</LastModified></Contents>"
        for key in keys
    )
    more = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    next_token = f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""
    text = (
        f"<ListBucketResult><IsTruncated>{'true' if token else 'false'}</IsTruncated>"
        f"{next_token}{more}{items}</ListBucketResult>"
    )
    return Answer(200, text.encode())


def test_listings_of_servers_that_differ(server: Scripted) -> None:
    server.answers = [
        page("run/a%2Bb+c", token="next&page", EncodingType="url"),
        page("run/a%2Bb+d"),  # it does not encode, and says so
    ]
    store = store_at(server.endpoint)
    files = store.list(9).files
    assert [(file.path, file.etag) for file in files] == [("a+b c", '"v"'), ("a%2Bb+d", '"v"')]
    assert files[0].mtime_ns == 1767323045_670000000
    assert "continuation-token=next%26page" in server.requests[1][1]


def test_a_listing_without_end(server: Scripted) -> None:
    server.answers = [page("run/a", token="1"), page(token="2")]
    with pytest.raises(StoreError, match="listing is incomplete"):
        store_at(server.endpoint).list(9)
    server.answers = [page("run/a//b", "run/c/", token="1")]  # the same page for ever
    server.requests.clear()
    with pytest.raises(StoreError, match=r"more follows after 'run/c/', and sends no more"):
        store_at(server.endpoint).list(9)
    assert len(server.requests) == 4


BOMB = (
    b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + i, b"&%c;" % (97 + i) * 10) for i in range(12))
    + b"]><ListBucketResult><Contents><Key>&m;</Key></Contents></ListBucketResult>"
)


@pytest.mark.parametrize(
    "body", [b"", b"<ListBucketResult><Contents>", b"\xff\xfe\0", BOMB, b"<a>\x01</a>"]
)
def test_a_listing_that_is_no_xml(server: Scripted, body: bytes) -> None:
    server.answers = [Answer(200, body)]
    store = store_at(server.endpoint)
    with pytest.raises(StoreError, match="not valid XML"):
        store.list(9)


@pytest.mark.parametrize(
    "body",
    [
        b"<!DOCTYPE a [<!ENTITY b '"
        + b"c" * 99
        + b"'><!ENTITY d '"
        + b"&b;" * 99
        + b"'>]><a>&d;</a>",
        "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>".encode("utf-16"),
        b"<a>" + b"<b/>" * 300_000 + b"</a>",
        b"<a>" * 300_000,
    ],
    ids=["entities", "utf-16", "many", "deep"],
)
def test_a_listing_that_would_grow_in_memory(server: Scripted, body: bytes) -> None:
    server.answers = [Answer(200, body)]
    store = store_at(server.endpoint)
    with pytest.raises(StoreError, match="too much of it"):
        store.list(9)


def test_a_web_page_is_no_empty_listing(server: Scripted) -> None:
    server.answers = [Answer(200, b"<html><body>Please log in.</body></html>")]
    with pytest.raises(StoreError, match="answered with <html> instead of a listing"):
        store_at(server.endpoint).list(9)


def test_s3_listing_with_invalid_fields_is_an_error(server: Scripted) -> None:
    text = b"".join(
        b"<Contents><Key>run/%s</Key><Size>%s</Size><ETag>%s</ETag>"
        b"<LastModified>%s</LastModified></Contents>" % row
        for row in [
            (b"a", b"-5", b"x", b""),
            (b"b", b"7", b"two words", b"yesterday"),
            (b"c", b"7", b"a&#13;&#10;x-evil: 1", b"0001-01-01T00:00:00Z"),
            (b"d", b"9999999999999999999999", b"", b""),
        ]
    )
    server.answers = [Answer(200, b"<ListBucketResult>" + text + b"</ListBucketResult>")]
    store = store_at(server.endpoint)
    listing = store.list(9)
    assert [(f.path, f.size, f.mtime_ns, f.etag) for f in listing.files] == [
        ("b", 7, 0, ""),
        ("c", 7, 0, ""),
    ]
    assert [skipped.name for skipped in listing.skipped] == ["a", "d"]


def test_s3_small_requests_are_retried(server: Scripted) -> None:
    store = store_at(server.endpoint)
    server.answers = [error(503, "SlowDown"), page("run/a")]
    assert len(store.list(9).files) == 1
    server.answers = [error(503, "SlowDown")]
    with (
        ends_in(0.5),
        pytest.raises(StoreUnavailable, match=r"SlowDown: told so\); try again later"),
    ):
        store.list(9)
    assert 3 <= len(server.requests) <= 5


def test_a_listing_survives_a_busy_server(
    server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses_s: list[float] = []
    monkeypatch.setattr("ckptfs._store.s3.retry.time.sleep", pauses_s.append)
    store = store_at(server.endpoint)
    server.answers = [error(503, "SlowDown")] * 4 + [
        error(503, "", retry_after="30"),
        page("run/a"),
    ]
    assert len(store.list(9).files) == 1
    assert pauses_s == sorted(pauses_s), "they grow"
    assert pauses_s[-1] >= 30
    server.answers = [error(503, "SlowDown")]
    with pytest.raises(StoreUnavailable, match="SlowDown"):
        store.list(9)
    server.answers = [error(503, "", retry_after="30")]
    with ends_in(10), pytest.raises(StoreUnavailable, match="503"):
        store.list(9)


def test_the_region_is_learned(server: Scripted) -> None:
    server.answers = [
        error(400, "AuthorizationHeaderMalformed", x_amz_bucket_region="eu-west-3"),
        page("run/a"),
    ]
    store = store_at(server.endpoint, region="")
    store.list(9)
    scopes = [headers["authorization"].split("/")[2] for _, _, headers in server.requests]
    assert scopes == ["us-east-1", "eu-west-3"]


def test_s3_client_does_not_learn_region_with_host_syntax(server: Scripted) -> None:
    server.answers = [error(301, "PermanentRedirect", x_amz_bucket_region="evil.host/")]
    store = store_at(server.endpoint)
    with pytest.raises(StoreError, match="PermanentRedirect"):
        store.list(9)


def test_connections_are_kept_and_replaced(server: Scripted) -> None:
    store = store_at(server.endpoint)
    server.answers = [ranged(0, b"01", 10)]
    for _ in range(5):
        read_range(store, PIN, 0, 2)
    assert server.connections == 1
    server.answers = [error(404, "NoSuchKey"), ranged(0, b"01", 10)]
    with pytest.raises(ObjectChanged):
        read_range(store, PIN, 0, 2)
    read_range(store, PIN, 0, 2)
    assert server.connections == 1
    server.answers = [ranged(0, b"01", 10, cut=2), ranged(0, b"01", 10)]  # whole, and then closed
    read_range(store, PIN, 0, 2)
    read_range(store, PIN, 0, 2)
    assert server.connections == 2


def test_a_closed_store_keeps_no_connection(server: Scripted) -> None:
    store = store_at(server.endpoint)
    server.answers = [ranged(0, b"01", 10)]
    read_range(store, PIN, 0, 2)
    store.close()
    read_range(store, PIN, 0, 2)
    read_range(store, PIN, 0, 2)
    assert server.connections == 3


def test_s3_anonymous_requests_are_unsigned(server: Scripted) -> None:
    server.answers = [page("run/a")]
    store = store_at(server.endpoint, secrets={}, anonymous=True)
    store.list(9)
    assert "authorization" not in server.requests[0][2]


def test_a_server_that_is_not_there_or_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        store = store_at(endpoint, timeout_s=0.2)
        with pytest.raises(StoreTimeout, match=r"a in s3://bucket/run.* did not answer"):
            store.confirm(PIN)
    store = store_at(endpoint)
    with pytest.raises(StoreUnavailable, match="Connection refused"):
        store.confirm(PIN)


def test_s3_answer_that_is_not_http_is_an_error(server: Scripted) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        endpoint = f"127.0.0.1:{listening.getsockname()[1]}"

        def answer() -> None:
            with listening.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        store = store_at(endpoint)
        with pytest.raises(StoreUnavailable):
            store.confirm(PIN)
        thread.join()


def test_certificates_that_are_not_there() -> None:
    options = {"tls_ca_file_path": "/no/such/file"}
    with pytest.raises(LocationError, match="No such file"):
        open_store(Location("s3", "bucket/run", options, SECRETS), 1)


# -- what is counted and told


def test_s3_user_agent_has_the_request_id(server: Scripted) -> None:
    server.answers = [ranged(2, b"2345", 10)]
    store = store_at(server.endpoint)
    read_range(store, PIN, 2, 4)
    token = request_id.set("abc.1")
    try:
        read_range(store, PIN, 2, 4)
    finally:
        request_id.reset(token)
    agents = [headers["user-agent"] for _, _, headers in server.requests]
    assert agents == [f"ckptfs/{version('ckptfs')}", f"ckptfs/{version('ckptfs')} request/abc.1"]
    signed = server.requests[-1][2]["authorization"]
    assert "user-agent" not in signed  # a proxy may change it


@pytest.mark.parametrize(
    ("name", "shown"),
    [("4442587FB7D0A2F9", " [request 4442587FB7D0A2F9]"), ("a b\x1b[1m", ""), ("x" * 500, "")],
)
def test_an_error_names_the_servers_request(server: Scripted, name: str, shown: str) -> None:
    body = b"<Error><Code>SlowDown</Code><Message>less</Message></Error>"
    server.answers = [Answer(503, body, x_amz_request_id=name)]
    with pytest.raises(StoreUnavailable) as failed:
        read_range(store_at(server.endpoint), PIN, 2, 4)
    assert f"(SlowDown: less{shown})" in str(failed.value)


@pytest.mark.parametrize(
    ("answer", "kind", "outcome"),
    [
        (ranged(2, b"2345", 10), "read", "ok"),
        (Answer(503), "read", "unavailable"),
        (Answer(403), "read", "denied"),
        (Answer(412), "read", "changed"),
        (Answer(404), "get", "absent"),
        (Answer(404), "head", "absent"),
        (Answer(418), "list", "error"),
        (ranged(2, b"2345", 10, etag='"v2"'), "read", "changed"),
        (ranged(2, b"2345", 10, cut=2), "read", "unavailable"),
    ],
)
def test_requests_are_counted(server: Scripted, answer: Answer, kind: str, outcome: str) -> None:
    server.answers = [answer]
    store = store_at(server.endpoint)
    before = {found.kind: found for found in REQUESTS.snapshot()}
    call = {
        "read": lambda: read_range(store, PIN, 2, 4),
        "get": lambda: store.get("a"),
        "head": lambda: store.find("a"),
        "list": lambda: store.list(10),
    }[kind]
    with contextlib.suppress(CkptfsError):
        call()
    for found in REQUESTS.snapshot():
        then = before[found.kind]
        counted = {name: n - then.outcomes[name] for name, n in found.outcomes.items()}
        times = sum(found.latency_ns) - sum(then.latency_ns)
        is_it = found.kind == kind
        assert {name for name, n in counted.items() if n} == ({outcome} if is_it else set())
        assert times == (len(server.requests) if is_it else 0)
        assert (found.total_ns > then.total_ns) == is_it


def test_a_request_to_another_region_is_two(server: Scripted) -> None:
    server.answers = [
        Answer(301, x_amz_bucket_region="eu-west-1"),
        ranged(2, b"2345", 10),
    ]
    [before] = [found for found in REQUESTS.snapshot() if found.kind == "read"]
    read_range(store_at(server.endpoint), PIN, 2, 4)
    [after] = [found for found in REQUESTS.snapshot() if found.kind == "read"]
    for outcome, count in (("redirected", 1), ("ok", 1), ("error", 0)):
        assert after.outcomes[outcome] - before.outcomes[outcome] == count  # type: ignore[index]
