"""Where log lines go, and what they look like.

To the journal with fields of their own, if that is what standard error leads to; else to standard
error, as text or as one JSON object each (`log_format`). Fields that a line can have beside its
message: `FIELDS`.

**Bounded.** Whatever fails may fail a thousand times a second, and a log is on a disk. Of the lines
of one kind (the same text before its arguments are filled in; of errors the same code) at most
`_LINES_MAX` pass in `INTERVAL_S`, and of those above INFO only one for each file, where they name
one. The next line like it says how many were left out; if there is none, one line does in the end.

Only lines of ckptfs can be below WARNING, whatever `log_level` is: what libraries say for debugging
can have credentials in it.
"""

import json
import logging
import os
import socket
import sys
import time
from typing import Any

from ckptfs._daemon.lossy import LossyHandler
from ckptfs._model.config import Config
from ckptfs._requestid import request_id

FIELDS = {
    "event": (
        "what has happened: attached, detached, left-out, request, refused, failing, worker-ended"
    ),
    "request": "the id of the client's request that it belongs to",
    "operation": "what the client has asked for",
    "uid": "the user who has",
    "checkpoint": "its URI, without credentials",
    "file": "of the checkpoint",
    "error": "the error's code, as in --json",
    "suppressed": "how many lines like it were left out before",
}
"""Beside time, level, logger and message. In the journal their names are CKPTFS_EVENT and so on."""

INTERVAL_S = 60.0
_LINES_MAX = 100
"""Of one kind in an interval. A line has some 200 bytes: a failing store writes 30 MB a day."""
_DEBUG_LINES_MAX = 6000
_MESSAGE_LENGTH_MAX = 8192
"""Longer ones are cut: a message to the journal has to fit into a socket's buffer."""
_JOURNAL = "/run/systemd/journal/socket"
_PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # syslog(3)

log = logging.getLogger(__name__)


def configure(config: Config) -> "Limiter":
    """Let all log lines of this process go where they belong; returns what bounds them."""
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
    """Whether it is the connection to the journal that systemd has made (systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        info = os.fstat(fd)
    except OSError:
        return False
    return (device, inode) == (str(info.st_dev), str(info.st_ino))


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Those of `FIELDS` that a line has."""
    found = {name: getattr(record, name, None) for name in FIELDS}
    if not found["suppressed"]:
        del found["suppressed"]
    return {name: value for name, value in found.items() if value not in (None, "")}


def message_of(record: logging.LogRecord) -> str:
    """The text of a line, with what was left out before it."""
    text = record.getMessage()
    if len(text) > _MESSAGE_LENGTH_MAX:
        text = f"{text[:_MESSAGE_LENGTH_MAX]}... ({len(text)} characters)"
    suppressed = getattr(record, "suppressed", 0)
    return f"{text} ({suppressed} lines like it were left out)" if suppressed else text


class TextFormatter(logging.Formatter):
    """For people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(text)s")

    def format(self, record: logging.LogRecord) -> str:
        """One line, and those of a traceback."""
        request = getattr(record, "request", "")
        record.text = message_of(record) + (f" [request {request}]" if request else "")
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """For programs: one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
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
        return json.dumps(line)  # in ASCII, so that no name can break it


class JournalHandler(logging.Handler):
    """Sends lines to the journal, in its own protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

    def __init__(self, path: str = _JOURNAL) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)  # a journal that is stuck must not stop the event loop
        self._text = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line; one that the journal does not take is lost."""
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
    """With its length, because a value may have any bytes in it."""
    raw = str(value).encode(errors="replace")
    return name.encode() + b"\n" + len(raw).to_bytes(8, "little") + raw + b"\n"


class _Budget:
    """What passed since `since_s`, and what did not since the last that did."""

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
            record.exc_info = None  # its frames would be kept
            self.last = record
            return False
        self.passed += 1
        return True


class Limiter(logging.Filter):
    """Bounds the lines of one handler: see the module's text. Also gives each the request's id."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler
        self._kinds: dict[object, _Budget] = {}
        self._files: dict[object, _Budget] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line may pass."""
        if hasattr(record, "suppressed"):
            return True  # it says what was left out
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
        """Those it has to keep to; the narrowest first, so that only what passes that counts."""
        kind = record.name, record.msg, getattr(record, "error", "")
        most = _LINES_MAX if record.levelno >= logging.INFO else _DEBUG_LINES_MAX
        found = [(self._kinds.setdefault(kind, _Budget(now_s)), most)]
        file = getattr(record, "file", "")
        if file and record.levelno > logging.INFO:
            key = kind, getattr(record, "checkpoint", ""), file
            if key in self._files or len(self._files) < 10 * _LINES_MAX:
                found.insert(0, (self._files.setdefault(key, _Budget(now_s)), 1))
        return found

    def flush(self) -> None:
        """To be called now and then: says what was left out for good."""
        now_s = time.monotonic()
        for budgets in (self._files, self._kinds):
            for key, budget in list(budgets.items()):
                if now_s - budget.since_s < INTERVAL_S:
                    continue
                del budgets[key]
                if budget.suppressed and budget.last is not None:
                    budget.last.suppressed = budget.suppressed - 1
                    self._handler.handle(budget.last)
