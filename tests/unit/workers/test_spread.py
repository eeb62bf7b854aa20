"""Long reads of our own clients run in workers under a load, and nobody can tell the difference."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from conftest import wait_until
from support.cloudservers import ACCOUNT, ACCOUNT_KEY, CloudProxy, Seen, cloud_server, sas_token
from support.fakes import pattern
from support.faultserver import ANSWERS, Answer, FaultServer, Object

from ckptfs._daemon.control.named_stores import opening_with
from ckptfs._daemon.quotas import limit_for
from ckptfs._model.location import Location
from ckptfs._model.named_store import CredentialSource
from ckptfs._model.request_id import request_id
from ckptfs._store.base import Pin, pin_of
from ckptfs._store.request_context import Progress, ends_in
from ckptfs._store.request_metrics import REQUESTS
from ckptfs._workers import pool as pools
from ckptfs._workers import process, spread
from ckptfs._workers.counts import COUNTS
from ckptfs._workers.pool import Pool
from ckptfs._workers.process import BUSY_CALLS
from ckptfs._workers.spread import Load, SpreadStore, load_for, processes_for
from ckptfs._workers.store import WorkerStore
from ckptfs.errors import AccessDenied, ObjectChanged, StoreTimeout, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ckptfs._model.kinds import Kind
    from ckptfs._model.named_store import Credentials
    from ckptfs._workers.process import Group, Worker

MIB = 1 << 20
SIZE = 3 * MIB
DATA = pattern(SIZE)
LEFT_S = 30.0
ME = os.geteuid()


# -- when


def test_a_load_is_sustained_after_a_while_and_survives_pauses() -> None:
    load, long_s = Load(), 2 * spread._GAP_S
    assert [load.began(0.0) for _ in range(spread._FEW)] == [False] * spread._FEW
    assert load.began(spread._SUSTAINED_S)
    for _ in range(2):
        load.ended(1.0)
    assert load.began(1.0 + spread._GAP_S)
    load.ended(2.0)
    assert not load.began(2.0 + long_s)
    assert load.began(3.0 + long_s)


def test_a_slow_link_is_no_load_where_the_node_decides() -> None:
    slow = int(spread._FAST_BYTES_PER_S * spread._SUSTAINED_S / 2)
    cases: list[tuple[int | Literal["auto"], int, bool]]
    cases = [("auto", slow, False), ("auto", 3 * slow, True), (2, 0, True)]
    for setting, length, is_load in cases:
        load = load_for(partial(lambda setting: setting, setting))
        for _ in range(spread._FEW):
            load.began(0.0)
        load.ended(0.1, length)
        assert load.began(spread._SUSTAINED_S) is is_load


def test_short_reads_are_no_load(server: Recording) -> None:
    with opened(server) as bench:
        for _ in range(10):
            assert bench.read(0, MIB - 1) == DATA[: MIB - 1]
        assert bench.starts() == 0


@pytest.mark.parametrize(
    ("cores", "processes"), [(1, 0), (3, 0), (4, 1), (15, 3), (16, 4), (32, 8), (256, 8)]
)
def test_the_machine_decides_how_many_processes_there_are(cores: int, processes: int) -> None:
    assert processes_for("auto", cores) == processes
    assert [processes_for(0, cores), processes_for(5, cores)] == [0, 5]


# -- a server, and a store whose every long read may go to a worker


class Recording(FaultServer):
    """A server that notes its requests, and can refuse some.

    Attributes:
        requests: Method and headers of each request.
        refusal: Returns another answer to a request, or None.
    """

    def __init__(self, *, is_disk: bool = False) -> None:
        super().__init__(is_disk=is_disk)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.refusal: Callable[[str, dict[str, str]], str] = lambda *_: ""
        self.objects["bucket/run/a"] = Object(DATA, 1_600_000_000)

    def _answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        self.requests.append((method, headers))
        right = super()._answer(method, target, headers, body)
        refused = self.refusal(method, headers)
        return ANSWERS[refused](right) if refused else right

    def methods(self) -> list[str]:
        """The methods of the requests since the last call."""
        found = [method for method, _ in self.requests]
        self.requests.clear()
        return found

    def open_connections(self) -> list[socket.socket]:
        """The connections that no client has ended."""
        with self._lock:
            ours = list(self._open)
        return [each for each in ours if not is_ended(each)]


class IdentityServer(Recording):
    """A server that also lends keys to a web identity, as Amazon's token service does.

    Attributes:
        tokens: The tokens of the identities so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[str] = []

    def _answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        if method != "POST":
            return super()._answer(method, target, headers, body)
        self.tokens += parse_qs(body.decode())["WebIdentityToken"]
        lent = (
            b"<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
            b"<AccessKeyId>LENT</AccessKeyId><SecretAccessKey>s</SecretAccessKey>"
            b"<SessionToken>session</SessionToken><Expiration>2100-01-01T00:00:00Z</Expiration>"
            b"</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )
        return Answer(200, {"Content-Length": str(len(lent))}, lent, True)


def is_ended(sock: socket.socket) -> bool:
    poll = select.poll()
    with contextlib.suppress(ValueError):  # closed here, too
        poll.register(sock, select.POLLRDHUP)
        return bool(poll.poll(0))
    return True


class Gate:
    """Holds the answers to reads in their middle."""

    def __init__(self, server: FaultServer) -> None:
        self.open = threading.Event()
        self._lock = threading.Lock()
        self.held = 0
        server.during = self._meet

    def _meet(self, moment: str) -> None:
        if moment == "middle":
            with self._lock:
                self.held += 1
            self.open.wait(LEFT_S)


class Always(Load):
    """A load that is sustained from the first read on."""

    def began(self, now_s: float) -> bool:
        super().began(now_s)
        return True


class Bench:
    """The store at `place`, with its pool.

    Attributes:
        store: The store, as a daemon opens it.
        pin: The object's version, as a check has found it.
    """

    def __init__(self, place: Location, processes: int, credentials: Credentials) -> None:
        self.pool = Pool(limit_for, b"", lambda: self.processes)
        self.processes = processes
        self.store = opening_with(self.pool, Load(), is_private=False)(place, 3.0, ME, credentials)
        assert isinstance(self.store, SpreadStore)
        self.store._load = Always()
        with ends_in(LEFT_S):
            [file] = self.store.list(10).files
            self.pin = self.store.confirm(pin_of(file))
        self._starts, self._ends = COUNTS.starts, dict(COUNTS.ends)

    def read(self, offset: int = 0, length: int = SIZE, left_s: float = LEFT_S) -> bytes:
        """The bytes of a read that the store calls those of the pin."""
        buffer = bytearray(length)
        with ends_in(left_s):
            assert self.store.read_into(self.pin, offset, memoryview(buffer))
        return bytes(buffer)

    def read_in_worker(self) -> bytes:
        """The bytes of a read by the first worker, which starts if there is none."""
        buffer = bytearray(SIZE)
        store: WorkerStore = self.store._in_workers  # type: ignore[attr-defined]

        def is_read() -> bool:
            with ends_in(LEFT_S):
                found = store.read_if_ready(
                    self.pin, 0, memoryview(buffer), answers_are_whole=False
                )
            return found is not None

        wait_until(is_read)
        return bytes(buffer)

    @property
    def group(self) -> Group:
        """The group of the workers."""
        return self.store._in_workers._group  # type: ignore[attr-defined]

    def start(self) -> Worker:
        """Start the first worker, and return it when it is ready."""
        assert self.read() == DATA
        wait_until(lambda: self.group.workers and self.group.workers[0].is_ready)
        return self.group.workers[0]

    def starts(self) -> int:
        """The workers that were started."""
        return COUNTS.starts - self._starts

    def ends(self) -> dict[str, int]:
        """The workers that have ended, by reason."""
        more = {reason: n - self._ends[reason] for reason, n in COUNTS.ends.items()}
        return {reason: n for reason, n in more.items() if n}


@pytest.fixture
def server() -> Iterator[Recording]:
    with Recording() as server:
        yield server


@contextlib.contextmanager
def opened(
    server: Recording, processes: int = 1, credentials: Credentials = "default"
) -> Iterator[Bench]:
    secrets = {"access_key": "key", "secret_key": "secret"} if credentials == "default" else {}
    with opened_at(s3_at(server, secrets), credentials, processes) as bench:
        yield bench


def s3_at(server: Recording, secrets: dict[str, str], **more: str) -> Location:
    options = {"endpoint_override": server.endpoint, "scheme": "http", "region": "us-east-1"}
    return Location("s3", "bucket/run", {**options, **more}, secrets)


@contextlib.contextmanager
def opened_at(
    place: Location, credentials: Credentials = "default", processes: int = 1
) -> Iterator[Bench]:
    bench = Bench(place, processes, credentials)
    try:
        yield bench
    finally:
        bench.pool.shut()


def threads_of(worker: Worker) -> int:
    return len(os.listdir(f"/proc/{worker.pid}/task"))


def descriptors_of(worker: Worker) -> int:
    return len(os.listdir(f"/proc/{worker.pid}/fd"))


# -- where


def test_a_read_waits_for_no_start(server: Recording) -> None:
    with opened(server) as bench:
        assert bench.read() == DATA  # and lets one start
        worker = bench.start()
        before = descriptors_of(worker)
        assert bench.read(MIB, 2 * MIB) == DATA[MIB:]
        assert descriptors_of(worker) > before  # it has a channel now
        assert bench.starts() == 1


def test_without_a_descriptor_the_daemon_reads_itself(
    server: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> tuple[socket.socket, socket.socket]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with opened(server) as bench:
        worker = bench.start()
        worker.idle.append(worker.new_channel())
        monkeypatch.setattr(socket, "socketpair", none)
        assert bench.read() == DATA


def test_without_processes_the_daemon_reads_itself(server: Recording) -> None:
    with opened(server, processes=0) as bench:
        assert bench.read() == DATA
        assert bench.starts() == 0
        bench.processes = 1  # a reload
        worker = bench.start()
        bench.read()
        bench.processes = 0
        used_s = worker.used_s
        assert bench.read() == DATA
        assert worker.used_s == used_s


def test_busy_workers_get_company_up_to_the_limit(
    server: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOPPED_S", LEFT_S)  # a beat may be late on a busy machine
    with opened(server, processes=2) as bench, ThreadPoolExecutor(16) as threads:
        gate = Gate(server)
        gate.open.set()
        first = bench.start()
        gate.open.clear()
        gate.held = 0
        reads = [threads.submit(bench.read) for _ in range(BUSY_CALLS)]
        wait_until(lambda: gate.held == BUSY_CALLS)
        assert first.calls == BUSY_CALLS
        assert bench.starts() == 1
        reads.append(threads.submit(bench.read))
        wait_until(lambda: len(bench.group.workers) == 2 and bench.group.workers[1].is_ready)
        second = bench.group.workers[1]
        reads += [threads.submit(bench.read) for _ in range(2 * BUSY_CALLS)]
        wait_until(lambda: gate.held == len(reads))
        assert abs(first.calls - second.calls) <= 1
        assert first.calls + second.calls == len(reads)
        gate.open.set()
        assert all(read.result() == DATA for read in reads)
        assert bench.starts() == 2


def test_another_user_has_a_share_of_the_extra_workers(server: Recording) -> None:
    with opened(server, processes=2) as bench:
        group = bench.group
        group.uid = ME + 1
        bench.start()
        with bench.pool._changed:
            group.workers[0].calls += BUSY_CALLS
            bench.pool._want(group)
            assert not group.is_starting
            group.workers[0].calls -= BUSY_CALLS


def test_workers_that_are_not_used_end(server: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(server) as bench:
        bench.start()
        monkeypatch.setattr(pools, "IDLE_S", 0.0)
        wait_until(lambda: not bench.group.workers)
        assert bench.ends() == {"idle": 1}
        bench.store.close()
        wait_until(lambda: not bench.pool._groups)


def test_a_worker_has_no_library_in_memory(server: Recording) -> None:
    with opened(server) as bench:
        worker = bench.start()
        bench.read()
        maps = Path(f"/proc/{worker.pid}/maps").read_text()
        assert not [name for name in ("pyarrow", "libarrow", "pyfuse3") if name in maps]


# -- what nobody may notice


def test_a_worker_knows_what_the_daemon_has_learned(server: Recording) -> None:
    with opened(server) as bench:
        bench.start()
        server.methods()
        for _ in range(3):
            assert bench.read() == DATA  # asserts that nothing is to be confirmed
        assert server.methods() == ["GET"] * 3


def test_a_worker_of_a_disk_server_promises_nothing() -> None:
    with Recording(is_disk=True) as server, opened(server) as bench:
        buffer = memoryview(bytearray(SIZE))
        with ends_in(LEFT_S):
            assert not bench.store.read_into(bench.pin, 0, buffer)
            wait_until(lambda: bench.group.workers and bench.group.workers[0].is_ready)
            assert not bench.store.read_into(bench.pin, 0, buffer)


def test_errors_of_a_worker_are_those_of_the_client(server: Recording) -> None:
    with opened(server) as bench:
        bench.start()
        other = Pin("a", SIZE, bench.pin.mtime_ns, '"other"')
        with pytest.raises(ObjectChanged, match=r"a in s3://.*: it was written again"):
            bench.store.read_into(other, 0, memoryview(bytearray(SIZE)))
        server.refusal = lambda *_: "503, again in 1 s"
        with pytest.raises(StoreUnavailable, match="SlowDown") as error:
            bench.read()
        assert error.value.retry_after_s == 1.0
        server.refusal = lambda *_: "403 expired"
        with pytest.raises(AccessDenied, match="ExpiredToken"):
            bench.read()
        assert bench.ends() == {}


def test_a_read_in_a_worker_counts_as_one(server: Recording) -> None:
    def outcomes() -> dict[str, int]:
        [reads] = [each for each in REQUESTS.snapshot() if each.kind == "read"]
        return dict(reads.outcomes)

    with opened(server) as bench:
        bench.start()
        before = outcomes()
        bench.read()
        server.refusal = lambda *_: "503"
        with pytest.raises(StoreUnavailable):
            bench.read()
        after = outcomes()
    changes = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changes == {"ok": 1, "unavailable": 1}


def test_the_server_hears_of_the_request_that_a_worker_reads_for(server: Recording) -> None:
    with opened(server) as bench:
        bench.start()
        token = request_id.set("0123456789abcdef")
        try:
            bench.read()
        finally:
            request_id.reset(token)
        assert server.requests[-1][1]["user-agent"].endswith(" request/0123456789abcdef")
        bench.read()
        assert "request/" not in server.requests[-1][1]["user-agent"]


def test_a_worker_learns_the_region_once(server: Recording) -> None:
    def refusal(_: str, headers: dict[str, str]) -> str:
        return "" if "/eu-west-3/" in headers["authorization"] else "400 elsewhere"

    elsewhere = "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>"

    def other_region(right: Answer) -> Answer:
        headers = {"x-amz-bucket-region": "eu-west-3", "Content-Length": str(len(elsewhere))}
        return Answer(400, headers, elsewhere.encode(), right.has_body)

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(ANSWERS, "400 elsewhere", other_region)
        server.refusal = refusal
        with opened(server) as bench:
            bench.start()
            server.methods()
            for _ in range(4):
                assert bench.read() == DATA
            assert server.methods() == ["GET"] * 5


def test_a_worker_reads_new_credentials_from_their_file(server: Recording, tmp_path: Path) -> None:
    def write(key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")
        file.chmod(0o600)

    def refusal(_: str, headers: dict[str, str]) -> str:
        return "" if f"Credential={allowed[0]}/" in headers["authorization"] else "403 expired"

    file, allowed = tmp_path / "keys", ["FIRST"]
    write("FIRST")
    server.refusal = refusal
    with opened(server, credentials=CredentialSource(file=str(file))) as bench:
        worker = bench.start()
        bench.read()
        allowed[0] = "SECOND"
        write("SECOND")
        bench.read()
        environ = Path(f"/proc/{worker.pid}/environ").read_bytes()
        assert b"FIRST" not in environ + Path(f"/proc/{worker.pid}/cmdline").read_bytes()
        assert bench.starts() == 1


@pytest.mark.parametrize("is_in_location", [False, True])
def test_a_worker_has_the_keys_of_a_profile(
    server: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_in_location: bool
) -> None:
    file = tmp_path / "keys"
    file.write_text("[run]\naws_access_key_id = RUN\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    place = s3_at(server, {}, **({"profile": "run"} if is_in_location else {}))
    with opened_at(
        place, "default" if is_in_location else CredentialSource(profile="run")
    ) as bench:
        assert bench.read_in_worker() == DATA
    assert all("Credential=RUN/" in headers["authorization"] for _, headers in server.requests)


def test_a_worker_asks_for_keys_by_its_web_identity(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("identity")
    with IdentityServer() as server:
        place = s3_at(
            server,
            {},
            role_arn="arn:aws:iam::123456789012:role/reader",
            web_identity_token_file=str(tmp_path / "token"),
            sts_endpoint_url=f"http://{server.endpoint}",
        )
        with opened_at(place) as bench:
            assert bench.read_in_worker() == DATA
            assert server.tokens == ["identity"] * 2  # of this process and the worker
            reads = [headers for method, headers in server.requests if method == "GET"]
            assert all("Credential=LENT/" in headers["authorization"] for headers in reads)
            assert all(headers["x-amz-security-token"] == "session" for headers in reads)


def test_progress_of_a_worker_reaches_the_daemon(server: Recording) -> None:
    gate = Gate(server)
    gate.open.set()
    with opened(server) as bench, ThreadPoolExecutor(1) as threads:
        bench.start()
        gate.open.clear()
        progress = Progress()
        read = threads.submit(progress.run, bench.read)
        wait_until(lambda: progress.body_count > 0)
        assert progress.body_count <= SIZE // 2
        gate.open.set()
        assert read.result() == DATA


# -- other clouds


@pytest.fixture(scope="module", params=["gcs", "azure"])
def cloud(request: pytest.FixtureRequest) -> Iterator[Any]:
    with cloud_server(request.param) as server:
        server.put("run/a", DATA)
        yield server


@pytest.fixture
def proxy(cloud: Any) -> Iterator[CloudProxy]:
    with CloudProxy(cloud.endpoint) as proxy:
        yield proxy


def secrets_of(cloud: Any, number: int = 0) -> dict[str, str]:
    """Credentials that the server takes; another `number`, other ones."""
    if cloud.kind == "gcs":
        return {"access_token": f"ya29.{number}"}
    return {"sas_token": sas_token(1 + number)}


def is_authorized(seen: Seen, secrets: dict[str, str]) -> bool:
    """Whether a request has these credentials."""
    if token := secrets.get("access_token"):
        return seen.headers["authorization"] == f"Bearer {token}"
    if sas := secrets.get("sas_token"):
        return parse_qs(sas)["sig"] == parse_qs(urlsplit(seen.target).query)["sig"]
    return seen.headers["authorization"].startswith(f"SharedKey {ACCOUNT}:")


def test_a_worker_reads_a_cloud_with_the_credentials_of_its_location(
    cloud: Any, proxy: CloudProxy
) -> None:
    used = [secrets_of(cloud), *([{"account_key": ACCOUNT_KEY}] if cloud.kind == "azure" else [])]
    for secrets in used:
        with opened_at(cloud.location("run", proxy.endpoint, **secrets)) as bench:
            worker = bench.start()
            proxy.seen.clear()
            assert bench.read_in_worker() == DATA
            assert proxy.seen
            assert all(is_authorized(seen, secrets) for seen in proxy.seen)
            assert "pyarrow" not in Path(f"/proc/{worker.pid}/maps").read_text()


def test_a_worker_of_a_cloud_reads_new_credentials_from_their_file(
    cloud: Any, proxy: CloudProxy, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"
    file.touch(0o600)
    first, second = secrets_of(cloud), secrets_of(cloud, 1)
    file.write_text(json.dumps(first))
    place = msgspec.structs.replace(cloud.location("run", proxy.endpoint, **first), secrets={})
    with opened_at(place, CredentialSource(file=str(file))) as bench:
        assert bench.read_in_worker() == DATA
        assert all(is_authorized(seen, first) for seen in proxy.seen)
        file.write_text(json.dumps(second))
        proxy.seen.clear()
        assert bench.read_in_worker() == DATA
        assert proxy.seen
        assert all(is_authorized(seen, second) for seen in proxy.seen)
        assert bench.starts() == 1


def test_a_worker_of_a_cloud_refuses_the_bytes_of_another_version(cloud: Any) -> None:
    cloud.put("changing/a", DATA)
    with opened_at(cloud.location("changing", **secrets_of(cloud))) as bench:
        assert bench.read_in_worker() == DATA
        cloud.put("changing/a", DATA[::-1])
        with pytest.raises(ObjectChanged):
            bench.read_in_worker()
        assert bench.ends() == {}


# -- ends


def test_a_read_that_is_given_up_ends_at_the_server(server: Recording) -> None:
    gate = Gate(server)
    gate.open.set()
    with opened(server) as bench, ThreadPoolExecutor(1) as threads:
        worker = bench.start()
        bench.read()
        wait_until(lambda: worker.idle)
        before = threads_of(worker), descriptors_of(worker)
        gate.open.clear()
        gate.held = 0
        progress = Progress()
        read = threads.submit(progress.run, bench.read)
        wait_until(lambda: gate.held)
        kept = len(server.open_connections())
        progress.give_up()
        with pytest.raises(StoreTimeout, match="given up"):
            read.result(LEFT_S)
        wait_until(lambda: len(server.open_connections()) == kept - 1)
        wait_until(lambda: threads_of(worker) < before[0])
        wait_until(lambda: descriptors_of(worker) < before[1])
        assert worker.calls == 0
        gate.open.set()
        assert bench.read() == DATA
        assert bench.ends() == {}


def test_a_read_ends_in_the_worker_at_its_deadline(server: Recording) -> None:
    gate = Gate(server)
    gate.open.set()
    with opened(server) as bench:
        worker = bench.start()
        bench.read()
        wait_until(lambda: worker.idle)
        before = threads_of(worker)
        gate.open.clear()
        with pytest.raises((StoreTimeout, StoreUnavailable)):
            bench.read(left_s=0.5)
        wait_until(lambda: threads_of(worker) <= before and worker.calls == 0)
        gate.open.set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_reads_go_on_when_their_worker_is_gone(server: Recording, number: signal.Signals) -> None:
    gate = Gate(server)
    gate.open.set()
    with opened(server) as bench, ThreadPoolExecutor(4) as threads:
        worker = bench.start()
        gate.open.clear()
        gate.held = 0
        reads = [threads.submit(bench.read) for _ in range(4)]
        wait_until(lambda: gate.held == 4)
        os.kill(worker.pid, number)
        wait_until(lambda: gate.held == 8)  # they are made again
        gate.open.set()
        assert all(read.result() == DATA for read in reads)
        assert bench.ends() == {"died" if number == signal.SIGKILL else "stopped": 1}


def test_a_stopped_worker_gets_no_reads(server: Recording) -> None:
    with opened(server) as bench:
        worker = bench.start()
        os.kill(worker.pid, signal.SIGSTOP)
        wait_until(lambda: not worker.is_ready)
        assert bench.read() == DATA
        assert worker.calls == 0
        os.kill(worker.pid, signal.SIGCONT)
        wait_until(lambda: worker.is_ready)
        assert bench.ends() == {}


def test_a_worker_that_dies_again_and_again_is_left_alone_for_a_while(
    server: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "PROTOCOL", process.PROTOCOL + 1)  # as of another version
    with opened(server) as bench:
        wait_until(lambda: bench.read() == DATA and bench.group.deaths >= 3)
        assert bench.ends() == {"died": bench.group.deaths}
        monkeypatch.undo()
        wait_until(lambda: bench.read() == DATA and bench.group.deaths == 0)


# -- stores that only workers read


@pytest.mark.parametrize(
    ("kind", "extra", "most"), [("http", 0, 1), ("http", 1, 2), ("hdfs", 1, 1)]
)
def test_own_clients_that_need_a_worker_may_have_more(kind: Kind, extra: int, most: int) -> None:
    pool = Pool(limit_for, b"", lambda: extra)
    try:
        store = WorkerStore(pool, ME, Location(kind, "http://127.0.0.1:9/run"), 3.0)
        group = store._group
        with ends_in(LEFT_S):
            seats = [pool.take(group, "x", waits=True) for _ in range(BUSY_CALLS + 1)]
            wait_until(lambda: not group.is_starting)
            assert len(group.workers) == most
            for seat in seats:
                pool.give_back(group, *seat)
    finally:
        pool.shut()
