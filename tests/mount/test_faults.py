"""Faults of the network through the real mount: the errno, the attribute, the log, and the end."""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import Node, wait_until
from support.fakes import pattern
from support.faultserver import FaultServer, Object

import ckptfs

pytestmark = pytest.mark.mount

DATA = pattern(300_000)
DEADLINE_S = 2.0
FAULTS = {
    "black hole": (errno.ETIMEDOUT, "did not answer"),
    "trickling body": (errno.ETIMEDOUT, "did not answer"),
    "cut in the body": (errno.ETIMEDOUT, "the answer ended after"),
    "503, again in an hour": (errno.ETIMEDOUT, "SlowDown"),
    "wrong range": (errno.EIO, "other bytes than were asked for"),
    "403 expired": (errno.EACCES, "ExpiredToken"),
}


def can_read(fd: int) -> bool:
    with suppress(OSError):
        return bool(os.pread(fd, 1, 0))
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_network_through_the_mount(node: Node, fault: str) -> None:
    code, cause = FAULTS[fault]
    node.configure(read_deadline_s=DEADLINE_S, store_timeout_s=0.5)
    node.expected_in_log.append("weights")
    with FaultServer() as server:
        server.objects["bucket/run/weights"] = Object(DATA, 1_500_000_000)
        endpoint = quote(server.endpoint, safe="")
        uri = f"s3://k:s@bucket/run?endpoint_override={endpoint}&scheme=http&region=us-east-1"
        with ckptfs.Checkpoint(uri).as_directory() as path:
            file = f"{path}/weights"
            server.fault = fault
            fd = os.open(file, os.O_RDONLY)
            try:
                with pytest.raises(OSError, check=lambda error: error.errno == code):
                    os.pread(fd, 100, 0)
                for place in (file, path):
                    assert cause in os.getxattr(place, "user.ckptfs.error").decode()
                assert os.getxattr(file, "user.ckptfs.state") == b"failing"
                assert cause in node.log()
                assert f"a read by pid {os.getpid()} " in node.log()
                server.heal()
                # A read that failed by its deadline fails for a moment more: see SEMANTICS.md.
                wait_until(lambda: can_read(fd))
                assert os.pread(fd, len(DATA), 0) == DATA
            finally:
                os.close(fd)


def test_a_request_that_stalls_is_made_a_second_time(node: Node) -> None:
    """The first one is held up until the read has its bytes."""
    node.configure(read_deadline_s=30.0, store_timeout_s=600.0)
    names = [f"{number:02}" for number in range(40)]
    was_read, stalled = threading.Event(), threading.Event()

    def stall_once(moment: str) -> None:
        if moment == "begin" and not stalled.is_set():
            stalled.set()
            was_read.wait(60)

    with FaultServer() as server:
        for name in names:
            server.objects[f"bucket/run/{name}"] = Object(name.encode() * 5000, 1_500_000_000)
        endpoint = quote(server.endpoint, safe="")
        uri = f"s3://k:s@bucket/run?endpoint_override={endpoint}&scheme=http&region=us-east-1"
        with ckptfs.Checkpoint(uri).as_directory() as path:
            for name in names[:-1]:
                assert Path(path, name).read_bytes() == name.encode() * 5000
            server.during = stall_once
            try:
                assert Path(path, names[-1]).read_bytes() == names[-1].encode() * 5000
            finally:
                was_read.set()
            assert stalled.is_set()
