"""Whatever a library does in its process, a call ends, the next one succeeds, and no other user
notices.

The libraries here are `support.workerfaults`, in real workers.
"""

import contextlib
import functools
import gc
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from pyarrow import fs
from support.fakes import FakeStore, pattern
from support.workerfaults import Faulty

from ckptfs._daemon.quotas import limit_for
from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile
from ckptfs._store.base import Pin, Store, pin_of
from ckptfs._store.request_context import Progress, current_progress, ends_in
from ckptfs._store.request_metrics import REQUESTS
from ckptfs._workers import messages, pool, process, store, worker
from ckptfs._workers.channel import Channel, Nonsense
from ckptfs._workers.counts import COUNTS
from ckptfs._workers.pool import Pool
from ckptfs._workers.store import WorkerStore
from ckptfs.errors import (
    AccessDenied,
    CheckpointNotFound,
    LimitExceeded,
    LocationError,
    ObjectChanged,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

SIZE = 300_000
ME, OTHER = os.geteuid(), 65534


class Bench:
    """A pool whose workers have the filesystem of `workerfaults`, and its files."""

    def __init__(self, folder: Path) -> None:
        self.top = folder / "top"
        self.seen = folder / "seen"
        self.seen.mkdir()
        (self.top / "run").mkdir(parents=True)
        handler = Faulty(str(self.top), str(self.seen))
        self.pool = Pool(limit_for, pickle.dumps(fs.PyFileSystem(handler)))
        self.store = self.open()
        self._counted_starts, self._counted_ends = COUNTS.starts, dict(COUNTS.ends)

    def open(self, path: str = "run", uid: int = ME) -> WorkerStore:
        """The store at a directory."""
        return WorkerStore(self.pool, uid, Location("private", path), 3.0)

    def pin(self, name: str) -> Pin:
        """Of a file, which is made if it is not there."""
        path = self.top / "run" / name
        if not path.exists():
            path.write_bytes(pattern(SIZE, len(name)))
        return pin_of(ListedFile(name, SIZE, path.stat().st_mtime_ns))

    def read(self, name: str, left_s: float = 20.0, store: Store | None = None) -> None:
        """Read a file as a whole, and check its bytes."""
        pin, buffer = self.pin(name), bytearray(SIZE)
        with ends_in(left_s):
            (store or self.store).read_into(pin, 0, memoryview(buffer))
        assert buffer == pattern(SIZE, len(name))

    def pids(self) -> list[int]:
        """The workers."""
        groups = self.pool._all
        return [worker.pid for group in groups for worker in group.workers]

    def ends(self) -> dict[str, int]:
        """How many workers have ended, by reason."""
        more = {reason: n - self._counted_ends[reason] for reason, n in COUNTS.ends.items()}
        return {reason: n for reason, n in more.items() if n}

    def starts(self) -> int:
        """How many were started."""
        return COUNTS.starts - self._counted_starts


@pytest.fixture(autouse=True)
def _workers_know_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.pool.shut()


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run `call` in a thread; its outcome comes into the list."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


# -- a Store like any other


def test_worker_store_behaves_like_its_store(bench: Bench) -> None:
    (bench.top / "run" / "below" / "empty").mkdir(parents=True)
    bench.read("plain")
    pin = bench.pin("plain")
    listing = bench.store.list(10)
    assert [(file.path, file.size) for file in listing.files] == [("plain", SIZE)]
    assert sorted(listing.directories) == ["below", "below/empty"]
    assert bench.store.confirm(pin) == pin
    part = bytearray(1000)
    assert bench.store.read_into(pin, 5, memoryview(part)) is False
    assert part == pattern(SIZE, 5)[5:1005]
    assert bench.store.read_into(pin, SIZE, memoryview(b"")) is False
    bench.store.put("note", b"x" * 100_000)
    assert bench.store.get("note") == b"x" * 100_000
    bench.store.put("nothing", b"")
    assert bench.store.get("nothing") == b""
    assert bench.store.get("no such file") is None
    assert bench.store.find("no such file") is None
    found = bench.store.find("note")
    assert found is not None
    assert found.size == 100_000
    assert bench.starts() == 1


def test_errors_keep_their_kind(bench: Bench) -> None:
    for number in range(3):
        bench.pin(str(number))
    with pytest.raises(LimitExceeded, match="files_max"):
        bench.store.list(2)
    with pytest.raises(CheckpointNotFound):
        bench.open("none").list(1)
    with pytest.raises(ObjectChanged, match="bytes became"):
        bench.store.confirm(Pin("1", 5, 0))
    with pytest.raises(AccessDenied, match="deny in private://run"):
        bench.read("deny")
    with pytest.raises(StoreError, match=r"unexpected ZeroDivisionError at workerfaults") as error:
        bench.read("odd")
    assert "S3CR3T" not in str(error.value)
    assert bench.starts() == 1


def test_worker_store_passes_retry_after_on() -> None:
    class Busy(FakeStore):
        def get(self, path: str) -> bytes:
            error = StoreUnavailable("SlowDown")
            error.retry_after_s = 7.0
            raise error

    with serving(Busy({})) as channel:
        answer = channel.ask(call("get"), lambda: time.monotonic() + 20, lambda: None)
        assert isinstance(answer, messages.Failed)
        error = store._error_of(answer)
        assert type(error) is StoreUnavailable
        assert (str(error), error.retry_after_s) == ("SlowDown", 7.0)


def test_worker_store_of_invalid_location_is_an_error(bench: Bench) -> None:
    plain = Pool(limit_for)
    try:
        with pytest.raises(LocationError, match="only a private daemon"):
            WorkerStore(plain, ME, Location("private", "run"), 3.0).list(1)
        with pytest.raises(LocationError, match="unknown options"):
            WorkerStore(plain, ME, Location("local", "/", {"other": 1}), 3.0).list(1)
    finally:
        plain.shut()


def test_each_call_is_counted_once(bench: Bench) -> None:
    before = {kind.kind: kind.outcomes for kind in REQUESTS.snapshot()}
    bench.read("once-abort")
    with pytest.raises(AccessDenied):
        bench.read("deny")
    after = {kind.kind: kind.outcomes for kind in REQUESTS.snapshot()}
    changes = {o: n - before["read"][o] for o, n in after["read"].items() if n > before["read"][o]}
    assert changes == {"ok": 1, "denied": 1}


# -- what libraries do


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("once-abort", "died"), ("once-exit-0", "died"), ("once-stop", "stopped")],
)
def test_a_worker_that_dies_or_is_stopped_costs_no_error(
    bench: Bench, fault: str, reason: str
) -> None:
    bench.read("plain")
    first = bench.pids()
    bench.read(fault)
    assert bench.pids() != first
    assert bench.ends() == {reason: 1}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_signal_to_a_worker_costs_no_error(bench: Bench, number: signal.Signals) -> None:
    bench.read("plain")
    reading, outcome = in_thread(lambda: bench.read("sleep-1"))
    wait_until(lambda: bench.pool._groups and bench.pids())
    [pid] = bench.pids()
    wait_until(lambda: any(g.workers and g.workers[0].calls for g in bench.pool._all))
    os.kill(pid, number)
    reading.join()
    assert outcome == [None]
    assert bench.pids() != [pid]


def test_a_stopped_worker_that_takes_no_channels_holds_no_caller_up() -> None:
    setup = messages.Setup(messages.PROTOCOL, Location("private", ""), 3.0)
    stopped = process.Worker(setup)
    try:
        os.kill(stopped.pid, signal.SIGSTOP)
        stopped._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least
        with pytest.raises(BlockingIOError):
            stopped.idle.extend(stopped.new_channel() for _ in range(100))
    finally:
        stopped.kill("stopped")
        assert stopped.ends_within(20)
        stopped.close()


def test_a_library_that_ends_the_process_is_named(bench: Bench) -> None:
    with pytest.raises(StoreUnavailable, match=r"library was killed by SIGABRT; check what"):
        bench.read("abort")
    assert bench.ends() == {"died": 2}
    bench.read("plain")


def test_worker_listing_has_more_tries_than_reads(bench: Bench) -> None:
    (bench.top / "abort").mkdir()
    with pytest.raises(StoreUnavailable, match="SIGABRT"):
        bench.open("abort").list(1)
    assert bench.ends() == {"died": store._TRIES_OF_OTHERS}


def test_worker_put_is_tried_once(bench: Bench) -> None:
    with pytest.raises(StoreUnavailable, match="SIGABRT"):
        bench.store.put("once-abort", b"x")
    assert bench.store.get("once-abort") is None
    bench.store.put("once-abort", b"x")
    assert bench.store.get("once-abort") == b"x"


def test_a_library_that_holds_the_lock_is_waited_for(bench: Bench) -> None:
    bench.read("hold-1.5")
    assert bench.ends() == {}


def test_a_library_that_holds_the_lock_for_too_long_is_replaced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "STILL_S", 2.0)  # a start of the next one may take a second
    monkeypatch.setattr(store, "PATIENCE", 0.01)
    bench.read("once-hold-60")
    assert bench.ends() == {"still": 1}


def test_a_library_that_hangs_ends_at_the_deadline_and_is_replaced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "GRACE_S", 0.1)
    bench.read("plain")
    [first] = bench.pids()
    other, outcome = in_thread(lambda: bench.read("gate"))
    wait_until(lambda: bench.store._group.workers[0].calls)
    with pytest.raises(StoreTimeout, match=r"hang in private://run: .* no answer"):
        bench.read("hang", left_s=0.2)
    wait_until(lambda: bench.pool._groups and bench.open()._group.workers[0].is_retired)
    bench.read("plain")  # by another one, while the first one still has a call
    assert first in bench.pids()
    (bench.seen / "open").touch()
    other.join()
    assert outcome == [None]
    wait_until(lambda: bench.ends() == {"overdue": 1})
    assert first not in bench.pids()


def test_a_call_that_ends_late_gives_its_channel_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "GRACE_S", 20.0)
    bench.read("plain")
    with pytest.raises(StoreTimeout):
        bench.read("gate", left_s=0.3)
    [worker] = bench.store._group.workers
    assert len(worker.left) == worker.calls == 1
    (bench.seen / "open").touch()
    wait_until(lambda: not worker.left)
    wait_until(lambda: len(worker.idle) == 1)
    assert not worker.calls
    bench.read("plain")
    assert bench.ends() == {}


def test_a_read_that_is_given_up_ends_at_once(bench: Bench) -> None:
    bench.read("plain")
    read = Progress()
    reading, outcome = in_thread(lambda: read.run(lambda: bench.read("hang", left_s=1000)))
    [worker] = bench.store._group.workers
    wait_until(lambda: read._sock)
    read.give_up()
    reading.join(20)
    assert isinstance(outcome[0], StoreTimeout)
    with pytest.raises(StoreTimeout):  # nor does it begin
        read.run(lambda: bench.read("plain"))
    bench.read("plain")
    assert worker.calls == len(worker.left) == 1


def test_too_many_calls_that_were_left_behind_end_the_worker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "LEFT_MAX", 2)
    bench.read("plain")
    for _ in range(3):
        read = Progress()
        hang = functools.partial(bench.read, "hang", left_s=1000)
        reading, _ = in_thread(functools.partial(read.run, hang))
        wait_until(functools.partial(getattr, read, "_sock"))
        read.give_up()
        reading.join(20)
    wait_until(lambda: bench.ends() == {"overdue": 1})
    bench.read("plain")


@pytest.mark.parametrize(
    "how",
    [
        "garbage",
        "another type",
        "short memory",
        "long object",
        "endless part",
        "closed channel",
        "half an answer",
    ],
)
def test_a_worker_that_talks_nonsense_is_killed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(process, "_PROGRAM", "support.badworkers")
    monkeypatch.setattr(pool, "_END_S", 0.2)
    monkeypatch.setattr(store, "_TRIES_OF_OTHERS", 2)
    wrong = bench.open(how)
    with pytest.raises(StoreUnavailable, match="process of the store's library"), ends_in(20):
        wrong.list(5) if how == "endless part" else wrong.get("x")
    assert sum(bench.ends().values()) == 2
    assert bench.pids() == []
    monkeypatch.setattr(process, "_PROGRAM", "ckptfs._workers")
    bench.read("plain")


def test_a_worker_of_another_version_asks_for_a_restart(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "PROTOCOL", messages.PROTOCOL + 1)
    with pytest.raises(StoreUnavailable, match="another version of ckptfs: run ckptfs restart"):
        bench.store.list(5)


# -- deaths in a row, and limits


def test_a_library_that_dies_again_and_again_is_no_fork_bomb(bench: Bench) -> None:
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="SIGABRT"):
            bench.read("abort")
    starts = bench.starts()
    assert starts in (3, 4)
    bench.store._group.not_before_s = time.monotonic() + 1000  # the pause outlasts the loop
    for _ in range(200):
        with pytest.raises(StoreUnavailable, match="in a row; it is started again in") as error:
            bench.read("abort", store=bench.store)
        assert 0 < error.value.retry_after_s <= 1000
    assert bench.starts() == starts
    bench.store._group.not_before_s = time.monotonic() + 0.1
    bench.store.list(1000)  # has the time to wait for the next one
    bench.read("plain")
    assert bench.store._group.deaths == 0


def test_starts_are_counted_by_user() -> None:
    starts = pool._Starts(8)
    assert [starts.take() for _ in range(9)] == [True] * 8 + [False]
    starts._counted_s -= pool._BURST_S / 8
    assert [starts.take() for _ in range(2)] == [True, False]
    starts._counted_s -= 1e6
    assert [starts.take() for _ in range(9)] == [True] * 8 + [False]


def test_stores_and_users_have_workers_of_their_own(bench: Bench) -> None:
    bench.read("plain")
    bench.read("plain", store=bench.open("run"))
    assert len(bench.pids()) == 1
    bench.read("plain", store=bench.open(uid=OTHER))
    assert len(bench.pids()) == 2
    places = [
        Location("gcs", "b/x", {"anonymous": True}, {"access_token": "one"}),
        Location("gcs", "b/x", {"anonymous": True}, {"access_token": "two"}),
        Location("gcs", "b/x", {"scheme": "http"}, {"access_token": "two"}),
        Location("http", "http://one/x"),
        Location("http", "http://two/x"),
    ]
    stores = [WorkerStore(bench.pool, ME, place, 3.0) for place in places]
    assert len({id(each._group) for each in stores}) == len(places)
    same = WorkerStore(bench.pool, ME, Location("http", "http://one/y"), 3.0)
    assert same._group is stores[3]._group


def test_one_user_has_a_share_of_the_workers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PROCESSES_MAX", 8)  # two for one of the other users
    monkeypatch.setattr(pool, "_BURST_S", 0.1)
    bench.pin("plain")
    stores = [WorkerStore(bench.pool, OTHER, Location("private", "run"), i) for i in range(1, 4)]
    bench.read("plain", store=stores[0])
    bench.read("plain", store=stores[1])
    first = stores[0]._group.workers[0]
    bench.read("plain", store=stores[2])  # in the place of the one that was used longest ago
    assert not stores[0]._group.workers
    assert first.has_ended
    assert bench.ends() == {"idle": 1}
    busy = [in_thread(lambda s=s: bench.read("sleep-1.5", store=s)) for s in stores[1:]]  # type: ignore[misc]
    wait_until(lambda: all(s._group.workers and s._group.workers[0].calls for s in stores[1:]))
    with pytest.raises(StoreTimeout, match="all processes for the libraries of stores were busy"):
        bench.read("plain", left_s=0.3, store=stores[0])
    bench.read("plain")  # another user's
    for thread, outcome in busy:
        thread.join()
        assert outcome == [None]


def test_calls_of_one_store_share_one_worker(bench: Bench) -> None:
    parallel = WorkerStore(bench.pool, ME, Location("private", "run"), 5.0)
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda _: bench.read("sleep-0.3", store=parallel), range(30)))
    assert len(parallel._group.workers) == 1
    assert bench.starts() == 1


# -- many calls, and what is left of them


def test_worker_answers_concurrent_calls(bench: Bench) -> None:
    names = [f"{number:03}" for number in range(100)]
    for name in names:
        bench.pin(name)
    with ThreadPoolExecutor(100) as threads:
        list(threads.map(bench.read, names))
    assert bench.starts() == 1


def test_a_thousand_calls_leave_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.read("plain")
    [pid] = bench.pids()

    def descriptors() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{pid}/fd"))

    pin, buffer = bench.pin("plain"), memoryview(bytearray(SIZE))
    bench.store.read_into(pin, 0, buffer)
    before = descriptors()
    for _ in range(1000):
        bench.store.read_into(pin, 0, buffer)
    assert descriptors() == before
    [worker] = bench.store._group.workers
    assert len(worker.idle) == 1
    monkeypatch.setattr(pool, "_CHANNEL_IDLE_S", 0.0)
    wait_until(lambda: not worker.idle)
    wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) < before[1])


def test_workers_that_die_in_the_middle_of_calls_leave_no_descriptor(tmp_path: Path) -> None:
    gc.collect()  # tests before this one leave sockets in cycles, which could go in the middle
    before = len(os.listdir("/proc/self/fd"))
    bench = Bench(tmp_path)
    bench.pin("sleep-0.05")
    is_over = threading.Event()

    def call_again_and_again(number: int) -> None:
        while not is_over.is_set():
            with contextlib.suppress(StoreUnavailable):
                bench.read("sleep-0.05", left_s=0.06 if number % 2 else 20)

    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(call_again_and_again, number) for number in range(8)]
        for _ in range(6):
            wait_until(bench.pids)
            time.sleep(0.1)
            for pid in bench.pids():
                os.kill(pid, signal.SIGKILL)
        is_over.set()
    for each in calls:
        each.result()
    bench.pool.shut()
    assert len(os.listdir("/proc/self/fd")) == before


def test_worker_without_stores_ends_with_its_secrets(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.read("plain")
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(pool, "IDLE_S", 0.0)
    wait_until(lambda: not bench.pids())
    assert bench.ends() == {"idle": 1}
    assert len(os.listdir("/proc/self/fd")) < before
    monkeypatch.setattr(pool, "IDLE_S", 30.0)
    bench.read("plain")  # it is started again
    monkeypatch.setattr(pool, "IDLE_S", 0.0)
    del bench.store  # as one whose credentials were replaced
    wait_until(lambda: not bench.pool._groups)


def test_a_directory_that_is_closed_is_forgotten_by_the_worker(bench: Bench) -> None:
    (bench.top / "other").mkdir()
    other = bench.open("other")
    assert other.list(1).files == []
    bench.read("plain")
    other.close()
    wait_until(lambda: len(bench.store._group.stores) == 1)
    bench.read("plain")
    assert bench.starts() == 1


def test_a_closed_store_can_still_be_used_and_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.store.close()
    monkeypatch.setattr(pool, "IDLE_S", 0.0)
    wait_until(lambda: not bench.pool._all)
    monkeypatch.setattr(pool, "IDLE_S", 30.0)
    bench.read("plain")
    monkeypatch.setattr(pool, "IDLE_S", 0.0)
    wait_until(lambda: not bench.pids() and not bench.pool._all and not bench.pool._groups)


def test_directories_forget_old_closes_and_leave_no_store_of_a_late_call_open() -> None:
    directories = worker.Directories(messages.Setup(messages.PROTOCOL, Location("s3", ""), 3.0))
    directories._open = lambda *_: FakeStore({})

    def call_of(number: int) -> messages.Call:
        call = messages.Call("find", number, "run", None, 20.0)
        directories.store(call)
        directories.leave(call)
        return call

    kept = call_of(0)
    store = directories.store(kept)
    for number in range(1, 2 * worker._CLOSED_MAX):
        call_of(number)
        directories.close(number)
        call_of(number)  # as one that was sent before the close
        assert list(directories._stores) == [0]
    assert len(directories._closed) == worker._CLOSED_MAX
    assert directories.store(kept) is store
    directories.close(0)  # the oldest directory is the last one to be closed
    call_of(0)
    assert directories._stores == {}


def test_secrets_and_descriptors_do_not_reach_the_outside(bench: Bench, tmp_path: Path) -> None:
    options = {"endpoint_override": "127.0.0.1:9", "scheme": "http"}
    place = Location("gcs", "b/x", options, {"access_token": "S3CR3T"})
    secret = WorkerStore(bench.pool, ME, place, 3.0)
    with (tmp_path / "mine").open("w") as mine, contextlib.suppress(StoreError), ends_in(20):
        os.set_inheritable(mine.fileno(), True)
        secret.find("x")  # nothing answers there
    [worker] = secret._group.workers
    for name in ("cmdline", "environ"):
        assert b"S3CR3T" not in Path(f"/proc/{worker.pid}/{name}").read_bytes()
    opened = {os.readlink(entry) for entry in Path(f"/proc/{worker.pid}/fd").iterdir()}
    assert not any(str(tmp_path) in target for target in opened)
    assert "S3CR3T" not in repr(secret._group.setup)


PARENT = """
import os, pickle, sys
from pyarrow import fs
from support.workerfaults import Faulty
from ckptfs._model.location import Location
from ckptfs._store.base import Pin
from ckptfs._workers.pool import Pool
from ckptfs._workers.store import WorkerStore
import threading

top = sys.argv[1]
pool = Pool(lambda _, limit: limit, pickle.dumps(fs.PyFileSystem(Faulty(top, top))))
store = WorkerStore(pool, 0, Location("private", "run"), 3.0)
store.list(10)
print(store._group.workers[0].pid, flush=True)
store.get("hold-60")
"""


def test_a_worker_ends_with_its_daemon(bench: Bench) -> None:
    """Also while a library holds the lock, so that no thread of Python can see it."""
    bench.pin("hold-60")
    command = [sys.executable, "-c", PARENT, str(bench.top)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        parent.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


# -- a channel


class serving:
    """The daemon's end of a channel that a thread of this process serves with `store`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __enter__(self) -> Channel:
        self._channel = Channel()
        sock, memory = self._channel._theirs, worker.Memory(os.dup(self._channel._memory))
        directories: Any = type(
            "", (), {"store": lambda _, __: self._store, "leave": lambda _, __: None}
        )()
        self._thread = threading.Thread(
            target=worker._serve_channel,
            args=(sock, memory, directories, worker._Telling(sock)),
        )
        self._thread.start()
        return self._channel

    def __exit__(self, *_: object) -> None:
        self._channel._sock.close()
        self._thread.join()
        self._channel.close()


def call(method: messages.Method, **arguments: Any) -> bytes:
    return messages.encode(messages.Call(method, 1, "run", None, 20.0, **arguments))


def test_worker_reports_progress_while_bytes_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PROGRESS_S", 0.0)
    half, go_on = threading.Event(), threading.Event()

    class Slow(FakeStore):
        def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
            current_progress().came(5)
            half.set()
            assert go_on.wait(20)
            current_progress().came(5)
            buffer[:] = b"0123456789"
            return True

    fake = Slow({"a": b"0123456789"})
    with serving(fake) as channel:
        read = Progress()
        text = call("read_into", pin=fake.pin("a"), length=10)

        def ask() -> object:
            return channel.ask(text, lambda: time.monotonic() + 20, lambda: None)

        reading, outcome = in_thread(lambda: read.run(ask))
        assert half.wait(20)
        wait_until(lambda: read.count == 5)
        assert read.first_s > 0
        go_on.set()
        reading.join()
        assert outcome == [messages.Done(is_true=True, size=10)]
        assert read.count == 10
        assert channel.data(10) == b"0123456789"
        with pytest.raises(Nonsense):
            channel.data(11)


def test_channel_of_a_read_given_up_after_its_answer_serves_the_next_call() -> None:
    fake = FakeStore({"a": b"0123456789"})
    with serving(fake) as channel:
        read = Progress()

        def deadline_s() -> float:
            assert select.select([channel._sock], [], [], 20)[0]
            read.give_up()  # the answer is there, and nothing has looked at it yet
            return time.monotonic() + 20

        def ask(deadline_s: Callable[[], float]) -> object:
            return channel.ask(call("find", name="a"), deadline_s, lambda: None)

        answer = read.run(lambda: ask(deadline_s))
        assert isinstance(answer, messages.Done)
        for _ in range(2):
            assert ask(lambda: time.monotonic() + 20) == answer


def test_a_long_listing_comes_in_parts() -> None:
    count = 2 * messages.LISTED_AT_ONCE + 1
    fake = FakeStore({f"{number}": b"" for number in range(count)})
    with serving(fake) as channel:
        answer = channel.ask(
            call("list", files_max=count), lambda: time.monotonic() + 20, lambda: None
        )
        assert isinstance(answer, messages.Done)
        parts = list(channel.parts(answer.size))
        assert [len(part.files) for part in parts] == [messages.LISTED_AT_ONCE] * 2 + [1]
        listed = [file for part in parts for file in part.files]
        assert listed == fake.list(count).files


def test_an_answer_that_is_too_long_for_a_message_is_an_error() -> None:
    class Long(FakeStore):
        def find(self, path: str) -> ListedFile:
            return ListedFile("x" * 100_000, 1, 0)

        def get(self, path: str) -> bytes:
            return bytes(messages.OBJECT_BYTES_MAX + 1)

    with serving(Long({})) as channel:
        for method in ("find", "get"):
            answer = channel.ask(call(method), lambda: time.monotonic() + 20, lambda: None)
            assert isinstance(answer, messages.Failed)
            assert answer.code == "store"
