"""The daemon's view of a worker (its process, its beats and its channels), and of the workers of
one store of one user."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ckptfs._os.write_all import write_all
from ckptfs._workers.channel import Channel
from ckptfs._workers.messages import BEAT_BYTES, OTHER_PROTOCOL_STATUS, PROTOCOL, Setup, encode

_PROGRAM = "ckptfs._workers"
STOPPED_S = 1.0
"""The longest time without a beat of a stopped process (SIGSTOP, a debugger). Only the process that
has stopped it knows when it continues."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_REAP_S = 1.0
"""The longest wait for a killed process, which ends at once unless it waits for a disk in the
kernel."""
BUSY_CALLS = 4
"""The calls at which a worker is busy. More threads that receive TLS only wait for one lock: 4 and
16 threads of one process took a GiB in the same time."""
_DYING_MAX = 4
"""The most killed workers of one group that still exist, because they wait in the kernel for a
network file system."""

Reason: TypeAlias = Literal["died", "stopped", "still", "overdue", "nonsense", "idle"]
"""The reason of a worker's end: by itself, or why the pool killed it."""


class Worker:
    """One process. The pool owns the attributes that are not about the process itself.

    The thread that makes it has to live as long as the worker, because the kernel ends the worker
    with that thread.

    Attributes:
        calls: The number of its running calls, with those in `left`.
        idle: The channels without a call, the last one used first.
        left: The channels whose calls were left behind.
        is_retired: Whether it gets no more calls.
        reason: The reason of its end.
        used_s: The end of its last call.
    """

    def __init__(self, setup: Setup) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)  # a stopped worker reads nothing
        self._beat = os.memfd_create("ckptfs-beat", os.MFD_CLOEXEC)
        self.calls = 0
        self.idle: list[Channel] = []
        self.left: list[Channel] = []
        self.is_retired = False
        self.reason: Reason = "died"
        self.used_s = self._begun_s = time.monotonic()
        try:
            with theirs:
                os.pwrite(self._beat, struct.pack("d", self._begun_s), 0)
                self._tell(setup)
                fd = theirs.fileno()
                self._process = subprocess.Popen(
                    [sys.executable, "-m", _PROGRAM, str(fd), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(fd,),
                    cwd="/",  # so that no module comes from the daemon's working directory
                )
        except OSError:
            self._control.close()
            os.close(self._beat)
            raise

    def _tell(self, setup: Setup) -> None:
        memory = os.memfd_create("ckptfs-setup", os.MFD_CLOEXEC)
        try:
            write_all(memory, encode(setup))
            os.lseek(memory, 0, os.SEEK_SET)
            socket.send_fds(self._control, [encode(PROTOCOL)], [memory, self._beat])
        finally:
            os.close(memory)

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def new_channel(self) -> Channel:
        """A new channel. Raises OSError if the worker is dead, or does not take it."""
        channel = Channel()
        try:
            channel.pass_to(self._control)
        except OSError:
            channel.close()
            raise
        return channel

    def tell(self, text: bytes) -> None:
        """Send a message without an answer, if the worker takes it."""
        with contextlib.suppress(OSError):
            self._control.send(text)

    # -- its life

    def still_s(self) -> float:
        """The seconds since the last beat."""
        return time.monotonic() - self._last_beat_s()

    def _last_beat_s(self) -> float:
        raw = os.pread(self._beat, BEAT_BYTES, 0)
        return struct.unpack("d", raw)[0] if len(raw) == BEAT_BYTES else 0.0

    @property
    def is_ready(self) -> bool:
        """Whether it has begun to serve, and beats."""
        beat_s = self._last_beat_s()
        return beat_s != self._begun_s and time.monotonic() - beat_s < STOPPED_S

    def is_stopped(self) -> bool:
        """Whether it does not beat, and the kernel reports it as stopped."""
        if self.still_s() < STOPPED_S:
            return False
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
        return False

    def memory_bytes(self) -> int:
        """The bytes that it has in memory now."""
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
        return 0

    def kill(self, reason: Reason) -> None:
        """Kill the process."""
        if self._process.poll() is None and self.reason == "died":
            self.reason = reason
        self.is_retired = True
        self._process.kill()

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def ends_within(self, wait_s: float) -> bool:
        """Wait for the end of the process. Returns whether it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        return self.has_ended

    def how_it_ended(self) -> str:
        """The way in which it ended, as a text. Call it when it has ended, or was killed."""
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
        """Close the descriptors of an ended process, once."""
        if self._control.fileno() < 0:
            return
        for channel in (*self.idle, *self.left):
            channel.close()
        self.idle.clear()
        self.left.clear()
        self._control.close()
        os.close(self._beat)


@dataclass(eq=False)
class Group:
    """The workers of one store of one user. Belongs to the pool.

    Attributes:
        key: The key that distinguishes groups.
        uid: The user.
        setup: The first message to its workers.
        has_own_client: Whether a client of ckptfs reads the store. Then several workers may serve,
            and a call ends when its channel is closed.
        needed: The number of workers without which there are no calls: 0 if the daemon can make
            them itself, or 1. The others are extra ones.
        stores: The numbers of the directories that are in use.
        workers: The workers that are alive.
        dying: The workers that were killed and still exist.
        is_starting: Whether a worker is being started.
        deaths: The deaths in a row.
        how: The cause of the last death.
        not_before_s: The earliest time of the next start.
    """

    key: Hashable
    uid: int
    setup: Setup
    has_own_client: bool = False
    needed: int = 1
    stores: set[int] = field(default_factory=set[int])
    workers: list[Worker] = field(default_factory=list[Worker])
    dying: list[Worker] = field(default_factory=list[Worker])
    is_starting: bool = False
    deaths: int = 0
    how: str = ""
    not_before_s: float = 0.0

    @property
    def serving(self) -> list[Worker]:
        """The workers that get calls."""
        return [worker for worker in self.workers if not worker.is_retired]

    def least_busy(self, extra_max: int) -> Worker | None:
        """The worker that gets the next call if there may be `extra_max` extra ones; None if there
        is none now."""
        serving = self.serving[: self.needed + extra_max]
        return min(serving, key=lambda worker: (not worker.is_ready, worker.calls), default=None)

    @property
    def size(self) -> int:
        """The number of workers, with the one that is being started."""
        return len(self.workers) + self.is_starting

    @property
    def extra(self) -> int:
        """The number of workers that serve or start beyond those that are needed."""
        if not self.has_own_client:
            return 0
        return max(0, len(self.serving) + self.is_starting - self.needed)

    @property
    def may_start(self) -> bool:
        """Whether the group has no serving worker, or only busy ones, and may start one."""
        if self.is_starting or len(self.dying) >= _DYING_MAX:
            return False
        if self.has_own_client:
            return all(worker.calls >= BUSY_CALLS for worker in self.serving)
        return not self.serving
