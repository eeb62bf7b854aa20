"""The daemon dies, or is stuck, and readers notice a pause only."""

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import COMMAND_TIMEOUT_S, Node, wait_until
from mount.test_lifecycle import attachments, daemons, hear, tell

import ckptfs

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


def test_readers_do_not_notice_that_the_daemon_is_killed(
    node: Node, bucket: Path, uri_of: UriOf
) -> None:
    """`CKPTFS_TEST_KILLS` of them; by default few, so that it is quick."""
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    kills = int(os.environ.get("CKPTFS_TEST_KILLS", "6"))
    node.configure(restarts_max=1000, cache_bytes_max=24 * MIB)
    size = 48 * MIB
    content = random.Random(1).randbytes(size)
    (bucket / "a.bin").write_bytes(content)
    (bucket / "b.bin").write_bytes(content[::-1])
    digests = node.folder / "digests"
    digests.write_bytes(
        b"".join(
            hashlib.blake2b(content[i : i + (1 << 16)], digest_size=16).digest()
            for i in range(0, size, 1 << 16)
        )
    )
    rng = random.Random(2)
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        readers = [
            node.python(READER, path, how, str(seed), str(size), str(digests))
            for seed, how in enumerate(("read", "pread", "mmap", "look") * 2)
        ]
        try:
            assert [hear(reader) for reader in readers] == ["ready"] * 8
            for reader in readers:
                tell(reader, str(kills * 1.6))
            for _ in range(kills):
                time.sleep(rng.uniform(0.5, 2))
                wait_until(lambda: len(daemons(node)) == 1)
                os.kill(daemons(node)[0], signal.SIGKILL)
            said = [hear(reader) for reader in readers]
        finally:
            for reader in readers:
                reader.communicate(timeout=COMMAND_TIMEOUT_S)
        print("operations and longest pause:", said)
        assert [reader.returncode for reader in readers] == [0] * 8
        [attachment] = attachments()
        assert attachment["open_files"] == 0
        assert attachment["holders"] == [os.getpid()]
    wait_until(lambda: not attachments())
