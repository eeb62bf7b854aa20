"""A worker as the daemon has it: its process, its beats and its channels."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Literal, TypeAlias

from ckptfs._workers.channel import Channel
from ckptfs._workers.messages import (
    BEAT_BYTES,
    OTHER_PROTOCOL_STATUS,
    PROTOCOL,
    Setup,
    encode,
)

_PROGRAM = "ckptfs._workers"
STOPPED_S = 1.0
"""Without a beat for so long, and stopped (SIGSTOP, a debugger): who has done that does not say
when it ends."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_REAP_S = 1.0
"""A process that was killed is gone at once, unless it waits for a disk in the kernel."""

Reason: TypeAlias = Literal["died", "stopped", "still", "overdue", "nonsense", "idle"]
"""Why a worker has ended: by itself, or why it was killed."""


class Worker:
    """One process. To be made by a thread that lives as long as the worker is to: the kernel ends
    the worker with that thread. What is not about the process itself belongs to the pool.

    Attributes:
        calls: How many calls are under way in it, with those in `left`.
        idle: Channels without a call, the last one used first.
        left: Channels whose calls were left behind.
        is_retired: It gets no more calls.
        reason: Why it was killed.
        used_s: When its last call ended.
    """

    def __init__(self, setup: Setup) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._beat = os.memfd_create("ckptfs-beat", os.MFD_CLOEXEC)
        self.calls = 0
        self.idle: list[Channel] = []
        self.left: list[Channel] = []
        self.is_retired = False
        self.reason: Reason = "died"
        self.used_s = time.monotonic()
        try:
            with theirs:
                os.pwrite(self._beat, struct.pack("d", time.monotonic()), 0)
                self._tell(setup)
                fd = theirs.fileno()
                self._process = subprocess.Popen(
                    [sys.executable, "-m", _PROGRAM, str(fd), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(fd,),
                    cwd="/",  # so that no module comes from where the daemon was started
                )
        except OSError:
            self._control.close()
            os.close(self._beat)
            raise

    def _tell(self, setup: Setup) -> None:
        memory = os.memfd_create("ckptfs-setup", os.MFD_CLOEXEC)
        try:
            text = memoryview(encode(setup))
            while text:
                text = text[os.write(memory, text) :]
            os.lseek(memory, 0, os.SEEK_SET)
            socket.send_fds(self._control, [encode(PROTOCOL)], [memory, self._beat])
        finally:
            os.close(memory)

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    def new_channel(self) -> Channel:
        """One more. Raises OSError: the worker is dead, or does not take it."""
        channel = Channel()
        try:
            channel.pass_to(self._control)
        except OSError:
            channel.close()
            raise
        return channel

    def tell(self, text: bytes) -> None:
        """Send a message that has no answer, if the worker takes it."""
        with contextlib.suppress(OSError):
            self._control.send(text, socket.MSG_DONTWAIT)

    # -- its life

    def still_s(self) -> float:
        """Seconds since its last beat."""
        raw = os.pread(self._beat, BEAT_BYTES, 0)
        beat_s = struct.unpack("d", raw)[0] if len(raw) == BEAT_BYTES else 0.0
        return time.monotonic() - beat_s

    def is_stopped(self) -> bool:
        """Whether it does not beat, and the kernel calls it stopped."""
        if self.still_s() < STOPPED_S:
            return False
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
        return False

    def memory_bytes(self) -> int:
        """What it has in memory now."""
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
        return 0

    def kill(self, reason: Reason) -> None:
        """End it at once."""
        if self._process.poll() is None and self.reason == "died":
            self.reason = reason
        self.is_retired = True
        self._process.kill()

    @property
    def has_ended(self) -> bool:
        """Whether it is gone."""
        return self._process.poll() is not None

    def ends_within(self, wait_s: float) -> bool:
        """Wait until it has ended; whether it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        return self.has_ended

    def how_it_ended(self) -> str:
        """To be called when it has ended, or was killed."""
        try:
            status = self._process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return "does not end, because it waits in the kernel"
        if status == OTHER_PROTOCOL_STATUS:
            return "is of another version of ckptfs: run ckptfs restart"
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def close(self) -> None:
        """Let go of it, when it has ended; once."""
        if self._control.fileno() < 0:
            return
        for channel in (*self.idle, *self.left):
            channel.close()
        self.idle.clear()
        self.left.clear()
        self._control.close()
        os.close(self._beat)
