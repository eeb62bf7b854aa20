"""The formats of log lines, their destinations, and the bound on their number."""

import errno
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
from support.fakes import config_of

from ckptfs._model.request_id import request_id
from ckptfs._mount import logs

ABOUT = {"event": "failing", "checkpoint": "s3://b/run", "file": "a", "error": "store-timeout"}


class Lines:
    """A logger with a limiter, and its lines."""

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
    monkeypatch.setattr("ckptfs._mount.logs.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def request_of_ours() -> Iterator[str]:
    token = request_id.set("abc123")
    yield "abc123"
    request_id.reset(token)


def test_json_formatter_writes_the_fields(request_of_ours: str) -> None:
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


def test_text_formatter_names_the_request(request_of_ours: str) -> None:
    lines = Lines(logs.TextFormatter())
    lines.logger.info("attached %s", "x", extra={"event": "attached"})
    [line] = lines.taken()
    assert line.endswith(" INFO ckptfs.test: attached x [request abc123]")


def test_limiter_passes_one_line_of_a_failing_file_per_interval(now_s: list[float]) -> None:
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
    assert not lines.limiter._single
    assert not lines.limiter._kinds


def test_limiter_passes_a_line_once_for_each_value(now_s: list[float]) -> None:
    lines = Lines(logs.TextFormatter())
    for verb in ("read", "write", "read", "write"):
        lines.logger.info("cannot %s", verb, extra={"once_for": verb})
    assert [line.rpartition(": ")[2] for line in lines.taken()] == ["cannot read", "cannot write"]
    now_s[0] += logs.INTERVAL_S
    lines.logger.info("cannot %s", "read", extra={"once_for": "read"})
    [line] = lines.taken()
    assert line.endswith("cannot read (1 lines like it were left out)")


def test_limiter_bounds_lines_of_many_failing_files(now_s: list[float]) -> None:
    lines = Lines(logs.JsonFormatter())
    for number in range(5000):
        lines.logger.warning("%s", f"{number} failed", extra={**ABOUT, "file": str(number)})
    assert len(lines.taken()) == logs._LINES_MAX
    assert len(lines.limiter._single) <= 10 * logs._LINES_MAX
    lines.logger.error("of another kind")
    assert len(lines.taken()) == 1
    now_s[0] += logs.INTERVAL_S
    lines.limiter.flush()
    left_out = [json.loads(line) for line in lines.taken()]
    assert len(left_out) == 1
    assert left_out[0]["suppressed"] == 5000 - logs._LINES_MAX - 1


def test_limiter_bounds_lines_without_a_file(now_s: list[float]) -> None:
    lines = Lines(logs.TextFormatter())
    for number in range(500):
        lines.logger.info("attached %s", number)
    assert len(lines.taken()) == logs._LINES_MAX


class Journal:
    """A socket in place of the journal's."""

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


def test_journal_handler_sends_the_fields(journal: Journal, request_of_ours: str) -> None:
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


def test_leads_to_journal_compares_the_stream(
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
def test_where_log_is_names_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, command: str
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    with (tmp_path / "log").open("w") as file:
        assert logs.where_log_is(file.fileno()) == str(tmp_path / "log")
        info = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{info.st_dev}:{info.st_ino}")
        monkeypatch.setattr(Path, "read_text", lambda _: cgroup)
        assert logs.where_log_is(file.fileno()) == command
    ends = os.pipe()
    assert logs.where_log_is(ends[1]) == "the standard error of ckptfs mount"
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
def test_configure_hides_debug_lines_of_libraries(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], settings: dict[str, str]
) -> None:
    logs.configure(config_of(tmp_path, log_level="debug", **settings))
    logging.getLogger("botocore.parsers").debug("SECRET")
    logging.getLogger("botocore.credentials").info("SECRET")
    logging.getLogger("ckptfs.daemon").debug("of ours")
    [line] = capfd.readouterr().err.splitlines()
    assert "of ours" in line
    assert line.startswith("{") == (settings["log_format"] == "json")


# -- a full disk


def test_lossy_handler_counts_lines_that_a_full_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    log = logging.Logger("test")
    log.addHandler(handler := logs.LossyHandler(fd))
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    room = 10
    real = os.write

    def write(to: int, data: bytes) -> int:
        nonlocal room
        if to != fd:
            return real(to, data)
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(to, data[:room])
        room -= done
        return done

    monkeypatch.setattr(os, "write", write)
    for number in range(3):
        log.info("line %d", number)
    room = 1 << 20
    log.info("line 3: \udcff")
    log.info("line 4")
    monkeypatch.undo()
    os.close(fd)
    lost = "WARNING ckptfs._mount.logs: 3 lines of this log were lost: No space left on device"
    assert path.read_text().splitlines() == [
        "INFO test:",
        lost,
        "INFO test: line 3: \\udcff",
        "INFO test: line 4",
    ]
    assert capsys.readouterr().err == ""
