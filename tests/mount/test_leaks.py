"""The daemon leaks nothing and kills no process, whatever its clients and its store do."""

import contextlib
import os
import random
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Node, wait_until
from mount.test_lifecycle import daemons
from pyarrow.fs import S3FileSystem
from support.fakes import pattern
from support.faultserver import FaultServer, Object

from ckptfs._client import client, connection
from ckptfs._model.protocol.requests import Attach, Detach
from ckptfs._store.describe import describe
from ckptfs.errors import CkptfsError

pytestmark = pytest.mark.mount

CYCLES = int(os.environ.get("CKPTFS_TEST_CYCLES", "1000"))
DATA = pattern(200_000)
FAULTS = ("403 expired", "301 elsewhere", "wrong range", "cut in the head", "503")
GROWTH_BYTES_MAX = 12 << 20
"""Of so many cycles; malloc(3) takes 3 to 8 MiB for them, and ever less for the next ones."""


class Taken(NamedTuple):
    """The open descriptors, the threads and the private memory of a process."""

    descriptors: int
    threads: int
    memory_bytes: int


def taken_by(pid: int) -> Taken:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    memory_bytes = int(fields["RssAnon"].split()[0]) << 10
    return Taken(len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"]), memory_bytes)


@pytest.mark.long
def test_cycles_of_attaching_and_reading_leave_nothing(node: Node) -> None:
    node.configure(linger_s=0, attach_deadline_s=0.2, read_deadline_s=0.2, store_timeout_s=0.1)
    node.expected_in_log += ["bucket/run", "weights"]
    chance = random.Random(1)
    with FaultServer() as server:
        for number in range(4):
            server.objects[f"bucket/run{number}/weights"] = Object(DATA, 1_500_000_000)
        filesystem = S3FileSystem(
            access_key="k",
            secret_key="s",
            region="us-east-1",
            scheme="http",
            endpoint_override=server.endpoint,
        )
        failed = 0

        def cycle(control: connection.Connection) -> None:
            nonlocal failed
            fault = chance.choice(FAULTS) if chance.random() < 0.03 else ""
            server.fault = fault if chance.random() < 0.5 else ""
            location = describe(filesystem, f"bucket/run{chance.randrange(5)}")  # one is not there
            try:
                path = (
                    f"{node.mount}/{control.ask_once(Attach(location=location, pinned=True)).name}"
                )
                server.fault = fault
                if chance.random() < 0.5:
                    os.setxattr(f"{path}/weights", "user.ckptfs.evict", b"")
                fd = os.open(f"{path}/weights", os.O_RDONLY)
                try:
                    at = chance.randrange(len(DATA))
                    assert os.pread(fd, 5000, at) == DATA[at : at + 5000]
                finally:
                    os.close(fd)
            except (CkptfsError, OSError):
                failed += 1
            with contextlib.suppress(CkptfsError):
                control.ask(Detach(location=location, force=True))
            server.fault = ""

        def at_rest() -> Taken:
            wait_until(lambda: not node.status()["attachments"])
            [pid] = daemons(node)
            found: list[Taken] = []

            def is_steady() -> bool:  # threads and connections of the last cycles end
                found.append(taken_by(pid))
                return len(found) > 20 and len(set(found[-20:])) == 1

            wait_until(is_steady)
            return found[-1]

        node.here("mount")
        seen: list[Taken] = []
        for length in (500, CYCLES):  # the allocator grows in the first ones
            with client.connect() as control:
                for _ in range(length):
                    cycle(control)
            seen.append(at_rest())
    before, after = seen
    assert failed > CYCLES // 10
    assert after.descriptors <= before.descriptors + 2, (before, after)
    assert after.threads <= before.threads + 2, (before, after)
    assert after.memory_bytes - before.memory_bytes < GROWTH_BYTES_MAX, (before, after)
