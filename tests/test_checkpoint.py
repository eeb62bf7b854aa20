"""The Checkpoint API: one contract for every kind of filesystem, and what the constructor takes."""

import itertools
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import HAS_FUSE, Node, daemons, wait_until
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs as pafs
from support.s3server import S3Server

import ckptfs
from ckptfs import Checkpoint
from ckptfs._client import client
from ckptfs._client import connection as _connection
from ckptfs._config.load import load_config
from ckptfs._local_directory import filesystem_behind
from ckptfs._model.uris import parse_uri
from ckptfs._store.describe import describe

CONTENT = {
    "config.json": b'{"layers": 1}',
    "empty": b"",
    "layers/0/weights.bin": bytes(range(256)) * 9000,  # 2.2 MiB: of several blocks
    "layers/1/with space+ä.bin": b"x",
}
METADATA = ".metadata.json"
_serial = itertools.count()

HTTP_SERVER = """
import html, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

top = sys.argv[1]

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object, **__: object):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def allowed(self):
        token = self.headers.get("Authorization")
        return "/closed/" not in self.path or token == "Bearer S3CR3T"

    def do_GET(self):
        path = top + unquote(self.path)
        if not self.allowed():
            return self.answer(401)
        if os.path.isdir(path) and not self.path.endswith("/"):
            return self.answer(301, Location=self.path + "/")
        if os.path.isdir(path):
            names = [n + "/" * os.path.isdir(path + n) for n in sorted(os.listdir(path))]
            links = [f'<a href="{quote(name)}">{html.escape(name)}</a>' for name in names]
            return self.answer(200, "\\n".join(links).encode(), Content_Type="text/html")
        if not os.path.isfile(path):
            return self.answer(404)
        info = os.stat(path)
        with open(path, "rb") as file:
            body = file.read()
        version = {
            "ETag": f'"{info.st_mtime_ns:x}-{info.st_size}"',
            "Last_Modified": self.date_time_string(int(info.st_mtime)),
        }
        asked = self.headers.get("Range")
        if asked is None:
            return self.answer(200, body, **version)
        first, last = asked.removeprefix("bytes=").split("-")
        part = body[int(first) : int(last) + 1]
        if not part:
            return self.answer(416)
        shown = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
        self.answer(206, part, Content_Range=shown, **version)

    do_HEAD = do_GET

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed():
            return self.answer(401)
        path = top + unquote(self.path)
        with open(path + ".new", "wb") as file:
            file.write(data)
        os.replace(path + ".new", path)
        self.answer(201)

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def http_server(top: Path) -> Iterator[str]:
    """An HTTP server with index pages and ranges in a process of its own; yields its URL.

    Below "/closed/" it wants the header ``Authorization: Bearer S3CR3T``.
    """
    command = [sys.executable, "-c", HTTP_SERVER, str(top)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


# -- the filesystems


class Place:
    """A kind of filesystem with checkpoints on it.

    Attributes:
        checkpoint: Makes the object for a checkpoint of that name.
        mode: How ``as_directory`` has to be asked for it.
        local: Whether a checkpoint is its own directory.
    """

    mode: Any = "auto"
    local = False

    def __init__(self, folder: Path, checkpoint: Callable[[str], Checkpoint]) -> None:
        self.folder = folder
        self.checkpoint = checkpoint

    def write(self, path: str, data: bytes) -> None:
        """Store a file behind the filesystem's back."""
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_bytes(data)

    def stored(self, name: str) -> dict[str, bytes]:
        """All files of a checkpoint, as they are stored."""
        return files_in(self.folder / name)

    def remove(self, name: str) -> None:
        subprocess.run(["rm", "-rf", str(self.folder / name)], check=True)


class InMemory(Place):
    """Another process cannot see it: it is copied."""

    mode = "copy"

    def __init__(self) -> None:
        self.memory = MemoryFileSystem()
        on_it = DirFileSystem(path="/runs", fs=self.memory)
        super().__init__(Path("/runs"), lambda name: Checkpoint(name, on_it))

    def write(self, path: str, data: bytes) -> None:
        self.memory.pipe_file(f"/runs/{path}", data)

    def stored(self, name: str) -> dict[str, bytes]:
        found = self.memory.find(f"/runs/{name}")
        return {path[len(f"/runs/{name}/") :]: self.memory.cat_file(path) for path in found}

    def remove(self, name: str) -> None:
        self.memory.rm(f"/runs/{name}", recursive=True)


def files_in(top: "str | Path") -> dict[str, bytes]:
    return {str(p.relative_to(top)): p.read_bytes() for p in Path(top).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    """One node for all tests of this module; its daemon runs from the start."""
    node = Node(Path(tempfile.mkdtemp(prefix="ckptfs-")))
    node.configure(idle_exit_s=0, linger_s=0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in node.environment.items():
            patch.setenv(name, value)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        # rclone cannot read the checksums that the AWS SDK puts behind what it sends.
        patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        patch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        try:
            if HAS_FUSE:
                client.connect_or_start(load_config()).close()
            yield node
        finally:
            if node.socket.exists():
                with client.connect() as connection:
                    connection.stop(force=True)
            wait_until(lambda: not daemons())
            log = node.log()
            subprocess.run(["rm", "-r", str(node.folder)], check=True)
    node.check_log(log)


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    top = tmp_path_factory.mktemp("http")
    with http_server(top) as url:
        yield top, url


OTHER_LOCAL = """
from fsspec.implementations.local import LocalFileSystem

class OtherLocal(LocalFileSystem):
    '''Looks like nothing that is known, and can be pickled.'''
    protocol = "otherlocal"
"""


@contextmanager
def described_by_nothing(folder: Path) -> Iterator[Place]:
    """A filesystem whose class is in a module of the user's; for a private daemon."""
    modules = folder / "modules"
    modules.mkdir()
    (modules / "other_local.py").write_text(OTHER_LOCAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(modules)
        import other_local  # pyright: ignore[reportMissingImports]

        filesystem = other_local.OtherLocal()
        yield Place(folder, lambda name: Checkpoint(f"{folder}/{name}", filesystem))
        del sys.modules["other_local"]


KINDS = [
    "local",
    "SubTree over local",
    "DirFileSystem over local",
    "s3 URI",
    "S3FileSystem",
    "SubTree over S3",
    "memory",
    "http",
    "http with a token",
    "not describable",
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.replace(" ", "-"))
def place(
    request: pytest.FixtureRequest,
    shared: Node,
    s3: S3Server,
    http: tuple[Path, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    kind: str = request.param
    folder = tmp_path_factory.mktemp("place")
    bucket = s3.bucket_dir("contract")
    top, url = http
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["rm", "-r", str(bucket)], check=True)
        if kind == "local":
            place = Place(folder, lambda name: Checkpoint.from_directory(folder / name))
        elif kind == "SubTree over local":
            tree = pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem())
            place = Place(folder, lambda name: Checkpoint(name, tree))
        elif kind == "DirFileSystem over local":
            directory = DirFileSystem(path=str(folder), fs=LocalFileSystem())
            place = Place(folder, lambda name: Checkpoint(name, directory))
        elif kind == "s3 URI":
            place = Place(bucket, lambda name: Checkpoint(s3.uri(f"contract/{name}")))
        elif kind == "S3FileSystem":
            filesystem = s3.filesystem()
            place = Place(bucket, lambda name: Checkpoint(f"contract/{name}", filesystem))
        elif kind == "SubTree over S3":
            tree = pafs.SubTreeFileSystem("contract", s3.filesystem())
            place = Place(bucket, lambda name: Checkpoint(name, tree))
        elif kind == "memory":
            place = InMemory()
        elif kind == "http":
            place = Place(top, lambda name: Checkpoint(f"{url}/{name}/"))
        elif kind == "http with a token":
            (top / "closed").mkdir(exist_ok=True)
            headers = {"Authorization": "Bearer S3CR3T"}
            closed = HTTPFileSystem(client_kwargs={"headers": headers})
            place = Place(top / "closed", lambda name: Checkpoint(f"{url}/closed/{name}", closed))
        else:
            place = stack.enter_context(described_by_nothing(folder))
        place.local = "local" in kind
        if HAS_FUSE and kind in ("http with a token", "not describable"):
            # Held for as long as it is needed, or each test would start it anew.
            place.write("held/file", b"1")
            stack.enter_context(place.checkpoint("held").as_directory(mode="mount"))
            stack.callback(end_private_daemons)
            stack.callback(stack.pop_all().close)
        yield place


def end_private_daemons() -> None:
    """Stop the private daemons, so that no test has to wait until they are idle."""
    for path in Path(tempfile.gettempdir()).glob("ckptfs-private-*/sock"):
        with _connection.connect_to(str(path), 10) as connection:
            connection.stop(force=True)


@pytest.fixture
def name() -> str:
    """A name for a checkpoint that no other test has used: nothing of it is cached."""
    return f"ckpt-{next(_serial)}"


@pytest.fixture
def stored(place: Place, name: str) -> Iterator[Checkpoint]:
    """A checkpoint with `CONTENT`."""
    for path, data in CONTENT.items():
        place.write(f"{name}/{path}", data)
    yield place.checkpoint(name)
    place.remove(name)


def wait_gone(path: str) -> None:
    """Wait, because the daemon needs a moment to release a path that no process uses."""
    wait_until(lambda: not os.path.exists(path))


# -- the contract


@pytest.mark.mount
def test_as_directory_shows_what_is_stored(place: Place, stored: Checkpoint, name: str) -> None:
    with stored.as_directory(mode=place.mode) as path:
        assert (path == str(place.folder / name)) is place.local
        assert os.path.isabs(path)
        assert files_in(path) == CONTENT
    if place.local:
        assert files_in(path) == CONTENT
    else:
        wait_gone(path)
    assert place.stored(name) == CONTENT


@pytest.mark.mount
def test_contexts_can_be_nested(place: Place, stored: Checkpoint) -> None:
    with stored.as_directory(mode=place.mode) as outer:
        with stored.as_directory(mode=place.mode) as inner:
            assert files_in(inner) == CONTENT
        assert files_in(outer) == CONTENT
    if not place.local:
        wait_gone(outer)


@pytest.mark.mount
def test_a_copy_is_never_what_is_stored(place: Place, stored: Checkpoint, name: str) -> None:
    with stored.as_directory(mode="copy") as path:
        assert files_in(path) == CONTENT
        for below in [Path(path), *Path(path).rglob("*")]:
            assert os.access(below, os.W_OK)
            assert str(place.folder / name) not in os.path.realpath(below)
        Path(path, "config.json").write_bytes(b"changed")
        Path(path, "empty").unlink()
        Path(path, "layers", "new").write_bytes(b"new")
        os.truncate(f"{path}/layers/0/weights.bin", 3)
        assert place.stored(name) == CONTENT
        with stored.as_directory(mode="copy") as again:  # of one object: as Ray has it
            assert again == path
            assert Path(again, "config.json").read_bytes() == b"changed"
        with stored.as_directory(mode="copy", include=["*.json"]) as other:
            assert files_in(other) == {"config.json": CONTENT["config.json"]}
    assert not os.path.exists(path)
    assert place.stored(name) == CONTENT
    with stored.as_directory(mode="copy") as path:
        assert files_in(path) == CONTENT


@pytest.mark.mount
def test_the_first_exit_leaves_the_directory_to_another_thread(
    place: Place, stored: Checkpoint
) -> None:
    both_in = threading.Barrier(2, timeout=60)

    def first() -> None:
        with stored.as_directory(mode=place.mode):
            both_in.wait()

    thread = threading.Thread(target=first)
    thread.start()
    with stored.as_directory(mode=place.mode) as path:
        both_in.wait()
        thread.join(60)
        with client.connect() as connection:  # the daemon has seen the end of the first
            connection.status()
        assert files_in(path) == CONTENT


@pytest.mark.mount
def test_a_pickled_checkpoint_is_the_same_one(place: Place, stored: Checkpoint) -> None:
    again: Checkpoint = pickle.loads(pickle.dumps(stored))
    assert again is not stored
    assert (again.path, repr(again)) == (stored.path, repr(stored))
    with stored.as_directory(mode=place.mode) as path, again.as_directory(mode=place.mode) as other:
        assert files_in(other) == CONTENT
        assert other == path
    target = stored.to_directory(include=["config.json"])
    try:
        assert again.to_directory(include=["empty"]) == target
        assert files_in(target).keys() == {"config.json", "empty"}
    finally:
        subprocess.run(["rm", "-r", target], check=True)


def test_to_directory_copies(place: Place, stored: Checkpoint, name: str, tmp_path: Path) -> None:
    target = stored.to_directory()
    try:
        assert os.path.dirname(target) == tempfile.gettempdir()
        assert files_in(target) == CONTENT
        assert stored.to_directory() == target
    finally:
        subprocess.run(["rm", "-r", target], check=True)
    given = tmp_path / "given"
    (given / "layers").mkdir(parents=True)
    (given / "layers" / "mine").write_bytes(b"stays")
    (given / "config.json").write_bytes(b"is replaced")
    assert stored.to_directory(f"{given}/./") == str(given)
    assert files_in(given) == CONTENT | {"layers/mine": b"stays"}
    assert place.stored(name) == CONTENT
    assert os.listdir(tmp_path) == ["given"]


def test_what_is_not_there_and_what_is_a_file_are_told_apart(
    place: Place, stored: Checkpoint, name: str, tmp_path: Path
) -> None:
    missing, file = place.checkpoint("missing"), place.checkpoint(f"{name}/config.json")
    with pytest.raises(ckptfs.CheckpointNotFound, match="missing"):
        missing.to_directory(tmp_path / "copy")
    with (
        pytest.raises(ckptfs.CheckpointNotFound, match="missing"),
        missing.as_directory(mode="copy"),
    ):
        pass
    with pytest.raises(ckptfs.CheckpointIsFile, match=r"config\.json"):
        file.to_directory(tmp_path / "copy")
    assert os.listdir(tmp_path) == []


def test_metadata_round_trip(place: Place, stored: Checkpoint, name: str) -> None:
    assert stored.get_metadata() == {}
    stored.set_metadata({"step": 5, "name": "größe", "nested": {"a": [1, None]}})
    assert json.loads(place.stored(name)[METADATA]) == {
        "step": 5,
        "name": "größe",
        "nested": {"a": [1, None]},
    }
    stored.update_metadata({"step": 6, "more": True})
    expected = {"step": 6, "name": "größe", "nested": {"a": [1, None]}, "more": True}
    assert stored.get_metadata() == expected
    assert place.checkpoint(name).get_metadata() == expected
    stored.set_metadata({"only": 1})
    assert stored.get_metadata() == {"only": 1}
    stored.set_metadata({})
    stored.update_metadata({"from": "nothing"})
    assert stored.get_metadata() == {"from": "nothing"}
    assert place.stored(name).keys() - CONTENT.keys() == {METADATA}  # no temporary file


def test_metadata_that_is_not_json_leaves_the_stored_one(
    place: Place, stored: Checkpoint, name: str
) -> None:
    stored.set_metadata({"step": 5})
    before = place.stored(name)
    for change in (stored.set_metadata, stored.update_metadata):
        with pytest.raises(TypeError):
            change({"a": 1, "b": {1, 2}})
        with pytest.raises(TypeError):
            change({"b": b"bytes"})
    with pytest.raises(TypeError, match="must be a dict, not list"):
        stored.update_metadata([("a", 1)])  # type: ignore[arg-type]
    assert place.stored(name) == before


def test_stored_metadata_of_another_kind_is_a_clear_error(
    place: Place, stored: Checkpoint, name: str
) -> None:
    place.write(f"{name}/{METADATA}", b"[1, 2]")
    assert stored.get_metadata() == [1, 2]
    with pytest.raises(TypeError, match=rf"\.metadata\.json in .*{name}.* holds a list") as caught:
        stored.update_metadata({"a": 1})
    assert "set_metadata" in str(caught.value)
    place.write(f"{name}/{METADATA}", b"{broken")
    for change in (stored.get_metadata, lambda: stored.update_metadata({"a": 1})):
        with pytest.raises(
            ckptfs.MetadataError, match=rf"\.metadata\.json in .*{name}.* is not JSON"
        ):
            change()
    assert place.stored(name)[METADATA] == b"{broken"
    stored.set_metadata({"a": 1})
    assert stored.get_metadata() == {"a": 1}


# -- memory: copied, and why


@pytest.mark.mount
def test_what_only_this_process_sees_is_copied_with_a_warning(shared: Node) -> None:
    before = daemons()
    place = InMemory()
    place.write("ckpt/config.json", b"{}")
    checkpoint = place.checkpoint("ckpt")
    try:
        with (
            pytest.warns(
                UserWarning,
                match=r"ckptfs copies the checkpoint \(2 B\) to .*: cannot mount: another process "
                "does not see",
            ) as caught,
            checkpoint.as_directory() as path,
        ):
            assert files_in(path) == {"config.json": b"{}"}
        assert caught[0].filename == __file__  # the caller's line
        with (
            pytest.raises(ckptfs.CannotMount, match="another process"),
            checkpoint.as_directory(mode="mount"),
        ):
            pass
    finally:
        place.remove("ckpt")
        end_private_daemons()
        wait_until(lambda: daemons() <= before)


# -- the object


def test_checkpoints_are_equal_to_themselves_only(tmp_path: Path) -> None:
    first, second = Checkpoint.from_directory(tmp_path), Checkpoint.from_directory(tmp_path)
    assert first != second
    assert len({first: 1, second: 2}) == 2
    assert repr(first) == f"Checkpoint(filesystem=local, path={tmp_path})"


def test_from_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Checkpoint):
        pass

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given in ("run", Path("run"), "~/run", f"{tmp_path}/run/"):
        checkpoint = Mine.from_directory(given)
        assert type(checkpoint) is Mine
        assert checkpoint.path == f"{tmp_path}/run"
        assert isinstance(checkpoint.filesystem, pafs.LocalFileSystem)
    with pytest.raises(ckptfs.CheckpointNotFound), checkpoint.as_directory():
        pass
    (tmp_path / "run").touch()
    with pytest.raises(ckptfs.CheckpointIsFile), checkpoint.as_directory():
        pass


class Uri(NamedTuple):
    """An argument of the constructor, and the values that the constructor makes of it."""

    given: str
    kind: str
    path: str


@pytest.mark.parametrize(
    "uri",
    [
        Uri("/a/b", "local", "/a/b"),
        Uri("/a/b/", "local", "/a/b"),
        Uri("/", "local", "/"),
        Uri("~/run/", "local", "/home/me/run"),
        Uri("file:///a/b/", "local", "/a/b"),
        Uri("file:///a%20b", "local", "/a b"),
        Uri("s3://bucket/path/to/checkpoint?region=eu-west-3", "s3", "bucket/path/to/checkpoint"),
        Uri("s3://bucket/run/?region=eu-west-3", "s3", "bucket/run"),
        Uri("gs://anonymous@bucket/run/", "gcs", "bucket/run"),
        Uri("abfss://box@me.dfs.core.windows.net/run/", "abfs", "box/run"),
        Uri("mock:///run/", "mock", "run"),
        Uri("hf://me/model/step-1/", "py::fsspec+hf", "me/model/step-1"),
        Uri("hf://datasets/me/data", "py::fsspec+hf", "datasets/me/data"),
        Uri("https://host/run/", "py::fsspec", "https://host/run"),
    ],
    ids=lambda uri: uri.given,
)
def test_what_the_constructor_takes(uri: Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    checkpoint = Checkpoint(uri.given)
    assert checkpoint.path == uri.path
    assert checkpoint.filesystem.type_name.startswith(uri.kind)
    assert repr(checkpoint) == (
        f"Checkpoint(filesystem={checkpoint.filesystem.type_name}, path={uri.path})"
    )


def test_a_path_object_is_taken_too() -> None:
    assert Checkpoint(Path("/a/b")).path == "/a/b"
    filesystem = pafs.LocalFileSystem()
    checkpoint = Checkpoint(Path("/a/b"), filesystem)
    assert checkpoint.path == "/a/b"
    assert checkpoint.filesystem is filesystem


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("run/checkpoint", "'run/checkpoint' is a relative path; use an absolute path or a URI"),
        (Path("run"), "'run' is a relative path"),
        ("", "is a relative path"),
        ("~nobody-of-that-name/run", "is a relative path"),
        ("gopher://host/run", "gopher://host/run: unknown scheme; use s3://, .* or https://"),
        ("memory://run", "unknown scheme"),  # fsspec has it, and it is not on the list
        ("az://box/run", "az://box: .* pip install adlfs"),
        ("hdfs://host:9000/run", "hdfs://host:9000/run: "),
        (
            "http://host/run?sig=S3CR3T",
            "http://host/run: .* a URL with credentials or a query",
        ),
        (
            "https://me:S3CR3T@host/run",
            "https://host/run: ckptfs cannot mount a URL with credentials or a query",
        ),
        (
            "https://S3CR3T@host/run",
            "https://host/run: ckptfs cannot mount a URL with credentials or a query",
        ),
        ("s3://KEY:S3CR3T/X@bucket/run?region=x", "s3://.*@bucket/run: "),
        ("s3://KEY:S3CR3T@bucket/run?region=x&nonsense=S3CR3T", "s3://.*@bucket/run: .*nonsense"),
    ],
)
def test_what_the_constructor_refuses(
    given: "str | Path", message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(ckptfs.LocationError, match=message) as caught:
        _ = Checkpoint(given).filesystem
    assert "S3CR3T" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "uri", "message"),
    [
        ("aiohttp", "https://host/run", "pip install fsspec aiohttp"),
        ("fsspec", "http://host/run", "pip install fsspec aiohttp"),
        ("huggingface_hub", "hf://me/model", "pip install huggingface_hub"),
    ],
)
def test_a_missing_package_is_named(missing: str, uri: str, message: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import ckptfs\n"
        f"try: ckptfs.Checkpoint({uri!r})\n"
        "except ckptfs.LocationError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.startswith(uri)
    assert message in done.stdout


@pytest.mark.parametrize("filesystem", ["s3", object(), pafs.LocalFileSystem, LocalFileSystem])
def test_what_is_no_filesystem_is_a_type_error(filesystem: Any) -> None:
    with pytest.raises(TypeError, match=r"pyarrow\.fs\.FileSystem or an fsspec filesystem, not a "):
        Checkpoint("/run", filesystem)


def test_a_checkpoint_is_no_path(tmp_path: Path) -> None:
    checkpoint = Checkpoint.from_directory(tmp_path)
    for use in (os.fspath, open, os.listdir, os.path.join, Checkpoint):
        with pytest.raises(TypeError, match=r"with checkpoint\.as_directory\(\) as path"):
            use(checkpoint)  # type: ignore[arg-type]


def test_the_constructor_asks_nobody(s3: S3Server, bucket: Path) -> None:
    checkpoints = [
        Checkpoint(f"{bucket.name}/missing", s3.filesystem()),
        Checkpoint(s3.uri(f"{bucket.name}/missing")),
        Checkpoint("missing", pafs.SubTreeFileSystem("no-such-bucket", s3.filesystem())),
        Checkpoint("/missing", MemoryFileSystem()),
        Checkpoint("http://127.0.0.1:9/missing"),
    ]
    for checkpoint in checkpoints:
        assert "missing" in repr(pickle.loads(pickle.dumps(checkpoint)))
    assert s3.traffic().requests == []


def test_a_uri_is_read_without_a_filesystem_of_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow's own look-up of a region kept a process for minutes after its last error."""

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("pyarrow was asked")

    monkeypatch.setattr(pafs, "S3FileSystem", refuse)
    monkeypatch.setattr(pafs, "GcsFileSystem", refuse)
    monkeypatch.setattr(pafs, "resolve_s3_region", refuse)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        query = f"endpoint_override=http://127.0.0.1:{bound.getsockname()[1]}"
        checkpoint = Checkpoint(f"s3://key:secret@bucket/run?{query}")
        for use in (checkpoint.get_metadata, checkpoint.to_directory):
            with pytest.raises(ckptfs.StoreUnavailable):
                use()
    assert repr(checkpoint) == "Checkpoint(filesystem=s3, path=bucket/run)"
    assert repr(Checkpoint("gs://bucket/run")) == "Checkpoint(filesystem=gcs, path=bucket/run)"


def test_what_a_uri_says_goes_with_the_checkpoint() -> None:
    uri = "s3://key:secret@bucket/run?region=x&requester_pays=true&tls_verify_certificates=false"
    checkpoint = pickle.loads(pickle.dumps(Checkpoint(uri)))
    found = describe(filesystem_behind(checkpoint), checkpoint.path, {})
    assert (found.uri, found.secrets) == (parse_uri(uri).uri, parse_uri(uri).secrets)
    below = pafs.SubTreeFileSystem("bucket", filesystem_behind(checkpoint))
    assert describe(below, "run", {}) == found
    with pytest.raises(ckptfs.LocationError, match="requester_pays"):
        _ = checkpoint.filesystem  # pyarrow has no such option


@pytest.mark.parametrize(
    ("uri", "environ", "region"),
    [
        ("s3://bucket/run?region=eu-west-3", {"AWS_REGION": "eu-west-1"}, "eu-west-3"),
        ("s3://bucket/run", {"AWS_REGION": "eu-west-1"}, "eu-west-1"),
        ("s3://bucket/run", {"AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-2"),
        ("s3://bucket/run?endpoint_override=http://minio:9000", {}, "us-east-1"),
        ("s3://bucket/run", {}, "sa-east-1"),
    ],
)
def test_the_region_of_a_filesystem(
    monkeypatch: pytest.MonkeyPatch, uri: str, environ: dict[str, str], region: str
) -> None:
    """Amazon is asked where nothing else says it, and says it with a refusal, too."""
    asked: list[str] = []

    def urlopen(request: urllib.request.Request, timeout: float) -> None:
        asked.append(f"{request.method} {request.full_url}")
        headers = Message()
        headers["x-amz-bucket-region"] = "sa-east-1"
        raise urllib.error.HTTPError(request.full_url, 403, "Forbidden", headers, None)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    filesystem = Checkpoint(uri).filesystem
    assert isinstance(filesystem, pafs.S3FileSystem)
    assert filesystem.region == region
    lookup = ["HEAD https://s3.us-east-1.amazonaws.com/bucket"]
    assert asked == (lookup if region == "sa-east-1" else [])


def test_secrets_are_in_no_text_of_a_checkpoint(s3: S3Server, bucket: Path) -> None:
    checkpoint = Checkpoint(s3.uri(f"{bucket.name}/missing"))
    texts = [repr(checkpoint), str(checkpoint), checkpoint.path, f"{checkpoint}"]
    for use in (checkpoint.to_directory, lambda: checkpoint.update_metadata({"a": {1}})):
        with pytest.raises((ckptfs.CkptfsError, TypeError)) as caught:
            use()
        texts += [str(caught.value), repr(caught.value)]
    assert not [text for text in texts if s3.secret_key in text or s3.access_key in text]


def test_as_directory_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    checkpoint = Checkpoint.from_directory(tmp_path)
    refused: list[tuple[type[Exception], dict[str, Any]]] = [
        (ValueError, {"mode": "fuse"}),
        (TypeError, {"prefetch": "*.json"}),
        (TypeError, {"include": "*.json"}),
    ]
    for kind, arguments in refused:
        with pytest.raises(kind), checkpoint.as_directory(**arguments):
            pass
    with pytest.raises(TypeError, match="include"):
        checkpoint.to_directory(tmp_path / "copy", include="*")


# -- importing


def test_the_api_imports_what_it_needs_only() -> None:
    code = (
        "from ckptfs import Checkpoint\n"
        "Checkpoint('/tmp'); Checkpoint.from_directory('/tmp')\n"
        "import sys; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd="/"
    )
    heavy = "aiohttp|fsspec|huggingface_hub|pyfuse3|ray|rich|trio|typer"
    assert not [name for name in done.stdout.split() if re.fullmatch(heavy, name)]
