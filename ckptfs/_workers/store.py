"""A Store in a worker; see the package's docstring."""

import itertools
import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile, Listing, printable
from ckptfs._model.named_store import Credentials
from ckptfs._model.request_id import request_id
from ckptfs._store.base import Method, Pin, check_count
from ckptfs._store.request_context import deadline_s
from ckptfs._store.request_metrics import KIND_OF, Outcome, counted, outcome_of
from ckptfs._workers.channel import Channel, LeftBehind, Nonsense
from ckptfs._workers.messages import OBJECT_BYTES_MAX, Call, Done, Failed, encode
from ckptfs._workers.pool import Died, Pool
from ckptfs._workers.process import Worker
from ckptfs.errors import BY_CODE, CkptfsError, StoreError, StoreTimeout, StoreUnavailable

T = TypeVar("T")

STILL_S = 5.0
PATIENCE = 0.75
"""The part of a call's time for which a library may hold the lock, because it may still get its
answer. The rest is enough for another try at a store that answers as usual."""
_STILL_AT_READ_S = 2.0
"""The same in seconds for a read that the daemon can make itself: our own clients hold the lock for
milliseconds, so the process does not run."""
_TRIES = 2
_TRIES_OF_OTHERS = 4
"""The tries of a call whose worker died. ``_daemon.fetch.retry`` repeats reads and checks after
that, but no caller repeats a listing. `put` is tried once."""

_IS_TRIED_ON = frozenset[Method](["confirm", "read_into"])
"""The calls that ``_daemon.fetch.retry`` makes again after `StoreUnavailable`."""


class _NotSent(StoreUnavailable):
    """This process had no descriptor for the call, so no worker has it."""


def _fill(buffer: memoryview, done: Done, channel: Channel) -> bool:
    channel.read_into(buffer)
    return done.is_true


def _outcome_of(error: BaseException) -> Outcome:
    return "unavailable" if isinstance(error, Died) else outcome_of(error)


def _error_of(failed: Failed) -> CkptfsError:
    error = BY_CODE.get(failed.code, StoreError)(failed.message)
    if isinstance(error, StoreUnavailable):
        error.retry_after_s = failed.retry_after_s
    return error


class WorkerStore:
    """The directory at `location`, which workers of `pool` read for the user `uid`.

    `credentials` are those of a named store. `is_needed` says whether the caller cannot do without
    a worker, as it can with `read_if_ready`. The first call opens the store, so it raises the error
    of wrong options.
    """

    def __init__(
        self,
        pool: Pool,
        uid: int,
        location: Location,
        timeout_s: float,
        credentials: Credentials = "default",
        *,
        is_needed: bool = True,
    ) -> None:
        self.name = location.uri
        self._path, self._named = location.path, location.store
        self._pool = pool
        self._group, self._number, self._leave = pool.enter(
            self, location, timeout_s, uid, credentials, is_needed=is_needed
        )

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
        fill = partial(_fill, buffer)
        return self._call("read_into", fill, pin=pin, offset=offset, length=len(buffer))

    def read_if_ready(
        self, pin: Pin, offset: int, buffer: memoryview, *, answers_are_whole: bool
    ) -> bool | None:
        """As `read_into`, by a worker that is ready now; None if none is, or if it dies, or if this
        process has no descriptor for the call.

        `answers_are_whole` is what the caller knows of the server, see `HasWholeAnswers`.
        """
        seat = self._pool.take_ready(self._group)
        if seat is None:
            return None
        call = self._made(
            "read_into",
            pin=pin,
            offset=offset,
            length=len(buffer),
            answers_are_whole=answers_are_whole,
        )
        with suppress(Died, _NotSent), counted("read", _outcome_of):
            return self._ask(*seat, call, b"", _STILL_AT_READ_S, partial(_fill, buffer))
        return None

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
        **arguments: Any,
    ) -> T:
        """The result of a call that sends `data`: `result` of its answer."""
        call = self._made(method, **arguments)
        is_tried_on = method in _IS_TRIED_ON
        patience_s = max(STILL_S, PATIENCE * call.left_s) if is_tried_on else math.inf
        tries = 1 if method == "put" else _TRIES if is_tried_on else _TRIES_OF_OTHERS
        with counted(KIND_OF[method]):
            for tried in itertools.count(1):
                try:
                    seat = self._pool.take(self._group, self.name, waits=not is_tried_on)
                    return self._ask(*seat, call, data, patience_s, result)
                except Died as death:
                    if tried >= tries:
                        raise StoreUnavailable(str(death)) from None
        raise AssertionError("unreachable")

    def _made(self, method: Method, **arguments: Any) -> Call:
        return Call(
            method=method,
            store=self._number,
            path=self._path,
            named=self._named,
            left_s=deadline_s() - time.monotonic(),
            request=request_id.get(),
            **arguments,
        )

    def _ask(
        self,
        worker: Worker,
        channel: Channel,
        call: Call,
        data: bytes,
        patience_s: float,
        result: Callable[[Done, Channel], T],
    ) -> T:
        """The result of one try. Raises Died if the worker has died."""

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
            raise _NotSent(
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
