"""Files that are complete in the cache are read by the kernel itself, where it can.

The tests tell the difference because a process can read such a file while the daemon is stopped.
"""

import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import HAS_FUSE, Node, wait_until

from ckptfs import Checkpoint

pytestmark = pytest.mark.mount
MIB = 1 << 20
SIZE = 16 * MIB + 77
CONTENT = os.urandom(SIZE)
STOPPED_S_MAX = 5.0
"""After this time the daemon goes on, so that a failing test ends."""


@pytest.fixture
def uri(bucket: Path, uri_of: Callable[[Path], str]) -> str:
    (bucket / "run").mkdir()
    (bucket / "run" / "a.bin").write_bytes(CONTENT)
    (bucket / "run" / "b.bin").write_bytes(CONTENT[::-1])
    return uri_of(bucket / "run")


@pytest.fixture
def root(module_node: Node, uri: str) -> Iterator[str]:
    """A checkpoint, on a node that can pass files through."""
    with Checkpoint(uri).as_directory() as path:
        if (why := module_node.status()["passthrough"]) != "on":
            pytest.skip(f"passthrough is {why}")
        yield path


def without_daemon(node: Node, read: Callable[[], bytes]) -> bytes | None:
    """The result of `read` while the daemon is stopped, or None if it needed the daemon."""
    pid = node.status()["pid"]
    resumed = threading.Event()

    def resume() -> None:
        resumed.set()
        os.kill(pid, signal.SIGCONT)

    timer = threading.Timer(STOPPED_S_MAX, resume)
    os.kill(pid, signal.SIGSTOP)
    timer.start()
    try:
        data = read()
        return None if resumed.is_set() else data
    finally:
        timer.cancel()
        os.kill(pid, signal.SIGCONT)


def complete(path: str) -> None:
    """Have all of a file in the cache, but not in the kernel's memory."""
    os.setxattr(path, "user.ckptfs.prefetch", b"")
    wait_until(lambda: os.getxattr(path, "user.ckptfs.state") == b"cached")


def test_a_complete_file_is_read_without_the_daemon(module_node: Node, root: str) -> None:
    path = f"{root}/a.bin"
    complete(path)
    with open(path, "rb", buffering=0) as file:
        fd = file.fileno()
        assert without_daemon(module_node, lambda: os.pread(fd, SIZE + 1, 0)) == CONTENT
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
            assert without_daemon(module_node, lambda: memory[:]) == CONTENT
        assert os.pread(fd, 10, SIZE) == b""
        assert os.fstat(fd).st_size == SIZE
        with open(os.devnull, "wb") as sink:
            assert os.sendfile(sink.fileno(), fd, 0, SIZE) == SIZE
    assert Path(path).read_bytes() == CONTENT


def test_o_direct(module_node: Node, root: str) -> None:
    path = f"{root}/a.bin"
    complete(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        memory = mmap.mmap(-1, MIB)
        assert os.preadv(fd, [memory], 2 * MIB) == MIB
        assert memory[:] == CONTENT[2 * MIB : 3 * MIB]
    finally:
        os.close(fd)


def test_a_file_opened_incomplete_stays_ordinary_until_its_last_handle_is_gone(
    module_node: Node, root: str
) -> None:
    path = f"{root}/a.bin"
    with open(path, "rb", buffering=0) as first:
        memory = mmap.mmap(first.fileno(), 0, prot=mmap.PROT_READ)
        assert first.read(MIB) == CONTENT[:MIB]
        complete(path)
        with open(path, "rb", buffering=0) as second:  # mixing both would be EIO
            assert os.pread(second.fileno(), 99, 2 * MIB) == CONTENT[2 * MIB : 2 * MIB + 99]
    with open(path, "rb", buffering=0) as third:  # closed, but still mapped
        assert os.pread(third.fileno(), 99, 0) == CONTENT[:99]
    assert memory[MIB : MIB + 9] == CONTENT[MIB : MIB + 9]
    memory.close()
    with open(path, "rb", buffering=0) as last:
        fd = last.fileno()
        assert without_daemon(module_node, lambda: os.pread(fd, SIZE, 0)) == CONTENT


def test_a_file_that_was_just_read_is_in_memory_and_stays_there(
    module_node: Node, root: str
) -> None:
    path = f"{root}/a.bin"
    assert Path(path).read_bytes() == CONTENT
    wait_until(lambda: os.getxattr(path, "user.ckptfs.state") == b"cached")
    with open(path, "rb", buffering=0) as file:
        fd = file.fileno()
        assert (
            without_daemon(module_node, lambda: os.pread(fd, SIZE, 0)) == CONTENT
        )  # from its pages
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, SIZE, 0) == CONTENT  # the daemon is asked: it was no passthrough
    with open(path, "rb", buffering=0) as file:  # but now it is: memory seems to be short
        fd = file.fileno()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert without_daemon(module_node, lambda: os.pread(fd, SIZE, 0)) == CONTENT


def test_many_handles_at_the_same_time(module_node: Node, root: str) -> None:
    path = f"{root}/a.bin"
    complete(path)
    files = [open(path, "rb", buffering=0) for _ in range(20)]  # noqa: SIM115
    for file in files[::2]:
        file.close()
    fds = [file.fileno() for file in files[1::2]]
    for fd in fds:
        assert without_daemon(module_node, lambda fd=fd: os.pread(fd, SIZE, 0)) == CONTENT
    for file in files:
        file.close()


def test_passthrough_goes_on_at_once_with_the_next_daemon(node: Node, uri: str) -> None:
    for number in range(2):
        with Checkpoint(uri).as_directory() as root:
            if (why := node.status()["passthrough"]) != "on":
                pytest.skip(f"passthrough is {why}")
            if number == 0:
                complete(f"{root}/a.bin")
            with open(f"{root}/a.bin", "rb", buffering=0) as file:
                fd = file.fileno()
                data = without_daemon(node, lambda: os.pread(fd, SIZE, 0))  # noqa: B023
                assert data == CONTENT
        node.end()


def test_eviction_leaves_what_is_passed_through(node: Node, uri: str) -> None:
    node.configure(cache_bytes_max=18 * MIB)
    with Checkpoint(uri).as_directory() as root:
        if (why := node.status()["passthrough"]) != "on":
            pytest.skip(f"passthrough is {why}")
        complete(f"{root}/a.bin")
        with open(f"{root}/a.bin", "rb", buffering=0) as file:
            fd = file.fileno()
            assert without_daemon(node, lambda: os.pread(fd, 10, 0)) == CONTENT[:10]
            assert Path(root, "b.bin").read_bytes() == CONTENT[::-1]
            node.wait_quiet()
            assert node.status()["cache_bytes"] <= 18 * MIB
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert without_daemon(node, lambda: os.pread(fd, SIZE, 0)) == CONTENT
        assert Path(root, "b.bin").read_bytes() == CONTENT[::-1]
        assert Path(root, "a.bin").read_bytes() == CONTENT


def test_passthrough_outlives_a_detach_by_force(module_node: Node, uri: str) -> None:
    root = module_node.here("attach", uri).stdout.strip()
    if (why := module_node.status()["passthrough"]) != "on":
        pytest.skip(f"passthrough is {why}")
    complete(f"{root}/a.bin")
    with open(f"{root}/a.bin", "rb", buffering=0) as file:
        module_node.here("detach", "--force", uri)
        assert file.readall() == CONTENT
    with Checkpoint(uri).as_directory() as root:
        assert Path(root, "a.bin").read_bytes() == CONTENT


def test_reads_without_passthrough_return_the_same_bytes(node: Node, uri: str) -> None:
    node.configure(passthrough=False)
    with Checkpoint(uri).as_directory() as root:
        assert node.status()["passthrough"] == "off: passthrough = false in the configuration"
        assert "passthrough  off: passthrough = false" in node.here("status").stdout
        complete(f"{root}/a.bin")
        with open(f"{root}/a.bin", "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.readall() == CONTENT


def test_status_says_whether_the_machine_has_passthrough(module_node: Node, uri: str) -> None:
    with Checkpoint(uri).as_directory():
        why = module_node.status()["passthrough"]
        assert why == "on" or why.startswith("off: ")
        release = tuple(int(part) for part in os.uname().release.split(".")[:2])
        assert why == "on" or release < (6, 9) or not HAS_FUSE or os.geteuid() != 0
