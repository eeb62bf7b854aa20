"""A Store over fsspec: versions by what `info` says, whole listings, and errors told apart."""

import http.server
import os
import random
import socket
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from support.reading import read_range

from ckptfs._model.manifest import ListedFile, Skipped, build_manifest
from ckptfs._store import fsspec as ours
from ckptfs._store import timestamps
from ckptfs._store.base import Pin, pin_of
from ckptfs._store.fsspec import FsspecStore
from ckptfs.errors import (
    AccessDenied,
    CheckpointIsFile,
    CheckpointNotFound,
    CkptfsError,
    LimitExceeded,
    ObjectChanged,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

NAME = "fake://top"


class Fake(AbstractFileSystem):
    """Files in memory whose `info` says what a test wants, and whose operations fail on demand."""

    protocol = "fake"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.said: dict[str, dict[str, Any]] = {}
        self.faults: dict[tuple[str, str], Exception] = {}
        self.listing: list[dict[str, Any]] | None = None

    def put_file_in(self, path: str, data: bytes, **said: Any) -> None:
        """Store a file; `said` is what `info` says beside name, type and size."""
        self.files[path] = data
        self.said[path] = said

    def _begin(self, operation: str, path: str) -> None:
        if error := self.faults.get((operation, path)):
            raise error

    def _info_of(self, path: str) -> dict[str, Any]:
        if path in self.files:
            size = len(self.files[path])
            return {"name": path, "type": "file", "size": size, **self.said[path]}
        if not any(file.startswith(f"{path}/") for file in self.files):
            raise FileNotFoundError(path)
        return {"name": path, "type": "directory", "size": 0}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self._begin("ls", path)
        own = self._info_of(path)
        below = {p[len(path) + 1 :].partition("/")[0] for p in self.files if p.startswith(path)}
        is_file = own["type"] == "file"
        found = [own] if is_file else [self._info_of(f"{path}/{name}") for name in sorted(below)]
        return found if detail else [info["name"] for info in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._begin("info", path)
        return self._info_of(path)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        self._begin("cat_file", path)
        self._info_of(path)
        return self.files[path][start:end]

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
        raise NotImplementedError(mode)


@pytest.fixture
def fake() -> Fake:
    fake = Fake()
    fake.put_file_in("top/a", b"12345", ETag='"1"', mtime=1_700_000_000.5)
    fake.put_file_in("top/sub/b", b"678")
    return fake


@pytest.fixture
def store(fake: Fake) -> FsspecStore:
    return FsspecStore(fake, "top/", NAME)


def read(store: FsspecStore, pin: Pin, offset: int, length: int) -> bytes:
    return read_range(store, pin, offset, length)[0]


# -- listing


def test_a_listing_has_names_sizes_and_times(store: FsspecStore) -> None:
    listing = store.list(10)
    assert listing.files == [
        ListedFile("a", 5, 1_700_000_000_500_000_000),
        ListedFile("sub/b", 3, 0),
    ]
    assert listing.directories == ["sub"]
    assert listing.skipped == []


def test_fsspec_listing_skips_entries_without_type_or_size(fake: Fake, store: FsspecStore) -> None:
    fake.put_file_in("top/pipe", b"", type="other")
    fake.put_file_in("top/unknown\n", b"12", size=None)
    listing = store.list(10)
    assert [file.path for file in listing.files] == ["a", "sub/b"]
    assert sorted(listing.skipped, key=lambda s: s.name) == [
        Skipped("pipe", "it is neither a file nor a directory"),
        Skipped("unknown\\n", "the store does not know its size"),
    ]


def test_fsspec_listing_of_missing_file_or_too_many_is_an_error(
    fake: Fake, store: FsspecStore
) -> None:
    with pytest.raises(CheckpointNotFound, match="fake://none does not exist"):
        FsspecStore(fake, "none", "fake://none").list(10)
    with pytest.raises(CheckpointIsFile, match="fake://top/a is a file"):
        FsspecStore(fake, "top/a", "fake://top/a").list(10)
    assert len(store.list(3).files) == 2
    with pytest.raises(LimitExceeded, match="holds 3 objects, more than files_max = 2"):
        store.list(2)


def test_an_empty_directory_is_an_empty_checkpoint() -> None:
    memory = MemoryFileSystem()
    memory.mkdir("/empty-one")
    try:
        listing = FsspecStore(memory, "/empty-one", "memory://empty-one").list(10)
        assert (listing.files, listing.directories, listing.skipped) == ([], [], [])
    finally:
        memory.rmdir("/empty-one")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError("reset"), StoreUnavailable),
        (TimeoutError("slow"), StoreTimeout),
        (PermissionError("closed"), AccessDenied),
        (OSError("odd"), StoreError),
    ],
)
def test_a_directory_that_cannot_be_listed_fails_the_listing(
    fake: Fake, store: FsspecStore, error: Exception, expected: type[CkptfsError]
) -> None:
    """fsspec's own walk leaves such a directory out without a word."""
    fake.faults["ls", "top/sub"] = error
    with pytest.raises(expected):
        store.list(10)


def test_a_directory_that_vanishes_meanwhile_is_not_there(fake: Fake, store: FsspecStore) -> None:
    fake.faults["ls", "top/sub"] = FileNotFoundError("top/sub")
    assert [file.path for file in store.list(10).files] == ["a"]


class Flat(Fake):
    """One that lists as stores of objects do, at once."""

    def find(self, path: str, *_: Any, **__: Any) -> Any:
        if path in self.files:
            return [path]  # as adlfs does
        return {file: self._info_of(file) for file in self.files if file.startswith(path)}


def test_slashes_in_names_are_kept_and_refused() -> None:
    """Without them, "top//a" would stand under the name of "top/a"."""
    flat = Flat()
    for path in ("top/a", "top//a", "top/b//c", "top///d"):
        flat.put_file_in(path, b"12345")
    flat.put_file_in("top/sub/", b"")
    listing = FsspecStore(flat, "top", NAME).list(10)
    assert sorted(file.path for file in listing.files) == ["//d", "/a", "a", "b//c"]
    manifest = build_manifest(listing)
    assert [file.path for file in manifest.files] == ["a"]
    assert {skipped.name for skipped in manifest.skipped} == {"/a", "b//c", "//d"}
    assert manifest.directories == ("sub",)


def test_a_file_that_is_found_as_a_list_is_a_file() -> None:
    flat = Flat()
    flat.put_file_in("top/a", b"12345")
    with pytest.raises(CheckpointIsFile):
        FsspecStore(flat, "top/a", NAME).list(10)


def test_a_listing_of_another_place_is_an_error() -> None:
    flat = Flat()
    flat.put_file_in("topless/a", b"12345")
    with pytest.raises(StoreError, match="topless/a, which is not below it"):
        FsspecStore(flat, "top", NAME).list(10)


# -- versions


def test_fractions_of_a_second_count(fake: Fake, store: FsspecStore) -> None:
    moment = datetime(2023, 11, 14, 22, 13, 20, 123_456, timezone.utc)
    fake.put_file_in("top/a", b"12345", created=moment)
    pin = next(pin_of(file) for file in store.list(9).files if file.path == "a")
    assert pin.mtime_ns == 1_700_000_000_123_456_000
    assert store.confirm(pin) == pin
    fake.said["top/a"] = {"created": moment.timestamp()}
    assert store.confirm(pin) == pin
    for later in (moment.replace(microsecond=123_459), "2023-11-14T22:13:20.200000Z"):
        fake.said["top/a"] = {"created": later}
        with pytest.raises(ObjectChanged, match="it was written again"):
            store.confirm(pin)


def test_a_read_waits_until_only_a_later_version_can_have_another_time(
    store: FsspecStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(ours, "wait_until_settled", waited.append)
    read(store, Pin("a", 5, 17), 0, 5)
    read(store, Pin("a", 5, 17, '"1"'), 0, 5)
    assert waited == [17]


def test_a_file_that_a_package_decodes_is_refused(fake: Fake, store: FsspecStore) -> None:
    fake.put_file_in("top/a", b"12345", contentEncoding="gzip")
    with pytest.raises(StoreError, match="stored with Content-Encoding gzip"):
        store.confirm(Pin("a", 5, 0))


def test_fsspec_local_files_differ_within_a_second(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"first")
    os.utime(file, (1_700_000_000, 1_700_000_000))
    store = FsspecStore(LocalFileSystem(), str(tmp_path), NAME)
    pin = store.confirm(pin_of(store.list(9).files[0]))
    assert store.confirm(pin) == pin
    (tmp_path / "b").write_bytes(b"other")
    os.utime(tmp_path / "b", (1_700_000_000, 1_700_000_000))
    (tmp_path / "b").replace(file)
    with pytest.raises(ObjectChanged):
        store.confirm(pin)


def test_a_thousand_overwrites_in_memory_in_the_middle_of_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes that were read and then confirmed are of one version."""
    memory, chance = MemoryFileSystem(), random.Random(0)
    cat_file = MemoryFileSystem.cat_file
    overwrites = right = 0

    def overwrite() -> None:
        nonlocal overwrites
        if chance.random() < 0.5:
            overwrites += 1
            memory.pipe_file("/top/a", b"%08d" % overwrites * 100)

    def cat(self: Any, *args: Any, **more: Any) -> Any:
        overwrite()
        data = cat_file(self, *args, **more)
        overwrite()
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat)
    monkeypatch.setattr(timestamps, "TICK_S", 0.0)  # the clock of Python objects has microseconds
    store = FsspecStore(memory, "/top", "memory://top")
    try:
        while overwrites < 1000:
            memory.pipe_file("/top/a", b"%08d" % overwrites * 100)
            pin = pin_of(store.list(9).files[0])
            now = overwrites
            try:
                got = read(store, pin, 0, 800)
                store.confirm(pin)
            except ObjectChanged:
                assert overwrites > now
                continue
            assert got == b"%08d" % now * 100
            right += 1
    finally:
        memory.rm("/top", recursive=True)
    assert right > 50


def test_the_etag_is_learned_and_compared(fake: Fake, store: FsspecStore) -> None:
    [listed, _] = store.list(10).files
    pin = store.confirm(Pin(listed.path, listed.size, listed.mtime_ns))
    assert pin.etag == '"1"'
    assert store.confirm(pin) == pin
    fake.put_file_in("top/a", b"54321", ETag='"2"', mtime=1_700_000_000.25)
    with pytest.raises(ObjectChanged, match=r'a in fake://top .* ETag "1" became "2"; attach'):
        store.confirm(pin)
    fake.put_file_in("top/a", b"54321", mtime=1_700_000_000.25)
    with pytest.raises(ObjectChanged, match='ETag "1" became none'):
        store.confirm(pin)


@pytest.mark.parametrize("key", ["etag", "ETag", "blob_id", "generation", "checksum"])
def test_fsspec_version_is_found_under_each_key(fake: Fake, store: FsspecStore, key: str) -> None:
    fake.put_file_in("top/a", b"12345", **{key: 17})
    pin = store.confirm(Pin("a", 5, 0))
    assert pin.etag == "17"
    fake.said["top/a"] = {key: 18}
    with pytest.raises(ObjectChanged):
        store.confirm(pin)


SECOND_NS = 1_700_000_000 * 10**9


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mtime", 1_700_000_000.0),
        ("mtime", 1_700_000_000),
        ("LastModified", datetime.fromtimestamp(1_700_000_000, timezone.utc)),
        ("last_modified", datetime(2023, 11, 14, 22, 13, 20)),
        ("Last-Modified", "Tue, 14 Nov 2023 22:13:20 GMT"),
        ("updated", "2023-11-14T22:13:20+00:00"),
        ("created", datetime.fromtimestamp(1_700_000_000, timezone.utc)),
    ],
)
def test_fsspec_time_is_found_under_each_key(
    fake: Fake, store: FsspecStore, key: str, value: object
) -> None:
    fake.put_file_in("top/a", b"12345", **{key: value})
    assert store.list(10).files[0].mtime_ns == SECOND_NS
    store.confirm(Pin("a", 5, SECOND_NS))
    store.confirm(Pin("a", 5, SECOND_NS + 5 * 10**8))  # some servers tell fractions in one place
    with pytest.raises(ObjectChanged, match="it was written again"):
        store.confirm(Pin("a", 5, SECOND_NS - 10**9))


@pytest.mark.parametrize("value", ["yesterday", "", None, [], "Xyz, 99 Nov 2023"])
def test_a_time_that_cannot_be_read_is_none(fake: Fake, store: FsspecStore, value: object) -> None:
    fake.put_file_in("top/a", b"12345", mtime=value)
    assert store.list(10).files[0].mtime_ns == 0
    store.confirm(Pin("a", 5, SECOND_NS))


def test_another_size_another_kind_and_none_at_all_are_changes(
    fake: Fake, store: FsspecStore
) -> None:
    pin = Pin("a", 5, 0)
    fake.put_file_in("top/a", b"1234")
    with pytest.raises(ObjectChanged, match="5 bytes became 4"):
        store.confirm(pin)
    with pytest.raises(ObjectChanged, match="it ends at byte 4 of 5"):
        read(store, pin, 0, 5)
    with pytest.raises(ObjectChanged, match="it ends at byte 4 of 5"):
        read(store, pin, 4, 1)
    del fake.files["top/a"]
    for use in (lambda: store.confirm(pin), lambda: read(store, pin, 0, 5)):
        with pytest.raises(ObjectChanged, match="it was deleted"):
            use()
    fake.put_file_in("top/a/below", b"12345")
    with pytest.raises(ObjectChanged, match="it is not a file any more"):
        store.confirm(pin)


# -- reading and writing


def test_a_read_is_the_range_and_no_more(store: FsspecStore) -> None:
    assert read(store, Pin("a", 5, 0), 1, 3) == b"234"
    assert read(store, Pin("a", 5, 0), 0, 5) == b"12345"


def test_a_server_that_ignores_ranges_is_an_error_and_no_wrong_bytes(
    fake: Fake, store: FsspecStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "cat_file", lambda path, **_: fake.files[path])
    with pytest.raises(StoreError, match="the server cannot send a part of a file") as caught:
        read(store, Pin("a", 5, 0), 0, 2)
    assert type(caught.value) is StoreError  # trying again would not help
    assert read(store, Pin("a", 5, 0), 0, 5) == b"12345"


class Buffered(Fake):
    """One whose reads go through fsspec's file object, as those of huggingface_hub do."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[int, int]] = []

    # The store looks whether a class overrides it.
    cat_file = AbstractFileSystem.cat_file  # pyright: ignore[reportAssignmentType]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        from fsspec.spec import AbstractBufferedFile

        class File(AbstractBufferedFile):
            def _fetch_range(self, start: int, end: int) -> bytes:
                self.fs.ranges.append((start, end))
                return self.fs.files[self.path][start:end]

        options = {k: v for k, v in options.items() if k in ("cache_type", "block_size")}
        return File(self, path, mode, **options)


def test_the_buffer_of_fsspecs_files_is_not_filled() -> None:
    """It would read on for 5 MiB behind each range."""
    buffered = Buffered()
    buffered.put_file_in("top/a", bytes(range(256)) * 100)
    store = FsspecStore(buffered, "top", NAME)
    assert read(store, Pin("a", 25600, 0), 256, 256) == bytes(range(256))
    assert buffered.ranges == [(256, 512)]


def test_small_objects_as_a_whole(fake: Fake, store: FsspecStore) -> None:
    assert store.get("a") == b"12345"
    assert store.get("none") is None
    assert store.find("a") == ListedFile("a", 5, 1_700_000_000_500_000_000)
    assert store.find("none") is None
    assert store.find("sub") is None
    for operation, use in (("cat_file", store.get), ("info", store.find)):
        fake.faults[operation, "top/a"] = ConnectionResetError("reset")
        with pytest.raises(StoreUnavailable):
            use("a")


def test_fsspec_put_without_write_support_is_denied(store: FsspecStore) -> None:
    with pytest.raises(AccessDenied, match=r"fake://top: fsspec's filesystem of .* cannot write"):
        store.put("a", b"1")


# -- errors


class WithStatus(Exception):
    """Of aiohttp."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, message='something'\nsecond line")
        self.status = status


class WithStatusCode(Exception):
    """Of azure."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}\nsecond line")
        self.status_code = status


class WithResponse(Exception):
    """Of requests and httpx."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}\nsecond line")
        self.response = WithStatusCode(status)


class WithCode(Exception):
    """Of gcsfs, whose codes are numbers or text."""

    def __init__(self, status: int, as_text: bool = False) -> None:
        super().__init__(f"{status}\nsecond line")
        self.code = str(status) if as_text else status


class ClientPayloadError(Exception):
    """Named as aiohttp's, of a body that is cut."""


class ServiceRequestError(Exception):
    """Named as azure's, of a connection that cannot be made."""


class OfflineModeIsEnabled(ConnectionError):
    """Named as huggingface_hub's."""


class ClientConnectorError(Exception):
    """Named as aiohttp's, which is no ConnectionError."""


class ServerDisconnectedError(Exception):
    """Named as aiohttp's."""


class ReadTimeout(Exception):
    """Named as httpx's."""


KINDS = (WithStatus, WithStatusCode, WithResponse, WithCode)
ERRORS: list[tuple[Exception, type[CkptfsError]]] = [
    (PermissionError("no"), AccessDenied),
    (TimeoutError("slow"), StoreTimeout),
    (ReadTimeout(), StoreTimeout),
    (WithStatus(408), StoreTimeout),
    (ConnectionRefusedError("closed"), StoreUnavailable),
    (ClientConnectorError("no route"), StoreUnavailable),
    (ServerDisconnectedError(), StoreUnavailable),
    (WithStatus(429), StoreUnavailable),
    (WithStatus(501), StoreError),
    (WithStatus(400), StoreError),
    (OSError("odd"), StoreError),
    (RuntimeError(""), StoreError),
    (AccessDenied("ours"), AccessDenied),
    (ClientPayloadError("400, message: Response payload is not completed"), StoreUnavailable),
    (ServiceRequestError("no route"), StoreUnavailable),
    (OfflineModeIsEnabled("offline"), StoreError),
    (WithCode(403, as_text=True), AccessDenied),
    (WithCode(429), StoreUnavailable),
    (WithCode(400), StoreError),
    (WithStatus(505), StoreError),
    *[(kind(401), AccessDenied) for kind in KINDS],
    *[(kind(403), AccessDenied) for kind in KINDS],
    *[(kind(503), StoreUnavailable) for kind in KINDS],
]


@pytest.mark.parametrize(("error", "expected"), ERRORS, ids=lambda value: repr(value)[:40])
def test_errors_by_what_the_store_said(
    fake: Fake, store: FsspecStore, error: Exception, expected: type[CkptfsError]
) -> None:
    fake.faults = {
        (operation, f"top{path}"): error
        for operation in ("ls", "info", "cat_file")
        for path in ("", "/a")
    }
    pin = Pin("a", 5, 0)
    uses = (
        lambda: store.list(10),
        lambda: store.confirm(pin),
        lambda: read(store, pin, 0, 5),
        lambda: store.get("a"),
        lambda: store.find("a"),
    )
    for use in uses:
        with pytest.raises(expected) as caught:
            use()
        assert type(caught.value) is expected
        assert "\n" not in str(caught.value)
        if error is not caught.value:
            assert NAME in str(caught.value)
            assert caught.value.__cause__ is error


@pytest.mark.parametrize("kind", KINDS)
def test_fsspec_status_404_is_not_found(
    fake: Fake, store: FsspecStore, kind: "type[WithStatus]"
) -> None:
    for operation in ("ls", "info", "cat_file"):
        for path in ("top", "top/a"):
            fake.faults[operation, path] = kind(404)
    with pytest.raises(CheckpointNotFound):
        store.list(10)
    for use in (lambda: store.confirm(Pin("a", 5, 0)), lambda: read(store, Pin("a", 5, 0), 0, 5)):
        with pytest.raises(ObjectChanged, match="it was deleted"):
            use()
    assert store.get("a") is None
    assert store.find("a") is None


def test_how_long_to_wait_is_said(fake: Fake, store: FsspecStore) -> None:
    error = WithResponse(429)
    error.response.headers = {"Retry-After": "7"}  # type: ignore[attr-defined]
    fake.faults["info", "top/a"] = error
    with pytest.raises(StoreUnavailable) as caught:
        store.confirm(Pin("a", 5, 0))
    assert caught.value.retry_after_s == 7


def test_a_range_behind_the_end_is_a_shorter_object(fake: Fake, store: FsspecStore) -> None:
    fake.faults["cat_file", "top/a"] = WithStatus(416)
    with pytest.raises(ObjectChanged, match="it became shorter"):
        read(store, Pin("a", 5, 0), 4, 1)


# -- http itself


class Server:
    """Answers each path as it is told: a body, a status, or None to hang up."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | int | None] = {}
        self.encodings: list[str] = []
        self.url = ""


@pytest.fixture
def server() -> Iterator[Server]:
    told = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object, **__: object) -> None:
            pass

        def do_GET(self) -> None:
            answer = told.answers.get(self.path, 404)
            told.encodings.append(self.headers.get("Accept-Encoding", ""))
            if answer is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            body = answer if isinstance(answer, bytes) else b""
            self.send_response(200 if isinstance(answer, bytes) else answer)
            self.send_header("Content-Type", "text/html" if b"href" in body else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=[0.01])
        thread.start()
        told.url = f"http://127.0.0.1:{listening.server_port}/top"
        told.answers = {
            "/top": b'<a href="a">a</a> <a href="sub/">sub/</a>',
            "/top/a": b"12345",
            "/top/sub": b'<a href="b">b</a>',
            "/top/sub/b": b"678",
        }
        yield told
        listening.shutdown()
        thread.join()


@pytest.fixture
def http_store(server: Server) -> FsspecStore:
    return FsspecStore(HTTPFileSystem(skip_instance_cache=True), server.url, server.url)


def test_http_sizes_are_asked_for(http_store: FsspecStore) -> None:
    listing = http_store.list(10)
    assert sorted((file.path, file.size) for file in listing.files) == [("a", 5), ("sub/b", 3)]
    assert listing.directories == ["sub"]


def test_http_ranges_are_asked_for_as_they_are_stored(server: Server) -> None:
    filesystem = HTTPFileSystem(skip_instance_cache=True, headers={"X-Key": "k"})
    store = FsspecStore(filesystem, server.url, server.url)
    assert read(store, store.confirm(Pin("a", 5, 0)), 0, 5) == b"12345"
    assert set(server.encodings) == {"identity"}


def test_http_index_pages_link_to_more_than_files(server: Server, http_store: FsspecStore) -> None:
    server.answers["/top"] = (
        b'<a href="?C=N;O=D">Name</a> <a href="/">Parent</a> <a href="../">Up</a> '
        b'<a href="https://elsewhere/x">x</a> <a href="#end">end</a> '
        b'<a href="a">a</a> <a href="/top/sub/">sub</a>'
    )
    server.answers["/top/?C=N;O=D"] = server.answers["/top"]
    server.answers["/top/"] = server.answers["/top"]
    listing = http_store.list(10)
    assert sorted(file.path for file in listing.files) == ["a", "sub/b"]
    assert listing.directories == ["sub"]


def test_http_names_are_decoded_for_sessions_of_ones_own_too(
    server: Server, http_store: FsspecStore
) -> None:
    server.answers["/top"] = b'<a href="step%3D1%20%23%25">x</a> <a href="a%2Fb">y</a>'
    server.answers["/top/step=1%20%23%25"] = server.answers["/top/a%2Fb"] = b"12345"
    listing = http_store.list(10)
    assert [file.path for file in listing.files] == ["step=1 #%"]
    assert listing.skipped == [Skipped("a/b", "the name holds a slash")]
    assert read(http_store, http_store.confirm(Pin("step=1 #%", 5, 0)), 0, 5) == b"12345"


class Login:
    """As aiohttp's BasicAuth."""

    def encode(self) -> str:
        return "Basic bWU6cGFzcw=="


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"headers": {"A": "b"}, "block_size": 7}, {"A": "b"}),
        ({"client_kwargs": {"headers": {"A": "b"}, "timeout": 7}}, {"A": "b"}),
        (
            {"client_kwargs": {"auth": Login()}},
            {"Authorization": "Basic bWU6cGFzcw=="},
        ),
        ({"client_kwargs": {"trust_env": True}}, None),
        ({"ssl": False}, None),
        ({"client_kwargs": {"auth": object()}}, None),
    ],
)
def test_the_headers_of_an_http_filesystem(
    options: dict[str, Any], expected: "dict[str, str] | None"
) -> None:
    filesystem = HTTPFileSystem(skip_instance_cache=True, **options)
    assert ours.http_headers_of(filesystem) == expected
    assert ours.http_headers_of(MemoryFileSystem()) is None


def test_a_dead_link_on_an_index_page_is_left_out(server: Server, http_store: FsspecStore) -> None:
    server.answers["/top/a"] = 404
    listing = http_store.list(10)
    assert [file.path for file in listing.files] == ["sub/b"]
    assert [skipped.name for skipped in listing.skipped] == ["a"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (401, AccessDenied),
        (403, AccessDenied),
        (429, StoreUnavailable),
        (503, StoreUnavailable),
        (None, StoreUnavailable),
    ],
)
def test_an_outage_of_http_is_no_missing_file(
    server: Server,
    http_store: FsspecStore,
    answer: int | None,
    expected: type[CkptfsError],
) -> None:
    """Its `info` calls every failure a FileNotFoundError."""
    server.answers["/top/a"] = answer
    pin = Pin("a", 5, 0)
    for use in (
        lambda: http_store.list(10),
        lambda: http_store.confirm(pin),
        lambda: http_store.find("a"),
        lambda: http_store.get("a"),
        lambda: read(http_store, pin, 0, 5),
    ):
        with pytest.raises(expected):
            use()
    server.answers["/top/a"] = 404
    with pytest.raises(ObjectChanged, match="it was deleted"):
        http_store.confirm(pin)
    assert http_store.find("a") is None
