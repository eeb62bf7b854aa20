"""Hugging Face through a small Hub in this process: commits, versions and refusals."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from support.fakes import pattern
from support.reading import read_range

from ckptfs._model.location import Location
from ckptfs._model.manifest import METADATA_NAME
from ckptfs._store import huggingface as hub_of_ours
from ckptfs._store.base import Pin, Store, pin_of
from ckptfs._store.resolve import open_store
from ckptfs.errors import (
    AccessDenied,
    CheckpointIsFile,
    CheckpointNotFound,
    CkptfsError,
    LocationError,
    ObjectChanged,
    StoreUnavailable,
)

WEIGHTS = pattern(300_000, 1)


def digest(data: object) -> str:
    return hashlib.sha1(repr(data).encode()).hexdigest()


class Hub:
    """Repositories with commits, and the parts of the Hub's API that HfFileSystem uses.

    Attributes:
        commits: Files by path, of each commit.
        heads: Which commit a branch names.
        refusal: Status and X-Error-Code of all answers; (0, ""): there is none.
        requests: "METHOD path" of each request.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.heads: dict[str, str] = {}
        self.refusal: tuple[int, str] = (0, "")
        self.requests: list[str] = []
        self.authorizations: list[str | None] = []
        self.url = ""

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit, and let a branch name it."""
        name = digest((sorted(files.items()), len(self.commits)))
        self.commits[name] = files
        self.heads[branch] = name
        return name

    def tree(self, files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
        """As the tree endpoint says it."""
        prefix = f"{below}/" if below else ""
        found: dict[str, dict[str, Any]] = {}
        for path, data in files.items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                name = prefix + "/".join(parts[:depth])
                folder = {"type": "directory", "oid": digest(name), "size": 0, "path": name}
                if recursive or depth == 1:
                    found[name] = folder
            if recursive or len(parts) == 1:
                oid = digest(data)
                found[path] = {"type": "file", "oid": oid, "size": len(data), "path": path}
        return list(found.values())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    told = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object, **__: object) -> None:
            pass

        def do_GET(self) -> None:
            told.requests.append(f"{self.command} {self.path}")
            told.authorizations.append(self.headers.get("Authorization"))
            parts = urlsplit(self.path)
            steps = [unquote(step) for step in parts.path.strip("/").split("/")]
            status, code = told.refusal
            if status:
                return self._send(status, b"{}", X_Error_Code=code, X_Error_Message="no")
            if steps[0] == "cdn":
                return self._bytes(told.commits[steps[1]]["/".join(steps[2:])])
            if steps[0] == "api":
                return self._api(steps[2:], parse_qs(parts.query))
            return self._resolve(steps)

        do_HEAD = do_GET

        def _api(self, steps: list[str], query: dict[str, list[str]]) -> None:
            if steps[:2] != ["org", "model"]:
                return self._send(401, b"{}", X_Error_Code="RepoNotFound")
            verb, *more = steps[2:] or ["revision", "main"]
            commit = told.heads.get(more[0], more[0])
            files = told.commits.get(commit)
            if files is None:
                return self._send(404, b"{}", X_Error_Code="RevisionNotFound")
            if verb == "revision":
                return self._json({"id": "org/model", "sha": commit, "siblings": []})
            below = "/".join(more[1:])
            is_all = query.get("recursive", ["false"])[0].lower() == "true"
            found = told.tree(files, below, is_all)
            if not found and below:
                return self._send(404, b"{}", X_Error_Code="EntryNotFound")
            return self._json(found)

        def _resolve(self, steps: list[str]) -> None:
            assert steps[:3] == ["org", "model", "resolve"]
            commit = told.heads.get(steps[3], steps[3])
            path = "/".join(steps[4:])
            if path not in told.commits[commit]:
                return self._send(404, b"{}", X_Error_Code="EntryNotFound")
            quoted = "/".join(self.path.partition("?")[0].strip("/").split("/")[4:])
            return self._send(302, Location=f"{told.url}/cdn/{commit}/{quoted}")

        def _bytes(self, data: bytes) -> None:
            if not (asked := self.headers["Range"]):
                return self._send(200, data)
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            part = data[first : last + 1]
            shown = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
            return self._send(206, part, Content_Range=shown)

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), Content_Type="application/json")

        def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, args=[0.01])
        thread.start()
        told.url = f"http://127.0.0.1:{listening.server_port}"
        told.commit({"config.json": b"{}", "sub/größe #1.bin": WEIGHTS})
        yield told
        listening.shutdown()
        thread.join()


def store_at(hub: Hub, path: str = "org/model", **secrets: str) -> Store:
    return open_store(Location("hf", path, {"endpoint": hub.url}, secrets), 5)


def read(store: Store, pin: Pin) -> bytes:
    data, _ = read_range(store, pin)
    store.confirm(pin)
    return data


def pins(store: Store) -> dict[str, Pin]:
    return {file.path: pin_of(file) for file in store.list(100).files}


@pytest.mark.parametrize("path", ["org/model", "org/model@main", "org/model/sub"])
def test_a_repository_is_listed_and_read(hub: Hub, path: str) -> None:
    store = store_at(hub, path, token="hf_S3CR3T")
    found = pins(store)
    name = "größe #1.bin" if path.endswith("/sub") else "sub/größe #1.bin"
    assert found[name] == Pin(name, len(WEIGHTS), 0, digest(WEIGHTS), "listing")
    assert read(store, found[name]) == WEIGHTS
    assert set(hub.authorizations[:2]) == {"Bearer hf_S3CR3T"}


def test_a_branch_that_moves_changes_nothing(hub: Hub) -> None:
    store = store_at(hub)
    found = pins(store)
    first = hub.heads["main"]
    hub.commit({"config.json": b"[]", "sub/größe #1.bin": pattern(300_000, 2)})
    assert read(store, found["config.json"]) == b"{}"
    assert read(store, found["sub/größe #1.bin"]) == WEIGHTS
    assert all(first in request for request in hub.requests if "/resolve/" in request)
    assert pins(store)["config.json"].etag != found["config.json"].etag
    assert read(store, pins(store)["config.json"]) == b"[]"


def test_huggingface_moved_branch_is_noticed_after_daemon_restart(hub: Hub) -> None:
    """It has the versions of the files, and not the commit."""
    found = pins(store_at(hub))
    hub.commit({"config.json": b"[]", "sub/größe #1.bin": WEIGHTS})
    again = store_at(hub)
    assert read(again, found["sub/größe #1.bin"]) == WEIGHTS
    with pytest.raises(ObjectChanged):
        again.confirm(found["config.json"])


def test_huggingface_metadata_is_read_from_the_branch(hub: Hub) -> None:
    store = store_at(hub)
    pins(store)
    assert store.get(METADATA_NAME) is None
    hub.commit({METADATA_NAME: b'{"a": 1}'})
    assert store.get(METADATA_NAME) == b'{"a": 1}'
    found = store.find(METADATA_NAME)
    assert found is not None
    assert read(store, pin_of(found)) == b'{"a": 1}'


@pytest.mark.parametrize(
    ("path", "expected", "message"),
    [
        ("org/none", CheckpointNotFound, "does not exist; .*a private repository needs a token"),
        ("org/model@none", CheckpointNotFound, "check the revision behind the @"),
        ("org/model/none", CheckpointNotFound, "check the path"),
        ("org/model/config.json", CheckpointIsFile, "is a file"),
    ],
)
def test_what_cannot_be_attached(
    hub: Hub, path: str, expected: type[CkptfsError], message: str
) -> None:
    with pytest.raises(expected, match=message):
        store_at(hub, path).list(10)


@pytest.mark.parametrize(
    ("status", "code", "expected", "message"),
    [
        (401, "", AccessDenied, "denied|needs a token"),
        (403, "", AccessDenied, "denied"),
        (403, "GatedRepo", AccessDenied, "accept the repository's conditions"),
        (429, "", StoreUnavailable, "try again later"),
        (500, "", StoreUnavailable, "check the endpoint"),
    ],
)
def test_refusals_by_their_status(
    hub: Hub, status: int, code: str, expected: type[CkptfsError], message: str
) -> None:
    store = store_at(hub)
    found = pins(store)
    hub.refusal = status, code
    uses = [
        lambda: store.confirm(found["config.json"]),
        lambda: read(store, found["config.json"]),
    ]
    if status != 401:  # where it means as well that there is no such repository
        uses.append(lambda: store.list(10))  # type: ignore[arg-type, return-value]
    for use in uses:
        with pytest.raises(expected, match=message) as caught:
            use()
        assert type(caught.value) is expected


def test_the_network_is_the_callers_or_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[Any] = []
    monkeypatch.setattr("huggingface_hub.set_client_factory", set_to.append)
    monkeypatch.setattr(hub_of_ours, "_network", [])
    hub_of_ours.use_network({"proxy": "http://127.0.0.1:1", "tls_verify_certificates": False})
    assert len(set_to) == 1
    set_to[0]().close()
    with pytest.raises(ValueError, match="another proxy"):
        hub_of_ours.use_network({})
    with pytest.raises(LocationError, match="another proxy"):
        store_at(hub)
