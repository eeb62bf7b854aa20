"""The daemon's pod is replaced on a node while other pods read. All have their own namespaces."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
import trustme
from conftest import COMMAND_TIMEOUT_S, Node, wait_until
from mount.test_namespaces import CKPTFS, OWN_PIDS, Containers, end, first_in
from support.faultproxy import Proxy

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root has mount namespaces here"),
]
MIB = 1 << 20
SIZE = 48 * MIB
BLOCK = 1 << 16
POD = """
import hashlib, mmap, os, random, sys, time
from pathlib import Path
import ckptfs

uri, digests, board, first = sys.argv[1:]
known = Path(digests).read_bytes()
size = len(known) // 16 * (1 << 16)
BLOCK = 1 << 16

def read_on(path, how, slot):
    rng = random.Random(slot)
    kept = os.open(path + "/a.bin", os.O_RDONLY)
    mapped = mmap.mmap(kept, 0, prot=mmap.PROT_READ)
    operations, worst = 0, 0.0
    out = Path(board, f"reader-{slot}")
    while not Path(board, "over").exists():
        offset = rng.randrange(size // BLOCK) * BLOCK
        length = min(size - offset, rng.choice((1, 4, 16)) * BLOCK)
        began = time.monotonic()
        if how == "open":
            with open(path + "/a.bin", "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                data = os.pread(file.fileno(), length, offset)
        elif how == "kept":
            os.posix_fadvise(kept, 0, 0, os.POSIX_FADV_DONTNEED)
            data = os.pread(kept, length, offset)
        elif how == "mapped":
            mapped.madvise(mmap.MADV_DONTNEED)
            data = mapped[offset:offset + length]
        else:
            assert os.listdir(path) == ["a.bin"]
            assert os.getxattr(path + "/a.bin", "user.ckptfs.size") == str(size).encode()
            data = b""
        worst = max(worst, time.monotonic() - began)
        for at in range(0, len(data), BLOCK):
            want = known[(offset + at) // BLOCK * 16:][:16]
            assert hashlib.blake2b(data[at:at + BLOCK], digest_size=16).digest() == want
        assert len(data) == length or how == "look"
        operations += 1
        new = out.with_suffix(".new")
        new.write_text(f"{operations} {worst}")
        new.replace(out)

with ckptfs.Checkpoint(uri).as_directory(mode="mount") as path:
    readers = []
    for number in range(2):
        slot = int(first) + number
        if not (pid := os.fork()):
            read_on(path, ("open", "kept", "mapped", "look")[slot % 4], slot)
            os._exit(0)
        readers.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in readers]
    assert statuses == [0, 0], statuses
"""
"""A pod with two readers, which compare each block with its digest until a file says that it is
over. Each writes the number of its operations, and the longest one."""


class Pods(Containers):
    """The daemon's pods, of which one follows the other, beside the readers' pods."""

    def keeper(self, name: str, log: Path) -> "subprocess.Popen[str]":
        """Start a pod of the daemon, as a DaemonSet with ``maxSurge`` does."""
        run = self.folder / "daemon" / "run"
        return self._start(
            [*self._enter, "unshare", "--mount", "--uts", "--propagation", "unchanged", *OWN_PIDS],
            f"hostname {name}; mount --rbind {self.folder}/host/run {run}; "
            f"exec {CKPTFS} mount --foreground --take-over 2>>{log}",
            CKPTFS_SOCKET=f"{run}/sock",
            CKPTFS_MOUNT=f"{run}/mnt",
        )


@pytest.fixture
def pods(node: Node) -> Iterator[Pods]:
    can = subprocess.run(["unshare", "--mount", *OWN_PIDS, "true"], check=False).returncode == 0
    if not can:
        pytest.skip("no new namespaces are allowed here")
    with contextlib.ExitStack() as stack:
        yield Pods(node.folder / "node", stack)


@pytest.fixture(params=[pytest.param("http", marks=pytest.mark.long), "https"])
def uri(
    request: pytest.FixtureRequest, bucket: Path, uri_of: Callable[[Path], str], node: Node
) -> Iterator[str]:
    """A checkpoint with one large file."""
    (bucket / "run").mkdir()
    content = random.Random(1).randbytes(SIZE)
    (bucket / "run" / "a.bin").write_bytes(content)
    blocks = (content[i : i + BLOCK] for i in range(0, SIZE, BLOCK))
    digests = b"".join(hashlib.blake2b(each, digest_size=16).digest() for each in blocks)
    (node.folder / "digests").write_bytes(digests)
    uri = uri_of(bucket / "run")
    if request.param == "http":
        yield uri
        return
    authority = trustme.CA()
    authority.cert_pem.write_to_path(node.folder / "ca.pem")
    pems = [node.folder / "store.pem", node.folder / "other.pem"]
    for pem in pems:
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    found = urlsplit(uri)
    query = dict(parse_qsl(found.query))
    with Proxy(query["endpoint_override"].rpartition("/")[2], 0, pems) as proxy:
        query |= {"endpoint_override": proxy.endpoint, "scheme": "https"}
        query["tls_ca_file_path"] = str(node.folder / "ca.pem")
        yield found._replace(query=urlencode(query)).geturl()


def operations(board: Path) -> list[int]:
    """The operations of each reader so far."""
    return [int(path.read_text().split()[0]) for path in sorted(board.glob("reader-?"))]


def test_readers_in_pods_do_not_notice_that_the_daemons_pod_is_replaced(
    node: Node, pods: Pods, uri: str
) -> None:
    node.configure(cache_bytes_max=24 * MIB, passthrough=False, idle_exit_s=0)
    board = node.folder / "board"
    board.mkdir()
    log = node.folder / "keepers.log"
    log.touch()
    mount = [f"{pods.folder}/host/run/mnt"]
    keeper = pods.keeper("ckptfs-0", log)
    wait_until(lambda: "serving on" in log.read_text())
    words = (uri, str(node.folder / "digests"), str(board))
    readers = [
        pods.client(sys.executable, "-c", POD, *words, str(number)) for number in range(0, 8, 2)
    ]
    wait_until(lambda: len(operations(board)) == 8)
    for number in (1, 2):
        time.sleep(0.5)  # of reads between the replacements
        following = pods.keeper(f"ckptfs-{number}", log)
        wait_until(lambda count=number: log.read_text().count("took over the mount") == count)
        wait_until(lambda count=number: log.read_text().count("waits for the end") == count)
        assert pods.mounts() == mount
        end(keeper)  # the pod is deleted, and its namespaces end
        assert keeper.returncode == 0
        keeper = following
        before = operations(board)
        wait_until(lambda old=before: all(map(int.__lt__, old, operations(board))))
        assert pods.mounts() == mount
    (board / "over").touch()
    for reader in readers:
        output, errors = reader.communicate(timeout=COMMAND_TIMEOUT_S)
        assert (reader.returncode, output, errors) == (0, "", "")
    worst = [float(path.read_text().split()[1]) for path in sorted(board.glob("reader-?"))]
    print("operations:", operations(board), "longest, in s:", worst)
    os.kill(first_in(keeper), signal.SIGTERM)
    assert keeper.wait(COMMAND_TIMEOUT_S) == 0
    assert pods.mounts() == []  # also on the node
    assert sorted(os.listdir(board.parent)).count("sock") == 0
    node.check_log(log.read_text())


def test_pod_that_does_not_see_the_mount_leaves_it_to_the_owner(node: Node, pods: Pods) -> None:
    node.configure(idle_exit_s=0)
    log = node.folder / "keepers.log"
    keeper = pods.keeper("ckptfs-0", log)
    wait_until(lambda: log.exists() and "serving on" in log.read_text())
    other = node.folder / "other.log"
    run = pods.folder / "daemon" / "run"
    blind = pods._start(
        [*pods._enter, "unshare", "--mount", "--propagation", "private", *OWN_PIDS],
        f"mount --bind {pods.folder}/host/run {run}; "
        f"exec {CKPTFS} mount --foreground --take-over 2>>{other}",
        CKPTFS_SOCKET=f"{run}/sock",
        CKPTFS_MOUNT=f"{run}/mnt",
    )
    wait_until(lambda: other.exists() and "waiting for its end" in other.read_text())
    assert "mountPropagation: Bidirectional" in other.read_text()
    assert pods.mounts() == [f"{pods.folder}/host/run/mnt"]
    end(blind)
    assert blind.returncode == 0
    end(keeper)
    assert pods.mounts() == []
