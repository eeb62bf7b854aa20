"""The exporter, the page and the dashboard have the metrics of the table."""

import contextlib
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.bench import ELSEWHERE, ME, PLACE, SETTINGS, Bench
from support.fakes import FakeStore, InlineOffload
from support.pages import METRICS, metric_rows, names
from support.rig import read_of, rig_in
from trio.testing import MockClock

from ckptfs._config.load import load_config
from ckptfs._daemon.control import metrics_server as scrapes_module
from ckptfs._daemon.control.metrics_server import MetricsServer, is_open, listen
from ckptfs._daemon.control.prometheus import Exporter
from ckptfs._daemon.usage import counters as activity_module
from ckptfs._daemon.usage import procfs
from ckptfs._daemon.usage.counters import count_failed_read
from ckptfs._model.config import Config
from ckptfs._model.metrics import READ_ERRORS
from ckptfs._model.protocol.message import LINE_BYTES_MAX
from ckptfs._model.protocol.wire import encode
from ckptfs._store.request_metrics import KINDS, OUTCOMES, REQUESTS, outcome_of_status
from ckptfs.errors import BY_CODE, ConfigError, PlanError, StoreTimeout

DASHBOARD = Path(__file__).parents[4] / "scripts" / "grafana" / "ckptfs.json"
ALERTS = DASHBOARD.with_name("alerts.yaml")
CONTENT = {"a/b": b"content", "c": b"x"}


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with rig_in(tmp_path, InlineOffload(), **SETTINGS) as rig:
        yield Bench(rig)


def exporter_of(bench: Bench, config: Config | None = None, *, open_: bool = False) -> Exporter:
    """The exporter of a bench."""
    service = bench.service
    return Exporter(
        config or bench.rig.config,
        service.attachments,
        service.reporter,
        bench.offload,
        is_open=open_,
    )


async def values_of(exporter: Exporter) -> dict[str, dict[tuple[str, ...], float]]:
    """The values that Prometheus reads, by series and by labels in the order of their names."""
    _, content = await exporter.text("")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(content.decode()):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


# -- the table


def test_the_page_on_metrics_has_the_rows_of_the_table() -> None:
    lines = files("ckptfs").joinpath("METRICS.md").read_text().splitlines()
    rows = metric_rows()
    found = [line for line in lines if line.startswith("| `ckptfs_")]
    assert found == rows, "put these rows into METRICS.md:\n" + "\n".join(rows)


def test_the_page_on_metrics_explains_the_labels() -> None:
    page = files("ckptfs").joinpath("METRICS.md").read_text()
    labels = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", page, re.MULTILINE))
    used = {label for metric in METRICS.values() for label in metric.labels}
    assert used | {"le"} == set(labels)
    for name in (*KINDS, *OUTCOMES):
        assert f"`{name}`" in labels["kind"] + labels["outcome"]


@pytest.mark.parametrize("file", [DASHBOARD, ALERTS], ids=lambda path: path.name)
def test_dashboard_and_alerts_use_existing_metrics(file: Path) -> None:
    asks_for = yaml.safe_load(file.read_text())  # JSON is YAML
    known = {name: metric for metric in METRICS.values() for name in names(metric)}
    asked: set[str] = set()
    for query in _queries(asks_for):
        found = re.findall(r"\b(ckptfs_\w+)(\{[^}]*\})?", query)
        assert found or query == 'up{job="ckptfs"} == 0', query
        for name, selection in found:
            asked.add(name)
            labels = set(re.findall(r"(\w+)\s*=~?|(\w+)\s*!=", selection))
            flat = {label for pair in labels for label in pair if label}
            assert flat - {"instance"} <= set(known[name].labels), query
        groups = re.findall(r"by \(([^)]*)\)", query)
        by = {label.strip() for group in groups for label in group.split(",")}
        of_all = {label for name, _ in found for label in known[name].labels} | {"instance", "le"}
        assert by <= of_all, query
    assert len(asked) >= (20 if file is DASHBOARD else 8)


def test_alerts_name_an_action() -> None:
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    for rule in group["rules"]:
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["labels"]["severity"] in ("critical", "warning")


def _queries(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "definition") and isinstance(inner, str):
                yield inner
            yield from _queries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _queries(inner)


# -- values


async def test_exporter_exports_exactly_the_table(bench: Bench, autojump_clock: MockClock) -> None:
    attachment = await bench.attach()
    bench.service.vfs.open(attachment.snapshot.tree.root.children[b"c"].inode)
    found = await values_of(exporter_of(bench))
    assert set(found) == {name for metric in METRICS.values() for name in names(metric)}
    assert found["ckptfs_attachments"] == {(): 1}
    assert found["ckptfs_opens_total"] == {("daemon",): 1, ("kernel",): 0}
    assert list(found["ckptfs_checkpoint_reads_total"]) == [(attachment.name,)]
    _, openmetrics = await exporter_of(bench).text("application/openmetrics-text")
    assert openmetrics.endswith(b"# EOF\n")


async def test_exporter_starts_error_counters_at_zero(
    bench: Bench, autojump_clock: MockClock
) -> None:
    codes = {(code,) for code in READ_ERRORS}
    assert {code for (code,) in codes} - {"stale"} <= set(BY_CODE)
    found = await values_of(exporter_of(bench))
    for name in ("ckptfs_read_errors_total", "ckptfs_fetch_failures_total"):
        assert found[name] == dict.fromkeys(codes, 0)
    attachment = await bench.attach()
    count_failed_read(attachment.activity.opened(77), StoreTimeout())
    attachment.activity.failed(StoreTimeout())
    attachment.activity.failed(PlanError())  # an error that has no counter at the start
    found = await values_of(exporter_of(bench))
    assert found["ckptfs_read_errors_total"]["store-timeout",] == 1
    assert found["ckptfs_fetch_failures_total"]["store-timeout",] == 1
    assert found["ckptfs_fetch_failures_total"]["plan",] == 1


async def test_exporter_counts_reads_and_fetched_bytes(
    bench: Bench, autojump_clock: MockClock
) -> None:
    attachment = await bench.attach()
    vfs = bench.service.vfs
    handle = vfs.open(attachment.snapshot.tree.root.children[b"c"].inode, 77)
    assert await read_of(vfs, handle, 0, 10) == b"x"
    vfs.note_read(handle, 0, 1, 0)
    assert await read_of(vfs, handle, 0, 10) == b"x"
    vfs.note_read(handle, 0, 1, 0)
    found = await values_of(exporter_of(bench))
    for prefix, labels in (("ckptfs_", ()), ("ckptfs_checkpoint_", (attachment.name,))):
        assert found[f"{prefix}read_bytes_total"] == {(*labels, "cache"): 1, (*labels, "store"): 1}
        assert found[f"{prefix}read_misses_total"] == {labels: 1}
        assert found[f"{prefix}fetched_bytes_total"] == {labels: 1}
    assert found["ckptfs_read_seconds_count"] == {(): 2}
    assert found["ckptfs_fetched_spans_total"] == {(): 1}
    vfs.release(handle)
    bench.service.attachments.detach(attachment, force=True)
    after = await values_of(exporter_of(bench))
    assert after["ckptfs_read_seconds_count"] == {(): 2}
    assert after["ckptfs_read_bytes_total"] == found["ckptfs_read_bytes_total"]
    assert "ckptfs_checkpoint_reads_total" not in after


async def test_exporter_gives_further_checkpoints_one_label(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity_module, "NAMED_MAX", 1)
    async with rig_in(tmp_path, InlineOffload(), **SETTINGS) as rig:
        bench = Bench(rig)
        first, second = await bench.attach(), await bench.attach(ELSEWHERE)
        for attachment in (first, second):
            handle = bench.service.vfs.open(attachment.snapshot.tree.root.children[b"c"].inode)
            bench.service.vfs.note_read(handle, 0, 5, 0)
        found = await values_of(exporter_of(bench))
        assert found["ckptfs_checkpoint_reads_total"] == {(first.name,): 1, ("other",): 1}
        bench.service.attachments.detach(second, force=True)
        found = await values_of(exporter_of(bench))
        assert found["ckptfs_checkpoint_reads_total"] == {(first.name,): 1, ("other",): 1}


async def test_exporter_hides_names_from_other_users(
    bench: Bench, autojump_clock: MockClock
) -> None:
    attachment = await bench.attach()
    shared = msgspec.structs.replace(bench.rig.config, allow_other=True)
    for config, open_, expected in (
        (bench.rig.config, True, attachment.name),
        (shared, False, attachment.name),
        (shared, True, attachment.location.digest),
    ):
        found = await values_of(exporter_of(bench, config, open_=open_))
        assert list(found["ckptfs_checkpoint_reads_total"]) == [(expected,)]


def test_request_outcomes_follow_the_http_status() -> None:
    statuses = (200, 206, 304, 400, 401, 403, 404, 412, 416, 429, 500, 503)
    outcomes = [outcome_of_status(status) for status in statuses]
    assert outcomes == [
        *("ok", "ok", "ok", "error", "denied", "denied", "absent"),
        *("changed", "changed", "unavailable", "unavailable", "unavailable"),
    ]
    assert {kind.kind for kind in REQUESTS.snapshot()} == set(KINDS)


# -- the server


@asynccontextmanager
async def scraped(bench: Bench, address: str) -> AsyncIterator[MetricsServer]:
    """Serve metrics at the address."""
    async with trio.open_nursery() as nursery:
        scrapes = MetricsServer(exporter_of(bench), address)
        nursery.start_soon(scrapes.serve)
        yield scrapes
        nursery.cancel_scope.cancel()


async def ask(path: str, request: bytes) -> bytes:
    """The answer at a unix socket."""
    with trio.fail_after(5):
        while not os.path.exists(path):  # noqa: ASYNC110 - the server makes it
            await trio.sleep(0.01)
        stream = await trio.open_unix_socket(path)
        async with stream:
            await stream.send_all(request)
            answer = b""
            with contextlib.suppress(trio.BrokenResourceError):  # it has not read all of it
                while more := await stream.receive_some(65536):
                    answer += more
    return answer


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("m") / "m")


async def test_metrics_server_speaks_http(bench: Bench, path: str) -> None:
    async with scraped(bench, f"unix:{path}"):
        answer = await ask(path, b"GET /metrics?x HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain")
        assert f"Content-Length: {len(body)}".encode() in head
        assert b"ckptfs_attachments 0.0" in body
        assert os.stat(path).st_mode & 0o777 == 0o600
        head = await ask(path, b"HEAD /metrics HTTP/1.1\r\n\r\n")
        assert head.endswith(b"\r\n\r\n")
        for request, status in (
            (b"GET / HTTP/1.1\r\n\r\n", b"404"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
            (b"\r\n\r\n", b"404"),
            (b"\xff\x00\r\n\r\n", b"404"),
        ):
            assert (await ask(path, request)).startswith(b"HTTP/1.1 " + status)
        assert await ask(path, b"x" * 20_000) == b""
        openmetrics = b"GET /metrics HTTP/1.1\r\naccept: application/openmetrics-text\r\n\r\n"
        assert (await ask(path, openmetrics)).endswith(b"# EOF\n")
    assert not os.path.exists(path)


async def test_metrics_server_repeats_its_answer_within_a_second(
    bench: Bench, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    scrapes = MetricsServer(exporter_of(bench), "unix:/x")
    first = await scrapes._text("")
    await bench.attach()
    assert await scrapes._text("") is not None
    assert (await scrapes._text(""))[1] == first[1]
    await trio.sleep(1.1)
    assert b"ckptfs_attachments 1.0" in (await scrapes._text(""))[1]


async def test_metrics_server_closes_silent_connections(
    bench: Bench, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrapes_module, "_CONNECTION_S", 0.2)
    async with scraped(bench, f"unix:{path}"):
        assert await ask(path, b"") == b""
        assert await ask(path, b"GET /metrics HTTP/1.1\r\n") == b""
        silent = [await trio.open_unix_socket(path) for _ in range(20)]
        for stream in silent:
            assert await stream.receive_some(1) == b""
            await stream.aclose()
        assert b" 200 " in await ask(path, b"GET /metrics HTTP/1.1\r\n\r\n")


async def test_metrics_server_retries_a_used_address(
    bench: Bench, path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrapes_module, "_AGAIN_S", 0.02)
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(path)
        taken.listen()
        async with scraped(bench, f"unix:{path}"):
            await trio.sleep(0.1)
            taken.close()  # only the file is left
            assert b" 200 " in await ask_when_served(path)
    assert "another process listens on it" in caplog.text


async def ask_when_served(path: str) -> bytes:
    """As `ask`, when the server listens."""
    with trio.fail_after(5):
        while True:
            try:
                return await ask(path, b"GET /metrics HTTP/1.1\r\n\r\n")
            except (ConnectionRefusedError, FileNotFoundError):
                await trio.sleep(0.01)


def test_metrics_server_does_not_replace_a_file(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("precious")
    with pytest.raises(OSError, match="not a socket"):
        listen(f"unix:{file}")
    assert file.read_text() == "precious"


def test_metrics_server_listens_on_loopback_addresses() -> None:
    for host, family in (("127.0.0.1", socket.AF_INET), ("localhost", socket.AF_INET)):
        with listen(f"{host}:0") as listening:
            assert listening.family == family
            assert listening.getsockname()[0] == "127.0.0.1"
    with pytest.raises(OSError, match="port 99999 is above 65535"):
        listen("127.0.0.1:99999")
    assert is_open("127.0.0.1:1")
    assert not is_open("unix:/x")


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0:9467", "10.0.0.1:9467", ":9467", "9467", "host:9467", "[::]:9467", "127.0.0.1"),
        *("unix:relative", "unix:", "127.0.0.1:9467\n", "127.0.0.1.evil.example:9467", "x" * 200),
    ],
)
def test_metrics_setting_refuses_other_addresses(tmp_path: Path, address: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"metrics = {json.dumps(address)}\n")
    with pytest.raises(ConfigError, match="metrics"):
        load_config({"CKPTFS_CONFIG": str(file)})


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:9467", "127.1.2.3:1", "localhost:80", "[::1]:1", "unix:/run/m.sock"]
)
def test_metrics_setting_accepts_local_addresses(tmp_path: Path, address: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"metrics = {json.dumps(address)}\n")
    assert load_config({"CKPTFS_CONFIG": str(file)}).metrics == address


# -- status and top


async def test_replies_are_bounded(tmp_path: Path, autojump_clock: MockClock) -> None:
    settings = SETTINGS | {"attachments_max": 1000}
    async with rig_in(tmp_path, InlineOffload(), **settings) as rig:
        bench = Bench(rig)
        count = 40
        for number in range(count):
            place = msgspec.structs.replace(PLACE, path=f"bucket/{number}/{'x' * 7000}")
            bench.stores[place.path] = FakeStore(
                {"c": b"x", **{f"{'y' * 200}{i}\n": b"" for i in range(100)}}
            )
            attachment = await bench.attach(place)
            for pid in range(100):
                bench.service.vfs.open(attachment.snapshot.tree.root.children[b"c"].inode, pid + 1)
        status, activity = bench.service.reporter.status(ME), bench.service.reporter.activity(ME)
        assert len(encode(status)) < LINE_BYTES_MAX
        assert len(encode(activity)) < LINE_BYTES_MAX
        assert len(status.attachments) + status.left_out == count
        assert len(activity.checkpoints) + activity.checkpoints_left_out == count
        assert status.left_out > 0
        assert activity.checkpoints[0].processes_left_out > 0
        assert bench.service.reporter.activity(4242).checkpoints == []


async def test_reporter_hides_commands_of_other_users(
    bench: Bench, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptfs._daemon.control.service.command", lambda pid: f"command {pid}")
    monkeypatch.setattr(procfs, "owner", lambda pid: 5 if pid == 71 else 4242)
    attachment = await bench.attach(uid=4242)
    root = attachment.snapshot.tree.root
    bench.service.vfs.opendir(root.inode, 71)
    bench.service.vfs.opendir(root.inode, 72)
    bench.service.vfs.open(root.children[b"c"].inode, 72)
    await trio.sleep(1)
    for uid, expected in ((0, ["command 71", "command 72"]), (4242, ["", "command 72"])):
        [told] = bench.service.reporter.status(uid).attachments
        assert [(h.pid, h.command, h.open_files) for h in told.processes] == [
            (71, expected[0], 0),
            (72, expected[1], 1),
        ]
        assert told.holders == [71, 72]
        [checkpoint] = bench.service.reporter.activity(uid).checkpoints
        assert [(p.pid, p.command) for p in checkpoint.processes] == [(72, "command 72")]
