"""Reads of our own clients, spread over the daemon and its workers.

An interpreter hands out the bytes of a TLS connection record by record (16 KiB), and takes its lock
for each. A GiB takes it for half a second and more, so one process ends at some 2 GB/s on any
machine. Under a sustained load, long reads therefore run in workers. All other calls run in this
process, as do reads while no worker is ready: a read never waits for the start of a worker.

A worker takes memory, and one more copy of each byte. So a node that chooses the number of workers
itself (`fetch_processes = "auto"`) has none while the link or the store is slower than
`_FAST_BYTES_PER_S`.

If a worker dies or stands still in a read, the read is made again in this process. The log and the
counts name the death, and the pool starts another worker (see `pool`).
"""

import threading
import time
from collections.abc import Callable
from typing import Literal, TypeVar

from ckptfs._store.base import HasWholeAnswers, Method, Pin, Store
from ckptfs._store.wrappers import StoreWrapper
from ckptfs._workers.store import WorkerStore

T = TypeVar("T")

_LONG_BYTES = 1 << 20
"""The length of a long read. The way to a worker and back takes 60 µs and one more copy."""
_FEW = 3
"""The long reads at once that are a load. A reader of small tensors has one or two."""
_SUSTAINED_S = 0.3
"""The time after which a load counts as sustained: twice that of a worker's start."""
_GAP_S = 0.5
"""A shorter gap does not end a load, because readers pause between two files or tensors."""
_FAST_BYTES_PER_S = 400e6
"""The rate that one process reaches without help: a fifth of the most it can receive over HTTPS."""
_CORES_MIN = 4
_CORES_PER_PROCESS = 4
_PROCESSES_MAX = 8


def processes_for(setting: int | Literal["auto"], cores: int) -> int:
    """The number of processes that the setting `fetch_processes` stands for with so many cores.

    A process that receives TLS keeps a core busy. The server's bytes also cost the daemon, the
    kernel and their readers, so "auto" is a quarter of the cores. Eight processes bring more than
    one daemon can pass on.
    """
    if setting != "auto":
        return setting
    return 0 if cores < _CORES_MIN else min(_PROCESSES_MAX, cores // _CORES_PER_PROCESS)


class Load:
    """The long reads that run in this process and its workers. Several threads may use it.

    `fast_bytes_per_s` returns the rate from which on they are a load.
    """

    def __init__(self, fast_bytes_per_s: Callable[[], float] = lambda: 0.0) -> None:
        self._fast_bytes_per_s = fast_bytes_per_s
        self._lock = threading.Lock()  # guards the rest
        self._running = 0
        self._busy_since_s = 0.0
        self._busy_until_s = float("-inf")
        self._window_s = 0.0  # when the bytes below began to count
        self._bytes = 0
        self._is_fast = False

    def began(self, now_s: float) -> bool:
        """Count a read that begins. Returns whether the load is sustained."""
        with self._lock:
            self._running += 1
            if self._running == _FEW and now_s - self._busy_until_s > _GAP_S:
                self._busy_since_s = self._window_s = now_s
                self._bytes, self._is_fast = 0, False
            self._measure(now_s)
            is_sustained = now_s - self._busy_since_s >= _SUSTAINED_S
            return self._running >= _FEW and is_sustained and self._is_fast

    def _measure(self, now_s: float) -> None:
        passed_s = now_s - self._window_s
        if passed_s >= _SUSTAINED_S:
            self._is_fast = self._bytes >= passed_s * self._fast_bytes_per_s()
            self._window_s, self._bytes = now_s, 0

    def ended(self, now_s: float, length: int = 0) -> None:
        """Count a read that has ended, with `length` bytes."""
        with self._lock:
            if self._running == _FEW:
                self._busy_until_s = now_s
            self._running -= 1
            self._bytes += length


def load_for(setting: Callable[[], int | Literal["auto"]]) -> Load:
    """The load of a daemon with that setting `fetch_processes` now."""
    return Load(lambda: _FAST_BYTES_PER_S if setting() == "auto" else 0.0)


class SpreadStore(StoreWrapper):
    """A Store whose reads run in this process, by `store`, or `in_workers`. `load` counts the reads
    of all such stores."""

    def __init__(self, store: Store, in_workers: WorkerStore, load: Load) -> None:
        super().__init__(store)
        self._in_workers = in_workers
        self._load = load

    def _call(self, method: Method, call: Callable[[Store], T], length: int = 0) -> T:
        return call(self._store)

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        if len(buffer) < _LONG_BYTES:
            return self._store.read_into(pin, offset, buffer)
        is_sustained = self._load.began(time.monotonic())
        came = 0
        try:
            found = None
            if is_sustained:
                found = self._in_workers.read_if_ready(
                    pin, offset, buffer, answers_are_whole=self._answers_are_whole
                )
            if found is None:
                found = self._store.read_into(pin, offset, buffer)
            came = len(buffer)
            return found
        finally:
            self._load.ended(time.monotonic(), came)

    @property
    def _answers_are_whole(self) -> bool:
        store = self._store
        return isinstance(store, HasWholeAnswers) and store.answers_are_whole

    def close(self) -> None:
        super().close()
        self._in_workers.close()
