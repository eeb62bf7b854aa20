"""The stores on Google and Azure, against fake-gcs-server and Azurite.

Faults come from a proxy in front of them: each fault is tried with each operation.
"""

from __future__ import annotations

import gzip
import json
import random
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from support.cloudservers import (
    ACCOUNT,
    ACCOUNT_KEY,
    BUCKET,
    Azurite,
    CloudProxy,
    FakeGcs,
    Reply,
    cloud_server,
    overwrite_while_reading,
    sas_token,
)
from support.reading import read_range

from ckptfs._model.location import Location
from ckptfs._model.manifest import build_manifest
from ckptfs._store.base import Pin, Store, pin_of
from ckptfs._store.describe import NotDescribable, describe
from ckptfs._store.filesystems import wrapped
from ckptfs._store.fsspec_options import gcs_arguments
from ckptfs._store.in_process import store_of
from ckptfs._store.request_context import ends_in
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
    from collections.abc import Callable, Iterator
    from pathlib import Path

TIMEOUT_S = 5.0
TOKEN = "ya29.S3CR3T"
ODD_NAMES = [
    *("per%cent", "per%41cent", "per%2Fcent", "hash#", "a b", " lead", "trail ", "plus+plus"),
    *("what?", "[x](y)", "a:b", "a&<>'\"b", "ümlaut", "u\u0308mlaut", "tab\tname", "deep/er/x"),
]


@pytest.fixture(scope="module", params=["gcs", "azure"])
def cloud(request: pytest.FixtureRequest) -> Iterator[Any]:
    with cloud_server(request.param) as server:
        yield server


@pytest.fixture(scope="module")
def gcs() -> Iterator[FakeGcs]:
    with cloud_server("gcs") as server:
        yield server


@pytest.fixture(scope="module")
def azure() -> Iterator[Azurite]:
    with cloud_server("azure") as server:
        yield server


@pytest.fixture
def opened() -> Iterator[Callable[..., Store]]:
    stores: list[Store] = []

    def open_at(location: Location, timeout_s: float = TIMEOUT_S) -> Store:
        stores.append(open_store(location, timeout_s))
        return stores[-1]

    yield open_at
    for store in stores:
        store.close()


@pytest.fixture
def proxy(cloud: Any) -> Iterator[CloudProxy]:
    with CloudProxy(cloud.endpoint) as proxy:
        yield proxy


def is_confirmed(store: Store, pin: Pin) -> bool:
    """Whether the store says that the object is that of `pin`, and has the same ETag for it."""
    confirmed = store.confirm(pin)
    return (confirmed.size, confirmed.etag) == (pin.size, pin.etag)


# -- what is right


def test_a_tree_of_odd_names_and_sizes_is_read_byte_for_byte(cloud: Any, opened: Any) -> None:
    content = {name: random.Random(i).randbytes(i * 997) for i, name in enumerate(ODD_NAMES)}
    for name, data in content.items():
        cloud.put(f"odd/{name}", data)
    store = opened(cloud.location("odd"))
    listing = store.list(100)
    pins = {file.path: pin_of(file) for file in listing.files}
    assert {path: pin.size for path, pin in pins.items()} == {
        name: len(data) for name, data in content.items()
    }
    for name, data in content.items():
        assert not data or read_range(store, pins[name]) == (data, True), name
    assert not build_manifest(listing).skipped
    assert {name: store.get(name) for name in content} == content


def test_names_that_no_directory_can_hold_are_skipped(cloud: Any, opened: Any) -> None:
    cloud.put("skip/good", b"1")
    for name in ("skip//empty-component", "skip/with-content/"):
        cloud.put(name, b"12")
    manifest = build_manifest(opened(cloud.location("skip")).list(100))
    assert [file.path for file in manifest.files] == ["good"]
    assert {skipped.name for skipped in manifest.skipped} == {"/empty-component", "with-content/"}


def test_google_keys_with_dots_are_skipped(gcs: FakeGcs, opened: Any) -> None:
    for name in ("dots/good", "dots/.", "dots/../up", "up"):
        gcs.put(name, name.encode())
    manifest = build_manifest(opened(gcs.location("dots")).list(100))
    assert [file.path for file in manifest.files] == ["good"]
    assert {skipped.name for skipped in manifest.skipped} == {".", "../up"}


def test_a_leading_slash_names_another_object(cloud: Any, opened: Any) -> None:
    cloud.put("/lead/x", b"with")
    cloud.put("lead/x", b"without")
    store = opened(cloud.location("lead"))
    assert store.get("x") == b"without"
    everything = build_manifest(opened(Location(*_whole(cloud))).list(1000))
    assert "/lead/x" in {skipped.name for skipped in everything.skipped}


def _whole(cloud: Any) -> tuple[Any, ...]:
    location = cloud.location("")
    return location.kind, BUCKET, location.options, location.secrets


def test_directory_markers_are_directories(cloud: Any, opened: Any) -> None:
    cloud.put("marked/", b"")
    cloud.put("marked/empty/", b"")
    cloud.put("marked/full/", b"")
    cloud.put("marked/full/x", b"1")
    manifest = build_manifest(opened(cloud.location("marked")).list(100))
    assert manifest.directories == ("empty", "full")
    assert [file.path for file in manifest.files] == ["full/x"]
    assert not manifest.skipped


def test_hadoop_markers_on_azure_are_directories(azure: Azurite, opened: Any) -> None:
    azure.put("hadoop/x", b"1")
    for name in ("hadoop/sub", "hadoop/alone", "hadoop-empty"):
        azure.container.upload_blob(name, b"", metadata={"hdi_isfolder": "true"})
    azure.put("hadoop/sub/y", b"1")
    manifest = build_manifest(opened(azure.location("hadoop")).list(100))
    assert manifest.directories == ("alone", "sub")
    assert [file.path for file in manifest.files] == ["sub/y", "x"]
    assert opened(azure.location("hadoop-empty")).list(100).files == []


def test_azure_lists_page_by_page(
    azure: Azurite, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptfs._store.cloud.azure_listing._PAGE_BLOBS", 3)
    names = [f"{i:02}" for i in range(10)]
    for name in names:
        azure.put(f"pages/{name}", b"1")
    store = opened(azure.location("pages"))
    assert [file.path for file in store.list(100).files] == names
    with pytest.raises(LimitExceeded):
        store.list(5)


def test_gzip_objects_come_as_they_are_stored(cloud: Any, opened: Any) -> None:
    stored = gzip.compress(random.Random(1).randbytes(5000))
    cloud.put("packed/x", stored, gzip=True)
    store = opened(cloud.location("packed"))
    pin = pin_of(store.list(10).files[0])
    assert pin.size == len(stored)
    assert read_range(store, pin, 100, 50) == (stored[100:150], True)
    assert store.get("x") == stored


def test_missing_places(cloud: Any, opened: Any) -> None:
    cloud.put("here/x", b"1")
    with pytest.raises(CheckpointNotFound, match="does not exist"):
        opened(cloud.location("her")).list(10)
    with pytest.raises(CheckpointIsFile):
        opened(cloud.location("here/x")).list(10)
    store = opened(cloud.location("here"))
    assert store.find("y") is None
    assert store.get("y") is None


def test_a_missing_container(azure: Azurite, opened: Any) -> None:
    location = azure.location("")
    for path in ("nothing", "nothing/below"):
        with pytest.raises(CheckpointNotFound, match="no such container"):
            opened(Location("azure", path, location.options, location.secrets)).list(10)


def test_put_replaces_an_object_as_a_whole(cloud: Any, opened: Any) -> None:
    store = opened(cloud.location("put"))
    for data in (b'{"a": 1}', b"{}"):
        store.put("ü /.metadata.json", data)
        assert store.get("ü /.metadata.json") == data
    found = store.find("ü /.metadata.json")
    assert found is not None
    assert found.size == 2
    listed = store.list(10).files[0]
    assert (listed.path, listed.etag) == (found.path, found.etag)


def test_an_overwritten_and_a_deleted_object_have_changed(cloud: Any, opened: Any) -> None:
    cloud.put("change/x", b"1" * 100)
    store = opened(cloud.location("change"))
    pin = pin_of(store.list(10).files[0])
    assert is_confirmed(store, pin)
    cloud.put("change/x", b"2" * 100)  # within the same second
    for attempt in (lambda: store.confirm(pin), lambda: read_range(store, pin)):
        with pytest.raises(ObjectChanged):
            attempt()
    cloud.put("change/x", b"3")
    with pytest.raises(ObjectChanged):
        read_range(store, pin, 50, 10)
    cloud.delete("change/x")
    for attempt in (lambda: store.confirm(pin), lambda: read_range(store, pin)):
        with pytest.raises(ObjectChanged):
            attempt()


def test_overwrites_while_reading_mix_no_bytes(cloud: Any, proxy: CloudProxy, opened: Any) -> None:
    whole, changed = overwrite_while_reading(
        cloud, proxy, opened(cloud.location("race", proxy.endpoint)), rounds=60, seed=1
    )
    assert whole > 60
    assert changed > 60


# -- what it costs


def asked(proxy: CloudProxy) -> list[str]:
    """The requests that the server got, and each listing once: fake-gcs-server does not say which
    page is the last one, so the client asks for another one."""
    requests = proxy.operations()
    return [
        request
        for request, before in zip(requests, ["", *requests], strict=False)
        if (request, before) != ("list", "list")
    ]


def test_each_read_is_one_request_and_nothing_else(
    cloud: Any, proxy: CloudProxy, opened: Any
) -> None:
    data = random.Random(2).randbytes(1 << 20)
    cloud.put("cost/x", data)
    store = opened(cloud.location("cost", proxy.endpoint))
    pin = pin_of(store.list(10).files[0])
    assert asked(proxy) == ["list"]
    step = 1 << 18
    for offset in range(0, len(data), step):
        assert read_range(store, pin, offset, step) == (data[offset : offset + step], True)
        (seen,) = proxy.seen
        assert seen.headers["range"] == f"bytes={offset}-{offset + step - 1}"
        assert asked(proxy) == ["read"]


def test_small_files_are_read_side_by_side(cloud: Any, proxy: CloudProxy, opened: Any) -> None:
    for i in range(16):
        cloud.put(f"many/{i}", b"%d" % i)
    store = opened(cloud.location("many", proxy.endpoint))
    pins = [pin_of(file) for file in store.list(100).files]
    asked(proxy)
    with ThreadPoolExecutor(16) as pool, proxy.hold(16):
        # No request is answered before all of them have come.
        got = list(pool.map(lambda pin: read_range(store, pin)[0].decode(), pins))
    assert got == [pin.path for pin in pins]
    assert asked(proxy) == ["read"] * 16


# -- faults


class Fault(NamedTuple):
    """A change of an answer, and the expected result of each operation: a type of exception, or
    "right" for the right result."""

    change: Callable[[Any, Reply], Reply | None]
    list: Any = StoreError
    head: Any = StoreError
    read: Any = StoreError
    get: Any = StoreError
    put: Any = StoreError


def _page(
    status: int, text: str, kind: str = "text/html", **headers: str
) -> Callable[[Any, Reply], Reply]:
    """Another answer, in which stand the secrets of the request."""

    def change(seen: Any, _: Reply) -> Reply:
        target = seen.target.replace("&", "&amp;")
        said = f"{target} Authorization: {seen.headers.get('authorization', '')}"
        body = text.replace("SAID", said).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Reply(status, {"Content-Type": kind, **named}, body, len(body))

    return change


def _headers(**more: str | None) -> Callable[[Any, Reply], Reply]:
    """Other header fields; None: none."""

    def change(_: Any, reply: Reply) -> Reply:
        named = {name.replace("_", "-").lower(): value for name, value in more.items()}
        kept = {n: v for n, v in reply.headers.items() if n.lower() not in named}
        return reply._replace(headers=kept | {n: v for n, v in named.items() if v is not None})

    return change


def _body(shorten: Callable[[bytes], bytes], keep_length: bool) -> Callable[[Any, Reply], Reply]:
    def change(_: Any, reply: Reply) -> Reply:
        body = shorten(reply.body)
        return reply._replace(body=body, length=reply.length if keep_length else len(body))

    return change


def _all(kind: Any) -> dict[str, Any]:
    return dict.fromkeys(("list", "head", "read", "get", "put"), kind)


XML = "application/xml"
ERROR = "<Error><Code>InternalStuff</Code><Message>SAID</Message></Error>"
FAULTS: dict[str, Fault] = {
    "login page": Fault(_page(200, "<html><p>Log in <br> SAID")),
    "login page, XHTML": Fault(_page(200, "<html><body><p>SAID</p></body></html>")),
    "login page, as XML": Fault(_page(200, "<html><body><p>SAID</p></body></html>", XML)),
    "empty page": Fault(_page(200, "", XML)),
    "JSON instead": Fault(_page(200, '{"error": "SAID"}', "application/json")),
    "HTML error 400": Fault(_page(400, "<html>SAID"), head=(StoreError, AccessDenied)),
    "HTML error 502": Fault(_page(502, "<html>SAID"), **_all(StoreUnavailable)),
    "XML error 500": Fault(_page(500, ERROR, XML), **_all(StoreUnavailable)),
    "cut XML error 503": Fault(_page(503, ERROR[:20], XML), **_all(StoreUnavailable)),
    "429": Fault(_page(429, ERROR, XML, Retry_After="60"), **_all(StoreUnavailable)),
    "408": Fault(_page(408, "", Retry_After="60"), **_all(StoreUnavailable)),
    "401": Fault(_page(401, ERROR, XML), **_all(AccessDenied)),
    "403": Fault(_page(403, ERROR, XML), **_all(AccessDenied)),
    "403 without a body": Fault(_page(403, "", XML), **_all(AccessDenied)),
    "HTML 403": Fault(_page(403, "<html>SAID"), **_all(AccessDenied)),
    "404 without a body": Fault(
        _page(404, "", XML), head=ObjectChanged, read=ObjectChanged, get=None
    ),
    "412": Fault(_page(412, ERROR, XML), head=ObjectChanged, read=ObjectChanged),
    "416": Fault(_page(416, ERROR, XML), head=ObjectChanged, read=ObjectChanged),
    "cut in the body": Fault(
        _body(lambda body: body[: len(body) // 2], keep_length=True),
        list=StoreUnavailable,
        head="right",
        read=StoreUnavailable,
        get=StoreUnavailable,
        put=("right", StoreUnavailable),  # Azure's answer has no body
    ),
    "shortened body": Fault(
        _body(lambda body: body[: len(body) // 2], keep_length=False),
        head=("right", StoreError),  # a HEAD has its length only
        read=StoreUnavailable,
        get="any",  # the reader of the metadata sees that it is no JSON
        put=("right", StoreError),
    ),
    "body without a length": Fault(
        lambda _, reply: reply._replace(length=None),
        **_all("right") | {"head": ("right", ObjectChanged)},
    ),
    "wrong type": Fault(_headers(Content_Type="text/html"), **_all("right")),
    "other ETag": Fault(
        _headers(ETag='"other"'),
        list="right",
        head="any",  # the listing says that nothing has changed, so its ETag is corrected
        read=ObjectChanged,
        get="right",
        put="right",
    ),
    "no ETag": Fault(_headers(ETag=None), **_all("right")),
    "other range": Fault(
        _headers(Content_Range="bytes 101-1100/4096"), **_all("right") | {"read": StoreError}
    ),
    "other size": Fault(
        _headers(Content_Range="bytes 100-1099/4097"),
        **_all("right") | {"read": ObjectChanged, "head": ("right", StoreError)},
    ),
    "no answer": Fault(lambda *_: None, **_all(StoreTimeout)),
}
OPERATIONS = ("list", "head", "read", "get", "put")


class Faulty(NamedTuple):
    """A store behind the proxy, with an object of 4,096 bytes. `is_nameless`: no answer says of
    which version it is."""

    store: Store
    pin: Pin
    data: bytes
    secrets: tuple[str, ...]
    is_nameless: bool = False

    def run(self, operation: str) -> bool:
        """Whether the result is right."""
        if operation == "list":
            return [pin_of(file) for file in self.store.list(10).files] == [self.pin]
        if operation == "head":
            return is_confirmed(self.store, self.pin)
        if operation == "read":
            data, is_known = read_range(self.store, self.pin, 100, 1000)
            assert not (is_known and self.is_nameless)
            return data == self.data[100:1100]
        if operation == "get":
            return self.store.get("x") == self.data
        self.store.put("x", self.data)
        return True


def _secret_location(cloud: Any, path: str, endpoint: str) -> tuple[Location, tuple[str, ...]]:
    if cloud.kind == "gcs":
        return cloud.location(path, endpoint, access_token=TOKEN), (TOKEN,)
    sas = sas_token()
    signature = sas.partition("sig=")[2].partition("&")[0]
    return cloud.location(path, endpoint, sas_token=sas), (signature, ACCOUNT_KEY)


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> Fault:
    return FAULTS[request.param]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_faults(cloud: Any, proxy: CloudProxy, opened: Any, fault: Fault, operation: str) -> None:
    data = random.Random(3).randbytes(4096)
    cloud.put("faulty/x", data)
    location, secrets = _secret_location(cloud, "faulty", proxy.endpoint)
    store = opened(location, 0.2 if fault is FAULTS["no answer"] else TIMEOUT_S)
    proxy_change, proxy.change = fault.change, proxy.change
    pin = pin_of(opened(cloud.location("faulty")).list(10).files[0])
    proxy.change = proxy_change
    expected = getattr(fault, operation)
    outcomes = expected if isinstance(expected, tuple) else (expected,)
    error, is_right = None, False
    try:
        # A listing waits for its first page as long as its deadline allows.
        with ends_in(0.4 if fault is FAULTS["no answer"] else TIMEOUT_S):
            is_nameless = fault is FAULTS["no ETag"]
            is_right = Faulty(store, pin, data, secrets, is_nameless).run(operation)
    except CkptfsError as caught:
        error = caught
    if error is None:
        assert "any" in outcomes or ("right" if is_right else None) in outcomes
        return
    assert type(error) in outcomes, error
    said = "".join(traceback.format_exception(error))
    assert not [secret for secret in secrets if secret in said]
    if fault in (FAULTS["429"], FAULTS["408"]):
        assert isinstance(error, StoreUnavailable)
        assert error.retry_after_s == 60


def test_a_whole_object_in_answer_to_a_range_is_refused(
    cloud: Any, proxy: CloudProxy, opened: Any
) -> None:
    data = random.Random(4).randbytes(4096)
    cloud.put("ranges/x", data)
    store = opened(cloud.location("ranges", proxy.endpoint))
    pin = pin_of(store.list(10).files[0])

    def whole(seen: Any, reply: Reply) -> Reply:
        kept = {n: v for n, v in reply.headers.items() if n.lower() != "content-range"}
        return Reply(200, kept, data, len(data)) if seen.operation == "read" else reply

    proxy.change = whole
    with pytest.raises(StoreError, match="ranges"):
        read_range(store, pin, 100, 1000)
    assert read_range(store, pin)[0] == data


@pytest.mark.parametrize("operation", ["list", "head", "read", "get", "put"])
def test_cloud_read_lasts_longer_than_deadline_while_bytes_come(
    cloud: Any, proxy: CloudProxy, opened: Any, operation: str
) -> None:
    """The caller's deadline ends a request, however long the store's own timeout is."""
    data = random.Random(5).randbytes(4096)
    cloud.put("silent/x", data)
    store = opened(cloud.location("silent", proxy.endpoint), 60.0)
    pin = pin_of(store.list(10).files[0])
    proxy.change = lambda *_: None
    with ends_in(0.2), pytest.raises(StoreTimeout):
        Faulty(store, pin, data, ()).run(operation)
    proxy.change = lambda _, reply: reply
    assert Faulty(store, pin, data, ()).run(operation)


# -- listings of Azure that contradict themselves


def _listing(*blobs: str, marker: str = "<NextMarker/>") -> str:
    return f"<EnumerationResults><Blobs>{''.join(blobs)}</Blobs>{marker}</EnumerationResults>"


def _blob(name: str, properties: str = "<Content-Length>1</Content-Length>") -> str:
    return f"<Blob><Name>{name}</Name><Properties>{properties}</Properties></Blob>"


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (_listing(marker="<NextMarker>again</NextMarker>"), "repeats a page"),
        (_listing(_blob("lies/x"), marker="<NextMarker>again</NextMarker>"), "repeats a page"),
        (_listing(_blob("elsewhere/x")), "not below the prefix"),
        (_listing(_blob("")), "without a name"),
        (_listing(_blob("lies/x"), marker=""), "incomplete"),
        ("<EnumerationResults/>", "incomplete"),
        (_listing(_blob("lies/x"))[:-5], "not valid XML"),
        (_listing(_blob("lies/\x01")), "control character"),
        ("<!DOCTYPE x>" + _listing(), "not valid XML, or too much"),
        ("<Other/>", "instead of a listing"),
    ],
)
def test_azure_invalid_listing_is_an_error(
    azure: Azurite, opened: Any, page: str, why: str
) -> None:
    with CloudProxy(azure.endpoint) as proxy:
        proxy.change = _page(200, page, XML)
        with pytest.raises(StoreError, match=why):
            opened(azure.location("lies", proxy.endpoint)).list(10)


def test_azure_listing_skips_unreadable_blobs(azure: Azurite, opened: Any) -> None:
    page = _listing(
        _blob("odd/no-size", ""),
        _blob("odd/archived", "<Content-Length>1</Content-Length><AccessTier>Archive</AccessTier>"),
        _blob("odd/folder", "<ResourceType>directory</ResourceType>"),
        '<Blob><Name Encoded="true">odd%2Fa%EF%BF%BFb</Name>'
        "<Properties><Content-Length>1</Content-Length><Etag>bad\r\ntag</Etag></Properties></Blob>",
    )
    with CloudProxy(azure.endpoint) as proxy:
        proxy.change = _page(200, page, XML)
        listing = opened(azure.location("odd", proxy.endpoint)).list(10)
    assert {each.name: each.reason for each in listing.skipped} == {
        "no-size": "the store does not say its size",
        "archived": "it is archived; have it rehydrated and attach again",
    }
    assert listing.directories == ["folder"]
    assert [(file.path, file.etag) for file in listing.files] == [("a\uffffb", "")]


# -- credentials


def test_azure_credentials(azure: Azurite, opened: Any) -> None:
    azure.put("who/x", b"1")
    for secrets in ({"account_key": ACCOUNT_KEY}, {"sas_token": f"?{sas_token()}"}):
        store = opened(azure.location("who", **secrets))
        assert store.get("x") == b"1"
        store.put("y", b"2")
    other = ACCOUNT_KEY[4:8] + ACCOUNT_KEY[4:]
    with pytest.raises(AccessDenied, match="check credentials") as refused:
        opened(azure.location("who", account_key=other)).list(10)
    assert "RequestId" not in str(refused.value)
    with pytest.raises(AccessDenied, match="the SAS token expired at 20"):
        opened(azure.location("who", sas_token=sas_token(hours=-1))).list(10)
    location = azure.location("who")
    anonymous = Location("azure", location.path, {**location.options, "anonymous": True})
    with pytest.raises(AccessDenied, match="anonymous"):
        opened(anonymous).get("x")


@pytest.mark.parametrize(
    ("kind", "options", "secrets", "why"),
    [
        ("azure", {}, {"account_key": "a2V5"}, "account_name"),
        ("azure", {"account_name": "a"}, {"account_key": "S3CR3T!"}, "base64"),
        ("azure", {"account_name": "a"}, {"sas_token": "sv=1&S3CR3T"}, "signature"),
        ("azure", {"account_name": "a", "blob_storage_authority": "a b"}, {}, "endpoint"),
        ("gcs", {}, {"access_token": "S3CR3T\n"}, "malformed"),
        ("gcs", {}, {"service_account_key": "S3CR3T"}, "JSON"),
        ("gcs", {}, {"service_account_key": '{"type": "external_account"}'}, "type"),
    ],
)
def test_malformed_options(kind: Any, options: Any, secrets: Any, why: str) -> None:
    with pytest.raises(LocationError, match=why) as caught:
        open_store(Location(kind, "bucket/x", options, secrets), TIMEOUT_S)
    assert "S3CR3T" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({}, "account.blob.core.windows.net"),
        (
            {"dfs_storage_authority": ".dfs.core.chinacloudapi.cn"},
            "account.blob.core.chinacloudapi.cn",
        ),
        ({"blob_storage_authority": "[::1]:10000"}, "[::1]:10000"),
    ],
)
def test_azure_endpoints(options: Any, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "ckptfs._store.cloud.azure.AzureStore",
        lambda client, *_: asked.append(client.endpoint[0]) or _Closed(),
    )
    options = {"account_name": "account", **options}
    open_store(Location("azure", "c/p", options, {"account_key": "a2V5"}), TIMEOUT_S)
    assert asked == [host]


class _Closed:
    name = ""


def test_an_arrow_filesystem_is_read_by_our_client(cloud: Any, proxy: CloudProxy) -> None:
    from pyarrow import fs as pafs

    if cloud.kind == "gcs":
        filesystem = pafs.GcsFileSystem(
            anonymous=True, scheme="http", endpoint_override=proxy.endpoint
        )
    else:
        filesystem = pafs.AzureFileSystem(
            ACCOUNT,
            account_key=ACCOUNT_KEY,
            blob_storage_authority=proxy.endpoint,
            dfs_storage_authority=proxy.endpoint,
            blob_storage_scheme="http",
            dfs_storage_scheme="http",
        )
    cloud.put("arrow/x", b"1")
    with closing(store_of(filesystem, f"{BUCKET}/arrow")) as store:
        assert store.list(10).files[0].etag
        assert asked(proxy) == ["list"]


def gcsfs_at(endpoint: str, **options: Any) -> Any:
    from gcsfs import GCSFileSystem

    options = {"token": "anon", "endpoint_url": f"http://{endpoint}", **options}
    return GCSFileSystem(skip_instance_cache=True, **options)


def test_a_filesystem_of_gcsfs_is_read_by_our_client(gcs: FakeGcs) -> None:
    gcs.put("gcsfs//x", b"1")
    gcs.put("gcsfs/y", b"2")
    with CloudProxy(gcs.endpoint) as proxy:
        filesystem = wrapped(gcsfs_at(proxy.endpoint, block_size=1000, project="p"))
        with closing(store_of(filesystem, f"{BUCKET}/gcsfs")) as store:
            assert {file.path for file in store.list(10).files} == {"/x", "y"}
            assert store.get("y") == b"2"
        assert asked(proxy) == ["list", "get"]


def test_tokens_of_gcsfs(tmp_path: Path) -> None:
    file = tmp_path / "key.json"
    file.write_text("{}")
    key = {"type": "authorized_user"}
    expected: list[tuple[Any, str, dict[str, Any]]] = [
        ("anon", "", {"anonymous": True}),
        (None, "anon", {"anonymous": True}),  # what gcsfs has settled on, where there is nothing
        (None, "google_default", {}),
        ("cloud", "", {}),
        (key, "", {"service_account_key": json.dumps(key)}),
        (str(file), "", {"application_credentials": str(file)}),
        ("ya29.S3CR3T", "", {"access_token": "ya29.S3CR3T"}),
    ]
    for token, method, arguments in expected:
        assert gcs_arguments({"token": token}, method) == arguments
    for token in (object(), "cache", {"type": "external_account"}):
        with pytest.raises(LocationError, match="token"):
            gcs_arguments({"token": token}, "")


def test_gcsfs_unsupported_option_is_named() -> None:
    for options in ({"requester_pays": True}, {"session_kwargs": {"trust_env": True}}):
        with pytest.raises(NotDescribable, match=next(iter(options))):
            describe(wrapped(gcsfs_at("host:1", **options)), "bucket/x", {})
