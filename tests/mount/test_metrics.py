"""Metrics, status and logs of a real mount: each number is that of the S3 server, or known."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, wait_until
from prometheus_client.parser import text_string_to_metric_families
from support.s3server import S3Server

import ckptfs
from ckptfs._client import client
from ckptfs._model.protocol.requests import Activity

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
Values = dict[str, dict[tuple[str, ...], float]]
_NOT_SEEN_S = 1.1
"""Two scrapes within a second get the same answer."""


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def scrape(path: Path) -> Values:
    """The values that Prometheus would read, by series and the values of its labels."""
    wait_until(path.exists)
    connection = _UnixConnection(str(path))
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        content = connection.getresponse().read().decode()
    found: Values = {}
    for family in text_string_to_metric_families(content):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def drop_pages(path: str) -> None:
    """The kernel forgets what it has of a file, so that the next read is one for us."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def kinds_of(s3: S3Server) -> Counter[str]:
    """The requests that the server got, as the metrics call them."""
    kinds: Counter[str] = Counter()
    for request in s3.traffic().requests:
        kind = {"HEAD": "head", "PUT": "put"}.get(request.method)
        if kind is None:
            kind = "list" if "list-type" in request.target else "read" if request.range else "get"
        kinds[kind] += 1
    return kinds


def ranges_of(s3: S3Server) -> int:
    """The bytes of the ranges that it was asked for."""
    total = 0
    for request in s3.traffic().requests:
        if request.range:
            first, last = map(int, re.findall(r"\d+", request.range))
            total += last - first + 1
    return total


def test_each_number_is_that_of_the_server(
    node: Node, s3: S3Server, small: Path, uri_of: UriOf
) -> None:
    metrics = node.folder / "m.sock"
    node.configure(metrics=f"unix:{metrics}", passthrough=False)
    big = os.urandom(5_000_000)
    (small / "big.bin").write_bytes(big)
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        before = scrape(metrics)
        assert before["ckptfs_fetched_bytes_total"] == {(): 0}
        name = Path(path).name
        assert Path(path, "big.bin").read_bytes() == big
        assert Path(path, "config.json").read_text() == '{"layers": 1}'
        node.wait_quiet()
        time.sleep(_NOT_SEEN_S)
        cold = scrape(metrics)
        read_bytes = len(big) + 13
        assert sum(cold["ckptfs_read_bytes_total"].values()) == read_bytes
        assert cold["ckptfs_read_bytes_total"]["store",] > 0
        assert cold["ckptfs_fetched_bytes_total"] == {(): ranges_of(s3)} == {(): read_bytes}
        kinds = {labels[0]: 0.0 for labels in cold["ckptfs_store_requests_total"]}
        for (kind, outcome), count in cold["ckptfs_store_requests_total"].items():
            kinds[kind] += count
            assert not count or outcome == "ok"
        assert {kind: n for kind, n in kinds.items() if n} == kinds_of(s3)
        times = cold["ckptfs_store_request_seconds_count"]
        assert {kind: n for (kind,), n in times.items()} == kinds
        assert cold["ckptfs_opens_total"] == {("daemon",): 2, ("kernel",): 0}
        assert cold["ckptfs_read_misses_total"][()] >= 2

        drop_pages(f"{path}/big.bin")
        s3.reset_traffic()
        assert Path(path, "big.bin").read_bytes() == big
        time.sleep(_NOT_SEEN_S)
        warm = scrape(metrics)
        assert ranges_of(s3) == 0
        for series in ("ckptfs_fetched_bytes_total", "ckptfs_read_misses_total"):
            assert warm[series] == cold[series]
        sources = {s: warm["ckptfs_read_bytes_total"][s,] for s in ("cache", "store")}
        assert sources["store"] == cold["ckptfs_read_bytes_total"]["store",]
        assert sources["cache"] == cold["ckptfs_read_bytes_total"]["cache",] + len(big)
        # One checkpoint, so that its numbers are those of the node.
        for series in ("read_misses", "fetched_bytes"):
            of_it = warm[f"ckptfs_checkpoint_{series}_total"]
            assert of_it == {(name,): warm[f"ckptfs_{series}_total"][()]}
        assert warm["ckptfs_checkpoint_reads_total"][name,] == warm["ckptfs_read_seconds_count"][()]
        assert warm["ckptfs_cache_bytes"][()] > read_bytes
        with client.connect() as connection:
            activity = connection.ask(Activity())
        assert activity.counts.read_bytes == sum(sources.values())
        [checkpoint] = activity.checkpoints
        [process] = [p for p in checkpoint.processes if p.pid]
        assert process.pid == os.getpid()
        assert process.counts.read_bytes == activity.counts.read_bytes
        assert process.counts.opens == 4  # `drop_pages` is one
    assert os.stat(metrics).st_mode & 0o777 == 0o600


def test_what_fails_is_counted_and_logged_once(
    node: Node, s3: S3Server, small: Path, uri_of: UriOf
) -> None:
    node.configure(log_format="json", read_deadline_s=5.0)
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        weights = small / "layers" / "0" / "weights.bin"
        weights.write_bytes(b"another version")
        for _ in range(20):
            with pytest.raises(OSError, match="Stale"):
                Path(path, "layers/0/weights.bin").read_bytes()
        with client.connect() as connection:
            activity = connection.ask(Activity())
        os.kill(activity.pid, signal.SIGKILL)
        assert node.status()["pid"] != activity.pid
    assert activity.counts.errors["object-changed"] >= 20
    assert activity.counts.failures["object-changed"] >= 1
    node.end()
    lines = json_lines(node)
    assert any("killed by signal 9" in line["message"] for line in lines)  # the keeper's
    changed = [line for line in lines if line.get("event") == "failing"]
    assert len(changed) == 1
    assert changed[0]["error"] == "object-changed"
    reads = [line for line in lines if line.get("event") == "read-failed"]
    assert {line["pid"] for line in reads} == {os.getpid()}
    assert changed[0]["file"] == "layers/0/weights.bin"
    where = changed[0]["checkpoint"].partition("?")[0]
    assert where == f"s3://{small.relative_to(s3.root)}"
    attached = next(line for line in lines if line.get("event") == "attached")
    asked = next(line for line in lines if line.get("operation") == "Attach")
    assert attached["request"] == asked["request"] != ""
    assert attached["uid"] == os.geteuid()
    (node.cache_dir / "daemon.log").write_text("")  # these were expected


def json_lines(node: Node) -> list[dict[str, Any]]:
    """The records that keeper and daemon have logged."""
    return [json.loads(line) for line in node.log().splitlines()]


def test_top(node: Node, small: Path, uri_of: UriOf) -> None:
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        Path(path, "layers/0/weights.bin").read_bytes()
        found = json.loads(node.here("top", "--json", "--interval", "0.2").stdout)
        assert found["pid"] == node.status()["pid"]
        [line] = found["checkpoints"]
        assert line["name"] == Path(path).name
        assert line["read_bytes"] == line["store_bytes"] == 3_000_000
        assert [p["pid"] for p in line["processes"] if p["pid"]] == [os.getpid()]
        text = node.here("top", "--once", "--interval", "0.2", "--sort", "name").stdout
        assert f"{os.getpid()} " in text
        assert "READS/s" in text
        assert "\x1b" not in text
    done = node.here("top", "--sort", "nonsense", check=False)
    assert done.returncode == 2


def test_top_on_a_terminal(node: Node, small: Path, uri_of: UriOf) -> None:
    command = Path(sys.executable).with_name("ckptfs")
    with ckptfs.Checkpoint(uri_of(small)).as_directory():
        process = subprocess.Popen(
            ["script", "-qec", f"{command} top --interval 0.2", "/dev/null"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        said = b""
        while b"sort: read" not in said:
            said += os.read(process.stdout.fileno(), 65536)
        process.stdin.write(b"s")
        process.stdin.flush()
        while b"sort: store" not in said:
            said += os.read(process.stdout.fileno(), 65536)
        process.stdin.write(b"q")
        process.stdin.flush()
        rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"\x1b[?1049h" in said  # a screen of its own, which is left again
    assert b"\x1b[?1049l" in said + rest
    assert b"Traceback" not in said + rest


def test_metrics_on_a_port(node: Node, small: Path, uri_of: UriOf) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    node.configure(metrics=f"127.0.0.1:{port}")
    node.here("mount")
    url = f"http://127.0.0.1:{port}/metrics"
    wait_until(lambda: "metrics on" in node.log())
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert b"ckptfs_info{" in answer.read()
    before = node.status()["pid"]
    node.here("restart")
    wait_until(lambda: node.log().count("metrics on") == 2)
    assert node.status()["pid"] != before
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert b"ckptfs_restarts_total 1.0" in answer.read()


def test_help_metrics(node: Node) -> None:
    text = node.here("help", "metrics").stdout
    assert "ckptfs_read_seconds" in text
