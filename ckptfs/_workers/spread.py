"""Reads of our own clients, spread over the daemon and its workers.

An interpreter hands out the bytes of a TLS connection record by record (16 KiB), and takes its lock
for each. A GiB takes it for half a second and more, so one process ends at some 2 GB/s on any
machine. Under a sustained load, long reads therefore run in workers. All other calls run in this
process, as do reads while no worker is ready: a read never waits for the start of a worker.

If a worker dies or stands still in a read, the read is made again in this process. The log and the
counts name the death, and the pool starts another worker (see `pool`).
"""

import os
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
_CORES_MIN = 4
_CORES_PER_PROCESS = 4
_PROCESSES_MAX = 8


def processes_for(setting: int | Literal["auto"]) -> int:
    """The number of processes that the setting `fetch_processes` stands for on this machine.

    A process that receives TLS keeps a core busy. The server's bytes also cost the daemon, the
    kernel and their readers, so "auto" is a quarter of the cores. Eight processes bring more than
    one daemon can pass on.
    """
    if setting != "auto":
        return setting
    cores = len(os.sched_getaffinity(0))
    return 0 if cores < _CORES_MIN else min(_PROCESSES_MAX, cores // _CORES_PER_PROCESS)


class Load:
    """The long reads that run in this process and its workers. Several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the rest
        self._running = 0
        self._busy_since_s = 0.0
        self._busy_until_s = float("-inf")

    def began(self, now_s: float) -> bool:
        """Count a read that begins. Returns whether the load is sustained."""
        with self._lock:
            self._running += 1
            if self._running == _FEW and now_s - self._busy_until_s > _GAP_S:
                self._busy_since_s = now_s
            return self._running >= _FEW and now_s - self._busy_since_s >= _SUSTAINED_S

    def ended(self, now_s: float) -> None:
        """Count a read that has ended."""
        with self._lock:
            if self._running == _FEW:
                self._busy_until_s = now_s
            self._running -= 1


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
        try:
            if is_sustained:
                found = self._in_workers.read_if_ready(
                    pin, offset, buffer, answers_are_whole=self._answers_are_whole
                )
                if found is not None:
                    return found
            return self._store.read_into(pin, offset, buffer)
        finally:
            self._load.ended(time.monotonic())

    @property
    def _answers_are_whole(self) -> bool:
        store = self._store
        return isinstance(store, HasWholeAnswers) and store.answers_are_whole

    def close(self) -> None:
        super().close()
        self._in_workers.close()
