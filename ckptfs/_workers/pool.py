"""The workers of this process: which worker serves a call, and when workers start and end.

**A group** is one store of one user: the same kind, options and credentials. One worker serves the
calls of a library. Several may serve those of our own clients, because each process has an
interpreter's lock of its own. A call goes to the ready worker with the fewest calls. When all are
busy, another one starts in the background. A retired worker gets no more calls, and ends when its
calls have ended. A new worker may serve the group meanwhile.

**Limits.** At most `PROCESSES_MAX` workers run that calls need, and `extra_max()` others.
Another user than the daemon's has a share of both. If the first limit is reached, the pool ends the
worker without calls that was used longest ago. If all have calls, the call waits until its
deadline. A user may start as many workers of each sort at once as the first limit allows, and then
one sixteenth of that each second, so that a library that dies again and again does not become a
fork bomb.

**Deaths in a row.** The pool replaces a dead worker at once. After each further death without an
answer in between, the next start waits 0.2 s, and twice as long each time, up to 10 s. From `_ROW`
deaths on, reads and checks do not wait for it, because they would occupy threads that others need.
They fail until then, and ``_daemon.fetch.retry`` repeats them. Calls that the daemon can make
itself never wait for a worker.

One thread, the supervisor, starts all workers and never ends, because the kernel ends a worker with
the thread that has started it. It also removes dead workers, and checks the calls that were left
behind. `_changed` guards the groups and the pool's fields of workers. The pool never holds it
during IO that can wait.
"""

import itertools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from queue import Empty, SimpleQueue

import msgspec

from ckptfs._model.backoff import Backoff
from ckptfs._model.kinds import Kind
from ckptfs._model.location import Location
from ckptfs._model.named_store import Credentials
from ckptfs._store.kinds import KINDS
from ckptfs._store.request_context import deadline_s
from ckptfs._workers.channel import Channel, Nonsense
from ckptfs._workers.counts import COUNTS
from ckptfs._workers.messages import PROTOCOL, Call, Setup, encode
from ckptfs._workers.process import Group, Reason, Worker
from ckptfs.errors import StoreTimeout, StoreUnavailable

log = logging.getLogger(__name__)

PROCESSES_MAX = 32
"""The most workers of all users that calls need. A worker with pyarrow takes some 70 MB."""
_BURST_S = 16.0
"""The seconds after which a user may start all the user's workers again."""
_ROW = 3
_BACKOFF = Backoff(0.1, 10.0)
IDLE_S = 30.0
"""The time after which an idle worker ends. A start costs 0.15 s, and perhaps a new token."""
_CHANNEL_IDLE_S = 10.0
"""The time after which an idle channel closes. Its memory is as large as its largest read."""
_END_S = 1.0
"""The longest wait for a dying worker, which closes its channels a moment before its end."""
GRACE_S = 1.0
LEFT_MAX = 8
_TICK_S = 0.25

_WHY: dict[Reason, str] = {
    "stopped": "the process of the store's library was stopped",
    "still": "the store's library was blocked for too long",
    "overdue": "calls of the store's library did not end",
    "nonsense": "the process of the store's library sent invalid answers",
}


class Died(Exception):
    """The worker has died during the call. The text is for the caller's error."""


class Pool:
    """All workers.

    Args:
        limit_for: Returns the share of a limit that a user may have.
        pickled: The filesystem of a private daemon.
        extra_max: Returns the most workers that may run now besides those that calls need.
    """

    def __init__(
        self,
        limit_for: Callable[[int, int], int],
        pickled: bytes = b"",
        extra_max: Callable[[], int] = lambda: 0,
    ) -> None:
        self._limit_for = limit_for
        self._extra_max = extra_max
        self._pickled = pickled
        self._changed = threading.Condition()
        self._groups: dict[Hashable, Group] = {}  # by store, user and credentials
        self._all: set[Group] = set()  # also groups whose store is closed
        self._starts: dict[tuple[int, bool], _Starts] = {}  # by user, and whether extra
        self._numbers = itertools.count()
        self._asked: SimpleQueue[Group | None] = SimpleQueue()
        self._released: deque[tuple[Group, int]] = deque()
        self._supervisor: threading.Thread | None = None
        self._is_shut = False
        COUNTS.memory_bytes = self._memory_bytes

    def _memory_bytes(self) -> list[int]:
        with self._changed:
            return [worker.memory_bytes() for group in self._all for worker in group.workers]

    # -- directories

    def enter(
        self,
        owner: object,
        location: Location,
        timeout_s: float,
        uid: int,
        credentials: Credentials = "default",
        *,
        is_needed: bool = True,
    ) -> tuple[Group, int, Callable[[], object]]:
        """Register a directory that `owner` uses from now on. `is_needed` says whether it cannot do
        without a worker.

        Returns its group, its number, and a function to call when it is no longer used. The
        function runs at the latest when `owner` is collected.
        """
        place = msgspec.structs.replace(location, path="", store=None)
        secrets = tuple(sorted(place.secrets.items()))
        options = tuple(sorted((name, repr(value)) for name, value in place.options.items()))
        server = location.path.split("/")[:3] if location.kind == "http" else []
        key = (uid, place.kind, *server, options, secrets, timeout_s, repr(credentials), is_needed)
        with self._changed:
            self._forget_released()
            group = self._groups.get(key)
            if group is None:
                setup = Setup(PROTOCOL, place, timeout_s, self._pickled, credentials)
                row = None if self._pickled else KINDS.get(place.kind)
                has_own_client = row is not None and row.has_own_client
                group = Group(key, uid, setup, has_own_client, int(is_needed))
                self._groups[key] = group
            number = next(self._numbers)
            group.stores.add(number)
        leave = weakref.finalize(owner, self._release, group, number)
        leave.atexit = False
        return group, number, leave

    def _release(self, group: Group, number: int) -> None:
        """Note that a directory is no longer used. Takes no lock, because any thread and the
        garbage collector may call it at any time."""
        self._released.append((group, number))
        self._asked.put(None)

    def _forget_released(self) -> None:
        while self._released:
            group, number = self._released.popleft()
            group.stores.discard(number)
            for worker in group.workers:
                worker.tell(encode(Call("close", number, "", None, 0.0)))
            self._forget_unused(group)

    def _forget_unused(self, group: Group) -> None:
        """Forget a group and its credentials if nothing needs it."""
        if group.stores or group.size or group.dying:
            return
        self._all.discard(group)
        if self._groups.get(group.key) is group:
            del self._groups[group.key]

    # -- calls

    def take(self, group: Group, name: str, *, waits: bool) -> tuple[Worker, Channel]:
        """The worker of `group` with a channel, for one call. `name` is that of the store, and
        `waits` says whether to wait for a start that is delayed after too many deaths.

        Raises:
            StoreTimeout: The limits allowed no worker until the deadline.
            StoreUnavailable: Workers have died too often, or this process has no descriptors.
            Died: The worker does not take the channel.
        """
        with self._changed:
            while (worker := self._least_busy(group)) is None:
                if not waits:
                    self._check_row(group, name)
                left_s = deadline_s() - time.monotonic()
                if left_s <= 0 or self._is_shut:
                    raise StoreTimeout(
                        f"{name}: all processes for the libraries of stores were busy; try again"
                    )
                self._changed.wait(min(left_s, _TICK_S))
            worker.calls += 1
            if worker.idle:
                return worker, worker.idle.pop()
        try:
            return worker, self._new_channel(group, worker)
        except OSError as error:
            if worker.is_retired or isinstance(error, ConnectionError):
                raise self.died(group, worker, name) from None
            raise StoreUnavailable(
                f"{name}: cannot open a channel to the store's library: {error.strerror}; raise "
                "the limit of open files"
            ) from None

    def take_ready(self, group: Group) -> tuple[Worker, Channel] | None:
        """As `take`, but at once; None if no worker is ready."""
        with self._changed:
            worker = self._least_busy(group)
            if worker is None or not worker.is_ready:
                return None
            worker.calls += 1
            if worker.idle:
                return worker, worker.idle.pop()
        try:
            return worker, self._new_channel(group, worker)
        except OSError:  # the supervisor notices if the worker has died
            return None

    def _least_busy(self, group: Group) -> Worker | None:
        """The worker for the next call, if there is one now. If it is busy, another one may start.
        `_changed` is held."""
        self._all.add(group)
        worker = group.least_busy(self._extra_max())
        self._want(group)
        return worker

    def _new_channel(self, group: Group, worker: Worker) -> Channel:
        """A channel for a call that is counted already. Raises OSError."""
        try:
            return worker.new_channel()
        except OSError as error:
            with self._changed:
                worker.calls -= 1
                self._close_if_buried(group, worker)
            if isinstance(error, BlockingIOError):
                worker.kill("still")
            raise

    def give_back(self, group: Group, worker: Worker, channel: Channel) -> None:
        """Take back the channel of a call that was answered."""
        is_kept = not channel.is_large
        if not is_kept:
            channel.close()
        with self._changed:
            group.deaths = 0
            worker.calls -= 1
            worker.used_s = channel.used_s = time.monotonic()
            if is_kept:
                worker.idle.append(channel)
            self._close_if_buried(group, worker)

    def leave_behind(self, group: Group, worker: Worker, channel: Channel) -> None:
        """Leave a channel to its worker, which still runs the call. Its caller has gone.

        Our own clients end the call, so the channel is closed."""
        if group.has_own_client:
            self.drop(group, worker, channel)
            return
        with self._changed:
            channel.deadline_s = max(time.monotonic(), deadline_s())
            worker.left.append(channel)
            self._close_if_buried(group, worker)

    def drop(self, group: Group, worker: Worker, channel: Channel) -> None:
        """Close a channel that is no longer usable."""
        channel.close()
        with self._changed:
            worker.calls -= 1
            self._close_if_buried(group, worker)

    def died(self, group: Group, worker: Worker, name: str) -> Died:
        """The exception for a worker that has died or was killed."""
        if not worker.ends_within(_END_S):
            worker.kill("nonsense")
        how = worker.how_it_ended()
        with self._changed:
            self._bury(group, worker, how)
        why = _WHY.get(worker.reason)
        text = f"{why}, and it was replaced" if why else f"the process of the store's library {how}"
        return Died(f"{name}: {text}; check what answers at the endpoint, and try again")

    # -- starts, with `_changed` held

    @staticmethod
    def _check_row(group: Group, name: str) -> None:
        """Raise StoreUnavailable while the next start is delayed, after too many deaths."""
        pause_s = group.not_before_s - time.monotonic()
        if pause_s > 0 and group.deaths >= _ROW:
            error = StoreUnavailable(
                f"{name}: the process of the store's library {group.how}, {group.deaths} times in "
                f"a row; it is started again in {pause_s:.1f} s; check what answers at the endpoint"
            )
            error.retry_after_s = pause_s
            raise error

    def _want(self, group: Group) -> None:
        """Let the supervisor start a worker for `group` if it may have one."""
        if not group.may_start or self._is_shut or group.not_before_s > time.monotonic():
            return
        is_extra = group.has_own_client and len(group.serving) >= group.needed
        has_place = self._has_place_for_extra if is_extra else self._make_place
        if not has_place(group.uid):
            return
        starts = self._starts.setdefault(
            (group.uid, is_extra), _Starts(self._limit_for(group.uid, PROCESSES_MAX))
        )
        if not starts.take():
            return
        group.is_starting = True
        if self._supervisor is None:
            self._supervisor = threading.Thread(
                target=self._supervise, name="ckptfs-workers", daemon=True
            )
            self._supervisor.start()
        self._asked.put(group)

    def _has_place_for_extra(self, uid: int) -> bool:
        own = sum(group.extra for group in self._all if group.uid == uid)
        every = sum(group.extra for group in self._all)
        most = self._extra_max()
        return every < most and own < self._limit_for(uid, most)

    def _has_place(self, uid: int) -> bool:
        limit = self._limit_for(uid, PROCESSES_MAX)
        own = [group for group in self._all if group.uid == uid]
        size = sum(group.size - group.extra for group in own)
        if size >= limit or sum(len(group.dying) for group in own) >= limit:
            return False
        return sum(group.size - group.extra for group in self._all) < PROCESSES_MAX

    def _make_place(self, uid: int) -> bool:
        """Whether the user may have one more worker, perhaps after an idle one has ended."""
        if self._has_place(uid):
            return True
        own = [group for group in self._all if group.uid == uid]
        size = sum(group.size - group.extra for group in own)
        candidates = own if size >= self._limit_for(uid, PROCESSES_MAX) else self._all
        idle = [
            (group, w)
            for group in candidates
            if not group.extra
            for w in group.workers
            if not w.calls
        ]
        if not idle:
            return False
        group, worker = min(idle, key=lambda each: each[1].used_s)
        self._end(group, worker, "idle")
        return self._has_place(uid)

    # -- ends, with `_changed` held

    def _end(self, group: Group, worker: Worker, reason: Reason) -> None:
        worker.kill(reason)
        self._bury(group, worker, "")

    def _bury(self, group: Group, worker: Worker, how: str) -> None:
        """Remove a dead worker from its group, once."""
        if worker not in group.workers:
            return
        group.workers.remove(worker)
        group.dying.append(worker)
        COUNTS.ends[worker.reason] += 1
        # Reads that do not need a worker gain nothing from a new one on a machine that starves it.
        if worker.reason in ("died", "nonsense") or not (group.needed or worker.reason == "idle"):
            self._note_death(group, how)
        if worker.reason != "idle":
            why = _WHY.get(worker.reason, how)
            about = {"event": "worker-ended"}
            log.warning("worker %d (%s) ended: %s", worker.pid, _kind(group), why, extra=about)
        self._close_if_buried(group, worker)
        self._changed.notify_all()

    def _note_death(self, group: Group, how: str) -> None:
        group.deaths += 1
        group.how = how
        if group.deaths > 1:
            group.not_before_s = time.monotonic() + _BACKOFF.pause_s(group.deaths)

    def _close_if_buried(self, group: Group, worker: Worker) -> None:
        """Close a removed worker, unless a thread may still use it."""
        if worker not in group.workers and worker.calls == len(worker.left):
            worker.close()

    # -- the supervisor

    def _supervise(self) -> None:
        while True:
            try:
                group = self._asked.get(timeout=_TICK_S if self._has_workers() else None)
            except Empty:
                group = None
            try:
                if group is not None:
                    self._start(group)
                with self._changed:
                    if self._is_shut:
                        self._end_all()
                        return
                    self._look_after_all()
            except Exception:
                log.exception("unexpected error while looking after workers")

    def _has_workers(self) -> bool:
        with self._changed:
            return any(group.size or group.dying for group in self._all)

    def _start(self, group: Group) -> None:
        worker, how = None, "did not start"
        try:
            worker = Worker(group.setup)
        except OSError as error:
            how = f"did not start: {error.strerror}"
            log.warning("a worker (%s) %s", _kind(group), how)
        finally:
            with self._changed:
                group.is_starting = False
                if worker is not None:
                    group.workers.append(worker)
                    COUNTS.starts += 1
                else:
                    self._note_death(group, how)
                self._changed.notify_all()

    def _look_after_all(self) -> None:
        self._forget_released()
        now_s = time.monotonic()
        for group in list(self._all):
            for worker in list(group.workers):
                if worker.has_ended:
                    self._bury(group, worker, worker.how_it_ended())
                else:
                    self._look_after(group, worker, now_s)
            group.dying = [worker for worker in group.dying if not worker.has_ended]
            self._forget_unused(group)

    def _look_after(self, group: Group, worker: Worker, now_s: float) -> None:
        for channel in list(worker.left):
            try:
                has_ended = channel.look_behind()
            except Nonsense:
                has_ended = None
            if has_ended:
                worker.left.remove(channel)
                worker.calls -= 1
                worker.used_s = channel.used_s = now_s
                worker.idle.append(channel)
            elif has_ended is None or now_s > channel.deadline_s + GRACE_S:
                worker.is_retired = True
        if len(worker.left) > LEFT_MAX:
            worker.is_retired = True
        if worker.is_retired and worker.calls == len(worker.left):
            self._end(group, worker, "overdue")
        elif not worker.calls and now_s - worker.used_s > IDLE_S:
            self._end(group, worker, "idle")
        else:
            for channel in [c for c in worker.idle if now_s - c.used_s > _CHANNEL_IDLE_S]:
                worker.idle.remove(channel)
                channel.close()

    def _end_all(self) -> None:
        for group in self._all:
            for worker in list(group.workers):
                self._end(group, worker, "idle")
            for worker in group.dying:
                worker.how_it_ended()
        self._groups.clear()
        self._all.clear()

    def shut(self) -> None:
        """End all workers, and wait for their end."""
        with self._changed:
            self._is_shut = True
            self._changed.notify_all()
            supervisor = self._supervisor
        self._asked.put(None)
        if supervisor is not None:
            supervisor.join()


class _Starts:
    """The workers that a user may start now: a token bucket of `most`, filled in `_BURST_S`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._left = float(most)
        self._counted_s = time.monotonic()

    def take(self) -> bool:
        """Take a token. Returns whether there was one."""
        now_s = time.monotonic()
        more = (now_s - self._counted_s) * self._most / _BURST_S
        self._left = min(self._most, self._left + more)
        self._counted_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _kind(group: Group) -> Kind:
    return group.setup.location.kind
