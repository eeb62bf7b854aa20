"""A daemon's process, as its keeper has it.

It starts in two steps, because most of its start is importing: that it does by itself, and then it
waits for its configuration, which `activate` gives it. So a spare one takes over in a moment.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

import msgspec

from ckptfs._daemon import handoff, session
from ckptfs._model.config import Config
from ckptfs.errors import BY_CODE, DaemonError

READY_WAIT_S = 30.0
"""How long the daemon may take to come up: importing its modules from a slow disk."""
_END_WAIT_S = 5.0
"""How long the daemon may take to end."""
_HEART_STOPPED_BEATS = 10
"""So many looks in a row, one each `BEAT_S`, at a heart that does not beat: the daemon is stuck.
Looks are counted, and not seconds, so that a machine that was asleep has no stuck daemon."""
_F_SETPIPE_SZ = 1031  # linux/fcntl.h
_REPORT_BYTES_MAX = 1 << 20
"""Room for what a daemon reports: the most that a pipe of any user may have (pipe(7))."""
ASKED_FOR_NEXT = "has asked for the next one"
"""How a daemon has ended that wants to be followed by another."""


class DaemonProcess:
    """One process.

    Args:
        fuse_fd: The session.
        listen_fd: The control socket.
        memory: See `handoff`.
        features: What the kernel can do.
        after_another: Whether an earlier daemon has served the session.
    """

    def __init__(
        self,
        fuse_fd: int,
        listen_fd: int,
        memory: handoff.Fds,
        features: session.Features,
        *,
        after_another: bool,
    ) -> None:
        self._reports, theirs = os.pipe()
        self._told = b""
        with contextlib.suppress(OSError):  # then a long report waits until it is read
            fcntl.fcntl(theirs, _F_SETPIPE_SZ, _REPORT_BYTES_MAX)
        options = {
            "--fuse-fd": fuse_fd,
            "--listen-fd": listen_fd,
            "--ready-fd": theirs,
            "--keeper-pid": os.getpid(),
            "--passthrough": int(features.passthrough),
            "--after-another": int(after_another),
        }
        command = [sys.executable, "-m", "ckptfs._daemon.app"]
        command += [str(word) for option in options.items() for word in option]
        self._process = subprocess.Popen(
            [*command, "--handoff-fds", *map(str, memory.all())],
            stdin=subprocess.PIPE,
            pass_fds=(fuse_fd, listen_fd, theirs, *memory.all()),
        )
        os.close(theirs)

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    def activate(self, config: Config, pickled: bytes) -> None:
        """Have it serve; returns when it does. Raises what it reports, or DaemonError."""
        given = self._process.stdin
        assert given is not None
        with contextlib.suppress(BrokenPipeError):  # then it has no report, either
            given.write(msgspec.json.encode(config) + b"\n" + pickled)
            given.close()
        line, _, self._told = read_line(self._reports, READY_WAIT_S).partition(b"\n")
        _raise_reported(line, "the daemon did not come up; see its log")
        os.set_blocking(self._reports, False)

    def reloaded(self) -> Config | None:
        """The configuration that it has read since it was last asked for one, if it has."""
        if self._reports < 0:  # it was ended
            return None
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reports, _REPORT_BYTES_MAX):
                self._told += data
        *lines, self._told = self._told.split(b"\n")
        return msgspec.json.decode(lines[-1], type=Config) if lines else None

    def reload(self) -> None:
        """Have it read its configuration anew."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGHUP)

    def wait(self, timeout_s: float) -> str | None:
        """Wait for its end: how that was, "" if as it should; None: the time is over."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        if not status:
            return ""
        if status == handoff.RESTART_STATUS:
            return ASKED_FOR_NEXT
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def end(self, *, at_once: bool = False) -> None:
        """Have it ended; `at_once`: not asking it."""
        self._close_reports()
        if not at_once:
            self.terminate()
            if self.wait(_END_WAIT_S) is not None:
                return
        self._process.kill()
        self.wait(_END_WAIT_S)  # a dead disk may keep it for longer

    def _close_reports(self) -> None:
        if self._reports >= 0:
            os.close(self._reports)
            self._reports = -1


class Heart:
    """Tells whether the daemon's event loop turns. `look` is to be called once each `BEAT_S`.

    Attributes:
        beats: Whether it has beaten between the last two looks.
    """

    def __init__(self, memory: handoff.Fds) -> None:
        self._memory = memory
        self._count = handoff.beats(memory)
        self._silent = 0
        self.beats = False

    def look(self) -> bool:
        """Whether it has stopped."""
        now = handoff.beats(self._memory)
        self.beats = now != self._count
        self._silent = 0 if self.beats else self._silent + 1
        self._count = now
        return self._silent >= _HEART_STOPPED_BEATS


def read_line(fd: int, timeout_s: float) -> bytes:
    """The first line that arrives, or b"" at end of file or when the time is over."""
    line = b""
    deadline = time.monotonic() + timeout_s
    poll = select.poll()  # select(2) takes no descriptor above 1023
    poll.register(fd, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(1000 * max(0, deadline - time.monotonic())):
            return b""
        data = os.read(fd, 65536)
        if not data:
            return b""
        line += data
    return line


def _raise_reported(line: bytes, otherwise: str) -> None:
    """Raise the error that a report names; without a report, DaemonError with the text
    `otherwise`."""
    told: Any = json.loads(line) if line else {"code": DaemonError.code, "message": otherwise}
    if told:
        raise BY_CODE.get(told["code"], DaemonError)(told["message"])
