"""Readers of a mount whose daemon reads the store in several processes, and loses some of them."""

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
import trustme
from conftest import Node, wait_until, workers
from support.faultproxy import Proxy

import ckptfs

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE = 48 * MIB
READERS = 6
DATA = random.Random(7).randbytes(SIZE)
CHANNEL = "/memfd:ckptfs-channel (deleted)"


@pytest.fixture(params=[pytest.param("http", marks=pytest.mark.long), "https"])
def uri(
    request: pytest.FixtureRequest, bucket: Path, uri_of: Callable[[Path], str], tmp_path: Path
) -> Iterator[str]:
    """A checkpoint with one large file."""
    (bucket / "run").mkdir()
    (bucket / "run" / "weights").write_bytes(DATA)
    uri = uri_of(bucket / "run")
    if request.param == "http":
        yield uri
        return
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    pems = [tmp_path / "store.pem", tmp_path / "other.pem"]
    for pem in pems:
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    found = urlsplit(uri)
    query = dict(parse_qsl(found.query))
    with Proxy(query["endpoint_override"].rpartition("/")[2], 0, pems) as proxy:
        query |= {"endpoint_override": proxy.endpoint, "scheme": "https"}
        query["tls_ca_file_path"] = str(tmp_path / "ca.pem")
        yield found._replace(query=urlencode(query)).geturl()


@pytest.fixture
def spread(node: Node) -> Node:
    """A node that reads in two processes, and whose cache is smaller than the file."""
    node.configure(
        fetch_processes=2, cache_bytes_max=8 * MIB, passthrough=False, span_bytes_max=MIB
    )
    return node


class Readers:
    """Threads that read a file again and again, and compare every byte.

    Attributes:
        errors: The errors of reads, and the offsets of wrong bytes.
        rounds: The number of times that a thread has read the file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(READERS)]
        self.errors: list[OSError | int] = []
        self.rounds = 0

    def __enter__(self) -> "Readers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        begin = number * SIZE // READERS
        while not self._is_over.is_set():
            try:
                with open(self._path, "rb", buffering=0) as file:
                    for offset in (*range(begin, SIZE, MIB), *range(0, begin, MIB)):
                        # Other readers' pages are no load.
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                        if os.pread(file.fileno(), MIB, offset) != DATA[offset : offset + MIB]:
                            self.errors.append(offset)
                        if self._is_over.is_set():
                            return
            except OSError as error:
                self.errors.append(error)
                return
            self.rounds += 1


def links_of(pid: int) -> list[str]:
    """What the descriptors of a process lead to; none if it has ended."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(entry))
    return found


def reading() -> set[int]:
    """The workers that have been given reads."""
    return {pid for pid in workers() if CHANNEL in links_of(pid)}


def has_connections(pid: int) -> bool:
    """Whether a process has TCP connections."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    inodes = {f"socket:[{line.split()[9]}]" for line in lines}
    return not inodes.isdisjoint(links_of(pid))


def test_readers_under_a_load_get_the_bytes_from_workers(uri: str, spread: Node) -> None:
    with ckptfs.Checkpoint(uri).as_directory(mode="mount") as path:
        with Readers(f"{path}/weights") as readers:
            wait_until(reading)
            rounds = readers.rounds
            wait_until(lambda: readers.rounds >= rounds + READERS)
        assert readers.errors == []
        status = spread.status()
        assert 1 <= status["workers"] <= 2
        maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in workers())
        assert "pyarrow" not in maps


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_readers_do_not_notice_that_the_workers_are_gone(
    uri: str, spread: Node, number: signal.Signals
) -> None:
    spread.expected_in_log.append("(s3) ended: ")
    with ckptfs.Checkpoint(uri).as_directory(mode="mount") as path:
        pid = spread.status()["pid"]
        with Readers(f"{path}/weights") as readers:
            for _ in range(2):
                wait_until(reading)
                gone = reading()
                for worker in gone:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, number)
                rounds = readers.rounds
                wait_until(lambda: readers.rounds > rounds and not gone & workers())  # noqa: B023
        assert readers.errors == []
        assert spread.status()["pid"] == pid
        assert spread.status()["restarts"] == 0


def test_a_detach_ends_the_reads_of_workers(uri: str, spread: Node) -> None:
    spread.expected_in_log.append("weights")
    with ckptfs.Checkpoint(uri).as_directory(mode="mount") as path:
        with Readers(f"{path}/weights"):
            wait_until(reading)
            spread.here("detach", "--force", path)
        assert workers()
        wait_until(lambda: not any(map(has_connections, workers())))


def test_a_reload_changes_the_number_of_processes(uri: str, spread: Node) -> None:
    spread.configure(fetch_processes=0, cache_bytes_max=8 * MIB, span_bytes_max=MIB)
    with ckptfs.Checkpoint(uri).as_directory(mode="mount") as path:
        with Readers(f"{path}/weights") as readers:
            wait_until(lambda: readers.rounds >= READERS)
            assert not workers()
            spread.configure(fetch_processes=1, cache_bytes_max=8 * MIB, span_bytes_max=MIB)
            assert "fetch_processes" in spread.here("reload").stdout
            wait_until(reading)
        assert readers.errors == []
