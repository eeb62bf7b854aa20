"""Each irregularity of a server × each operation: the right result, or an error that says why."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from support.fakes import MIB, pattern
from support.faultserver import Object
from support.quirkserver import ERRORS, LISTINGS, OBJECTS, QuirkServer
from support.rig import rig_in

from ckptfs._daemon.cache.object_dir import ObjectKey
from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.offload import Offload
from ckptfs._model.backoff import Backoff
from ckptfs._model.location import Location
from ckptfs._model.manifest import METADATA_NAME, Skipped
from ckptfs._store import metadata
from ckptfs._store.base import Store, pin_of
from ckptfs._store.copy import copy_directory
from ckptfs._store.request_context import ends_in
from ckptfs._store.resolve import open_store
from ckptfs._store.s3.listing import Collector, Course, Item, Page
from ckptfs._store.search import search
from ckptfs._store.versions import etag_in, time_ns_in
from ckptfs.errors import AccessDenied, CkptfsError, ObjectChanged, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MTIME_S = 1_500_000_000  # a whole minute, long ago
FILES = {
    METADATA_NAME: b'{"step": 5}',
    "a b+c": b"plus",
    "deep/er/x": b"deep",
    "deep/y": b"y",
    "empty": b"",
    "p%20q": b"percent",
    "weights": pattern(2 * MIB + 5),
    "z1": b"1",
    "z2": b"2",
    "ünï": b"unicode",
}
PLACE = "bucket/run 1"
SECRETS = {"access_key": "key", "secret_key": "S3CR3T"}
PAGED = {name for name in LISTINGS if "encod" not in name and "%" not in name}
"""Those that are tried with pages of three names, too."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def serve(stack: ExitStack, *quirks: str, page_names: int = 1000) -> QuirkServer:
    server = stack.enter_context(QuirkServer(*quirks, page_names=page_names))
    for name, data in FILES.items():
        server.objects[f"{PLACE}/{name}"] = Object(data, MTIME_S)
    return server


def location_of(server: QuirkServer) -> Location:
    options = {"endpoint_override": server.endpoint, "scheme": "http", "region": "us-east-1"}
    return Location("s3", PLACE, options, SECRETS)


def store_on(stack: ExitStack, server: QuirkServer, timeout_s: float = 5.0) -> Any:
    store = open_store(location_of(server), timeout_s)
    stack.callback(store.close)
    return store


# -- the operations; each asserts that what it gives is right


def list_all(store: Store, _: Path, __: QuirkServer) -> None:
    listing = store.list(99)
    assert {file.path: file.size for file in listing.files} == {n: len(d) for n, d in FILES.items()}
    assert not listing.skipped


def copy_all(store: Store, folder: Path, _: QuirkServer) -> None:
    copy_directory(store, folder / "copy")
    found = {n: (folder / "copy" / n).read_bytes() for n in FILES}
    assert found == FILES
    assert sum(path.is_file() for path in (folder / "copy").rglob("*")) == len(FILES)


def find(store: Store, _: Path, server: QuirkServer) -> None:
    warnings: list[str] = []
    [found] = search(store, location_of(server), warn=warnings.append)
    assert (found.metadata, warnings) == ({"step": 5}, [])


def get_metadata(store: Store, _: Path, __: QuirkServer) -> None:
    assert metadata.read(store) == {"step": 5}
    found = store.find(METADATA_NAME)
    assert found is not None
    assert found.size == len(FILES[METADATA_NAME])
    assert store.get("missing") is None
    assert store.find("missing") is None


def set_metadata(store: Store, _: Path, server: QuirkServer) -> None:
    metadata.update(store, {"more": [1, 2]})
    stored = server.objects[f"{PLACE}/{METADATA_NAME}"].data
    assert metadata.parse(stored, "") == {"step": 5, "more": [1, 2]}


OPERATIONS: dict[str, Callable[[Store, Path, QuirkServer], None]] = {
    "list": list_all,
    "copy": copy_all,
    "find": find,
    "get": get_metadata,
    "set": set_metadata,
}
MEETS = {
    "list": {"list", "copy", "find"},
    "read": {"copy"},
    "part": set(),  # these files are copied by one request each
    "all": {"copy", "find", "get", "set"},
    "put": {"set"},
}
"""The operations that meet an irregularity of one kind."""


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("quirk", [*LISTINGS, *OBJECTS])
def test_each_irregularity_in_each_operation(
    stack: ExitStack, tmp_path: Path, quirk: str, operation: str
) -> None:
    for page_names in (1000, 3) if quirk in PAGED else (1000,):
        server = serve(stack, quirk, page_names=page_names)
        store = store_on(stack, server)
        OPERATIONS[operation](store, tmp_path / str(page_names), server)
        limit = 3 * len(FILES) if operation == "list" else 12 * len(FILES)
        assert len(server.requests) <= limit, "it should not need that many requests"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("quirk", ERRORS)
def test_each_contradiction_in_each_operation(
    stack: ExitStack, tmp_path: Path, quirk: str, operation: str
) -> None:
    kind, text = ERRORS[quirk]
    server = serve(stack, quirk, page_names=3)
    store = store_on(stack, server)
    if operation not in MEETS[kind]:
        if not (quirk == "gzip on the way" and operation in ("find", "get", "set")):
            OPERATIONS[operation](store, tmp_path, server)
        return
    with pytest.raises(CkptfsError) as caught:
        OPERATIONS[operation](store, tmp_path, server)
    assert type(caught.value) is StoreError, caught.value
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("copy/weights"))
    assert len(server.requests) < 1010


@pytest.mark.parametrize(
    "quirk", [*OBJECTS, *(q for q in ERRORS if ERRORS[q][0] in ("read", "part"))]
)
async def test_each_irregularity_in_reads_of_the_daemon(
    stack: ExitStack, tmp_path: Path, quirk: str
) -> None:
    server = serve(stack, quirk)
    store = store_on(stack, server)
    listed = {file.path: file for file in store.list(99).files}
    before = 0
    async with rig_in(tmp_path, Offload(4)) as rig:
        for name in ("weights", "z1"):
            pin = pin_of(listed[name])
            for _ in range(2):  # the second one finds the blocks in the cache
                file = RemoteFile(store, ObjectKey("s", name, pin.size, pin.mtime_ns), pin)
                rig.files.append(file)
                with rig.fetcher.opened(file):
                    if quirk in ERRORS and not (quirk == "ranges ignored" and name == "z1"):
                        with pytest.raises(StoreError, match=r"^[^\n]*$") as caught:
                            await rig.read(file, pin.size - 1, 1)
                        assert ERRORS[quirk][1] in str(caught.value)
                    else:
                        read = [await rig.read(file, o, 1) for o in range(0, pin.size, MIB)]
                        assert b"".join(read) == FILES[name][::MIB]
                        await rig.quiet()
                        before = len(server.requests)
                        assert await rig.read(file, 0, pin.size) == FILES[name]
            if quirk not in ERRORS:
                reads = [r for r in server.requests[before:] if "range" in r[2]]
                assert not reads, "the second attachment should use the cache"


VERSIONED = [name for name in OBJECTS if "403" not in name and "PUT" not in name]


@pytest.mark.parametrize("when", ["before the first read", "between two reads"])
@pytest.mark.parametrize("quirk", VERSIONED)
async def test_overwritten_object_is_stale_on_each_server(
    stack: ExitStack, tmp_path: Path, quirk: str, when: str
) -> None:
    server = serve(stack, quirk)
    store = store_on(stack, server)
    pin = next(pin_of(file) for file in store.list(99).files if file.path == "weights")
    async with rig_in(tmp_path, Offload(4)) as rig:
        file = RemoteFile(store, ObjectKey("s", "weights", pin.size, pin.mtime_ns), pin)
        rig.files.append(file)
        with rig.fetcher.opened(file):
            if when == "between two reads":
                assert await rig.read(file, 0, 5) == FILES["weights"][:5]
                await rig.quiet()
            other = pattern(pin.size, 7)
            is_timeless = quirk == "no times"
            server.objects[f"{PLACE}/weights"] = Object(other, MTIME_S + (not is_timeless) * 60)
            with pytest.raises(ObjectChanged):
                await rig.read(file, 2 * MIB, 5)
        await rig.quiet()


@pytest.mark.parametrize("quirk", ["no ETags", "weak ETags"])
def test_an_object_of_this_second_is_read_when_the_second_is_over(
    stack: ExitStack, quirk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(stack, quirk)
    store = store_on(stack, server)
    clock = [MTIME_S + 0.3]
    slept: list[float] = []

    def sleep(seconds: float) -> None:  # the object is overwritten once more in its second
        slept.append(seconds)
        clock[0] += seconds
        if "no ETags" in quirk:
            server.objects[f"{PLACE}/z1"] = Object(b"9", MTIME_S)

    fake = SimpleNamespace(sleep=sleep, time=lambda: clock[0])
    monkeypatch.setattr("ckptfs._store.s3.store.time", fake)
    pin = next(pin_of(file) for file in store.list(99).files if file.path == "z1")
    pin = store.confirm(pin)
    assert slept == [pytest.approx(1.7)]
    buffer = bytearray(1)
    assert not store.read_into(pin, 0, memoryview(buffer))
    assert buffer == server.objects[f"{PLACE}/z1"].data
    assert store.confirm(pin) == pin
    assert len(slept) == 1
    server.objects[f"{PLACE}/z1"] = Object(b"8", MTIME_S + 2)
    with pytest.raises(ObjectChanged):
        store.confirm(pin)


def test_a_slow_first_page_is_waited_for(stack: ExitStack, tmp_path: Path) -> None:
    server = serve(stack)
    server.first_page_s = 0.5
    store = store_on(stack, server, timeout_s=0.1)
    list_all(store, tmp_path, server)
    assert len(server.requests) == 1
    with ends_in(0.2), pytest.raises(StoreError, match="did not answer"):
        store.list(99)


def test_names_that_xml_cannot_carry(stack: ExitStack) -> None:
    server = serve(stack)
    server.objects[f"{PLACE}/bell\x07"] = Object(b"!", MTIME_S)
    assert "bell\x07" in {file.path for file in store_on(stack, server).list(99).files}
    server.quirks.add("encoding ignored")
    with pytest.raises(StoreError, match="has a control character, rename or remove that object"):
        store_on(stack, server).list(99)


def test_s3_listing_of_very_many_pages_ends(stack: ExitStack) -> None:
    server = serve(stack, "no token")
    for i in range(20_000):
        server.objects[f"{PLACE}/many/{i:06}"] = Object(b"", MTIME_S)
    assert len(store_on(stack, server).list(100_000).files) == 20_000 + len(FILES)


# -- archived objects


def test_archived_objects_are_left_out_and_named(stack: ExitStack, tmp_path: Path) -> None:
    server = serve(stack)
    server.archived = {
        f"{PLACE}/z1": "GLACIER",
        f"{PLACE}/z2": "DEEP_ARCHIVE",
        f"{PLACE}/empty": "GLACIER_IR",
        f"{PLACE}/weights": "GLACIER",
    }
    server.restored = {f"{PLACE}/weights"}
    store = store_on(stack, server)
    listing = store.list(99)
    assert {file.path for file in listing.files} == FILES.keys() - {"z1", "z2"}
    assert listing.skipped == [
        Skipped("z1", "it is archived (GLACIER); restore it, and then attach again", True),
        Skipped("z2", "it is archived (DEEP_ARCHIVE); restore it, and then attach again", True),
    ]
    with pytest.raises(StoreError, match=r"z1 in s3://.*cannot be copied: it is archived"):
        copy_directory(store, tmp_path / "copy")
    copy_directory(store, tmp_path / "copy", include=["weights", "e*"])
    assert (tmp_path / "copy/weights").read_bytes() == FILES["weights"]


@pytest.mark.parametrize(
    ("status", "code", "message", "error", "text"),
    [
        (403, "InvalidObjectState", "", StoreError, "is archived .*; restore it"),
        (403, "RequestTimeTooSkewed", "", AccessDenied, "clocks of this machine .*; set this"),
        (403, "AccessDenied", "Access Denied", AccessDenied, "requester_pays=true"),
        (403, "AccessDenied", "Bucket is requester pays", AccessDenied, "add requester_pays=true"),
        (403, "AccessDenied", "not authorized: kms:Decrypt", AccessDenied, "allow kms:Decrypt"),
        (400, "KMS.DisabledException", "", StoreError, "KMS key of the object"),
        (403, "InvalidAccessKeyId", "", AccessDenied, "check the access key"),
        (403, "SignatureDoesNotMatch", "", AccessDenied, "check the secret key"),
        (400, "ExpiredToken", "", AccessDenied, "have expired .*; renew them"),
        (400, "InvalidRequest", "Server Side Encryption needs", StoreError, "SSE-C"),
        (403, "AllAccessDisabled", "", AccessDenied, "ask the owner"),
        (400, "AuthorizationHeaderMalformed", "", AccessDenied, "another region"),
        (301, "PermanentRedirect", "", StoreError, "another region .* name its region or endpoint"),
        (503, "SlowDown", "", StoreError, "asks for fewer requests .*connections_max"),
        (400, "ThrottlingException", "", StoreError, "asks for fewer requests"),
        (509, "", "", StoreError, "busy or broken"),
        (507, "", "", StoreError, "no space left"),
        (404, "NoSuchBucket", "", CkptfsError, "there is no such bucket"),
        (403, "SecondLevelDomainForbidden", "", StoreError, "in the host.s name .*as a name"),
    ],
)
@pytest.mark.parametrize("operation", ["read", "check", "find", "get", "put"])
def test_each_error_says_what_to_do(
    stack: ExitStack,
    status: int,
    code: str,
    message: str,
    error: type[CkptfsError],
    text: str,
    operation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HEAD has no body, so its reason is asked for by another request."""
    monkeypatch.setattr("ckptfs._store.s3.retry.BACKOFF", Backoff(0.001, 10.0))
    server = serve(stack)
    store = store_on(stack, server)
    pin = next(pin_of(file) for file in store.list(99).files if file.path == "z1")
    server.codes[f"{PLACE}/z1"] = (status, code, message)
    if operation in ("check", "find") and status not in (400, 403):
        return  # HEAD says all that is to be known, or is repeated
    call: dict[str, Callable[[], object]] = {
        "read": lambda: store.read_into(pin, 0, memoryview(bytearray(1))),
        "check": lambda: store.confirm(pin),
        "find": lambda: store.find("z1"),
        "get": lambda: store.get("z1"),
        "put": lambda: store.put("z1", b"x"),
    }
    with pytest.raises(error, match=text) as caught:
        call[operation]()
    assert "\n" not in str(caught.value)


# -- which page comes next


def page(keys: str = "", more: str = "yes", token: str = "", **about: Any) -> Page:
    items = [Item(key, 1, 0, "", "") for key in keys]
    known = {"prefixes": [], "marker": "", "is_full": False}
    return Page(items=items, more=more, token=token, **{**known, **about})  # type: ignore[arg-type]


ASKED_BY_NAME = {"start-after": "b", "marker": "b"}


@pytest.mark.parametrize(
    ("pages", "asked"),
    [
        ([page("ab", "no")], [None]),
        ([page("", "no")], [None]),
        ([page("", "unsaid")], [None]),
        ([page("ab", "unsaid")], [ASKED_BY_NAME]),
        ([page("ab", "unsaid"), page("", "unsaid")], [{}, None]),
        ([page("ab", "unsaid"), page("ab", "unsaid")], [{}, {"marker": "b"}]),
        ([page("ab", "unsaid")] * 3, [{}, {}, None]),
        ([page("ab", token="1"), page("cd", "unsaid"), page("ab", token="1")], [{}, {}, {}]),
        ([page("ab"), page("cd", "unsaid"), page("ab"), page("ab")], [{}, {}, {}, None]),
        ([page("ab", token="1")], [{"continuation-token": "1"}]),
        ([page("ab", "unsaid", token="1")], [{"continuation-token": "1"}]),
        ([page("ab", "no", token="1")], [{"continuation-token": "1"}]),
        ([page("ab", "no", token="1"), page("ab", "no", token="1")], [{}, None]),
        ([page("ab", "no", token="1"), page("", "no", token="2")], [{}, None]),
        ([page("ab")], [ASKED_BY_NAME]),
        ([page("ab", "unsaid", marker="b")], [ASKED_BY_NAME]),
        ([page("ab", "unsaid", is_full=True)], [ASKED_BY_NAME]),
        ([page("ab", "unsaid", is_full=True), page("", "unsaid", token="5")], [{}, None]),
        ([page("ab", token="1"), page(token="2")], [{}, {"continuation-token": "2"}]),
        ([page("ab", token="1"), page(token="1")], [{}, ASKED_BY_NAME]),
        ([page("ab", token="1"), page("ab", token="2")], [{}, ASKED_BY_NAME]),
        ([page("ab", "unsaid", token="1"), page("ab", "unsaid", token="1")], [{}, ASKED_BY_NAME]),
        ([page("ab", token="1"), page("cd", token="1")], [{}, {"continuation-token": "1"}]),
        ([page("ab"), page("ab")], [{}, {"marker": "b"}]),
        ([page("ab"), page("ab", marker="opaque")], [{}, {"marker": "opaque"}]),
        ([page("ab"), page("ab"), page("ab")], [{}, {}, "listing is incomplete"]),
        ([page()], ["listing is incomplete"]),
        ([page("ab", "unsaid", is_full=True)] * 3, [{}, {}, "listing is incomplete"]),
    ],
)
def test_s3_listing_asks_for_the_next_page(pages: list[Page], asked: list[Any]) -> None:
    course, collector = Course("", "x"), Collector("", "x")
    for found, expected in zip(pages, asked, strict=True):
        is_new = collector.take_in(found, "")
        if isinstance(expected, str):
            with pytest.raises(StoreError, match=expected):
                course.after(found, is_new)
            continue
        query = course.after(found, is_new)
        assert (query is None) == (expected is None)
        assert (expected or {}).items() <= (query or {}).items()
        if set(expected or ()) == {"marker"}:
            assert "list-type" not in (query or {})


def test_a_name_that_comes_again_is_the_later_object() -> None:
    collector = Collector("", "x")
    assert collector.take_in(page("bc"), "")
    later = [Item("b", 7, 0, '"new"', ""), Item("a", 1, 0, "", ""), Item("c", 1, 0, "", "")]
    assert collector.take_in(page()._replace(items=later), "")
    assert not collector.take_in(page("abc"), "")
    assert sorted(file.path for file in collector.listing.files) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("2026-01-02T03:04:05.670Z", 1767323045_670000000),
        ("2026-01-02T03:04:05Z", 1767323045_000000000),
        ("2026-01-02T03:04:05.123456789Z", 1767323045_123456789),
        ("2026-01-02 03:04:05", 1767323045_000000000),
        ("2026-01-02T05:04:05.5+02:00", 1767323045_500000000),
        ("2026-01-02T05:04:05+0200", 1767323045_000000000),
        ("Fri, 02 Jan 2026 03:04:05 GMT", 1767323045_000000000),
        ("Fri, 02 Jan 2026 03:04:05 -0000", 1767323045_000000000),
        ("0001-01-01T00:00:00Z", 0),
        ("2026-13-45T03:04:05Z", 0),
        ("yesterday", 0),
        ("", 0),
    ],
)
def test_times_of_every_form(text: str, time_ns: int) -> None:
    assert time_ns_in(text) == time_ns


@pytest.mark.parametrize(
    ("text", "etag"),
    [
        ('"v1"', '"v1"'),
        ("v1", '"v1"'),
        (' "v1" ', '"v1"'),
        ('W/"v1"', 'W/"v1"'),
        ('w/"v1"', 'W/"v1"'),
        ("W/v1", 'W/"v1"'),
        ('""', ""),
        ("", ""),
        ('"two words"', ""),
        ('"a\r\nx-evil: 1"', ""),
    ],
)
def test_etags_of_every_form(text: str, etag: str) -> None:
    assert etag_in(text) == etag
