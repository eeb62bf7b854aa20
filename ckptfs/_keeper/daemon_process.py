"""The keeper's view of a daemon's process.

A daemon starts in two steps. Most of its start is the import of its modules, which it does by
itself. Then it waits for its configuration from `activate`. So a spare daemon takes over in a
moment.
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

import msgspec

from ckptfs._model.config import Config
from ckptfs._mount import handoff
from ckptfs.errors import BY_CODE, DaemonError

READY_WAIT_S = 30.0
"""Longest start of a daemon, whose modules may be on a slow disk."""
_END_WAIT_S = 5.0
"""Longest end of a daemon."""
_HEART_STOPPED_BEATS = 10
"""A daemon is stuck after so many looks without a beat, one each `BEAT_S`. The keeper counts looks
and not seconds, so the daemon of a machine that was asleep is not stuck."""
_F_SETPIPE_SZ = 1031  # linux/fcntl.h
_REPORT_BYTES_MAX = 1 << 20
"""Room for a daemon's reports, the most that a pipe of any user may have (pipe(7))."""
ASKED_FOR_NEXT = "has asked for the next one"
"""Result of `DaemonProcess.wait` after a daemon that a client has restarted."""


class DaemonProcess:
    """One process, for a session and a control socket.

    `passthrough` says that the kernel can do that, and `after_another` that an earlier daemon has
    served the session. With `announces`, the daemon says when it has imported its modules
    (`wait_imported`).
    """

    def __init__(
        self,
        fuse_fd: int,
        listen_fd: int,
        memory: handoff.Fds,
        *,
        passthrough: bool,
        after_another: bool,
        announces: bool = False,
    ) -> None:
        self._pidfd = -1
        self._reports, theirs = os.pipe()
        self._told = b""
        with contextlib.suppress(OSError):  # a long report then waits until the keeper reads it
            fcntl.fcntl(theirs, _F_SETPIPE_SZ, _REPORT_BYTES_MAX)
        options = {
            "--fuse-fd": fuse_fd,
            "--listen-fd": listen_fd,
            "--ready-fd": theirs,
            "--keeper-pid": os.getpid(),
            "--passthrough": int(passthrough),
            "--after-another": int(after_another),
        }
        if announces:
            options["--announces"] = 1
        command = [sys.executable, "-m", "ckptfs._daemon.app"]
        command += [str(word) for option in options.items() for word in option]
        self._process = subprocess.Popen(
            [*command, "--handoff-fds", *map(str, memory.all())],
            stdin=subprocess.PIPE,
            pass_fds=(fuse_fd, listen_fd, theirs, *memory.all()),
        )
        os.close(theirs)

    def wait_imported(self) -> None:
        """Return when the daemon has imported its modules. Raises DaemonError if it does not."""
        if not read_line(self._reports, READY_WAIT_S, bytes_max=1):
            raise DaemonError("the daemon did not come up; see its log")

    @property
    def pidfd(self) -> int:
        """A descriptor that is readable when the process has ended (pidfd_open(2))."""
        if self._pidfd < 0:
            self._pidfd = os.pidfd_open(self._process.pid)
        return self._pidfd

    def activate(self, config: Config, pickled: bytes) -> None:
        """Let the daemon serve, and return when it does. Raises the error that it reports, or
        DaemonError."""
        given = self._process.stdin
        assert given is not None
        with contextlib.suppress(BrokenPipeError):  # it then has no report, either
            given.write(msgspec.json.encode(config) + b"\n" + pickled)
            given.close()
        line, _, self._told = read_line(self._reports, READY_WAIT_S).partition(b"\n")
        otherwise = {"code": DaemonError.code, "message": "the daemon did not come up; see its log"}
        if told := json.loads(line) if line else otherwise:
            raise BY_CODE.get(told["code"], DaemonError)(told["message"])
        os.set_blocking(self._reports, False)

    def reloaded(self) -> Config | None:
        """The configuration that the daemon has read since the last call; None without one."""
        if self._reports < 0:  # it was ended
            return None
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reports, _REPORT_BYTES_MAX):
                self._told += data
        *lines, self._told = self._told.split(b"\n")
        return msgspec.json.decode(lines[-1], type=Config) if lines else None

    def reload(self) -> None:
        """Ask the daemon to read its configuration again."""
        self._process.send_signal(signal.SIGHUP)  # does nothing after its end

    def wait(self, timeout_s: float) -> str | None:
        """Wait for the end, and return how the daemon ended: "" if it ended by itself, None if the
        time is over."""
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
        """Ask the daemon to end."""
        self._process.terminate()

    def end(self, *, at_once: bool = False) -> None:
        """End the daemon, with `at_once` without asking it."""
        if self._reports >= 0:
            os.close(self._reports)
            self._reports = -1
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if not at_once:
            self.terminate()
            if self.wait(_END_WAIT_S) is not None:
                return
        self._process.kill()
        self.wait(_END_WAIT_S)  # a disk that does not answer may keep it for longer


class Heart:
    """Tells whether the daemon's event loop turns. The keeper calls `look` once each `BEAT_S`.

    Attributes:
        beats: Whether the heart has beaten between the last two looks.
    """

    def __init__(self, memory: handoff.Fds) -> None:
        self._memory = memory
        self._count = handoff.beats(memory)
        self._silent = 0
        self.beats = False

    def look(self) -> bool:
        """Whether the heart has stopped."""
        now = handoff.beats(self._memory)
        self.beats = now != self._count
        self._silent = 0 if self.beats else self._silent + 1
        self._count = now
        return self._silent >= _HEART_STOPPED_BEATS


def read_line(fd: int, timeout_s: float, bytes_max: int = 65536) -> bytes:
    """The first line that arrives, read in pieces of at most `bytes_max`; b"" at the end of the
    file, or when the time is over."""
    line = b""
    deadline = time.monotonic() + timeout_s
    poll = select.poll()  # select(2) takes no descriptor above 1023
    poll.register(fd, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(1000 * max(0, deadline - time.monotonic())):
            return b""
        data = os.read(fd, bytes_max)
        if not data:
            return b""
        line += data
    return line
