"""What log lines look like, where they go, and that there are never too many of them."""

import io
import json
import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.fakes import config_of

from ckptfs._daemon import logs
from ckptfs._daemon.status import where_log_is
from ckptfs._requestid import request_id

ABOUT = {"event": "failing", "checkpoint": "s3://b/run", "file": "a", "error": "store-timeout"}


class Lines:
    """A logger whose lines are bounded, and what it has written."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.stream = io.StringIO()
        handler = logging.StreamHandler(self.stream)
        handler.setFormatter(formatter)
        self.limiter = logs.Limiter(handler)
        handler.addFilter(self.limiter)
        self.logger = logging.Logger("ckptfs.test")
        self.logger.addHandler(handler)

    def taken(self) -> list[str]:
        """The lines since the last call."""
        lines = self.stream.getvalue().splitlines()
        self.stream.seek(0)
        self.stream.truncate()
        return lines


@pytest.fixture
def now_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the limiter sees."""
    now = [1000.0]
    monkeypatch.setattr("ckptfs._daemon.logs.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def request_of_ours() -> Iterator[str]:
    token = request_id.set("abc123")
    yield "abc123"
    request_id.reset(token)


def test_json_lines_have_the_fields(request_of_ours: str) -> None:
    lines = Lines(logs.JsonFormatter())
    lines.logger.warning("no \n data: %s", "ü\udc80", extra=ABOUT)
    try:
        raise ValueError("broken")
    except ValueError:
        lines.logger.exception("unexpected")
    first, second = map(json.loads, lines.taken())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "warning",
        "logger": "ckptfs.test",
        "message": "no \n data: ü\udc80",
        "request": request_of_ours,
        **ABOUT,
    }
    assert "ValueError: broken" in second["exception"]
    assert set(first) | set(second) <= {*logs.FIELDS, "level", "logger", "message", "exception"} | {
        "time"
    }


def test_text_names_the_request(request_of_ours: str) -> None:
    lines = Lines(logs.TextFormatter())
    lines.logger.info("attached %s", "x", extra={"event": "attached"})
    [line] = lines.taken()
    assert line.endswith(" INFO ckptfs.test: attached x [request abc123]")


def test_a_failing_file_is_one_line_in_an_interval(now_s: list[float]) -> None:
    lines = Lines(logs.TextFormatter())
    for number in range(1000):
        lines.logger.warning("%s", f"failed, request {number}", extra=ABOUT)
        lines.logger.warning("%s", "another one", extra={**ABOUT, "file": "b"})
        lines.limiter.flush()
    first, second = lines.taken()
    assert first.endswith("failed, request 0")
    assert second.endswith("another one")
    now_s[0] += logs.INTERVAL_S
    lines.logger.warning("%s", "failed again", extra=ABOUT)
    lines.limiter.flush()
    again, rest = lines.taken()
    assert again.endswith("failed again (999 lines like it were left out)")
    assert rest.endswith("another one (998 lines like it were left out)")
    now_s[0] += logs.INTERVAL_S
    lines.limiter.flush()
    assert lines.taken() == []
    assert not lines.limiter._files
    assert not lines.limiter._kinds


def test_many_failing_files_are_not_many_lines(now_s: list[float]) -> None:
    lines = Lines(logs.JsonFormatter())
    for number in range(5000):
        lines.logger.warning("%s", f"{number} failed", extra={**ABOUT, "file": str(number)})
    assert len(lines.taken()) == logs._LINES_MAX
    assert len(lines.limiter._files) <= 10 * logs._LINES_MAX
    lines.logger.error("of another kind")
    assert len(lines.taken()) == 1
    now_s[0] += logs.INTERVAL_S
    lines.limiter.flush()
    left_out = [json.loads(line) for line in lines.taken()]
    assert len(left_out) == 1
    assert left_out[0]["suppressed"] == 5000 - logs._LINES_MAX - 1


def test_lines_of_one_kind_are_bounded_also_without_a_file(now_s: list[float]) -> None:
    lines = Lines(logs.TextFormatter())
    for number in range(500):
        lines.logger.info("attached %s", number)
    assert len(lines.taken()) == logs._LINES_MAX


class Journal:
    """A socket as that of the journal."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "journal")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(10)

    def taken(self) -> dict[str, bytes]:
        """The fields of the next message."""
        data, fields = self._socket.recv(1 << 20), {}
        while data:
            name, _, data = data.partition(b"\n")
            (length,) = struct.unpack_from("<Q", data)
            fields[name.decode()] = data[8 : 8 + length]
            assert data[8 + length : 9 + length] == b"\n"
            data = data[9 + length :]
        return fields

    def close(self) -> None:
        """End it."""
        self._socket.close()


@pytest.fixture
def journal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journal]:
    journal = Journal(tmp_path_factory.mktemp("j"))
    yield journal
    journal.close()


def test_the_journal_gets_fields(journal: Journal, request_of_ours: str) -> None:
    handler = logs.JournalHandler(journal.path)
    handler.addFilter(logs.Limiter(handler))
    logger = logging.Logger("ckptfs.test")
    logger.addHandler(handler)
    logger.warning("two\nlines", extra=ABOUT)
    assert journal.taken() == {
        "MESSAGE": b"two\nlines",
        "PRIORITY": b"4",
        "SYSLOG_IDENTIFIER": b"ckptfs",
        "LOGGER": b"ckptfs.test",
        "CKPTFS_EVENT": b"failing",
        "CKPTFS_CHECKPOINT": b"s3://b/run",
        "CKPTFS_FILE": b"a",
        "CKPTFS_ERROR": b"store-timeout",
        "CKPTFS_REQUEST": b"abc123",
    }
    logger.error("x" * 500_000)  # more than a socket's buffer takes
    assert len(journal.taken()["MESSAGE"]) < 10_000
    handler.close()


def test_the_journal_is_known_by_its_stream(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("w") as file:
        info = os.fstat(file.fileno())
        for value, expected in (
            (f"{info.st_dev}:{info.st_ino}", True),
            (f"{info.st_dev}:{info.st_ino + 1}", False),
            ("", False),
            ("x", False),
        ):
            monkeypatch.setenv("JOURNAL_STREAM", value)
            assert logs.leads_to_journal(file.fileno()) is expected
        monkeypatch.delenv("JOURNAL_STREAM")
        assert not logs.leads_to_journal(file.fileno())


@pytest.mark.parametrize(
    ("cgroup", "command"),
    [
        ("0::/system.slice/ckptfs.service\n", "journalctl -u ckptfs.service"),
        (
            "0::/user.slice/user-7.slice/user@7.service/app.slice/ckptfs.service\n",
            "journalctl --user -u ckptfs.service",
        ),
    ],
)
def test_a_status_names_the_log_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, command: str
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    with (tmp_path / "log").open("w") as file:
        assert where_log_is(file.fileno()) == str(tmp_path / "log")
        info = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{info.st_dev}:{info.st_ino}")
        monkeypatch.setattr(Path, "read_text", lambda _: cgroup)
        assert where_log_is(file.fileno()) == command
    ends = os.pipe()
    assert where_log_is(ends[1]) == "the standard error of ckptfs mount"
    for end in ends:
        os.close(end)


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("ckptfs")
    before: Any = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before[0], before[1], before[2]


@pytest.mark.usefixtures("_logging_as_before")
@pytest.mark.parametrize("settings", [{"log_format": "json"}, {"log_format": "text"}])
def test_libraries_say_nothing_for_debugging(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], settings: dict[str, str]
) -> None:
    logs.configure(config_of(tmp_path, log_level="debug", **settings))
    logging.getLogger("botocore.parsers").debug("SECRET")
    logging.getLogger("botocore.credentials").info("SECRET")
    logging.getLogger("ckptfs.daemon").debug("of ours")
    [line] = capfd.readouterr().err.splitlines()
    assert "of ours" in line
    assert line.startswith("{") == (settings["log_format"] == "json")
