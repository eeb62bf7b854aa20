"""A Store over HTTP: names, sizes, versions and ranges of servers as they are."""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fakes import pattern
from support.httpserver import HttpServer
from support.reading import read_range

from ckptfs._model.backoff import Backoff
from ckptfs._model.manifest import ListedFile
from ckptfs._store.base import Pin, pin_of
from ckptfs._store.copy import copy_directory
from ckptfs._store.http import store as http
from ckptfs._store.http import tree
from ckptfs._store.http.client import HttpOptions
from ckptfs._store.http.store import HttpStore
from ckptfs._store.http.tree import encoded_url
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

DATA = pattern(5000)
MTIME_S = 1_700_000_000


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings that are tried again do not wait."""
    monkeypatch.setattr(tree, "_BACKOFF", Backoff(0.0, 0.0))


_opened: list[HttpStore] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with HttpServer() as server:
        server.put("/run/a", DATA)
        server.put("/run/sub/b", b"678")
        server.put("/run/sub/empty", b"")
        yield server


def store_at(
    server: HttpServer, path: str = "/run", options: HttpOptions | None = None
) -> HttpStore:
    store = HttpStore(server.url + path, "http://host/run", options or HttpOptions(), 5.0)
    _opened.append(store)
    return store


@pytest.fixture
def store(server: HttpServer) -> Iterator[HttpStore]:
    store = store_at(server)
    yield store
    store.close()


def pin(store: HttpStore, path: str = "a") -> Pin:
    return next(pin_of(file) for file in store.list(100).files if file.path == path)


def read(store: HttpStore, pin: Pin, offset: int = 0, length: int | None = None) -> bytes:
    data, is_confirmed = read_range(store, pin, offset, length)
    assert is_confirmed is False
    return data


# -- names


def test_a_listing_has_names_sizes_times_and_versions(server: HttpServer, store: HttpStore) -> None:
    listing = store.list(5)
    assert sorted(file.path for file in listing.files) == ["a", "sub/b", "sub/empty"]
    assert listing.directories == ["sub"]
    assert listing.skipped == []
    by_path = {file.path: file for file in listing.files}
    assert by_path["a"].size == 5000
    assert by_path["a"].mtime_ns == MTIME_S * 10**9
    assert by_path["a"].etag.startswith('"')
    assert by_path["sub/empty"].size == 0
    assert store.find("a") == by_path["a"]
    assert store.find("none") is None
    with pytest.raises(LimitExceeded, match="more than files_max = 2"):
        store.list(2)
    assert all(headers["accept-encoding"] == "identity" for headers in server.seen)


NAMES = [
    "step=100.bin",
    "a b",
    "a%20b",
    "100%",
    "a+b",
    "a#b",
    "q?x=1",
    "a&amp;b",
    "<t>",
    "a'b\"c",
    "a;b,c:d@e",
    "größe",
    "gro\u0308ße",
    "模型",
    "..a",
    "a\\b",
    "tab\t",
    "[1]{2}(3)",
    "~a*b!$",
]


def test_names_are_shown_decoded_and_asked_for_encoded(
    server: HttpServer, store: HttpStore
) -> None:
    for number, name in enumerate(NAMES):
        server.put(f"/run/{name}/{name}", pattern(1000, number))
    pins = {file.path: pin_of(file) for file in store.list(100).files}
    for number, name in enumerate(NAMES):
        assert read(store, pins[f"{name}/{name}"]) == pattern(1000, number)
        assert store.get(f"{name}/{name}") == pattern(1000, number)


def test_names_that_no_directory_can_hold_are_left_out(
    server: HttpServer, store: HttpStore
) -> None:
    links = "a", "a%2Fb", "line%0A", "bad%FF", "%2e%2e", "nul%00", "x%2f..%2f..%2fetc"
    page = "".join(f'<a href="{link}">{link}</a>' for link in links)
    server.index = lambda below: page.encode() if below == "/run/" else None  # type: ignore[method-assign]
    listing = store.list(10)
    assert [file.path for file in listing.files] == ["a"]
    slash = "the name holds a slash"
    assert {skipped.name: skipped.reason for skipped in listing.skipped} == {
        "a/b": slash,
        "x/../../etc": slash,
        "line\\n": "the name holds a NUL or newline",
        "nul\\x00": "the name holds a NUL or newline",
        "bad\\xff": "the name is not valid UTF-8",
        "..": "the name has a '.' or '..' component",
    }


def test_index_pages_link_to_more_than_files(server: HttpServer, store: HttpStore) -> None:
    page = f"""<html><base href="{server.url}/run/"><a href="?C=N;O=D">Name</a><a href="/">Top</a>
        <a href="../">Up</a><a href="https://elsewhere/run/x">x</a><a href="#end">end</a><a>no</a>
        <a href="javascript:alert()">j</a><a href="http://[">broken</a><a href="./a?download">d</a>
        <a href="./a">a</a><a href="/run/a">a</a><a href="{server.url}/run/a">a</a>
        <a href="sub/">sub</a><a href="sub/b">b</a><A HREF='none'>dead</A><a href="gone/">g</a>
        </html>"""
    index = server.index
    server.index = lambda below: page.encode() if below == "/run/" else index(below)  # type: ignore[method-assign]
    listing = store.list(10)
    assert sorted(file.path for file in listing.files) == ["a", "sub/b", "sub/empty"]
    assert listing.directories == ["sub"]
    nowhere = "the link leads nowhere"
    assert {s.name: s.reason for s in listing.skipped} == {"none": nowhere, "gone": nowhere}


@pytest.mark.parametrize("start", ["<html><body>", "<BODY>", ""])
def test_a_page_that_lacks_its_end_is_cut(server: HttpServer, store: HttpStore, start: str) -> None:
    """A page without any of these tags is as long as its answer."""
    page = f'{start}<h1>Index of /run/</h1><a href="a">a</a>'
    server.index = lambda _: page.encode()  # type: ignore[method-assign]
    if start:
        with pytest.raises(StoreUnavailable, match="the index page is cut"):
            store.list(10)
    else:
        assert [file.path for file in store.list(10).files] == ["a"]


def test_the_root_is_as_a_person_types_it(server: HttpServer) -> None:
    server.put("/my run/größe 100%/a", DATA)
    for path in ("/my run/größe 100%/", "/my%20run/gr%C3%B6%C3%9Fe%20100%25", "/my run/größe 100%"):
        assert [file.path for file in store_at(server, path).list(9).files] == ["a"]
    assert encoded_url("HTTP://Host/a//b+c=d/") == "http://Host/a//b+c=d"
    assert encoded_url("https://host/") == "https://host"
    for url in ("http://host/run#2", "http://host/run?x", "ftp://host/run", "http:///run"):
        with pytest.raises(LocationError):
            encoded_url(url)


def test_what_cannot_be_attached(server: HttpServer) -> None:
    with pytest.raises(CheckpointNotFound, match="http://host/run does not exist"):
        store_at(server, "/none").list(10)
    with pytest.raises(CheckpointIsFile, match="http://host/run is a file"):
        store_at(server, "/run/a").list(10)
    assert store_at(server, "/empty").list(10).files == []
    server.oddities.add("pages without a title")
    with pytest.raises(StoreError, match="is not an index page"):
        store_at(server, "/empty").list(10)
    assert len(store_at(server).list(10).files) == 3  # its links say enough


# -- each oddity in each operation

Expected = "type[CkptfsError] | None"
LISTED = {"a": 5000, "sub/b": 3, "sub/empty": 0}

ODDITIES: dict[str, "tuple[type[CkptfsError] | None, type[CkptfsError] | None]"] = {
    # The results of a read of a range, and of the whole file; None for the bytes.
    "no ETags": (None, None),
    "no times": (None, None),
    "weak ETags": (None, None),
    "weak in the first second": (None, None),
    "ETags of second and size": (ObjectChanged, ObjectChanged),
    "GET has other ETags": (None, None),
    "HEAD without a length": (None, None),
    "HEAD of no body": (None, None),
    "no ranges": (None, None),
    "a range as 200": (StoreError, None),
    "another range": (StoreError, None),
    "no Content-Range": (StoreError, StoreError),
    "total unknown": (None, None),
    "small parts": (None, None),
    "416 for all": (StoreError, StoreError),
    "chunked": (None, None),
    "gzip": (StoreError, StoreError),
    "elsewhere": (None, None),
    "login": (AccessDenied, AccessDenied),
    "login page": (StoreError, StoreError),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_an_odd_server_gives_right_bytes_or_an_error(
    server: HttpServer, store: HttpStore, oddity: str
) -> None:
    """One that becomes odd after it was listed."""
    pinned = pin(store)
    server.oddities.add(oddity)
    for (offset, length), expected in zip(((1000, 3000), (0, 5000)), ODDITIES[oddity], strict=True):
        if expected is None:
            assert read(store, pinned, offset, length) == DATA[offset : offset + length]
            continue
        with pytest.raises(CkptfsError) as caught:
            read(store, pinned, offset, length)
        # A page in the place of a file looks like another version of it, which HEAD says.
        assert type(caught.value) in (expected, ObjectChanged)
        assert "a in http://host/run" in str(caught.value)
        assert "S3CR3T" not in str(caught.value)


@pytest.mark.parametrize("oddity", ODDITIES)
def test_an_odd_server_is_listed_or_says_why_not(server: HttpServer, oddity: str) -> None:
    server.oddities.add(oddity)
    if oddity.startswith("login"):
        with pytest.raises(AccessDenied, match="login"):
            store_at(server).list(10)
        return
    store = store_at(server)
    listing = store.list(10)
    if oddity == "gzip":
        assert {skipped.reason for skipped in listing.skipped} == {
            "the server does not give its size"
        }
        return
    assert {file.path: file.size for file in listing.files} == LISTED
    pins = {file.path: pin_of(file) for file in listing.files}
    for pinned in pins.values():
        store.confirm(store.confirm(pinned))
    if ODDITIES[oddity][0] in (None, ObjectChanged):
        assert read(store, pins["a"], 1000, 3000) == DATA[1000:4000]
        assert read(store, pins["sub/b"]) == b"678"


@pytest.mark.parametrize("status", [400, 403, 405, 500, 501])
def test_a_server_without_head_is_asked_for_one_byte(
    server: HttpServer, store: HttpStore, status: int
) -> None:
    server.statuses["HEAD"] = [status]
    assert {file.path: file.size for file in store.list(10).files} == LISTED
    assert store.confirm(pin(store)) == pin(store)


def test_http_read_far_into_file_without_ranges_is_an_error(
    server: HttpServer, store: HttpStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_SKIP_BYTES_MAX", 1000)
    server.oddities.add("no ranges")
    pinned = pin(store)
    assert read(store, pinned, 1000, 7) == DATA[1000:1007]
    with pytest.raises(StoreError, match="the server cannot send a part of a file; copy"):
        read(store, pinned, 1001, 7)


# -- versions


@pytest.mark.parametrize("oddity", ["", "no ETags", "weak ETags", "GET has other ETags"])
@pytest.mark.parametrize("change", ["longer", "shorter", "written again", "deleted"])
def test_each_change_is_a_change(
    server: HttpServer, store: HttpStore, change: str, oddity: str
) -> None:
    server.oddities.add(oddity)
    pinned = pin(store)
    assert store.confirm(pinned) == pinned
    if change == "deleted":
        del server.files["/run/a"]
    else:
        sizes = {"longer": 5001, "shorter": 4000, "written again": 5000}
        server.put("/run/a", pattern(sizes[change], 7), MTIME_S + 1)
    for use in (
        lambda: store.confirm(pinned),
        lambda: read(store, pinned),
        lambda: read(store, pinned, 4500, 100),
    ):
        with pytest.raises(ObjectChanged, match=r"a in http://host/run changed .* attach"):
            use()


def test_http_untouched_file_never_changes(server: HttpServer, store: HttpStore) -> None:
    """Apache calls an ETag weak in the first second, and gateways tag GET and HEAD otherwise."""
    server.put("/run/a", DATA, server.now_s)
    server.oddities.add("weak in the first second")
    pinned = pin(store)
    server.now_s += 10
    assert store.confirm(pinned) == pinned
    assert read(store, pinned) == DATA
    server.oddities.add("GET has other ETags")
    assert read(store, pinned) == DATA
    server.oddities.add("no ETags")
    assert store.confirm(pinned) == pinned


def test_an_answer_within_the_second_of_its_version_is_waited_for(
    server: HttpServer, store: HttpStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds_s: float) -> None:
        slept.append(seconds_s)
        server.now_s += int(seconds_s)
        if len(slept) == 1:
            server.put("/run/a", pattern(5000, 2), server.files["/run/a"].mtime_s)

    monkeypatch.setattr(http.time, "sleep", sleep)
    server.oddities.add("ETags of second and size")
    server.put("/run/a", DATA, server.now_s)
    pinned = pin(store)
    assert read(store, pinned) == pattern(5000, 2)  # the last of that second, and no other
    assert slept == [1.0, 1.0]
    server.oddities.remove("ETags of second and size")
    server.put("/run/a", DATA, server.now_s)
    assert read(store, pin(store)) == DATA
    assert len(slept) == 2


@pytest.mark.parametrize("tags", ["", "no ETags", "ETags of second and size"])
def test_a_thousand_overwrites_over_http_in_the_middle_of_reads(
    server: HttpServer, store: HttpStore, tags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within one second: what was read and then confirmed is of one version, and the same
    one for each read."""
    chance = random.Random(len(tags))
    serial = itertools.count(1)
    overwrites = right = stale = 0
    server.oddities.add(tags)

    def version() -> bytes:
        return b"%08d" % next(serial) * 625

    def moment() -> None:
        nonlocal overwrites
        if chance.random() < 0.3:
            overwrites += 1
            server.now_s += chance.choice([0, 0, 1])
            server.put("/run/a", version(), server.now_s)

    def sleep(_: float) -> None:
        server.now_s += 1
        moment()

    monkeypatch.setattr(http.time, "sleep", sleep)
    while overwrites < 340:
        server.now_s += 1
        server.put("/run/a", version(), server.now_s)
        server.during = lambda: None
        listed = pin(store)
        server.during = moment
        versions = set[bytes]()
        for _ in range(3):
            try:
                got = read(store, listed)
                store.confirm(listed)
            except (ObjectChanged, StoreUnavailable):
                stale += 1
                break
            assert got == got[:8] * 625
            versions.add(got)
            right += 1
        assert len(versions) <= 1
    assert right > 20
    assert stale > 20


# -- errors


ERRORS: list[tuple[int, type[CkptfsError]]] = [
    (401, AccessDenied),
    (403, AccessDenied),
    (407, AccessDenied),
    (408, StoreTimeout),
    (418, StoreError),
    (429, StoreUnavailable),
    (500, StoreUnavailable),
    (501, StoreError),
    (503, StoreUnavailable),
]


@pytest.mark.parametrize(("status", "expected"), ERRORS)
def test_errors_by_their_status(
    server: HttpServer, store: HttpStore, status: int, expected: type[CkptfsError]
) -> None:
    pinned = pin(store)
    server.statuses = {"GET": [status], "HEAD": [status], "PUT": [status]}
    uses: list[Callable[[], object]] = [
        lambda: store.list(10),
        lambda: store.confirm(pinned),
        lambda: read(store, pinned),
        lambda: store.get("a"),
        lambda: store.find("a"),
    ]
    if status not in (501, 500):
        uses.append(lambda: store.put("a", b"1"))
    for use in uses:
        with pytest.raises(expected) as caught:
            use()
        assert type(caught.value) is expected
        assert "http://host/run" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_one_cut_answer_of_many_ends_no_listing(server: HttpServer, store: HttpStore) -> None:
    for cuts in (1, 2):
        server.cuts = cuts
        assert len(store.list(10).files) == 3
        assert server.cuts == 0
    server.statuses["HEAD /run/a"] = [503, 200]
    server.statuses["GET /run/sub/"] = [502, 503, 0]
    del server.statuses["GET /run/sub/"]
    assert len(store.list(10).files) == 3
    server.cuts = 100
    with pytest.raises(StoreUnavailable, match="its answer is cut"):
        store.list(10)
    server.cuts = 0


@pytest.mark.parametrize("oddity", ["", "chunked", "no ranges"])
def test_http_cut_answer_is_an_error(server: HttpServer, store: HttpStore, oddity: str) -> None:
    pinned = pin(store)
    server.oddities.add(oddity)
    for use in (lambda: read(store, pinned), lambda: store.get("a")):
        server.cuts = 1
        with pytest.raises(StoreUnavailable) as caught:
            use()
        assert type(caught.value) is StoreUnavailable
        assert use() == DATA


def test_a_server_that_is_not_there(server: HttpServer, store: HttpStore) -> None:
    pinned = pin(store)
    store.close()
    server.__exit__()
    for use in (lambda: store.list(9), lambda: store.confirm(pinned), lambda: read(store, pinned)):
        with pytest.raises(StoreUnavailable, match=r"cannot reach the server.*refused"):
            use()
    server.__enter__()


def test_headers_go_to_the_server_that_they_are_for(server: HttpServer) -> None:
    secret = HttpOptions(headers={"Authorization": "S3CR3T", "X-Key": "k"})
    store = store_at(server, options=secret)
    with HttpServer() as other:
        other.put("/b", b"12345")
        server.redirects["/run/there"] = f"{other.url}/b"
        server.redirects["/run/here"] = "/run/a"
        assert store.get("there") == b"12345"
        assert not {"authorization", "x-key"} & other.seen[-1].keys()
    assert store.get("here") == DATA
    assert server.seen[-1]["authorization"] == "S3CR3T"
    assert server.seen[-1]["x-key"] == "k"
    assert "S3CR3T" not in repr(secret)


def test_a_proxy_is_asked_with_its_own_credentials(server: HttpServer) -> None:
    proxy = server.url.replace("http://", "http://me:S3CR3T%40@")
    store = HttpStore("http://host.invalid/run", "name", HttpOptions(proxy=proxy), 5.0)
    assert len(store.list(10).files) == 3
    assert server.requests[0] == "GET http://host.invalid/run/"
    assert server.seen[0]["proxy-authorization"] == "Basic bWU6UzNDUjNUQA=="
    server.statuses["GET"] = [407]
    with pytest.raises(AccessDenied, match="the proxy refused access") as caught:
        store.list(10)
    server.__exit__()
    store.close()
    with pytest.raises(
        StoreUnavailable, match=r"the proxy http://.*refused.*; check the proxy"
    ) as unreachable:
        store.list(10)
    server.__enter__()
    assert "S3CR3T" not in f"{caught.value} {unreachable.value}"


def test_cut_answers_end_no_copy(server: HttpServer, store: HttpStore, tmp_path: Path) -> None:
    server.cuts = 3
    copy_directory(store, tmp_path / "copy")
    assert server.cuts == 0
    assert (tmp_path / "copy" / "a").read_bytes() == DATA
    assert (tmp_path / "copy" / "sub" / "b").read_bytes() == b"678"


@pytest.mark.parametrize("target", ["/run/round", "ftp://host/x", "http://["])
def test_redirects_that_lead_nowhere(server: HttpServer, store: HttpStore, target: str) -> None:
    server.redirects["/run/round"] = target
    with pytest.raises(StoreError):
        store.get("round")
    server.redirects.clear()
    server.statuses["GET /run/a"] = [302]
    with pytest.raises(StoreError, match="redirects to a bad URL"):
        store.get("a")


PAGES = {
    "Apache": """<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 3.2 Final//EN"><html><head>
        <title>Index of /run</title></head><body><h1>Index of /run</h1><table>
        <tr><th><a href="?C=N;O=D">Name</a></th><th><a href="?C=S;O=A">Size</a></th></tr>
        <tr><td><a href="/">Parent Directory</a></td></tr>
        <tr><td><img src="/i.gif" alt="[   ]"></td><td><a href="a">a</a></td><td>4.9K</td></tr>
        <tr><td><a href="sub/">sub/</a></td></tr></table></body></html>""",
    "IIS": """<html><head><title>host - /run/</title></head><body><H1>host - /run/</H1><hr>
        <pre><A HREF="/">[To Parent Directory]</A><br><br> 1/1/2026 1:00 AM 5000
        <A HREF="/run/a">a</A><br> &lt;dir&gt; <A HREF="/run/sub/">sub</A><br></pre>
        </body></html>""",
    "Caddy": """<!DOCTYPE html><html><head><title>run/</title></head><body><a href="../">Up</a>
        <a href="?sort=name&order=desc">Name</a><a href="./a">a</a><a href="./sub/">sub</a>
        </html>""",
    "lighttpd": """<!DOCTYPE html><html><head><title>Index of /run/</title></head><body>
        <tr class="d"><td class="n"><a href="../">..</a>/</td></tr>
        <tr class="d"><td class="n"><a href="sub/">sub</a>/</td></tr>
        <tr><td class="n"><a href="a">a</a></td></tr></body></html>""",
}


@pytest.mark.parametrize("program", PAGES)
def test_index_pages_of_programs(server: HttpServer, store: HttpStore, program: str) -> None:
    page, index = PAGES[program].encode(), server.index
    server.index = lambda below: page if below == "/run/" else index(below)  # type: ignore[method-assign]
    listing = store.list(10)
    assert {file.path: file.size for file in listing.files} == LISTED
    assert listing.skipped == []


def test_files_may_lie_behind_a_redirect(server: HttpServer, store: HttpStore) -> None:
    server.oddities.add("elsewhere")
    pinned = pin(store)
    assert read(store, pinned, 10, 10) == DATA[10:20]
    server.statuses["GET /other/run/a"] = [403]
    with pytest.raises(AccessDenied, match=r"HTTP status 403 of .*/other/run/a") as caught:
        read(store, pinned)
    assert "S3CR3T" not in str(caught.value)


# -- writing


def test_small_objects_as_a_whole(server: HttpServer, store: HttpStore) -> None:
    assert store.get("none") is None
    store.put("größe", b"first")
    assert store.get("größe") == b"first"
    assert store.find("größe") == ListedFile(
        "größe", 5, server.now_s * 10**9, pin(store, "größe").etag
    )
    for status in (405, 501):
        server.statuses["PUT"] = [status]
        with pytest.raises(AccessDenied, match="the server refuses PUT; change"):
            store.put("a", b"1")
    server.statuses["PUT"] = [404]
    with pytest.raises(CheckpointNotFound):
        store.put("a", b"1")
