"""Fakes for what a test cannot order about: the faults of a store, and time spent in threads."""

import functools
import itertools
import math
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import msgspec
import trio

from ckptfs._daemon.offload import Lane, Offload
from ckptfs._model.config import Config
from ckptfs._model.manifest import ListedFile, Listing
from ckptfs._store.base import Pin
from ckptfs.errors import CheckpointNotFound, CkptfsError, LimitExceeded, ObjectChanged

P = ParamSpec("P")
T = TypeVar("T")

MIB = 1 << 20
OLD_NS = 1_500_000_000 * 10**9
"""A modification time long ago, in whole seconds as S3 gives it: such an object is settled."""
_GATE_S_MAX = 30.0
"""A call that is held up goes on after this time, so that a failing test ends."""


_PIECE_BYTES = 64 << 10


@functools.cache
def _noise() -> bytes:
    return random.Random(0).randbytes(4 * MIB)


def pattern(size: int, seed: int = 0) -> bytes:
    """`size` bytes in which no two places look alike, nor the same place of two sizes or seeds.

    They are pieces from all over the same noise, because new bytes take Python ten times as long.
    """
    noise, chance = _noise(), random.Random(f"{size} {seed}")
    starts = (chance.randrange(len(noise) - _PIECE_BYTES) for _ in range(0, size, _PIECE_BYTES))
    return b"".join(noise[start : start + _PIECE_BYTES] for start in starts)[:size]


def config_of(directory: Path, **settings: object) -> Config:
    """A configuration whose paths are below `directory`."""
    paths = {
        "socket": str(directory / "control.sock"),
        "mount": str(directory / "mnt"),
        "cache_dir": str(directory / "cache"),
    }
    return msgspec.convert({**paths, "cache_free_share_min": 0.0, **settings}, Config)


class Call(NamedTuple):
    """One request that the store got; `offset` and `length` are those of a read."""

    operation: str
    path: str = ""
    offset: int = 0
    length: int = 0


class Gate:
    """Holds up one call: `entered` says that it came, `release` lets it go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()


class _Object(NamedTuple):
    data: bytes
    mtime_ns: int
    etag: str


class FakeStore:
    """A `Store` in memory, which does as it is told. May be used by several threads.

    Operations, for `fail` and `block`, are the methods' names; "put answer" is a `put` whose object
    has arrived and whose answer is lost or late.

    Attributes:
        calls: Every request so far.
        moments: How many moments passed: one before each `confirm`, and before, in the middle of
            and after each `read_into`. `at_moment` plans what happens then.
        with_etags: Whether the store has ETags.
        put_mtime_ns: Time of what is `put`; None: one second after the last version.
        is_gone: Whether the directory is missing for `put`.
    """

    def __init__(
        self,
        objects: dict[str, bytes] | None = None,
        *,
        mtime_ns: int = OLD_NS,
        with_etags: bool = True,
    ) -> None:
        self.calls: list[Call] = []
        self.moments = 0
        self.with_etags = with_etags
        self.directories: list[str] = []
        self.closed = False
        self.put_mtime_ns: int | None = None
        self.is_gone = False
        self.name = f"fake://{id(self):x}"
        self._lock = threading.RLock()
        self._serial = itertools.count(1)
        self._objects: dict[str, _Object] = {}
        self._count: dict[str, int] = {}
        self._faults: dict[tuple[str, int], CkptfsError] = {}
        self._always: dict[str, CkptfsError] = {}
        self._gates: dict[tuple[str, int], Gate] = {}
        self._plans: dict[int, Callable[[], None]] = {}
        for path, data in (objects or {}).items():
            self.overwrite(path, data, mtime_ns=mtime_ns)

    # -- what a test does to it

    def overwrite(self, path: str, data: bytes, *, mtime_ns: int | None = None) -> None:
        """Put another version there; by default one second newer than the last."""
        with self._lock:
            before = self._objects.get(path)
            if mtime_ns is None:
                mtime_ns = before.mtime_ns + 10**9 if before else OLD_NS
            etag = f'"{next(self._serial)}"' if self.with_etags else ""
            self._objects[path] = _Object(data, mtime_ns, etag)

    def delete(self, path: str) -> None:
        """Remove an object."""
        with self._lock:
            del self._objects[path]

    def fail(self, operation: str, error: CkptfsError, *, at: int = 1, times: int = 1) -> None:
        """Let the `at`-th call of `operation` from now on fail, and `times` in all."""
        with self._lock:
            first = self._count.get(operation, 0) + at
            self._faults |= {(operation, first + i): error for i in range(times)}

    def fail_always(self, operation: str, error: CkptfsError | None) -> None:
        """Let every call fail from now on; None: no longer."""
        with self._lock:
            self._always.pop(operation, None)
            if error is not None:
                self._always[operation] = error

    def block(self, operation: str, *, at: int = 1) -> Gate:
        """Hold up the `at`-th call of `operation` from now on."""
        with self._lock:
            gate = self._gates[operation, self._count.get(operation, 0) + at] = Gate()
        return gate

    def release_all(self) -> None:
        """Let all calls go on that were held up."""
        for gate in self._gates.values():
            gate.release.set()

    def at_moment(self, number: int, action: Callable[[], None]) -> None:
        """Do something at the `number`-th moment from now on (the next one is 1)."""
        with self._lock:
            self._plans[self.moments + number] = action

    # -- what a test sees

    def pin(self, path: str) -> Pin:
        """The pin that a listing of now would give."""
        found = self._objects[path]
        return Pin(path, len(found.data), found.mtime_ns)

    def content(self, path: str) -> bytes | None:
        """The current bytes of an object; None where there is none."""
        found = self._objects.get(path)
        return None if found is None else found.data

    def etag(self, path: str) -> str:
        """The current ETag."""
        return self._objects[path].etag

    def reads(self, path: str | None = None) -> list[Call]:
        """The reads, of one object or of all."""
        return self._of("read_into", path)

    def confirms(self, path: str | None = None) -> list[Call]:
        """The version checks, of one object or of all."""
        return self._of("confirm", path)

    def _of(self, operation: str, path: str | None) -> list[Call]:
        with self._lock:
            return [c for c in self.calls if c.operation == operation and path in (None, c.path)]

    # -- the Store protocol

    def list(self, files_max: int) -> Listing:
        """See Store.list."""
        self._begin(Call("list"))
        with self._lock:
            if len(self._objects) > files_max:
                raise LimitExceeded(f"more than files_max = {files_max}")
            files = [ListedFile(p, len(o.data), o.mtime_ns) for p, o in self._objects.items()]
        return Listing(files, list(self.directories))

    def confirm(self, pin: Pin) -> Pin:
        """See Store.confirm. As the real ones, it compares whole seconds."""
        self._begin(Call("confirm", pin.path))
        self._moment()
        found = self._current(pin)
        if (len(found.data), found.mtime_ns // 10**9) != (pin.size, pin.mtime_ns // 10**9):
            raise ObjectChanged(f"{pin.path} is another version")
        if pin.etag and pin.etag != found.etag:
            raise ObjectChanged(f"{pin.path} has another ETag")
        return msgspec.structs.replace(pin, etag=found.etag)

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        """See Store.read_into. The second half is read later than the first."""
        length = len(buffer)
        self._begin(Call("read_into", pin.path, offset, length))
        self._moment()
        half = length // 2
        for start, stop in ((0, half), (half, length)):
            data = self._current(pin).data[offset + start : offset + stop]
            if len(data) != stop - start:
                raise ObjectChanged(f"{pin.path} became shorter")
            buffer[start:stop] = data
            self._moment()
        return False

    def get(self, path: str) -> bytes | None:
        """See Store.get."""
        self._begin(Call("get", path))
        return self.content(path)

    def put(self, path: str, data: bytes) -> None:
        """See Store.put."""
        self._begin(Call("put", path, 0, len(data)))
        if self.is_gone:
            raise CheckpointNotFound(self.name)
        self.overwrite(path, data, mtime_ns=self.put_mtime_ns)
        self._begin(Call("put answer", path))

    def find(self, path: str) -> ListedFile | None:
        """See Store.find."""
        self._begin(Call("find", path))
        with self._lock:
            found = self._objects.get(path)
        return None if found is None else ListedFile(path, len(found.data), found.mtime_ns)

    def close(self) -> None:
        """See Store.close."""
        self.closed = True

    def _current(self, pin: Pin) -> _Object:
        with self._lock:
            if pin.path not in self._objects:
                raise ObjectChanged(f"{pin.path} was deleted")
            return self._objects[pin.path]

    def _begin(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)
            number = self._count[call.operation] = self._count.get(call.operation, 0) + 1
            gate = self._gates.get((call.operation, number))
            error = self._faults.get((call.operation, number)) or self._always.get(call.operation)
        if gate is not None:
            gate.entered.set()
            gate.release.wait(_GATE_S_MAX)
        if error is not None:
            raise type(error)(*error.args)

    def _moment(self) -> None:
        with self._lock:
            self.moments += 1
            if action := self._plans.pop(self.moments, None):
                action()


class _InlineLane(Lane):
    """One kind of call of an `InlineOffload`."""

    def __init__(self, offload: "InlineOffload", kind: str) -> None:
        super().__init__(1, 0)
        self._offload = offload
        self._kind = kind

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._offload.run(self._kind, functools.partial(function, *args, **kwargs))


class InlineOffload(Offload):
    """Runs the calls in the event loop, after a checkpoint, so that a test can own the clock.

    `latency_s` gives a kind of call ("data", "control", "disk", "compute") a duration before it
    runs (infinity: it never does); `reply_s` delays its result.
    """

    def __init__(self) -> None:
        super().__init__(1)
        self.latency_s: dict[str, float] = {}
        self.reply_s: dict[str, float] = {}
        for kind in ("data", "control", "disk", "upkeep", "spool", "compute", "names"):
            setattr(self, kind, _InlineLane(self, kind))
        self.dark = self.control

    async def run(self, kind: str, call: Callable[[], T]) -> T:
        """Run a call of that kind."""
        latency_s = self.latency_s.get(kind, 0)
        if math.isinf(latency_s):
            await trio.sleep_forever()
        await trio.sleep(latency_s)
        result = call()
        if reply_s := self.reply_s.get(kind, 0):
            await trio.sleep(reply_s)
        return result
