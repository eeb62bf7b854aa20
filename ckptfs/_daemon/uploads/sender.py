"""The daemon's view of the process that sends one upload (``ckptfs._upload_process``).

The process gets its task, which has secrets, by a memfd as its standard input, and writes a JSON
line for each step. The event loop only reads these lines. The kernel ends the process with the
daemon. The thread that starts it is the event loop's, because the kernel ends the process with that
thread.
"""

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from ckptfs._model.upload_messages import NotSent, Progressed, Setup, Told
from ckptfs._model.uploads import Sent
from ckptfs._os.write_all import write_all
from ckptfs.errors import DaemonError

log = logging.getLogger(__name__)

_PROGRAM = "ckptfs._upload_process"
_LINE_BYTES_MAX = 1 << 16
_KILL_S = 30.0
"""Time after which a process that was asked to end is killed. It first removes its unfinished
objects, for 10 s at most, and a request under way may take longer."""
_END_S = 5.0
"""Longest wait for the end of a process that has said its last line, or was killed. A process that
waits for a disk in the kernel can take longer."""
_REAP_S = 0.02
_REAP_LATE_S = 1.0
_decoder: msgspec.json.Decoder[Told] = msgspec.json.Decoder(Told)


class Sender:
    """One process. `run` may be called once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._kill = trio.CancelScope(deadline=math.inf)
        self._is_ended = False

    def end(self) -> None:
        """Ask the process to remove its unfinished objects and end."""
        self._is_ended = True
        self._kill.deadline = min(self._kill.deadline, trio.current_time() + _KILL_S)
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    async def run(self, setup: Setup, progressed: Callable[[int], None]) -> Sent | NotSent:
        """Send, and return the result when the process has ended. `progressed` is called with the
        bytes at the store."""
        if self._is_ended:
            return NotSent(DaemonError.code, "the upload was ended before its process started")
        try:
            process, output = _start(setup)
        except OSError as error:
            text = f"the process for an upload did not start: {error.strerror}"
            return NotSent(DaemonError.code, text)
        self._process = process
        lines = trio.lowlevel.FdStream(output)
        result: Sent | NotSent | None = None
        status: int | None = None
        try:
            with self._kill:
                result = await _read(lines, progressed)
        except (msgspec.DecodeError, UnicodeDecodeError, trio.BrokenResourceError):
            pass  # nonsense, or a broken pipe: the process ends below
        finally:
            with trio.CancelScope(shield=True):
                await lines.aclose()
                status = await _ended(process, is_done=result is not None)
        if status is None:
            # What it has begun in the kernel can still reach the target, so no other process may
            # send to that place yet.
            log.warning("uploads: the process %d is killed and waits in the kernel", process.pid)
            while (status := process.poll()) is None:  # noqa: ASYNC110 - no signal tells its end
                await trio.sleep(_REAP_LATE_S)
        if result is None:
            return NotSent(DaemonError.code, f"the process that sent it {_how(status)}")
        return result


def _start(setup: Setup) -> "tuple[subprocess.Popen[bytes], int]":
    """Start the process. Returns it with a descriptor of its output, which the caller closes."""
    with contextlib.ExitStack() as on_error, contextlib.ExitStack() as always:
        memory = os.memfd_create("ckptfs-upload", os.MFD_CLOEXEC)
        always.callback(os.close, memory)
        write_all(memory, msgspec.json.encode(setup))
        os.lseek(memory, 0, os.SEEK_SET)
        # Not subprocess.PIPE: nothing after the start may fail for want of descriptors.
        reader, writer = os.pipe()
        on_error.callback(os.close, reader)
        always.callback(os.close, writer)
        process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM, str(os.getpid())],
            stdin=memory,
            stdout=writer,
            stderr=subprocess.DEVNULL,  # the last words of a library can contain URLs and tokens
            cwd="/",  # so that no module comes from the daemon's working directory
        )
        on_error.pop_all()
        return process, reader


async def _read(
    lines: trio.lowlevel.FdStream, progressed: Callable[[int], None]
) -> Sent | NotSent | None:
    """The result, which is the last line; None if the process has ended before."""
    pending = b""
    async for data in lines:
        *whole, pending = (pending + data).split(b"\n")
        for line in whole:
            told = _decoder.decode(line)
            if not isinstance(told, Progressed):
                return told
            progressed(told.bytes)
        if len(pending) > _LINE_BYTES_MAX:
            return None
    return None


async def _ended(process: "subprocess.Popen[Any]", *, is_done: bool) -> int | None:
    """Wait for the end of a process, which is killed unless it is done. Returns its status; None if
    it waits in the kernel and cannot end."""
    for wait_s in (_END_S, _END_S):
        if not is_done:
            process.kill()
        with trio.move_on_after(wait_s):
            while (status := process.poll()) is None:  # noqa: ASYNC110 - it ends in a moment
                await trio.sleep(_REAP_S)
            return status
        is_done = False
    return None


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
