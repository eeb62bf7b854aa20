"""A Store in a worker; see the package's docstring."""

import itertools
import math
import time
from collections.abc import Callable
from typing import TypeVar

from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile, Listing, printable
from ckptfs._store.base import Method, Pin, check_count
from ckptfs._store.request_context import deadline_s
from ckptfs._store.request_metrics import KIND_OF, counted
from ckptfs._workers.channel import Channel, LeftBehind, Nonsense
from ckptfs._workers.messages import OBJECT_BYTES_MAX, Call, Done, Failed, encode
from ckptfs._workers.pool import Died, Pool
from ckptfs.errors import BY_CODE, CkptfsError, StoreError, StoreTimeout, StoreUnavailable

T = TypeVar("T")

STILL_S = 5.0
PATIENCE = 0.75
"""The part of a call's time for which a library may hold the lock, because it may still get its
answer. The rest is enough for another try at a store that answers as usual."""
_TRIES = 2
_TRIES_OF_OTHERS = 4
"""The tries of a call whose worker died. ``_daemon.fetch.retry`` repeats reads and checks after
that, but no caller repeats a listing. `put` is tried once."""

_IS_TRIED_ON = frozenset[Method](["confirm", "read_into"])
"""The calls that ``_daemon.fetch.retry`` makes again after `StoreUnavailable`."""


def _error_of(failed: Failed) -> CkptfsError:
    error = BY_CODE.get(failed.code, StoreError)(failed.message)
    if isinstance(error, StoreUnavailable):
        error.retry_after_s = failed.retry_after_s
    return error


class WorkerStore:
    """The directory at `location`, which workers of `pool` read for the user `uid`.

    The first call opens the store, so it raises the error of wrong options.
    """

    def __init__(self, pool: Pool, uid: int, location: Location, timeout_s: float) -> None:
        self.name = location.uri
        self._path, self._named = location.path, location.store
        self._pool = pool
        self._group, self._number, self._leave = pool.enter(self, location, timeout_s, uid)

    def list(self, files_max: int) -> Listing:
        """See Store.list."""

        def listing(done: Done, channel: Channel) -> Listing:
            found = Listing([], [], [])
            for part in channel.parts(done.size):
                found.files.extend(part.files)
                found.directories.extend(part.directories)
                found.skipped.extend(part.skipped)
                check_count(self.name, len(found.files) + len(found.directories), files_max)
            return found

        return self._call("list", listing, files_max=files_max)

    def confirm(self, pin: Pin) -> Pin:
        """See Store.confirm."""

        def confirmed(done: Done, _: Channel) -> Pin:
            if done.pin is None:
                raise Nonsense("no pin")
            return done.pin

        return self._call("confirm", confirmed, pin=pin)

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        """See Store.read_into."""

        def fill(done: Done, channel: Channel) -> bool:
            channel.read_into(buffer)
            return done.is_true

        return self._call("read_into", fill, pin=pin, offset=offset, length=len(buffer))

    def get(self, path: str) -> bytes | None:
        """See Store.get."""

        def data(done: Done, channel: Channel) -> bytes | None:
            if done.size > OBJECT_BYTES_MAX:
                raise Nonsense("the object is too long")
            return channel.data(done.size) if done.is_true else None

        return self._call("get", data, name=path)

    def put(self, path: str, data: bytes) -> None:
        """See Store.put."""
        self._call("put", lambda _, __: None, name=path, length=len(data), data=data)

    def find(self, path: str) -> ListedFile | None:
        """See Store.find."""
        return self._call("find", lambda done, _: done.file, name=path)

    def close(self) -> None:
        """See Store.close."""
        self._leave()

    # -- calls

    def _call(
        self,
        method: Method,
        result: Callable[[Done, Channel], T],
        *,
        data: bytes = b"",
        pin: Pin | None = None,
        offset: int = 0,
        length: int = 0,
        files_max: int = 0,
        name: str = "",
    ) -> T:
        """The result of a call that sends `data`: `result` of its answer."""
        left_s = deadline_s() - time.monotonic()
        call = Call(
            method=method,
            store=self._number,
            path=self._path,
            named=self._named,
            left_s=left_s,
            pin=pin,
            offset=offset,
            length=length,
            files_max=files_max,
            name=name,
        )
        is_tried_on = method in _IS_TRIED_ON
        patience_s = max(STILL_S, PATIENCE * left_s) if is_tried_on else math.inf
        tries = 1 if method == "put" else _TRIES if is_tried_on else _TRIES_OF_OTHERS
        with counted(KIND_OF[method]):
            for tried in itertools.count(1):
                try:
                    return self._once(call, data, patience_s, result)
                except Died as death:
                    if tried >= tries:
                        raise StoreUnavailable(str(death)) from None
        raise AssertionError("unreachable")

    def _once(
        self, call: Call, data: bytes, patience_s: float, result: Callable[[Done, Channel], T]
    ) -> T:
        waits = call.method not in _IS_TRIED_ON
        worker, channel = self._pool.take(self._group, self.name, waits=waits)

        def look() -> None:
            if worker.is_stopped():
                worker.kill("stopped")
            elif worker.still_s() > patience_s:
                worker.kill("still")

        try:
            channel.put(data)
            answer = channel.ask(encode(call), deadline_s, look)
            found = result(answer, channel) if isinstance(answer, Done) else None
        except LeftBehind as why:
            self._pool.leave_behind(self._group, worker, channel)
            raise self._late(call, why) from None
        except Nonsense:
            worker.kill("nonsense")
            answer = found = None
        except TimeoutError as why:  # the caller gave it up before it was sent
            self._pool.give_back(self._group, worker, channel)
            raise self._late(call, why) from None
        except CkptfsError:  # there are too many files
            self._pool.give_back(self._group, worker, channel)
            raise
        except OSError as error:  # before it was sent
            self._pool.give_back(self._group, worker, channel)
            raise StoreUnavailable(
                f"{self.name}: cannot open a channel to the store's library: {error.strerror}; "
                "raise the limit of open files"
            ) from None
        except BaseException:
            worker.kill("nonsense")
            self._pool.drop(self._group, worker, channel)
            raise
        if answer is None:
            died = self._pool.died(self._group, worker, self.name)
            self._pool.drop(self._group, worker, channel)
            raise died
        self._pool.give_back(self._group, worker, channel)
        if isinstance(answer, Failed):
            raise _error_of(answer)
        return found  # pyright: ignore[reportReturnType] - it is what `result` has returned

    def _late(self, call: Call, why: Exception) -> StoreTimeout:
        what = call.pin.path if call.pin is not None else call.name
        shown = f"{printable(what)} in {self.name}" if what else self.name
        return StoreTimeout(f"{shown}: the store's library gave no answer: {why}; try again")
