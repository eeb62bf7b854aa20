"""Each kind of store: it goes away and comes back, and so does the daemon; readers go on."""

import errno
import os
import random
import signal
import threading
from pathlib import Path

import pytest
from conftest import Node, wait_until
from support.stores.common import MIB, configure, directory, fill, read_once
from support.stores.realstore import RealStore

pytestmark = [pytest.mark.mount, pytest.mark.long]


@pytest.mark.parametrize("outage", ["refused", "dark"])
def test_a_reader_outlasts_an_outage(store: RealStore, node: Node, path: str, outage: str) -> None:
    """The store is away when the read begins, and is back before its deadline."""
    if store.proxy is None:
        pytest.skip("no network is between")
    node.expected_in_log.append("weights")
    configure(node, store, store_timeout_s=1.0, window_bytes_max=0)
    node.here("reload")
    data = random.Random(7).randbytes(8 * MIB)
    fill(store, path, {"weights": data})
    with directory(store, path) as top:
        file = f"{top}/weights"
        assert read_once(file, 0, 100) == data[:100]
        store.break_down({"fault": outage})
        back = threading.Timer(1.5, store.break_down)
        back.start()
        try:
            assert read_once(file, 4 * MIB, 100) == data[4 * MIB : 4 * MIB + 100]
        finally:
            back.join()
        assert Path(file).read_bytes() == data


def test_an_outage_ends_reads_at_their_deadline(store: RealStore, node: Node, path: str) -> None:
    if store.proxy is None:
        pytest.skip("no network is between")
    node.expected_in_log.append("weights")
    configure(node, store, store_timeout_s=0.5, read_deadline_s=2.0, window_bytes_max=0)
    node.here("reload")
    data = random.Random(8).randbytes(8 * MIB)
    fill(store, path, {"weights": data})
    with directory(store, path) as top:
        file = f"{top}/weights"
        assert read_once(file, 0, 100) == data[:100]
        store.break_down({"fault": "refused"})
        with pytest.raises(OSError, check=lambda error: error.errno == errno.ETIMEDOUT):
            read_once(file, 4 * MIB, 100)
        assert b"nothing came from the store within 2 s" in os.getxattr(file, "user.ckptfs.error")
        assert read_once(file, 0, 100) == data[:100]
        store.break_down()
        assert read_once(file, 4 * MIB, 100) == data[4 * MIB : 4 * MIB + 100]


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_a_reader_outlasts_the_daemon(store: RealStore, node: Node, path: str, how: str) -> None:
    """One that has a file open, and reads of it what was not read before."""
    if not store.has_address:
        pytest.skip("it is copied")
    node.expected_in_log += ["starting the next one", "was killed by signal 9"]
    data = random.Random(9).randbytes(12 * MIB)
    fill(store, path, {"a": data, "b": data[::-1]})
    with directory(store, path) as top:
        fd = os.open(f"{top}/a", os.O_RDONLY)
        try:
            assert os.pread(fd, 100, 0) == data[:100]
            before = node.status()["pid"]
            if how == "restart":
                node.here("restart")
            else:
                os.kill(before, signal.SIGKILL)
            assert os.pread(fd, len(data), 0) == data
            wait_until(lambda: node.status()["pid"] != before)
        finally:
            os.close(fd)
        assert Path(top, "b").read_bytes() == data[::-1]
