"""The daemon dies, or is stuck, and readers notice a pause only."""

import contextlib
import errno
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COMMAND_TIMEOUT_S, Node, wait_until
from mount.test_lifecycle import (
    attachments,
    daemons,
    has_ended,
    hear,
    holder,
    is_mounted,
    keepers,
    quoted,
    tell,
)
from support.s3server import S3Server
from support.servers import Forwarder

import ckptfs
from ckptfs._config.load import load_config
from ckptfs._keeper import keeper
from ckptfs._mount import fuse_abi, session

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
MIB = 1 << 20

READER = """
import hashlib, mmap, os, random, sys, time

path, how, seed, size, digest = sys.argv[1:]
seed, size = int(seed), int(size)
rng = random.Random(seed)
digests = open(digest, "rb").read()
BLOCK = 1 << 16
worst = 0.0
operations = 0

def check(offset, data):
    start = offset // BLOCK * 16
    for i in range(0, len(data), BLOCK):
        want = digests[start + i // BLOCK * 16:][:16]
        assert hashlib.blake2b(data[i:i + BLOCK], digest_size=16).digest() == want, (offset, i)

print("ready", flush=True)
end = time.monotonic() + float(sys.stdin.readline())
folder = os.open(path, os.O_RDONLY)
os.chdir(path)
kept = os.open("a.bin", os.O_RDONLY)
mapped = mmap.mmap(kept, 0, prot=mmap.PROT_READ)
while time.monotonic() < end:
    began = time.monotonic()
    offset = rng.randrange(size // BLOCK) * BLOCK
    length = min(size - offset, rng.choice((1, 4, 16)) * BLOCK)
    if how == "read":
        name = rng.choice(("a.bin", "b.bin"))
        with open(name, "rb", buffering=0) as file:
            file.seek(offset)
            data = b""
            while len(data) < length:
                part = file.read(length - len(data))
                assert part
                data += part
        if name == "a.bin":
            check(offset, data)
    elif how == "pread":
        os.posix_fadvise(kept, 0, 0, os.POSIX_FADV_DONTNEED)  # the kernel has to ask
        data = os.pread(kept, length, offset)
        assert len(data) == length, (offset, length, len(data))
        check(offset, data)
    elif how == "mmap":
        check(offset, mapped[offset:offset + length])
    else:
        assert sorted(os.listdir(folder)) == ["a.bin", "b.bin"] == sorted(os.listdir("."))
        assert os.stat(path + "/a.bin").st_size == size
        assert os.getxattr("a.bin", "user.ckptfs.size") == str(size).encode()
        assert os.fstat(kept).st_size == size
    operations += 1
    worst = max(worst, time.monotonic() - began)
print(operations, worst, flush=True)
"""


def serving(node: Node) -> list[int]:
    """The daemon that has locked the cache, and whatever else there is of daemons behind it."""

    def has_cache(pid: int) -> bool:
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") == f"{node.cache_dir}/lock":
                        return True
        return False

    return sorted(daemons(node), key=has_cache, reverse=True)


@contextlib.contextmanager
def verified_reads(node: Node, bucket: Path, uri_of: UriOf, seconds: float) -> Iterator[None]:
    """Eight processes read for so long, and compare each block with its digest. At the end of the
    context none of them has seen an error, and nothing is attached."""
    content = random.Random(1).randbytes(48 * MIB)
    (bucket / "a.bin").write_bytes(content)
    (bucket / "b.bin").write_bytes(content[::-1])
    digests = node.folder / "digests"
    blocks = (content[i : i + (1 << 16)] for i in range(0, len(content), 1 << 16))
    digests.write_bytes(b"".join(hashlib.blake2b(b, digest_size=16).digest() for b in blocks))
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        readers = [
            node.python(READER, path, how, str(seed), str(len(content)), str(digests))
            for seed, how in enumerate(("read", "pread", "mmap", "look") * 2)
        ]
        try:
            assert [hear(reader) for reader in readers] == ["ready"] * 8
            for reader in readers:
                tell(reader, str(seconds))
            yield
            said = [hear(reader) for reader in readers]
        finally:
            for reader in readers:
                reader.communicate(timeout=COMMAND_TIMEOUT_S)
        print("operations and longest pause:", said)
        assert [reader.returncode for reader in readers] == [0] * 8
        wait_until(lambda: attachments()[0]["open_files"] == 0)  # the kernel tells it when it likes
        wait_until(lambda: attachments()[0]["holders"] == [os.getpid()])
    wait_until(lambda: not attachments())
    digests.unlink()


@pytest.mark.parametrize("spare", [pytest.param(False, marks=pytest.mark.long), True])
def test_readers_do_not_notice_that_the_daemon_is_killed(
    node: Node, bucket: Path, uri_of: UriOf, spare: bool
) -> None:
    """`CKPTFS_TEST_KILLS` of them; by default few, so that it is quick."""
    node.expected_in_log += ["signal 9: starting the next one", "the next daemon did not come up"]
    kills = int(os.environ.get("CKPTFS_TEST_KILLS", "4"))
    node.configure(restarts_max=1000, spare=spare, cache_bytes_max=24 * MIB)
    rng = random.Random(2)
    with verified_reads(node, bucket, uri_of, kills * 1.6):
        for _ in range(kills):
            time.sleep(rng.uniform(0.5, 2))
            wait_until(lambda: daemons(node))  # perhaps one that is starting, or the spare one
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(serving(node)[0], signal.SIGKILL)


def test_a_read_that_waits_goes_on_with_the_next_daemon(
    node: Node, s3: S3Server, bucket: Path
) -> None:
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    content = os.urandom(32 * MIB)
    (bucket / "large.bin").write_bytes(content)
    with Forwarder(s3.endpoint) as forwarder:
        uri = s3.uri(bucket.name).replace(quoted(s3.endpoint), quoted(forwarder.endpoint))
        with ckptfs.Checkpoint(uri).as_directory() as path:
            program = "import os, sys; print(os.pread(os.open(sys.argv[1], 0), 9, 7).hex())"
            forwarder.hold()
            with node.python(program, f"{path}/large.bin") as reader:
                wait_until(lambda: attachments()[0]["state"] == "fetching")
                for _ in range(3):
                    [victim] = daemons(node)
                    os.kill(victim, signal.SIGKILL)
                    wait_until(lambda victim=victim: daemons(node) not in ([], [victim]))
                    wait_until(lambda: attachments()[0]["open_files"] == 1)
                assert reader.poll() is None
                forwarder.release()
                assert hear(reader) == content[7:16].hex()


def test_a_stuck_daemon_is_replaced(node: Node, small: Path, uri_of: UriOf) -> None:
    node.expected_in_log.append("was stuck: starting the next one")
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        [stuck] = daemons(node)
        os.kill(stuck, signal.SIGSTOP)
        assert Path(path, "config.json").read_text() == '{"layers": 1}'
        assert daemons(node) not in ([], [stuck])


def test_restart_beyond_the_limit_ends_the_mount(node: Node, small: Path, uri_of: UriOf) -> None:
    node.configure(restarts_max=2)
    node.expected_in_log += [
        "starting the next one",
        "the next daemon did not come up",  # the kernel knows the path: one may die as it starts
        "ending the mount, because it died 3 times in 10 minutes (restarts_max)",
    ]
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        for _ in range(3):
            wait_until(lambda: len(daemons(node)) == 1 and os.path.exists(path))
            os.kill(daemons(node)[0], signal.SIGKILL)
        wait_until(lambda: has_ended(node))
        with pytest.raises(FileNotFoundError):
            os.stat(path)
        assert not is_mounted(node)
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        assert Path(path, "config.json").read_text() == '{"layers": 1}'


def test_a_daemon_follows_another_whose_cache_cannot_be_used(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    node.configure(restarts_max=1)
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        [victim] = daemons(node)
        node.cache_dir.rename(node.folder / "away")
        node.cache_dir.write_text("no directory")
        os.kill(victim, signal.SIGKILL)
        assert Path(path, "config.json").read_text() == '{"layers": 1}'
        log = (node.folder / "away" / "daemon.log").read_text()
        assert "cannot use its directory; reading without a cache" in log
    node.end()
    node.cache_dir.unlink()


def test_a_kernel_that_cannot_repeat_requests_gets_no_second_daemon(
    node: Node,
    small: Path,
    uri_of: UriOf,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The keeper runs in this process, with a session that lacks FUSE_HAS_RESEND (Linux < 6.9); so
    only another process may touch the mount."""
    monkeypatch.setattr(session, "_WANTED", session._WANTED & ~fuse_abi.HAS_RESEND)
    with keeper.Keeper(load_config()) as ours:
        ours.start()
        runs = threading.Thread(target=ours.run)
        with holder(node, uri_of(small)) as process:
            runs.start()
            tell(process)
            assert Path(hear(process)).parent == node.mount
            assert ours._daemon is not None
            os.kill(ours._daemon._process.pid, signal.SIGKILL)
            runs.join(COMMAND_TIMEOUT_S)
            ours.__exit__()  # as the keeper does next
    [text] = [r.getMessage() for r in caplog.records if r.name == "ckptfs._keeper.keeper"]
    assert re.fullmatch(
        r"the daemon was killed by signal 9: ending the mount, because the kernel \(.*\) cannot "
        r"repeat its requests; Linux 6\.9 can",
        text,
    )
    assert not is_mounted(node)


def test_pins_and_cached_bytes_outlive_the_daemon(node: Node, bucket: Path, uri_of: UriOf) -> None:
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    content = os.urandom(5 * MIB)
    (bucket / "a.bin").write_bytes(content)
    path = node.here("attach", uri_of(bucket)).stdout.rstrip("\n")
    file = Path(path, "a.bin")
    assert file.read_bytes() == content
    before = os.stat(path), file.stat()
    wait_until(lambda: attachments()[0]["cached"] == 5 * MIB)
    [victim] = daemons(node)
    os.kill(victim, signal.SIGKILL)
    assert file.read_bytes() == content
    assert [(s.st_ino, s.st_mtime_ns, s.st_mode) for s in (os.stat(path), file.stat())] == [
        (s.st_ino, s.st_mtime_ns, s.st_mode) for s in before
    ]
    [attachment] = attachments()
    assert attachment["pinned"]
    assert node.status()["fetched_bytes"] == 0
    node.here("detach", path)


def stated(place: str, name: str) -> bytes:
    """An attribute; of an error without its time, which may be that of a read after the first."""
    value = os.getxattr(place, name)
    return value.partition(b" ")[2] if name == "user.ckptfs.error" else value


def test_restart_keeps_the_last_error(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    node.expected_in_log += ["was killed by signal 9: starting the next one", "a.bin in s3://"]
    (bucket / "a.bin").write_bytes(bytes(3 * MIB))
    (bucket / "b.bin").write_bytes(bytes(3))
    names = "user.ckptfs.state", "user.ckptfs.error"
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        (bucket / "a.bin").write_bytes(b"another version")
        with pytest.raises(OSError, check=lambda error: error.errno == errno.ESTALE):
            Path(path, "a.bin").read_bytes()
        places = path, f"{path}/a.bin"
        before = [stated(place, name) for place in places for name in names]
        assert before[0] == before[2] == b"changed"
        for _ in range(2):
            [victim] = daemons(node)
            s3.reset_traffic()
            os.kill(victim, signal.SIGKILL)
            assert [stated(place, name) for place in places for name in names] == before
            assert os.getxattr(f"{path}/b.bin", names[0]) == b"lazy"
            [attachment] = attachments()
            assert attachment["state"] == "changed"
            assert attachment["error"].partition(" ")[2] == before[1].decode()
        assert not [r for r in s3.traffic().requests if r.target.endswith("a.bin")]


def test_restart_keeps_passthrough_of_open_files(node: Node, bucket: Path, uri_of: UriOf) -> None:
    """Passthrough: the next daemon opens it with the same backing id, and leaves its blocks."""
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    content = os.urandom(3 * MIB + 5)
    (bucket / "a.bin").write_bytes(content)
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        file = Path(path, "a.bin")
        assert file.read_bytes() == content
        wait_until(lambda: attachments()[0]["cached"] == len(content))
        if (why := node.status()["passthrough"]) != "on":
            pytest.skip(f"passthrough is {why}")
    node.here("umount", "--force")
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        fd = os.open(f"{path}/a.bin", os.O_RDONLY)
        for _ in range(2):
            [victim] = daemons(node)
            os.kill(victim, signal.SIGKILL)
            assert os.pread(fd, 1 << 30, 0) == content
            assert node.status()["fetched_bytes"] == 0
            wait_until(lambda: attachments()[0]["open_files"] == 1)
            again = os.open(f"{path}/a.bin", os.O_RDONLY)
            assert os.pread(again, 1 << 30, 0) == content
            os.close(again)
        os.close(fd)
        wait_until(lambda: attachments()[0]["open_files"] == 0)


def test_a_spare_takes_over(node: Node, small: Path, uri_of: UriOf) -> None:
    node.configure(spare=True)
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    killed: set[int] = set()  # a process that was killed is there for a moment

    def serving_and_spare() -> tuple[int, int]:
        found: set[int] = set()

        def is_one() -> bool:
            found.clear()
            found.update({*daemons(node)} - killed - {node.status()["pid"]})
            return len(found) == 1

        wait_until(is_one)
        return node.status()["pid"], found.pop()

    def kill(pid: int) -> None:
        killed.add(pid)
        os.kill(pid, signal.SIGKILL)

    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        for _ in range(2):
            serving, spare = serving_and_spare()
            kill(serving)
            assert Path(path, "config.json").read_text() == '{"layers": 1}'
            assert node.status()["pid"] == spare
        serving, spare = serving_and_spare()
        kill(spare)  # it is missed when it is needed
        kill(serving)
        assert Path(path, "config.json").read_text() == '{"layers": 1}'
    node.end()
    assert daemons(node) == []


@pytest.mark.parametrize("spare", [True, False])
def test_a_restart_replaces_daemon_and_keeper(
    node: Node, small: Path, uri_of: UriOf, spare: bool
) -> None:
    node.configure(spare=spare)
    node.expected_in_log.append("starting the next one")
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        [keeping] = keepers(node)
        before = node.status()["pid"]
        with open(f"{path}/config.json") as file:
            node.configure(spare=spare, linger_s=600)  # takes effect with it
            assert node.here("restart").stdout == ""
            after = node.status()["pid"]
            assert after != before
            assert node.status()["restarts"] == 1
            assert "restarted 1 time" in node.here("status").stdout
            assert not os.path.exists(f"/proc/{before}")
            assert keepers(node) == [keeping]  # of the same number, which now runs another program
            command = Path(f"/proc/{keeping}/cmdline").read_bytes()
            assert b"--resume" in command
            assert file.read() == '{"layers": 1}'
            os.kill(after, signal.SIGKILL)
            assert Path(path, "config.json").read_text() == '{"layers": 1}'
            assert node.here("restart").stdout == ""
    assert attachments()[0]["holders"] == []  # and it lingers
    node.end()
    assert has_ended(node)
    assert not is_mounted(node)
    assert not node.socket.exists()
    assert not os.path.exists(f"{node.socket}.lock")


def test_a_prefetch_command_goes_on_with_the_next_daemon(
    node: Node, bucket: Path, uri_of: UriOf
) -> None:
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    (bucket / "a.bin").write_bytes(os.urandom(24 * MIB))
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        command = [str(Path(sys.executable).with_name("ckptfs")), "prefetch", path]
        with subprocess.Popen([*command, "--limit-rate", "4M"]) as prefetch:
            wait_until(lambda: attachments()[0]["cached"] > 0)
            os.kill(daemons(node)[0], signal.SIGKILL)
            assert prefetch.wait(COMMAND_TIMEOUT_S) == 0
        wait_until(lambda: attachments()[0]["state"] == "cached")
