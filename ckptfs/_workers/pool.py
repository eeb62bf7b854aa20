"""The workers of this process: which call gets which of them, and when they start and end.

**A group** is one store of one user: the same kind, options and credentials. Its calls go to the
worker that has the fewest. It has one worker; a second and further ones are started for a library
that holds the interpreter's lock while it waits (`_PROCESSES`), as soon as all have a call.

**Limits.** There are at most `PROCESSES_MAX` workers, and of one of the other users a share of
them. Where there is no place, a worker without calls ends first, the one that was used longest ago;
otherwise the call waits until its deadline. A user may start as many workers at once as he may
have, and then one sixteenth of that each second, so that a library that dies again and again is no
fork bomb.

**Deaths in a row.** A worker that dies is replaced at once. After each further death, without an
answer in between, the next start waits: 0.2 s, and twice as long each time, up to `_PAUSE_S_MAX`.
From `_ROW` deaths on reads and checks do not wait for it, because they would keep threads that
others need: they fail until then, and are made again (``_daemon.outages``).

One thread, the supervisor, starts all workers and never ends, because the kernel ends a worker with
the thread that has started it. It also buries the dead and looks after what was left behind.
`_changed` guards the groups and what the pool keeps about workers. It is not held during IO that
can wait.
"""

import itertools
import logging
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from queue import Empty, SimpleQueue

import msgspec

from ckptfs._model.location import Kind, Location
from ckptfs._store.deadline import deadline_s
from ckptfs._workers.channel import Channel, Nonsense
from ckptfs._workers.counts import COUNTS
from ckptfs._workers.messages import PROTOCOL, Call, Setup, encode
from ckptfs._workers.process import Reason, Worker
from ckptfs.errors import StoreTimeout, StoreUnavailable

log = logging.getLogger(__name__)

PROCESSES_MAX = 32
"""Of all users. A worker with pyarrow in it takes some 70 MB."""
_PROCESSES: dict[Kind, int] = {"gcs": 4}
"""How many of one group. pyarrow's Google client holds the interpreter's lock while it waits."""
_BURST_S = 16.0
"""In so many seconds a user may start all workers again that he may have."""
_ROW = 3
_PAUSE_S = 0.1
_PAUSE_S_MAX = 10.0
IDLE_S = 30.0
"""A worker costs 0.15 s to start, and its library may have to get a token anew."""
_CHANNEL_IDLE_S = 10.0
"""The memory of a channel is as large as the largest read through it."""
_END_S = 1.0
"""A worker that dies closes its channels a moment before it is dead."""
GRACE_S = 1.0
LEFT_MAX = 8
_DYING_MAX = 4
"""Workers of one group that were killed and are not gone, because they wait for a disk in the
kernel: a file system of the network that does not answer."""
_TICK_S = 0.25

_WHY: dict[Reason, str] = {
    "stopped": "the process of the store's library was stopped",
    "still": "the store's library stood still for too long",
    "overdue": "calls of the store's library did not end",
    "nonsense": "the process of the store's library made no sense",
}


class Died(Exception):
    """The worker has died in the middle of the call; the text is for the caller's error."""


class Group:
    """The workers of one store of one user. Belongs to the pool.

    Attributes:
        key: What tells it from others.
        uid: The user.
        setup: What they are told.
        stores: The numbers of the directories that are in use.
        workers: Those that are alive; `dying`: those that were killed and are not gone yet.
        is_starting: One is being started.
        deaths: In a row; `how`: the last of them.
        not_before_s: When the next one may start.
    """

    def __init__(self, key: Hashable, uid: int, setup: Setup) -> None:
        self.key = key
        self.uid = uid
        self.setup = setup
        self.processes_max = _PROCESSES.get(setup.location.kind, 1)
        self.stores: set[int] = set()
        self.workers: list[Worker] = []
        self.dying: list[Worker] = []
        self.is_starting = False
        self.deaths = 0
        self.how = ""
        self.not_before_s = 0.0

    def best(self) -> Worker | None:
        """The one for the next call."""
        serving = [worker for worker in self.workers if not worker.is_retired]
        return min(serving, key=lambda worker: worker.calls, default=None)

    @property
    def size(self) -> int:
        """How many there are, or will be."""
        return len(self.workers) + self.is_starting

    @property
    def may_have_more(self) -> bool:
        """Whether those that get calls are fewer than they may be."""
        serving = sum(not worker.is_retired for worker in self.workers)
        is_stuck = len(self.dying) >= _DYING_MAX
        return serving + self.is_starting < self.processes_max and not is_stuck


class Pool:
    """All workers.

    Args:
        limit_for: How much of a limit a user may have.
        pickled: The filesystem of a private daemon.
    """

    def __init__(self, limit_for: Callable[[int, int], int], pickled: bytes = b"") -> None:
        self._limit_for = limit_for
        self._pickled = pickled
        self._changed = threading.Condition()
        self._groups: dict[Hashable, Group] = {}  # by store, user and credentials
        self._all: set[Group] = set()  # with those that a closed store still uses
        self._starts: dict[int, _Starts] = {}
        self._numbers = itertools.count()
        self._asked: SimpleQueue[Group | None] = SimpleQueue()
        self._released: deque[tuple[Group, int]] = deque()
        self._supervisor: threading.Thread | None = None
        self._is_shut = False
        COUNTS.running = self._memory

    def _memory(self) -> list[int]:
        with self._changed:
            return [worker.memory_bytes() for group in self._all for worker in group.workers]

    # -- directories

    def enter(
        self, owner: object, location: Location, timeout_s: float, uid: int
    ) -> tuple[Group, int, Callable[[], object]]:
        """The group for a directory that `owner` uses from now on, a number for the directory, and
        what is to be called when it is not used any more, at the latest when `owner` is gone."""
        place = msgspec.structs.replace(location, path="", store=None)
        secrets = tuple(sorted(place.secrets.items()))
        options = tuple(sorted((name, repr(value)) for name, value in place.options.items()))
        server = location.path.split("/")[:3] if location.kind == "http" else []
        key = (uid, place.kind, *server, options, secrets, timeout_s)
        with self._changed:
            self._forget_released()
            group = self._groups.get(key)
            if group is None:
                setup = Setup(PROTOCOL, place, timeout_s, self._pickled)
                group = self._groups[key] = Group(key, uid, setup)
            number = next(self._numbers)
            group.stores.add(number)
        leave = weakref.finalize(owner, self._release, group, number)
        leave.atexit = False
        return group, number, leave

    def _release(self, group: Group, number: int) -> None:
        """Called by any thread, at any time, also by the garbage collector: takes no lock."""
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
        """Forget its credentials, if nothing needs them any more."""
        if group.stores or group.size or group.dying:
            return
        self._all.discard(group)
        if self._groups.get(group.key) is group:
            del self._groups[group.key]

    # -- calls

    def take(self, group: Group, name: str, *, waits: bool) -> tuple[Worker, Channel]:
        """A worker of `group` with a channel, for one call; `name` is the store's. `waits`: also
        for a start that is delayed because they have died too often.

        Raises:
            StoreTimeout: There was no place for one until the deadline.
            StoreUnavailable: They have died too often, or this process has no descriptors.
            Died: The worker does not take the channel.
        """
        with self._changed:
            self._all.add(group)
            while True:
                worker = group.best()
                if worker is None or worker.calls:
                    self._want(group, is_needed=worker is None)
                if worker is not None:
                    break
                if not waits:
                    self._check_row(group, name)
                left_s = deadline_s() - time.monotonic()
                if left_s <= 0 or self._is_shut:
                    raise StoreTimeout(f"{name}: no process for the store's library was free")
                self._changed.wait(min(left_s, _TICK_S))
            worker.calls += 1
            if worker.idle:
                return worker, worker.idle.pop()
        try:
            return worker, worker.new_channel()
        except OSError as error:
            with self._changed:
                worker.calls -= 1
            if isinstance(error, BlockingIOError):
                worker.kill("still")
            if worker.is_retired or isinstance(error, ConnectionError):
                raise self.died(group, worker, name) from None
            raise StoreUnavailable(
                f"{name}: no channel to the store's library: {error.strerror}; raise the limit of "
                "open files"
            ) from None

    def give_back(self, group: Group, worker: Worker, channel: Channel) -> None:
        """The call has been answered."""
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

    def leave_behind(self, worker: Worker, channel: Channel) -> None:
        """The call goes on in the worker, and has no caller any more."""
        with self._changed:
            channel.deadline_s = max(time.monotonic(), deadline_s())
            worker.left.append(channel)

    def drop(self, group: Group, worker: Worker, channel: Channel) -> None:
        """The channel is of no use any more."""
        channel.close()
        with self._changed:
            worker.calls -= 1
            self._close_if_buried(group, worker)

    def died(self, group: Group, worker: Worker, name: str) -> Died:
        """The worker has died, or was killed: what is to be raised."""
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

    def _want(self, group: Group, *, is_needed: bool) -> None:
        """Have a worker started for `group`, if it may have one more. `is_needed`: it has none."""
        if group.is_starting or not group.may_have_more or self._is_shut:
            return
        if group.not_before_s > time.monotonic():
            return
        if not is_needed and not self._has_place(group.uid):
            return
        if not self._make_place(group.uid) or not self._starts_of(group.uid).take():
            return
        group.is_starting = True
        if self._supervisor is None:
            self._supervisor = threading.Thread(
                target=self._supervise, name="ckptfs-workers", daemon=True
            )
            self._supervisor.start()
        self._asked.put(group)

    def _starts_of(self, uid: int) -> "_Starts":
        return self._starts.setdefault(uid, _Starts(self._limit_for(uid, PROCESSES_MAX)))

    def _has_place(self, uid: int) -> bool:
        limit = self._limit_for(uid, PROCESSES_MAX)
        own = [group for group in self._all if group.uid == uid]
        if sum(group.size for group in own) >= limit or sum(len(g.dying) for g in own) >= limit:
            return False
        return sum(group.size for group in self._all) < PROCESSES_MAX

    def _make_place(self, uid: int) -> bool:
        """Whether the user may have one more, when an idle one has ended."""
        if self._has_place(uid):
            return True
        own = [group for group in self._all if group.uid == uid]
        is_full = sum(group.size for group in own) >= self._limit_for(uid, PROCESSES_MAX)
        idle = [
            (worker.used_s, id(worker), group, worker)
            for group in (own if is_full else self._all)
            for worker in group.workers
            if not worker.calls
        ]
        if not idle:
            return False
        _, _, group, worker = min(idle)
        self._end(group, worker, "idle")
        return self._has_place(uid)

    # -- ends, with `_changed` held

    def _end(self, group: Group, worker: Worker, reason: Reason) -> None:
        worker.kill(reason)
        self._bury(group, worker, "")

    def _bury(self, group: Group, worker: Worker, how: str) -> None:
        """The worker is no more; once."""
        if worker not in group.workers:
            return
        group.workers.remove(worker)
        group.dying.append(worker)
        COUNTS.ended(worker.reason)
        if worker.reason in ("died", "nonsense"):
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
            pause_s = min(_PAUSE_S_MAX, _PAUSE_S * 2 ** (group.deaths - 1))
            group.not_before_s = time.monotonic() + pause_s * random.uniform(0.5, 1)

    def _close_if_buried(self, group: Group, worker: Worker) -> None:
        """Not while a thread may use it."""
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
                    COUNTS.started()
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
            unused = [c for c in worker.idle if now_s - c.used_s > _CHANNEL_IDLE_S]
            for channel in unused:
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
        """End all workers, and wait until they are gone."""
        with self._changed:
            self._is_shut = True
            self._changed.notify_all()
            supervisor = self._supervisor
        self._asked.put(None)
        if supervisor is not None:
            supervisor.join()


class _Starts:
    """How many workers a user may start now: a bucket that holds `most` and is full again in
    `_BURST_S`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._left = float(most)
        self._counted_s = time.monotonic()

    def take(self) -> bool:
        """Count one, if there is one."""
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
