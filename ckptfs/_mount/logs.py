"""The daemon's log: destination, formats, and a bound on its length.

If standard error leads to the journal, lines go there with fields of their own. Otherwise they go
to standard error, as text or as one JSON object each (`log_format`). `FIELDS` lists the fields that
a line can have beside its message.

**Bound.** A fault may occur a thousand times a second, and the log is on a disk. So `Limiter` lets
at most `_LINES_MAX` lines of one kind pass in `INTERVAL_S`. Lines are of one kind if they have the
same text before its arguments are filled in, and for errors the same code. Of lines above INFO that
name a file, only one passes for each file. The next line of the kind says how many were left out.
If no such line follows, the limiter writes one in the end.

Only lines of ckptfs can be below WARNING, whatever `log_level` is, because debug lines of libraries
can contain credentials.
"""

import json
import logging
import os
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any

from ckptfs._model.config import Config
from ckptfs._model.request_id import request_id

FIELDS = {
    "event": (
        "the event: attached, detached, left-out, request, refused, failing, read-failed, "
        "worker-ended"
    ),
    "request": "the id of the client's request that the line belongs to",
    "operation": "the operation that the client requested",
    "uid": "the user of the request",
    "checkpoint": "the checkpoint's URI, without credentials",
    "file": "the file's path in the checkpoint",
    "pid": "the process that asked for the file; 0 for a process of another container",
    "error": "the error's code, as in --json",
    "suppressed": "the number of similar lines that were left out before",
}
"""The fields beside time, level, logger and message, with their meanings. In the journal their
names are CKPTFS_EVENT and so on."""

INTERVAL_S = 60.0
_LINES_MAX = 100
"""Lines of one kind in an interval. With some 200 bytes a line, a failing store writes 30 MB a
day."""
_DEBUG_LINES_MAX = 6000
_MESSAGE_LENGTH_MAX = 8192
"""Longer messages are cut, because a message to the journal has to fit into a socket's buffer."""
_JOURNAL = "/run/systemd/journal/socket"
_PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # syslog(3)

log = logging.getLogger(__name__)


def configure(config: Config) -> "Limiter":
    """Set up the log of this process, and return the limiter, whose `flush` needs calls."""
    handler: logging.Handler
    if leads_to_journal(sys.stderr.fileno()):
        handler = JournalHandler()
    else:
        handler = LossyHandler(sys.stderr.fileno())
        handler.setFormatter(JsonFormatter() if config.log_format == "json" else TextFormatter())
    limiter = Limiter(handler)
    handler.addFilter(limiter)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("ckptfs").setLevel(config.log_level.upper())
    return limiter


def leads_to_journal(fd: int) -> bool:
    """Whether the descriptor is systemd's connection to the journal (systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        info = os.fstat(fd)
    except OSError:
        return False
    return (device, inode) == (str(info.st_dev), str(info.st_ino))


def where_log_is(fd: int = 2) -> str:
    """Where a user can read the log that this process writes to `fd`: a command or a file."""
    if leads_to_journal(fd):
        unit, flags = unit_of_process()
        return " ".join(["journalctl", *flags, "-u", unit])
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.readlink(f"/proc/self/fd/{fd}")
    return "the standard error of ckptfs mount"


def unit_of_process() -> tuple[str, list[str]]:
    """The systemd unit of this process, and the flags that name its manager to systemctl and
    journalctl, which are none or those of a user's manager."""
    path = Path("/proc/self/cgroup").read_text().rstrip("\n").rpartition("\n")[2]
    return path.rpartition("/")[2], ["--user"] if "/user@" in path else []


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The line's fields, by the names in `FIELDS`."""
    found = {name: getattr(record, name, None) for name in FIELDS}
    if not found["suppressed"]:
        del found["suppressed"]
    return {name: value for name, value in found.items() if value not in (None, "")}


def message_of(record: logging.LogRecord) -> str:
    """The text of a line, with the number of similar lines that were left out before it."""
    text = record.getMessage()
    if len(text) > _MESSAGE_LENGTH_MAX:
        text = f"{text[:_MESSAGE_LENGTH_MAX]}... ({len(text)} characters)"
    suppressed = getattr(record, "suppressed", 0)
    return f"{text} ({suppressed} lines like it were left out)" if suppressed else text


class TextFormatter(logging.Formatter):
    """Formats lines for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(text)s")

    def format(self, record: logging.LogRecord) -> str:
        """One line, then the lines of a traceback."""
        request = getattr(record, "request", "")
        record.text = message_of(record) + (f" [request {request}]" if request else "")
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """Formats lines for programs, as one JSON object each."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message_of(record),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)  # in ASCII, so a hostile name cannot break the line


class JournalHandler(logging.Handler):
    """Sends lines to the journal, in its own protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

    def __init__(self, path: str = _JOURNAL) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)  # a journal that is stuck must not stop the event loop
        self._text = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line. It is lost if the journal does not take it."""
        message = message_of(record)
        if record.exc_info:
            message += "\n" + self._text.formatException(record.exc_info)[-_MESSAGE_LENGTH_MAX:]
        fields: dict[str, Any] = {
            "MESSAGE": message,
            "PRIORITY": _PRIORITIES.get(record.levelname, 6),
            "SYSLOG_IDENTIFIER": "ckptfs",
            "LOGGER": record.name,
            **{f"CKPTFS_{name.upper()}": value for name, value in fields_of(record).items()},
        }
        try:
            self._socket.sendto(b"".join(map(_field, fields, fields.values())), self._path)
        except OSError:
            self.handleError(record)

    def close(self) -> None:
        """See logging.Handler."""
        self._socket.close()
        super().close()


def _field(name: str, value: Any) -> bytes:
    """A field in the form with a length, because a value may contain any bytes."""
    raw = str(value).encode(errors="replace")
    return name.encode() + b"\n" + len(raw).to_bytes(8, "little") + raw + b"\n"


class LossyHandler(logging.Handler):
    """Writes to a descriptor whose disk may be full, because the log and the cache may share it
    with other programs. The handler counts lost lines, and the next written line reports them."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lost = 0
        self._why = ""
        self._is_torn = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, behind a line about lost records."""
        try:
            lines = [self.format(record)]
            if self._lost:
                text = f"{self._lost} lines of this log were lost: {self._why}"
                about = {"levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
                lines.insert(0, self.format(logging.makeLogRecord({"name": __name__, **about})))
        except Exception:  # the logging call is wrong
            self.handleError(record)
            return
        before = "\n" if self._is_torn else ""
        data = (before + "".join(f"{line}\n" for line in lines)).encode("utf-8", "backslashreplace")
        try:
            self._write(data)
        except OSError as error:
            self._lost += 1
            self._why = error.strerror or str(error)
        else:
            self._lost = 0

    def _write(self, data: bytes) -> None:
        """Write all of `data`. Raises OSError after a part of it."""
        while data:
            done = os.write(self._fd, data)
            self._is_torn = done < len(data)
            data = data[done:]


class _Budget:
    """Counts passed lines since `since_s`, and suppressed lines since the last passed one."""

    def __init__(self, now_s: float) -> None:
        self.since_s = now_s
        self.passed = 0
        self.suppressed = 0
        self.last: logging.LogRecord | None = None

    def take(self, record: logging.LogRecord, most: int, now_s: float) -> bool:
        if now_s - self.since_s >= INTERVAL_S:
            self.since_s, self.passed = now_s, 0
        if self.passed >= most:
            self.suppressed += 1
            record.exc_info = None  # it would keep its frames
            self.last = record
            return False
        self.passed += 1
        return True


class Limiter(logging.Filter):
    """Bounds the lines of one handler (see the module's text), and adds the request's id to each.

    A line with the attribute `once_for` (``extra={"once_for": "read"}``) passes once in an interval
    for each value of it, as a line above INFO does for each file.
    """

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler
        self._kinds: dict[object, _Budget] = {}
        self._single: dict[object, _Budget] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line may pass."""
        if hasattr(record, "suppressed"):
            return True  # the line reports suppressed lines
        if not hasattr(record, "request"):
            record.request = request_id.get()
        now_s = time.monotonic()
        budgets = self._budgets_of(record, now_s)
        for budget, most in budgets:
            if not budget.take(record, most, now_s):
                return False
        record.suppressed = sum(budget.suppressed for budget, _ in budgets)
        for budget, _ in budgets:
            budget.suppressed = 0
        return True

    def _budgets_of(self, record: logging.LogRecord, now_s: float) -> list[tuple[_Budget, int]]:
        """The line's budgets, the narrowest first, so a line counts in a wider one only if it
        passes the narrower one."""
        kind = record.name, record.msg, getattr(record, "error", "")
        most = _LINES_MAX if record.levelno >= logging.INFO else _DEBUG_LINES_MAX
        found = [(self._kinds.setdefault(kind, _Budget(now_s)), most)]
        single = getattr(record, "once_for", "")
        if not single and record.levelno > logging.INFO:
            single = getattr(record, "file", "")
        if single:
            key = kind, getattr(record, "checkpoint", ""), single
            if key in self._single or len(self._single) < 10 * _LINES_MAX:
                found.insert(0, (self._single.setdefault(key, _Budget(now_s)), 1))
        return found

    def flush(self) -> None:
        """Write one line for each kind whose suppressed lines no later line has reported. The
        daemon calls this now and then."""
        now_s = time.monotonic()
        for budgets in (self._single, self._kinds):
            for key, budget in list(budgets.items()):
                if now_s - budget.since_s < INTERVAL_S:
                    continue
                del budgets[key]
                if budget.suppressed and budget.last is not None:
                    budget.last.suppressed = budget.suppressed - 1
                    self._handler.handle(budget.last)
