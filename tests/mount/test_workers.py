"""The processes in which libraries of stores run, behind a real mount.

Whatever becomes of one, its readers get their bytes or an error in time, and other readers do not
notice.
"""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Node, wait_until, workers
from mount.test_users import BOB, as_user, let_others_in
from pyarrow import fs as pafs

import ckptfs
from ckptfs._client import client
from ckptfs._model.location import Location
from ckptfs._model.protocol.requests import Attach

pytestmark = [
    pytest.mark.mount,
    # Python 3.12 warns because pyarrow has threads; they hold nothing that the children need.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

TESTS = Path(__file__).parents[1]
SIZE = 20_000_000


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder, by HTTP."""

    def log_message(self, *_: object, **__: object) -> None:
        """Say nothing."""


class LoginPage(BaseHTTPRequestHandler):
    """Something on the way that wants a login. pyarrow's Azure client ends its process for it."""

    def answer(self) -> None:
        """Say so."""
        page = b"<html><body>Please log in<br></body></html>"
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    do_HEAD = do_GET = do_PUT = answer

    def log_message(self, *_: object, **__: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[int]:
    """An HTTP server; gives its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A checkpoint on the local disk."""
    top = tmp_path / "run" / "ckpt"
    top.mkdir(parents=True)
    (top / "config.json").write_text("{}")
    (top / "empty").touch()
    (top / "weights").write_bytes(os.urandom(SIZE))
    return top


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ckptfs.Checkpoint:
    """A checkpoint whose library misbehaves by the names of its files: see `workerfaults`."""
    monkeypatch.syspath_prepend(TESTS)
    from support.workerfaults import Faulty

    top, seen = tmp_path / "faulty", tmp_path / "seen"
    (top / "run").mkdir(parents=True)
    seen.mkdir()
    for name in ("plain", "once-hold-gate", "once-abort", "abort", "once-stop", "hang"):
        (top / "run" / name).write_bytes(name.encode() * 1000)
    return ckptfs.Checkpoint("run", pafs.PyFileSystem(Faulty(str(top), str(seen))))


def local(top: Path) -> Location:
    """A directory of the disk, to be mounted like any other."""
    return Location("local", str(top))


def azure_at(port: int) -> Location:
    """A place at an Azure server, with credentials of one's own."""
    host = f"127.0.0.1:{port}"
    options = {
        "account_name": "me",
        "blob_storage_authority": host,
        "blob_storage_scheme": "http",
        "dfs_storage_authority": host,
        "dfs_storage_scheme": "http",
    }
    return Location("azure", "box/run", options, {"account_key": "c2VjcmV0"})


def libraries_of(pid: int) -> set[str]:
    """Packages whose shared objects a process has in memory."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {name for name in ("pyarrow", "aiohttp", "obstore", "libarrow") if name in maps}


def test_no_library_of_a_store_is_in_the_daemon(node: Node, top: Path) -> None:
    node.configure(store_timeout_s=0.3)
    node.here("mount")
    with served(lambda *args: Quiet(*args, directory=str(top))) as port:
        place = Location("hdfs", "/box/x", {"host": "127.0.0.1", "port": 9})
        with client.connect() as connection, contextlib.suppress(ckptfs.CkptfsError):
            connection.ask_once(Attach(location=place))
        for place in (local(top), Location("http", f"http://127.0.0.1:{port}")):
            with client.leased(place) as path:
                assert "config.json" in os.listdir(path)
                assert Path(path, "empty").read_bytes() == b""
        found = set[str]().union(*map(libraries_of, workers()))
        assert "pyarrow" in found
        status = node.status()
        assert status["workers"] == len(workers()) > 0
        assert status["worker_bytes"] > 1_000_000
        assert "processes that read stores" in node.here("status").stdout
        assert libraries_of(status["pid"]) == set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGABRT])
def test_readers_do_not_notice_that_a_worker_is_gone(
    node: Node, top: Path, number: signal.Signals
) -> None:
    node.expected_in_log.append("(local) ended: ")
    content = (top / "weights").read_bytes()
    with client.leased(local(top)) as path:
        pid = node.status()["pid"]
        with open(f"{path}/weights", "rb", buffering=0) as file:
            assert file.read(100) == content[:100]
            node.wait_quiet()
            for worker in workers():
                os.kill(worker, number)
            assert file.read(SIZE) + file.read(SIZE) == content[100:]
        assert node.status()["pid"] == pid


def test_workers_end_with_their_daemon_and_the_next_has_its_own(node: Node, top: Path) -> None:
    node.expected_in_log.append("was killed by signal 9")
    content = (top / "weights").read_bytes()
    with client.leased(local(top)) as path:
        assert Path(path, "config.json").read_text() == "{}"
        before = workers()
        assert before
        os.kill(node.status()["pid"], signal.SIGKILL)
        assert Path(path, "weights").read_bytes() == content
        wait_until(lambda: not before & workers())
        assert workers()


def test_a_library_that_holds_the_lock_stops_nobody_else(
    node: Node, faulty: ckptfs.Checkpoint, tmp_path: Path
) -> None:
    node.configure(idle_exit_s=0.5)
    gate = tmp_path / "seen" / "gate"
    os.mkfifo(gate)
    with faulty.as_directory(mode="mount") as path:
        assert Path(path, "plain").read_bytes() == b"plain" * 1000
        held = threading.Thread(target=Path(path, "once-hold-gate").read_bytes)
        held.start()
        wait_until((gate.parent / "once-hold-gate").exists)
        for _ in range(6):
            with open(f"{path}/plain", "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert file.read() == b"plain" * 1000
            os.stat(f"{path}/hang")
        assert held.is_alive()
        gate.open("wb").close()
        held.join()
    wait_until(lambda: not workers())


@pytest.mark.long
def test_a_library_that_aborts_costs_an_error_and_no_daemon(
    node: Node, faulty: ckptfs.Checkpoint
) -> None:
    node.configure(idle_exit_s=0.5)
    with faulty.as_directory(mode="mount") as path:
        assert Path(path, "once-abort").read_bytes() == b"once-abort" * 1000
        assert Path(path, "once-stop").read_bytes() == b"once-stop" * 1000
        with subprocess.Popen(["cat", f"{path}/abort"], stdout=subprocess.PIPE) as reader:
            wait_until(lambda: b"SIGABRT" in error_of(f"{path}/abort"))
            reader.kill()
            assert reader.communicate()[0] == b""
        # The pause before the next start may be longer than the deadline of one read.
        wait_until(lambda: is_read(Path(path, "plain")))
        assert Path(path, "plain").read_bytes() == b"plain" * 1000
    wait_until(lambda: not workers())


def is_read(file: Path) -> bool:
    """Whether a file can be read now."""
    with contextlib.suppress(OSError):
        file.read_bytes()
        return True
    return False


def error_of(file: str) -> bytes:
    """What a file's attribute names as its last error."""
    with contextlib.suppress(OSError):
        return os.getxattr(file, "user.ckptfs.error")
    return b""


def test_another_user_cannot_end_the_daemon_by_a_library_that_aborts(node: Node, top: Path) -> None:
    node.configure(allow_other=True, linger_s=60.0, attach_deadline_s=10.0)
    let_others_in(node.folder)
    node.here("mount")
    node.expected_in_log.append("(azure) ended: was killed by SIGABRT")
    pid = node.status()["pid"]
    content = (top / "weights").read_bytes()

    def attach_again_and_again() -> None:
        for _ in range(2):
            with client.connect() as connection, pytest.raises(ckptfs.CkptfsError):
                connection.ask_once(Attach(location=azure_at(port)))

    with served(LoginPage) as port, client.leased(local(top)) as path:
        as_user(BOB, attach_again_and_again)
        assert Path(path, "weights").read_bytes() == content
    assert node.status()["pid"] == pid
    assert node.status()["restarts"] == 0
