"""Each fault of the network × each operation of the network: bounded, explained, and over at once.

Every cell of the matrix: the outcome is the right data or one of the fault's errors, within the
deadline and a second; the cause is where users look for it; no thread is left; and when the store
is back, the same operation succeeds with no more ado.
"""

from __future__ import annotations

import functools
import itertools
import logging
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest
import trio
import trio.testing
from pyarrow import fs as pafs
from support.fakes import FakeStore, pattern
from support.faultserver import ANSWERS, CONNECTIONS, FaultServer, Object
from support.rig import Rig, rig_in

from ckptfs._daemon.control.current_config import CurrentConfig
from ckptfs._daemon.control.service import Service
from ckptfs._daemon.offload import Offload
from ckptfs._model.location import Location
from ckptfs._model.manifest import METADATA_NAME
from ckptfs._mount.handoff import Handoff
from ckptfs._store.base import Store, pin_of
from ckptfs._store.copy import PART_BYTES, copy_directory
from ckptfs._store.request_context import ends_in
from ckptfs._store.resolve import open_store
from ckptfs._store.wrappers import OVERDUE_MAX, BoundedStore, within
from ckptfs.checkpoint import Checkpoint
from ckptfs.errors import (
    AccessDenied,
    CkptfsError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from ckptfs._daemon.attachment.attachment import Attachment

DEADLINE_S = 1.5
SILENCE_S = 0.4
GRACE_S = 1.0
"""The contract: the deadline and a second."""

FAULTS_AT_ONCE = 7
"""More faults at once would measure how long their operations wait for a core of this machine."""
NAP_S = 0.01
LATE_S = 0.1
"""A call during which the process was later than that may run out of its time."""

DATA = {name: pattern(300_000, number) for number, name in enumerate(["first", "known", "ahead"])}
METADATA = b'{"step": 5}'
NAMES = ("no name", "a name that takes for ever")
"""Faults of the resolver."""

TRANSIENT = (StoreTimeout, StoreUnavailable)
ERRORS: dict[str, tuple[type[CkptfsError], ...]] = {
    **dict.fromkeys((*CONNECTIONS, *NAMES, *ANSWERS), TRANSIENT),
    "403 expired": (AccessDenied,),
    "400 expired": (AccessDenied,),
    "301 elsewhere": (StoreError,),
    "wrong range": (StoreError,),
    "longer body": (),
}
"""The errors that an operation may raise under a fault; without these, it must succeed."""

MAY_SUCCEED = {"wrong range", "longer body", "shorter body", "trickling body", "cut in the body"}
"""Faults that some operations do not meet: they are those of ranged reads, or of bodies."""

FAULTS = tuple(ERRORS)


class Cell(NamedTuple):
    """The outcome of one operation under one fault.

    Attributes:
        took_s: By a clock that stands still while the process has no core.
        late_s: The seconds for which it had none.
    """

    operation: str
    outcome: object
    took_s: float
    late_s: float

    def is_to_repeat(self, errors: tuple[type[CkptfsError], ...]) -> bool:
        """Whether the machine, not the store, made it run out of its time. `errors` are those that
        it may raise."""
        is_timeout = isinstance(self.outcome, StoreTimeout) and StoreTimeout not in errors
        return is_timeout and self.late_s >= LATE_S


def location_of(server: FaultServer, host: str) -> Location:
    options = {
        "endpoint_override": f"{host}:{server.port}",
        "scheme": "http",
        "region": "us-east-1",
    }
    secrets = {"access_key": "k", "secret_key": "S3CR3T"}
    return Location("s3", f"bucket-{server.port}/run", options, secrets)


def fill(server: FaultServer) -> None:
    bucket = f"bucket-{server.port}"
    for top in ("run", "other"):
        for name, data in DATA.items():
            server.objects[f"{bucket}/{top}/{name}"] = Object(data, 1_500_000_000)
        server.objects[f"{bucket}/{top}/{METADATA_NAME}"] = Object(METADATA, 1_500_000_000)


class Resolver:
    """In place of getaddrinfo(3), for the names of this test."""

    def __init__(self) -> None:
        self.healed = threading.Event()
        self._real = socket.getaddrinfo

    def __call__(self, host: Any, *args: Any, **more: Any) -> Any:
        if str(host).endswith(".invalid"):
            if "name" in str(host) and not self.healed.is_set():
                if str(host).startswith("slow"):
                    self.healed.wait(20)
                else:
                    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = "127.0.0.1"
        return self._real(host, *args, **more)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    made = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", made)
    return made


class Lateness:
    """Measures how late this process gets a core. The contract does not count that time.

    Attributes:
        total_s: The seconds by which a thread of it was late so far.
    """

    def __init__(self) -> None:
        self.total_s = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Lateness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        began_s = time.monotonic()
        while not self._is_over.wait(NAP_S):
            ended_s = time.monotonic()
            self.total_s += ended_s - began_s - NAP_S
            began_s = ended_s

    def cell(self, operation: str) -> Callable[[object], Cell]:
        """Begin an operation; the result makes its cell out of its outcome."""
        began_s, late_s = time.monotonic(), self.total_s

        def end(outcome: object) -> Cell:
            late = self.total_s - late_s
            return Cell(operation, outcome, time.monotonic() - began_s - late, late)

        return end


@pytest.fixture
def lateness() -> Iterator[Lateness]:
    with Lateness() as measured:
        yield measured


HOSTS = {"no name": "name.invalid", "a name that takes for ever": "slow-name.invalid"}


def check(fault: str, cell: Cell) -> str:
    """The fault of a cell, or ""."""
    where = f"{fault} × {cell.operation}"
    if cell.took_s > DEADLINE_S + GRACE_S:
        return f"{where} took {cell.took_s:.1f} s"
    if not isinstance(cell.outcome, BaseException):
        allowed = not ERRORS[fault] or fault in MAY_SUCCEED
        return "" if allowed else f"{where} succeeded: is there a fault?"
    if not isinstance(cell.outcome, ERRORS[fault]):
        return f"{where}: {cell.outcome!r}"
    if "\n" in str(cell.outcome) or "S3CR3T" in str(cell.outcome):
        return f"{where}: {cell.outcome}"
    return ""


# -- the store's operations


def store_operations(store: Store) -> dict[str, Callable[[], object]]:
    """Each method of `Store` that asks the store; each asserts that what it gives is right."""
    pins = {file.path: pin_of(file) for file in store.list(99).files}

    def list_() -> None:
        assert {f.path for f in store.list(99).files} == {*DATA, METADATA_NAME}

    def confirm() -> None:
        assert store.confirm(pins["first"]).etag == pins["first"].etag

    def read_into() -> None:
        buffer = bytearray(200_000)
        store.read_into(pins["first"], 50_000, memoryview(buffer))
        assert buffer == DATA["first"][50_000:250_000]

    def get() -> None:
        assert store.get(METADATA_NAME) == METADATA

    def put() -> None:
        store.put(METADATA_NAME, METADATA)

    def find() -> None:
        found = store.find("first")
        assert found is not None
        assert found.size == len(DATA["first"])

    named = (list_, confirm, read_into, get, put, find)
    return {operation.__name__.rstrip("_"): operation for operation in named}


def run_in_time(
    cells: list[tuple[str, Cell]],
    lateness: Lateness,
    fault: str,
    operation: str,
    call: Callable[[], object],
) -> None:
    """Do it in this thread, which has a deadline, and note how it has ended."""
    while True:
        end, outcome = lateness.cell(operation), None
        try:
            with ends_in(DEADLINE_S):
                call()
        except Exception as error:
            outcome = error
        cell = end(outcome)
        if not cell.is_to_repeat(ERRORS[fault]):
            break
    cells.append((fault, cell))


def test_each_fault_of_the_network_in_each_operation_of_a_store(
    resolver: Resolver, lateness: Lateness
) -> None:
    cells: list[tuple[str, Cell]] = []

    run = functools.partial(run_in_time, cells, lateness)
    with ExitStack() as stack:
        threads: list[threading.Thread] = []
        servers: list[FaultServer] = []
        resolver.healed.set()
        operations: dict[str, dict[str, Callable[[], object]]] = {}
        # Only the daemon can leave a resolver behind that hangs for ever.
        for fault in (f for f in FAULTS if f != "a name that takes for ever"):
            server = stack.enter_context(FaultServer())
            fill(server)
            store = open_store(location_of(server, HOSTS.get(fault, "127.0.0.1")), SILENCE_S)
            stack.callback(store.close)
            operations[fault] = store_operations(store)
            store.close()  # no connection is left, so that a resolver's fault is met
            server.fault = fault if fault not in NAMES else ""
            server.break_down()
            servers.append(server)
        resolver.healed.clear()
        for fault, calls in operations.items():
            threads += [threading.Thread(target=run, args=(fault, *call)) for call in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(cells) == len(threads) == (len(FAULTS) - 1) * 6
        assert [wrong for fault, cell in cells if (wrong := check(fault, cell))] == []
        for server in servers:
            server.heal()
        resolver.healed.set()
        for calls in operations.values():
            for call in calls.values():
                call()


# -- the operations of a program that has no daemon


def program_operations(checkpoint: Checkpoint, top: Path) -> dict[str, Callable[[], object]]:
    """The operations of a program on a store; each asserts that its result is right."""
    copies = itertools.count()

    def copy() -> None:
        path = Path(checkpoint.to_directory(top / f"copy{next(copies)}", include=["[!.]*"]))
        assert {file.name: file.read_bytes() for file in path.iterdir()} == DATA

    def get_metadata() -> None:
        assert checkpoint.get_metadata()["step"] == 5

    def set_metadata() -> None:
        checkpoint.set_metadata({"step": 5})

    def update_metadata() -> None:
        checkpoint.update_metadata({"k": 1})

    named = (copy, get_metadata, set_metadata, update_metadata)
    return {operation.__name__: operation for operation in named}


def test_each_fault_of_the_network_in_each_operation_of_a_program(
    resolver: Resolver, lateness: Lateness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTFS_SOCKET", str(tmp_path / "no-daemon"))
    cells: list[tuple[str, Cell]] = []

    run = functools.partial(run_in_time, cells, lateness)
    with ExitStack() as stack:
        threads: list[threading.Thread] = []
        servers: list[FaultServer] = []
        operations: dict[str, dict[str, Callable[[], object]]] = {}
        for number, fault in enumerate(FAULTS):
            server = stack.enter_context(FaultServer())
            fill(server)
            options = {**(place := location_of(server, HOSTS.get(fault, "127.0.0.1"))).options}
            filesystem = pafs.S3FileSystem(**options, **place.secrets)
            top = tmp_path / str(number)
            operations[fault] = program_operations(Checkpoint(place.path, filesystem), top)
            server.fault = fault if fault not in NAMES else ""
            server.break_down()
            servers.append(server)
        for fault, calls in operations.items():
            threads += [threading.Thread(target=run, args=(fault, *call)) for call in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(cells) == len(threads) == len(FAULTS) * 4
        assert [wrong for fault, cell in cells if (wrong := check(fault, cell))] == []
        for server in servers:
            server.heal()
        resolver.healed.set()
        for calls in operations.values():
            for call in calls.values():
                call()


# -- the daemon's operations


class Daemon:
    """The daemon below FUSE, with one checkpoint attached before the fault begins."""

    def __init__(self, rig: Rig, location: Location) -> None:
        self.rig = rig
        self.location = location
        self.service = Service(
            current=CurrentConfig(rig.config),
            cache=rig.cache,
            fetcher=rig.fetcher,
            offload=rig.offload,
            nursery=rig.nursery,
            forget_name=lambda _: None,
            open_store=lambda location, timeout_s, _: open_store(location, timeout_s),
            upload_target=lambda location, *_: (location, "default"),
            handoff=Handoff(rig.new_memory()),
        )

    async def begin(self) -> None:
        """Attach, and read from one of the files."""
        self.attachment = await self.service.attaching.attach(self.location, 1, 1, pinned=True)
        for file in self.attachment.manifest.files:
            opened = self._file(file.path)
            self.rig.files.append(opened)
        self.known = self._file("known")
        self.rig.fetcher.open(self.known)

    def _file(self, path: str) -> Any:
        index = [f.path for f in self.attachment.manifest.files].index(path)
        return self.attachment.file(index)

    def operations(self) -> dict[str, Callable[[], Awaitable[object]]]:
        """Everything that the daemon asks the network for."""
        return {
            "attach": self.attach,
            "first read": self.first_read,
            "read": self.read,
            "prefetch": self.prefetch,
            "metadata read": self.metadata_read,
            "metadata write": self.metadata_write,
        }

    async def attach(self) -> None:
        path = self.location.path.replace("/run", "/other")
        place = msgspec.structs.replace(self.location, path=path)
        attachment: Attachment = await self.service.attaching.attach(place, 1, 1, pinned=False)
        assert {f.path for f in attachment.manifest.files} == {*DATA, METADATA_NAME}
        self.service.attachments.let_go(attachment)

    async def first_read(self) -> None:
        file = self._file("first")
        with self.rig.fetcher.opened(file):
            assert await self.rig.read(file, 100_000, 1000) == DATA["first"][100_000:101_000]

    async def read(self) -> None:
        assert await self.rig.read(self.known, 1000, 250_000) == DATA["known"][1000:251_000]

    async def prefetch(self) -> None:
        file = self._file("ahead")
        with self.rig.fetcher.opened(file):
            await self.rig.fetcher.fetch(file, range(1))

    async def metadata_read(self) -> None:
        self.attachment.metadata.read_s = self.attachment.metadata.until_s = -1e9
        assert (await self.service.metadata.values(self.attachment))["step"] == 5

    async def metadata_write(self) -> None:
        await self.service.metadata.change(self.attachment, lambda now: {**now, "k": 1})


class Wave:
    """The faults that are tried at once, and how far their tasks are."""

    def __init__(self, faults: tuple[str, ...]) -> None:
        self.faults = faults
        self.ready: list[str] = []
        self.broken = trio.Event()
        self.done: list[str] = []


async def test_each_fault_of_the_network_in_each_operation_of_the_daemon(
    tmp_path: Path, resolver: Resolver, lateness: Lateness, caplog: pytest.LogCaptureFixture
) -> None:
    wrong: list[str] = []

    async def one(fault: str, wave: Wave) -> None:
        cells: list[Cell] = []

        async def run(operation: str, call: Callable[[], Awaitable[object]]) -> Cell:
            end, outcome = lateness.cell(operation), None
            try:
                await call()
            except Exception as error:
                outcome = error
            return end(outcome)

        async def broken(operation: str, call: Callable[[], Awaitable[object]]) -> None:
            while (cell := await run(operation, call)).is_to_repeat(ERRORS[fault]):
                pass
            cells.append(cell)

        async def healed(operation: str, call: Callable[[], Awaitable[object]]) -> None:
            while (cell := await run(operation, call)).is_to_repeat(()):
                pass
            if cell.outcome is not None:
                wrong.append(f"{fault} × {operation}, healed: {cell.outcome!r}")

        settings = {
            "read_deadline_s": DEADLINE_S,
            "attach_deadline_s": DEADLINE_S,
            "store_timeout_s": SILENCE_S,
            "linger_s": 0,
        }

        offload = Offload(16)
        with FaultServer() as server:
            fill(server)
            location = location_of(server, HOSTS.get(fault, "127.0.0.1"))
            async with rig_in(tmp_path / fault.replace(" ", "-"), offload, **settings) as rig:
                daemon = Daemon(rig, location)
                await daemon.begin()
                daemon.attachment.store.close()  # connections, so that names are looked up
                wave.ready.append(fault)
                await wave.broken.wait()
                server.fault = fault if fault not in NAMES else ""
                server.break_down()
                async with trio.open_nursery() as nursery:
                    for call in daemon.operations().items():
                        nursery.start_soon(broken, *call)
                await rig.quiet()
                wrong.extend(problem for cell in cells if (problem := check(fault, cell)))
                failed = [cell for cell in cells if cell.outcome is not None]
                if failed and not daemon.attachment.error:
                    wrong.append(f"{fault}: no cause in the attribute")
                if fault not in NAMES:
                    with trio.move_on_after(GRACE_S):
                        while offload.threads():  # noqa: ASYNC110 - no event tells
                            await trio.sleep(0.01)
                    if offload.threads():
                        wrong.append(f"{fault}: {offload.threads()} threads are left")
                wave.done.append(fault)
                while len(wave.done) < len(wave.faults):  # noqa: ASYNC110 - all names heal together
                    await trio.sleep(0.01)
                server.heal()
                resolver.healed.set()
                for operation, call in daemon.operations().items():
                    await healed(operation, call)
                await rig.quiet()
                for attachment in daemon.service.attachments:
                    daemon.service.attachments.detach(attachment, force=True)

    async def run_wave(wave: Wave) -> None:
        resolver.healed.set()
        async with trio.open_nursery() as nursery:
            for fault in wave.faults:
                nursery.start_soon(one, fault, wave)
            while len(wave.ready) < len(wave.faults):  # noqa: ASYNC110
                await trio.sleep(0.01)
            resolver.healed.clear()
            wave.broken.set()

    with caplog.at_level(logging.WARNING), trio.fail_after(100):
        for first in range(0, len(FAULTS), FAULTS_AT_ONCE):
            await run_wave(Wave(FAULTS[first : first + FAULTS_AT_ONCE]))
    assert wrong == []
    for cause in ("did not answer", "cannot reach", "SlowDown", "ExpiredToken", "Redirect"):
        assert cause in caplog.text


# -- threads that hang in a library


def test_a_library_that_hangs_holds_up_no_program(tmp_path: Path) -> None:
    data = {"a": pattern(3 * PART_BYTES)}  # any of its parts may be the second one
    store = FakeStore(data)
    hanging = store.block("read_into", at=2)
    try:
        with ends_in(0.3), pytest.raises(StoreTimeout, match=r"no answer within"):
            copy_directory(store, tmp_path / "copy")
        assert not (tmp_path / "copy" / "a").exists()
        copy_directory(store, tmp_path / "copy")  # goes on, also while the thread still hangs
    finally:
        hanging.release.set()
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == data


def test_a_library_that_hangs_keeps_few_threads_of_a_program() -> None:
    hanging = FakeStore({"a": DATA["first"]})
    store = BoundedStore(hanging)
    gates = [hanging.block("get", at=number) for number in range(1, OVERDUE_MAX + 1)]
    for gate in gates:
        with pytest.raises(StoreTimeout, match="no answer within"):
            within(0.01, "a", store.get, "a")
        assert gate.entered.wait(20)
    with pytest.raises(StoreTimeout, match="have never ended; check the endpoint"):
        within(20, "a", store.get, "a")
    for gate in gates:
        gate.release.set()


async def test_threads_that_hang_take_no_place_from_others(tmp_path: Path) -> None:
    """A fake of a store that never gives a thread back, whatever its server does."""
    hanging = FakeStore({"a": pattern(9 << 20)})
    bright = FakeStore({"a": DATA["first"]})
    offload = Offload(4)
    settings = {"read_deadline_s": 0.1, "connections_max": 4, "span_bytes_max": 1 << 20}
    async with rig_in(tmp_path, offload, **settings) as rig:
        file = rig.open(hanging, "a")
        assert await rig.read(file, 0, 1) == pattern(9 << 20)[:1]
        await rig.quiet()
        gates = [hanging.block("read_into", at=number) for number in range(1, 100)]
        for _ in range(2 * OVERDUE_MAX):
            with pytest.raises(StoreTimeout):
                await rig.read(file, 1 << 20, 1)
            await rig.quiet()
        reads = len(hanging.reads()) - 1
        assert reads >= 2 * OVERDUE_MAX
        assert offload.threads() == reads
        # More hang than there are places for, and yet:
        assert await rig.read(rig.open(bright, "a"), 0, 1) == DATA["first"][:1]
        for gate in gates:
            gate.release.set()
        while offload.threads():  # noqa: ASYNC110 - no event tells when they end
            await trio.sleep(0.002)
        await trio.testing.wait_all_tasks_blocked()
        assert await rig.read(file, 1 << 20, 1) == pattern(9 << 20)[1 << 20 : (1 << 20) + 1]
        assert offload.data._limiter.total_tokens == 4


# -- pauses


async def test_a_store_that_asks_to_be_left_alone_is(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    store = FakeStore({"a": DATA["first"]})
    busy = StoreUnavailable("SlowDown")
    async with rig_in(tmp_path, read_deadline_s=30) as rig:
        file = rig.open(store, "a")
        times: list[float] = []

        def read_into(*args: Any) -> bool:
            times.append(trio.current_time())
            if len(times) < 3:
                busy.retry_after_s = 7.0
                raise busy
            return FakeStore.read_into(store, *args)

        store.read_into = read_into  # type: ignore[method-assign]
        assert await rig.read(file, 0, 10) == DATA["first"][:10]
        assert all(7 <= later - sooner <= 9 for sooner, later in itertools.pairwise(times))
        assert len(store.confirms()) == 2  # the first check and the last: none in the pauses


async def test_when_one_read_finds_the_store_back_the_others_do_not_wait(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    store = FakeStore({"a": pattern(3 << 20)})
    async with rig_in(tmp_path, read_deadline_s=60) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 2 << 20, 1)
        store.fail_always("read_into", StoreUnavailable("no route"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.read, file, 0, 1)
            await trio.sleep(30)  # its pauses are 2.5 to 5 s by now
            store.fail_always("read_into", None)
            began = trio.current_time()
            await rig.read(file, 1 << 20, 1)
        assert trio.current_time() == began


async def test_an_attempt_that_the_deadline_ends_hides_no_cause(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with rig_in(tmp_path, read_deadline_s=30) as rig:
        file = rig.open(FakeStore({"a": DATA["first"]}), "a")
        outcomes: list[StoreUnavailable] = [StoreUnavailable("SlowDown"), StoreTimeout("silent")]
        with trio.move_on_after(30) as scope:

            async def attempt() -> None:
                if len(outcomes) == 1:
                    await trio.sleep_until(scope.deadline - 0.05)
                raise outcomes.pop(0)

            await rig.fetcher._parts.retry.run(file, attempt)
        assert outcomes == []
        assert file.health.cause == "SlowDown"
