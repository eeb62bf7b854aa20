"""pip replaces the previous release of ckptfs by the release under test while readers read.

Keepers, daemons and clients of the previous release that still run, its unit file and its pickles
name modules of ckptfs by path. Each of these names has to lead to a module of the next release.
"""

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND_TIMEOUT_S, Node, daemons, wait_until, workers
from mount.test_lifecycle import hear, tell
from mount.test_named_stores import configure
from support.servicemanager import managing

from ckptfs._client import client, connection
from ckptfs._install import program
from ckptfs._keeper import keeper
from ckptfs.errors import CkptfsError

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
MIB = 1 << 20
PROJECT = Path(__file__).parents[2]

PREVIOUS = "ecac71df07fba2261820cb6976b791dc03b9c0a8"
"""The last commit of the release before modules moved. The modules that stand in for the former
ones stay for one release. When they go, this constant has to name the release that moved the
modules, and the assertions about the former names go."""
PREVIOUS_VERSION = "0.0.1"
"""The version that the previous release gets here, so that the two releases can be told apart."""

FILE_BYTES = 16 * MIB
CACHE_BYTES_MAX = 8 * MIB  # so that readers find some bytes in the cache, and others not
READS = 10
"""Verified reads of each reader that prove that it has read in a phase."""

READER = """
import mmap, os, random, sys, time

place, how, known, board, slot = sys.argv[1:]
slot = int(slot)
rng = random.Random(slot)

def mapped(path, mode="rb", **options):
    with open(path, mode) as file:
        return mmap.mmap(file.fileno(), 0, **options)

known = mapped(known, prot=mmap.PROT_READ)
counts = memoryview(mapped(board, "r+b")).cast("Q")

def pread(fd, length, offset):
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # the kernel has to ask
    return os.pread(fd, length, offset)

def read_once(kept, kept_mapped):
    offset = rng.randrange(len(known))
    length = min(len(known) - offset, rng.choice((1, 100, 4096, 1 << 16, 1 << 18)))
    if how == "mapped":
        kept_mapped.madvise(mmap.MADV_DONTNEED)  # the kernel keeps pages that are mapped
        data = kept_mapped[offset:offset + length]
    elif how == "kept":
        data = pread(kept, length, offset)
    elif how == "opened":
        with open(path + "/a.bin", "rb", buffering=0) as file:
            data = pread(file.fileno(), length, offset)
    else:
        with checkpoint.as_directory() as again:
            assert os.listdir(again) == ["a.bin"], os.listdir(again)
            assert os.getxattr(again + "/a.bin", "user.ckptfs.size") == b"%d" % len(known)
            with open(again + "/a.bin", "rb", buffering=0) as file:
                data = pread(file.fileno(), length, offset)
    assert data == known[offset:offset + length], (how, offset, length, len(data))

def read_on(path):
    kept = os.open(path + "/a.bin", os.O_RDONLY)
    kept_mapped = mapped(path + "/a.bin", prot=mmap.PROT_READ)
    print(path, flush=True)
    while not counts[4]:
        read_once(kept, kept_mapped)
        counts[slot] += 1
        time.sleep(0.02)  # four processes that never wait would slow everything else down

if how == "attached":
    import ckptfs

    checkpoint = ckptfs.Checkpoint(place)
    with checkpoint.as_directory() as path:
        read_on(path)
else:
    path = place
    read_on(path)
"""
"""A program that reads until the last number on the board is not 0."""
HOWS = "attached", "opened", "kept", "mapped"
"""The ways in which the readers read. The first reader is a client of the previous release, which
attaches the checkpoint for all of them."""

CLIENT = """
import sys
import ckptfs

checkpoint = ckptfs.Checkpoint(sys.argv[1])
for _ in sys.stdin:
    with checkpoint.as_directory() as path:
        print(len(open(path + "/layers/0/weights.bin", "rb").read()), flush=True)
"""
"""A program of the previous release, which attaches once for each line that it reads."""

PICKLE = """
import pickle, sys
import ckptfs

for place in sys.argv[1:]:
    print(pickle.dumps(ckptfs.Checkpoint(place)).hex())
"""

FILESYSTEM = """
from fsspec.implementations.local import LocalFileSystem

class OtherLocal(LocalFileSystem):
    protocol = "otherlocal"
"""
PRIVATE = """
import sys
sys.path.insert(0, sys.argv[1])
import other_filesystem
import ckptfs

checkpoint = ckptfs.Checkpoint(sys.argv[2], other_filesystem.OtherLocal())
with checkpoint.as_directory(mode="mount") as path:
    print(path, flush=True)
    for name in sys.stdin:
        print(open(f"{path}/{name.strip()}").read(), flush=True)
"""
"""A program of the previous release that has a private daemon."""


class Installed:
    """A virtual environment with a release of ckptfs."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.python = prefix / "bin" / "python"
        [self._packages] = prefix.glob("lib/python*/site-packages")

    @classmethod
    def make(cls, prefix: Path, source: Path) -> None:
        """Make one of a source tree. It has its dependencies from the environment of the tests."""
        run(sys.executable, "-m", "venv", "--without-pip", str(prefix))
        made = cls(prefix)
        dependencies = distribution("msgspec").locate_file(".")
        (made._packages / "dependencies.pth").write_text(f"{dependencies}\n")
        made._install("--ignore-installed", "--no-build-isolation", str(source))

    def upgrade(self) -> None:
        """Install the release under test in the place of the one that is there."""
        with tempfile.TemporaryDirectory() as folder:
            self._install("--upgrade", str(program.pack(Path(folder))))
        files = {str(file) for file in distribution("ckptfs").files or [] if file.suffix == ".py"}
        found = self._packages.glob("ckptfs/**/*.py")
        assert {str(path.relative_to(self._packages)) for path in found} == files

    def _install(self, *what: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python)]
        options = "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--no-index"
        run(*pip, "install", *options, *what)

    def ckptfs(self, *arguments: str) -> str:
        """Run its command; returns the output."""
        return run(str(self.python), "-m", "ckptfs", *arguments)

    def start(self, code: str, *arguments: str) -> "subprocess.Popen[str]":
        """Start a Python program that has this release."""
        return subprocess.Popen(
            [self.python, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",  # because "-c" puts the working directory on the module path
        )

    def command_of_the_unit(self) -> list[str]:
        """The command of its unit file, in this environment."""
        unit = self.prefix / "share/ckptfs/systemd/system/ckptfs.service"
        [line] = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=")]
        _, *words = line.split()
        return [str(self.python), *words]


def run(*command: str) -> str:
    """Run a command, with a time limit; returns its output."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False, cwd="/"
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def previous_release() -> Path:
    """An environment with the previous release, which no test changes. It is made once, and is then
    kept in the virtual environment of the tests."""
    kept = Path(sys.prefix, "previous-release", PREVIOUS)
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as work:
            source, prefix = Path(work, "source"), Path(work, "prefix")
            check_out_previous(source)
            Installed.make(prefix, source)
            with suppress(OSError):  # another run has made it meanwhile
                prefix.rename(kept)
    return kept


def check_out_previous(folder: Path) -> None:
    """Lay the source of the previous release into `folder`. Skips the test where that source is not
    in the history of this checkout."""
    archive = folder.with_suffix(".zip")
    git = ["git", "-C", str(PROJECT), "archive", f"--output={archive}", PREVIOUS]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
        why_not = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError:
        why_not = "git is not installed"
    if why_not:
        pytest.skip(f"the previous release is not in the history of {PROJECT}: {why_not}")
    shutil.unpack_archive(archive, folder)
    settings = folder / "pyproject.toml"
    text = settings.read_text()
    assert text.count('\nversion = "') == 1
    before, _, after = text.partition('\nversion = "')
    after = after.partition('"')[2]
    settings.write_text(f'{before}\nversion = "{PREVIOUS_VERSION}"{after}')


@pytest.fixture
def release(node: Node, previous_release: Path) -> Installed:
    """The previous release, in an environment that the test may upgrade."""
    prefix = node.folder / "release"
    shutil.copytree(previous_release, prefix, symlinks=True)
    return Installed(prefix)


def status(node: Node) -> dict[str, Any]:
    """The daemon's status, as soon as one answers."""
    found: list[dict[str, Any]] = []

    def has_answered() -> bool:
        with suppress(CkptfsError, ConnectionError):
            found.append(node.status())
        return bool(found)

    wait_until(has_answered)
    return found[0]


class Readers:
    """Four processes that read and verify all the time.

    Args:
        node: Where they run.
        release: The previous release.
        uri: Of a checkpoint with the file ``a.bin``.
        known: The same file, not on a mount.
    """

    def __init__(self, node: Node, release: Installed, uri: str, known: Path) -> None:
        self._node = node
        self._board = board = node.folder / "board"
        board.write_bytes(bytes(8 * (len(HOWS) + 1)))
        self._processes: list[subprocess.Popen[str]] = []
        place = uri
        for slot, how in enumerate(HOWS):
            process = release.start(READER, place, how, str(known), str(board), str(slot))
            self._processes.append(process)
            if not slot:
                place = hear(process)

    def counts(self) -> Sequence[int]:
        """How often each has read."""
        return memoryview(self._board.read_bytes()).cast("Q")[: len(HOWS)]

    def have_read(self) -> None:
        """Wait until each has read `READS` times from now on, and the daemon has fetched bytes."""
        before, fetched = self.counts(), status(self._node)["fetched_bytes"]

        def have_all() -> bool:
            assert [each.poll() for each in self._processes] == [None] * len(HOWS)
            pairs = zip(before, self.counts(), strict=True)
            have_read = all(now - then >= READS for then, now in pairs)
            return have_read and status(self._node)["fetched_bytes"] > fetched

        wait_until(have_all, COMMAND_TIMEOUT_S)

    def end(self) -> list[int]:
        """End them; returns their exit statuses."""
        with self._board.open("r+b") as board:
            board.seek(8 * len(HOWS))
            board.write(b"\1")
        try:
            for process in self._processes:
                process.communicate(timeout=COMMAND_TIMEOUT_S)
        finally:
            for process in self._processes:
                process.kill()
        return [process.returncode for process in self._processes]


@contextmanager
def reading(node: Node, release: Installed, bucket: Path, uri: str) -> Iterator[Readers]:
    """Readers of a checkpoint that is made here. At the end none of them has had an error."""
    (bucket / "a.bin").write_bytes(random.Random(1).randbytes(FILE_BYTES))
    readers = Readers(node, release, uri, bucket / "a.bin")
    try:
        readers.have_read()
        yield readers
    finally:
        statuses = readers.end()
    assert statuses == [0] * len(HOWS)


def kill_daemon(node: Node) -> None:
    """Kill the daemon, and wait for the next one."""
    victim = status(node)["pid"]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: status(node)["pid"] != victim)


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def wait_for_spare() -> None:
    """Wait until the keeper has a spare daemon that has imported its modules: it sleeps until it is
    given its configuration."""

    def sleeps(pid: int) -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    def are_two() -> bool:
        found = daemons(b"ckptfs._daemon.app")
        return len(found) == 2 and all(sleeps(pid) for pid in found)

    wait_until(are_two)


def test_upgrade_readers_of_the_previous_release_notice_nothing(
    node: Node, bucket: Path, uri_of: UriOf, release: Installed
) -> None:
    node.expected_in_log.append("starting the next one")
    node.configure(spare=True, cache_bytes_max=CACHE_BYTES_MAX)
    release.ckptfs("mount")
    with client.connect() as connected:
        keeping = connected.keeper_pid
    with reading(node, release, bucket, uri_of(bucket)) as readers:
        before = status(node)
        assert before["version"] == PREVIOUS_VERSION
        assert "--resume" not in command_of(keeping)
        wait_for_spare()

        release.upgrade()
        readers.have_read()
        release.ckptfs("reload")
        assert status(node)["pid"] == before["pid"]

        release.ckptfs("restart")
        after = status(node)
        assert after["version"] == version("ckptfs")
        assert after["pid"] != before["pid"]
        assert "--resume" in command_of(keeping)  # the keeper has been executed from the disk again
        readers.have_read()

        kill_daemon(node)
        assert status(node)["version"] == version("ckptfs")
        readers.have_read()

        release.ckptfs("restart")
        assert keeper.__name__ in command_of(keeping)  # the new keeper did that by its own name
        readers.have_read()
        assert status(node)["restarts"] == 3
        assert f"pid {status(node)['pid']}, restarted 3 times" in release.ckptfs("status")


def test_upgrade_of_a_service_goes_on_with_the_mount(
    node: Node, bucket: Path, uri_of: UriOf, release: Installed
) -> None:
    """The new keeper reads what the previous keeper has left with the service manager. The command
    that starts it stands in the unit file of the previous release."""
    node.expected_in_log.append("starting the next one")
    node.configure(cache_bytes_max=CACHE_BYTES_MAX)
    folder = node.folder / "manager"
    folder.mkdir()
    with managing(folder, release.command_of_the_unit()) as manager:

        def start() -> None:
            before = sum(said.startswith("READY=1\n") for said in manager.said)
            manager.start()
            wait_until(lambda: sum(s.startswith("READY=1\n") for s in manager.said) > before)

        start()
        with reading(node, release, bucket, uri_of(bucket)) as readers:
            assert status(node)["version"] == PREVIOUS_VERSION
            release.upgrade()
            kill_daemon(node)  # the former keeper starts a daemon of the new release
            assert status(node)["version"] == version("ckptfs")
            readers.have_read()

            assert manager.stop("restart") == 0
            start()
            assert status(node)["restarts"] == 2
            readers.have_read()

            release.ckptfs("restart")
            assert status(node)["restarts"] == 3
            assert status(node)["version"] == version("ckptfs")
            readers.have_read()
        assert manager.stop() == 0
        node.check_log(manager.log())


def test_upgrade_programs_of_the_previous_release_start_the_new_one(
    node: Node, small: Path, uri_of: UriOf, release: Installed
) -> None:
    """The client has imported the previous release, and the cache was filled by it."""
    with release.start(CLIENT, uri_of(small)) as former:
        tell(former)
        assert hear(former) == "3000000"
        wait_until(lambda: status(node)["cache_bytes"] >= 3_000_000)
        release.ckptfs("umount", "--force")
        release.upgrade()
        tell(former)
        assert hear(former) == "3000000"
        after = status(node)
        assert (after["version"], after["fetched_bytes"]) == (version("ckptfs"), 0)
    assert former.returncode == 0


def test_upgrade_a_private_daemon_is_followed_by_a_new_one(
    node: Node, tmp_path: Path, release: Installed
) -> None:
    """Its keeper remains the previous release's, because it has the client's pickle."""
    node.configure(idle_exit_s=0.5)
    (tmp_path / "other_filesystem.py").write_text(FILESYSTEM)
    top = tmp_path / "top"
    top.mkdir()
    for name in ("a", "b", "c"):
        (top / name).write_text(f"text of {name}")
    with release.start(PRIVATE, str(tmp_path), str(top)) as former:
        socket = Path(hear(former)).parents[1] / "sock"

        def read(name: str) -> str:
            """Have the client read a file; returns the version of the daemon then."""
            tell(former, name)
            assert hear(former) == f"text of {name}"
            with connection.connect_to(str(socket), COMMAND_TIMEOUT_S) as connected:
                return connected.status().version

        assert read("a") == PREVIOUS_VERSION
        release.upgrade()
        [worker] = workers()
        os.kill(worker, signal.SIGKILL)
        assert read("b") == PREVIOUS_VERSION  # whose next worker is one of the new release
        [victim] = daemons(b"ckptfs._daemon.app")
        os.kill(victim, signal.SIGKILL)
        assert read("c") == version("ckptfs")
    assert former.returncode == 0


def test_upgrade_pickles_of_the_previous_release_can_be_read(
    node: Node, small: Path, uri_of: UriOf, release: Installed
) -> None:
    configure(node, f'[store.prod]\nuri = "file://{small.parent}"\n')
    places = uri_of(small), f"prod:{small.name}"
    for text in run(str(release.python), "-c", PICKLE, *places).split():
        with pickle.loads(bytes.fromhex(text)).as_directory() as path:
            assert Path(path, "config.json").read_text() == '{"layers": 1}'
