"""Fixtures: a node with a daemon of its own, an S3 server, and the check that nothing is left."""

import contextlib
import io
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.s3server import S3Server

from ckptfs.__main__ import main
from ckptfs._client import client
from ckptfs._config.load import load_config

HAS_FUSE = os.path.exists("/dev/fuse") and stat.S_ISCHR(os.stat("/dev/fuse").st_mode)
COMMAND_TIMEOUT_S = 60
LARGE_BYTES = (20 << 20) + 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stores", action="store_true", help="tests/stores: all servers, also those that are slow"
    )
    parser.addoption(
        "--long", action="store_true", help="tests/stores: 1,000 overwrites on each server, not 40"
    )


def pytest_configure() -> None:
    """Give the run a temporary folder of its own, so that what is left in it is ours. With
    pytest-xdist each worker is a run, and its folder lies in that of the run which started it."""
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="ckptfs-tests-")


def pytest_unconfigure() -> None:
    shutil.rmtree(tempfile.gettempdir())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """More processes than there are cores, because many tests wait. At most four, because a test
    starts several processes."""
    return min(2 + len(os.sched_getaffinity(0)), 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_FUSE:
        return
    for item in items:
        if item.get_closest_marker("mount"):
            item.add_marker(pytest.mark.skip(reason="there is no /dev/fuse"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = [
        r for r in terminalreporter.stats.get("skipped", []) if "/dev/fuse" in str(r.longrepr)
    ]
    if skipped:
        terminalreporter.section("NO /dev/fuse: THE MOUNT WAS NOT TESTED", sep="!", red=True)
        terminalreporter.line(f"{len(skipped)} tests that mount were skipped")


def wait_until(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    """Return as soon as `condition()` is true. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s")
        time.sleep(0.02)


# -- what must not be left behind


def mounts() -> set[str]:
    """Mount points below the run's temporary folder."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {at for line in lines if (at := line.split(" ")[4]).startswith(tempfile.gettempdir())}


DAEMONS = b"ckptfs._keeper", b"ckptfs._daemon"
WORKERS = (b"ckptfs._workers",)


def processes() -> dict[int, bytes]:
    """The command lines of the processes of this run that belong to ckptfs."""
    ours = tempfile.gettempdir().encode()
    found: dict[int, bytes] = {}
    # Without Path and buffers, because each test looks twice at all processes of the machine.
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/cmdline", "rb", buffering=0) as file:
                    command = file.read()
                if has_module(command, DAEMONS + WORKERS):
                    with open(f"/proc/{name}/environ", "rb", buffering=0) as file:
                        if ours in file.read():
                            found[int(name)] = command
    return found


def has_module(command: bytes, modules: tuple[bytes, ...]) -> bool:
    return any(module in command for module in modules)


def workers() -> set[int]:
    """Processes of this run in which libraries of stores run."""
    return {pid for pid, command in processes().items() if has_module(command, WORKERS)}


def daemons(argument: bytes = b"") -> set[int]:
    """Processes of this run that are a keeper or a daemon, and have `argument` on their command
    line."""
    found = processes().items()
    return {pid for pid, command in found if argument in command and has_module(command, DAEMONS)}


def parent_of(pid: int) -> int:
    """The process that has started a process; 0: it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def temporary() -> set[str]:
    # Not pytest's own folder, which is made for the first test that asks for `tmp_path`.
    names = os.listdir(tempfile.gettempdir())
    return {name for name in names if not name.startswith("pytest-of-")}


def daemons_after_workers(kept: set[int]) -> set[int]:
    """The keepers and daemons, as soon as all workers have ended but those of `kept`: the kernel
    ends a worker a moment after its daemon. Raises TimeoutError."""
    found: dict[int, bytes] = {}

    def have_ended() -> bool:
        nonlocal found
        found = processes()
        workers = [pid for pid, command in found.items() if has_module(command, WORKERS)]
        return all(parent_of(pid) in kept for pid in workers)

    wait_until(have_ended)
    return {pid for pid, command in found.items() if has_module(command, DAEMONS)}


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    before = mounts(), daemons(), temporary()
    yield
    try:
        left_daemons = daemons_after_workers(before[1])
    except TimeoutError:
        pytest.fail("left behind: workers")
    after = mounts(), left_daemons, temporary()
    left = [sorted(now - then) for now, then in zip(after, before, strict=True)]  # type: ignore[type-var]
    assert left == [[], [], []], f"left behind: mounts, processes, temporary files: {left}"


# -- a node


class Node:
    """An isolated node: socket, mount, cache and configuration of its own.

    The environment of the test's process points to it, as does that of the commands it runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mount = folder / "mnt"
        self.cache_dir = folder / "cache"
        self.socket = folder / "sock"
        self.expected_in_log: list[str] = []
        self._others = daemons()
        self.environment = {
            "CKPTFS_SOCKET": str(self.socket),
            "CKPTFS_MOUNT": str(self.mount),
            "CKPTFS_CACHE_DIR": str(self.cache_dir),
            "CKPTFS_CONFIG": str(folder / "ckptfs.toml"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.configure()

    def configure(self, **settings: Any) -> None:
        """Write the configuration file. Takes effect with the next daemon."""
        settings = {
            "linger_s": 0.2,
            "spare": False,
            "read_deadline_s": 20.0,
            "cache_free_share_min": 0.0,
        } | settings
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
        (self.folder / "ckptfs.toml").write_text("".join(lines))

    def run(
        self, *command: str, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run any command, with a time limit."""
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
            **options,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``ckptfs`` with `arguments`."""
        command = Path(sys.executable).with_name("ckptfs")
        return self.run(str(command), *arguments, check=check)

    def here(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``ckptfs`` with `arguments` in this process, without an interpreter's start."""
        # As strict as a process's streams: text that UTF-8 does not have is an error.
        output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
        argv, sys.argv = sys.argv, ["ckptfs", *arguments]
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                main()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0
        finally:
            sys.argv = argv
        for stream in (output, errors):
            stream.seek(0)
        said = output.read(), errors.read()
        assert not check or status == 0, f"{arguments}: {said}"
        return subprocess.CompletedProcess(arguments, status, *said)

    def python(self, code: str, *arguments: str) -> "subprocess.Popen[str]":
        """Start a Python process that runs `code`; its output can be read."""
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def status(self) -> dict[str, Any]:
        """``ckptfs status --json``."""
        return json.loads(self.here("status", "--json").stdout)

    def wait_quiet(self) -> None:
        """Wait until nothing is being fetched any more, also ahead of the readers."""

        def is_quiet() -> bool:
            status = json.loads(self.here("status", "--json").stdout)
            return all(a["state"] != "fetching" for a in status["attachments"])

        wait_until(is_quiet)

    def wait_detached(self) -> None:
        """Wait until nothing is attached: the daemon hears of the end of a command a moment after
        it."""
        wait_until(lambda: self.status()["attachments"] == [])

    def log(self) -> str:
        """The text that keeper and daemon have logged."""
        path = self.cache_dir / "daemon.log"
        return path.read_text() if path.exists() else ""

    def end(self) -> None:
        """End the daemon, if it runs: ``ckptfs umount --force`` without a process of its own."""
        if self.socket.exists():
            with client.connect() as connection:
                connection.stop(force=True)
            assert client.wait_ended(load_config(), COMMAND_TIMEOUT_S)
        # The keeper gives its lock back before its last breath.
        wait_until(lambda: daemons() <= self._others)

    def check_log(self, log: str) -> None:
        """Fail for every line above INFO that the test did not announce in `expected_in_log`."""
        for line in log.splitlines():
            if " INFO " not in line and not any(known in line for known in self.expected_in_log):
                pytest.fail(f"unexpected line in the daemon's log: {line}\n\n{log}")


@contextlib.contextmanager
def node_in(patch: pytest.MonkeyPatch) -> Iterator[Node]:
    """A node to which the environment points. Its path is short: the socket's name has a limit of
    107 bytes (unix(7))."""
    node = Node(Path(tempfile.mkdtemp(prefix="ckptfs-")))
    for name, value in node.environment.items():
        patch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        patch.delenv(name, raising=False)
    try:
        yield node
    finally:
        node.end()
        log = node.log()
        shutil.rmtree(node.folder)
    node.check_log(log)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """A node of the test's own."""
    with node_in(monkeypatch) as node:
        yield node


@pytest.fixture(scope="module")
def running_node() -> Iterator[Node]:
    """A node whose daemon runs from the start, because an idle one would end between the tests."""
    with pytest.MonkeyPatch.context() as patch, node_in(patch) as node:
        node.configure(idle_exit_s=0)
        node.here("mount")
        yield node


@pytest.fixture
def module_node(running_node: Node) -> Iterator[Node]:
    """The node of a module's tests that read checkpoints of their own, with a daemon that none of
    them ends or configures. Nothing is attached when a test begins."""
    yield running_node
    for attachment in running_node.status()["attachments"]:
        if attachment["pinned"]:
            running_node.here("detach", attachment["path"])
    running_node.wait_detached()
    running_node.check_log(running_node.log())


# -- stores


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One S3 server for all tests, behind a counting proxy."""
    with S3Server(counted=True) as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[Path]:
    """The folder of a bucket of the test's own; its name is the folder's."""
    folder = s3.bucket_dir(f"test-{uuid.uuid4().hex[:12]}")
    s3.reset_traffic()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def uri_of(s3: S3Server) -> Callable[[Path], str]:
    """The URI of a folder in a bucket."""
    return lambda folder: s3.uri(str(folder.relative_to(s3.root)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory to upload: a file of several parts (`LARGE_BYTES`), a small and an empty one."""
    top = tmp_path / "checkpoint"
    (top / "a").mkdir(parents=True)
    (top / "large.bin").write_bytes(random.Random(5).randbytes(LARGE_BYTES))
    (top / "a" / "small.bin").write_bytes(b"small")
    (top / "a" / "empty").touch()
    return top


@pytest.fixture
def small(bucket: Path) -> Path:
    """A checkpoint with a few small files, ``<bucket>/run/checkpoint``."""
    top = bucket / "run" / "checkpoint"
    (top / "layers" / "0").mkdir(parents=True)
    (top / "config.json").write_text('{"layers": 1}')
    (top / "empty").touch()
    (top / "layers" / "0" / "weights.bin").write_bytes(os.urandom(3_000_000))
    return top
