"""Threads copy long replies to the kernel, out of buffers that are used again at once afterwards.

A buffer is poisoned when it is given back, so a reply out of a buffer that was reused has wrong
bytes.
"""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Node, wait_until
from mount.test_bad_input import injected
from mount.test_lifecycle import daemons

import ckptfs

pytestmark = pytest.mark.mount

MIB = 1 << 20
FILES = 3
SIZE = 12 * MIB + 77
READERS = 4
READS = 120

POISON = """
from ckptfs._daemon.cache.buffer_pool import Buffers
plain = Buffers.release
def release(self, buffer):
    plain(self, buffer)
    if not self.is_lent(buffer.memory):
        buffer.view[:] = bytes([0xDB]) * len(buffer.view)
Buffers.release = release

import pathlib
from ckptfs._daemon.fuse.reply_threads import ReplyThreads
plain_send = ReplyThreads.send
def send(self, header, found, read_again):
    plain_send(self, header, found, read_again)
    pathlib.Path(__file__).with_name("copied" if found.copies else "sent").touch()
ReplyThreads.send = send
"""
READER = """
import mmap, os, random, sys
top, source, seed, reads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(seed)
names = sorted(os.listdir(source))
content = {name: open(f"{source}/{name}", "rb").read() for name in names}
fds = {name: os.open(f"{top}/{name}", os.O_RDONLY | os.O_DIRECT) for name in names}
memory = mmap.mmap(-1, 1 << 20)
for number in range(reads):
    name = chance.choice(names)
    length = chance.choice([4096, 200 << 10, 1 << 20])
    offset = chance.randrange(0, len(content[name]), 4096)
    count = os.preadv(fds[name], [memoryview(memory)[:length]], offset)
    if memory[:count] != content[name][offset : offset + length]:
        sys.exit(f"wrong bytes in {name} at {offset}, read {number}")
"""


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.long), 3])
def test_no_reply_comes_out_of_a_buffer_that_was_reused(
    node: Node,
    bucket: Path,
    uri_of: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
) -> None:
    source = bucket / "run"
    source.mkdir()
    for index in range(FILES):
        (source / f"{index}.bin").write_bytes(os.urandom(SIZE))
    node.configure(
        reply_threads=threads,
        passthrough=False,
        in_flight_bytes_max=8 * MIB,
        cache_bytes_max=20 * MIB,
    )
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    with contextlib.ExitStack() as stack:
        with injected(node, monkeypatch, POISON):
            path = stack.enter_context(ckptfs.Checkpoint(uri_of(source)).as_directory())
        readers = [
            stack.enter_context(node.python(READER, path, str(source), str(seed), str(READS)))
            for seed in range(READERS)
        ]
        for _ in range(2):
            fetched_bytes = node.status()["fetched_bytes"]
            wait_until(lambda at=fetched_bytes: node.status()["fetched_bytes"] != at)
            node.here("cache", "clear", check=False)  # what is in use stays
            [daemon] = daemons(node)
            os.kill(daemon, signal.SIGKILL)
        assert [reader.wait(120) for reader in readers] == [0] * READERS
    assert {"copied", "sent"} <= {*os.listdir(node.folder / "inject")}
