"""Each kind of store × each fault of its server × each operation: the right bytes, or an error in
time; the daemon stays the same, and readers of another store notice nothing."""

import contextlib
import errno
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import Node
from support.faultproxy import CONNECTIONS
from support.serverbase import children
from support.stores.common import MIB, configure, directory, fill, read_once
from support.stores.realstore import RealStore
from support.wronganswers import CHANGED, INSTEAD

import ckptfs
from ckptfs import xattrs
from ckptfs._client import client
from ckptfs._model.location import Location

pytestmark = [pytest.mark.mount, pytest.mark.all_servers, pytest.mark.long]

OPERATIONS = ("list", "head", "read", "get", "put")
FAULTS = [*INSTEAD, *CHANGED, *(kind for kind in CONNECTIONS if kind != "trickle")]
LATE_S = 12.0
"""When the first byte comes, with the fault "slow"."""
DEADLINE_S = 2.0
STORE_TIMEOUT_S = 0.5
DATA = random.Random(11).randbytes(3 * MIB)
META = json.dumps({"step": 1}).encode()
ERRNOS = {errno.EIO, errno.ETIMEDOUT, errno.EACCES, errno.ENODATA}
"""ENODATA: the metadata that came are no JSON, and so have no keys."""

NEIGHBOUR = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(fd).st_size
for line in sys.stdin:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # the kernel has to ask the daemon
    assert len(os.pread(fd, size, 0)) == size
    print("read", flush=True)
"""


@contextmanager
def neighbour(node: Node, folder: Path) -> Iterator[Callable[[], None]]:
    """Another process has a file of another store open, and the file is in the cache. The function
    has the process read the file, and returns when it has all bytes."""
    folder.mkdir(exist_ok=True)
    (folder / "cached").write_bytes(bytes(MIB))
    with (
        client.leased(Location("local", str(folder))) as top,
        node.python(NEIGHBOUR, f"{top}/cached") as reader,
    ):

        def read() -> None:
            assert reader.stdin
            assert reader.stdout
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "read\n"

        read()
        yield read
        reader.communicate()
    assert reader.returncode == 0


class Outcome:
    """The outcome of an operation: "right", or an error, and how long it took."""

    def __init__(self, action: Callable[[], bool], errnos: Set[int]) -> None:
        began = time.monotonic()
        try:
            self.said = "right" if action() else "WRONG"
        except (OSError, ckptfs.CkptfsError) as error:
            code = error.errno if isinstance(error, OSError) else None
            is_known = isinstance(error, ckptfs.CkptfsError) or code in errnos
            self.said = f"{'error' if is_known else 'STRANGE'}: {error!r}"
        self.duration_s = time.monotonic() - began

    @property
    def is_good(self) -> bool:
        return self.said.startswith(("right", "error")) and self.duration_s <= DEADLINE_S + 1

    def __repr__(self) -> str:
        return f"{self.said} after {self.duration_s:.1f} s"


def is_attached_right(store: RealStore, path: str) -> bool:
    with directory(store, path) as top:
        names = {str(found.relative_to(top)) for found in Path(top).rglob("*")}
        return names | {".metadata.json"} == {"weights", "sub", "sub/x", ".metadata.json"}


def operations(store: RealStore, path: str, tops: dict[str, str]) -> dict[str, Callable[[], bool]]:
    """The actions of readers that lead to each operation of the store."""

    def reads(top: str) -> bool:
        return read_once(f"{top}/weights", MIB + 1, MIB) == DATA[MIB + 1 : 2 * MIB + 1]

    def writes(top: str) -> bool:
        os.setxattr(top, xattrs.PREFIX + "meta.step", b"2")
        return json.loads(store.get(f"{path}/put/.metadata.json")) == {"step": 2}

    return {
        "list": lambda: is_attached_right(store, f"{path}/list"),
        "head": lambda: reads(tops["head"]),
        "read": lambda: reads(tops["read"]),
        "get": lambda: os.getxattr(tops["get"], xattrs.PREFIX + "meta.step") == b"1",
        "put": lambda: writes(tops["put"]) if store.is_writable else True,
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_each_server_in_each_operation(
    store: RealStore, node: Node, path: str, fault: str
) -> None:
    if store.proxy is None:
        pytest.skip("no network is between")
    node.expected_in_log += [path, "weights: "]
    for operation in OPERATIONS:
        files = {"weights": DATA, "sub/x": b"x", ".metadata.json": META}
        fill(store, f"{path}/{operation}", files)
    pid = node.status()["pid"]
    with ExitStack() as stack:
        read_neighbour = stack.enter_context(neighbour(node, node.folder / "neighbour"))
        tops = {
            operation: stack.enter_context(directory(store, f"{path}/{operation}"))
            for operation in OPERATIONS[1:]
        }
        configure(
            node,
            store,
            read_deadline_s=DEADLINE_S,
            attach_deadline_s=DEADLINE_S,
            store_timeout_s=STORE_TIMEOUT_S,
        )
        node.here("reload")
        actions = operations(store, path, tops)
        aimed = [
            {"fault": fault, "operation": each, "within": f"{path}/{each}", "delay_s": LATE_S}
            for each in OPERATIONS
        ]
        store.break_down(*aimed)
        with ThreadPoolExecutor(len(OPERATIONS)) as pool:
            # A file that no program has touched is not stale, whatever else is wrong.
            errnos = ERRNOS | ({errno.ESTALE} if fault == "another version" else set[int]())
            begun = pool.map(lambda action: Outcome(action, errnos), actions.values())
            for _ in range(3):
                read_neighbour()
            outcomes = dict(zip(actions, begun, strict=True))
        store.break_down()
        configure(node, store)  # what is right now may take its time on a busy machine
        node.here("reload")
        bad = {name: outcome for name, outcome in outcomes.items() if not outcome.is_good}
        assert not bad
        assert {name: actions[name]() for name in ("list", "head", "read")} == {
            "list": True,
            "head": True,
            "read": True,
        }
    assert node.status()["pid"] == pid


@pytest.mark.parametrize("sign", ["SIGSTOP", "SIGABRT"])
def test_a_worker_of_a_store_that_stops_or_dies(
    store: RealStore, node: Node, path: str, sign: str
) -> None:
    """Its readers get bytes or an error in time, the others notice nothing, and the next read is
    right."""
    if not store.has_address:
        pytest.skip("it is copied")
    node.expected_in_log += [path, "weights: ", "worker", ") ended: "]
    configure(node, store, read_deadline_s=DEADLINE_S, window_bytes_max=0)
    node.here("reload")
    fill(store, path, {"weights": DATA * 4})
    pid = node.status()["pid"]
    with (
        neighbour(node, node.folder / "neighbour") as read_neighbour,
        directory(store, path) as top,
    ):
        file = f"{top}/weights"
        assert read_once(file, 0, 100) == DATA[:100]
        workers = children(pid)
        if not workers:
            pytest.skip("the store is read in the daemon's own process")
        for worker in workers:
            os.kill(worker, signal.Signals[sign])
        read_neighbour()
        outcome = Outcome(
            lambda: read_once(file, 4 * MIB, 100) == (DATA * 4)[4 * MIB :][:100], ERRNOS
        )
        assert outcome.is_good, outcome
        assert read_once(file, 8 * MIB, 100) == (DATA * 4)[8 * MIB :][:100]
        for worker in workers:  # no call has noticed those of other stores, and a later one would
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
    assert node.status()["pid"] == pid
