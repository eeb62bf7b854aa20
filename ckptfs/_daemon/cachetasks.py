"""Commands on the cache as a whole: whose they are, what each may touch, how many there may be.

An object in the cache belongs to the user for whose attachment it was cached first. Root and the
daemon's own user see and touch all; others what is theirs, and learn nothing of the rest.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable

import trio

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cachetask import CacheTask
from ckptfs._daemon.limits import is_ours, limit_for, may_see
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.upkeep import Chosen, Goal, Upkeep
from ckptfs._model.manifest import printable
from ckptfs._model.requests import CacheRequest, ClearCache, CollectCache, VerifyCache
from ckptfs.errors import LimitExceeded, LocationError, ProtocolError

_TASKS_MAX = 16
"""That run at the same time. One thread works for all of them."""
_DIRECTORY = re.compile(r"(.+-[0-9a-f]{12})(-[0-9]{1,10})?")
"""A checkpoint's directory in the mount, whoever has attached it."""


class CacheTasks:
    """Begins tasks.

    Args:
        cache: What they are about.
        bytes_max: The limit that a collection without a goal has; 0: none.
        offload: Runs disk IO.
        nursery: Runs the tasks.
        attached: All attachments of the daemon.
    """

    def __init__(
        self,
        cache: Cache,
        bytes_max: Callable[[], int],
        offload: Offload,
        nursery: trio.Nursery,
        attached: Iterable[Attachment],
    ) -> None:
        self._bytes_max = bytes_max
        self._cache = cache
        self._nursery = nursery
        self._attached = attached
        self._upkeep = Upkeep(cache, offload)
        self._running: Counter[int] = Counter()  # by user

    def begin(self, request: CacheRequest, uid: int) -> CacheTask:
        """Begin what that user asks for. Raises LimitExceeded, ProtocolError."""
        most = limit_for(uid, _TASKS_MAX)
        if self._running[uid] >= most or sum(self._running.values()) >= _TASKS_MAX:
            raise LimitExceeded(
                f"{most} cache commands are running, the most that there can be for uid {uid}; "
                "wait for one to end"
            )
        if isinstance(request, CollectCache):
            asked = [request.free, request.keep, request.older_s]
            if sum(each is not None for each in asked) > 1:
                raise ProtocolError("a cache can be collected for one goal at a time")
        task = CacheTask()
        task.removed_at_start = self._cache.removed_at_start if is_ours(uid) else 0
        self._running[uid] += 1
        self._nursery.start_soon(self._run, task, request, uid)
        return task

    async def _run(self, task: CacheTask, request: CacheRequest, uid: int) -> None:
        try:
            await task.run(lambda task: self._do(task, request, uid))
        finally:
            self._running -= Counter([uid])  # zeros go

    async def _do(self, task: CacheTask, request: CacheRequest, uid: int) -> None:
        upkeep = self._upkeep
        if isinstance(request, CollectCache):
            mine = self._chosen(uid, None)
            await upkeep.collect(task, mine, await self._goal(request, mine))
            return
        chosen = self._chosen(uid, await self._named(uid, request.checkpoint))
        if isinstance(request, VerifyCache):
            await upkeep.verify(task, chosen, request.rate)
        elif isinstance(request, ClearCache):
            await upkeep.collect(task, chosen, Goal(None, float("inf")))
        elif request.checkpoint:
            await upkeep.list_files(task, chosen)
        else:
            visible = [a for a in self._attached if may_see(uid, a)]
            pinned = {a.origin.name for a in visible if a.pinned}
            attached = {a.origin.name: a.origin.name in pinned for a in visible}
            await upkeep.list_checkpoints(task, chosen, attached)

    async def _goal(self, request: CollectCache, mine: Chosen) -> Goal:
        if request.older_s is not None:
            return Goal(None, time.time() - request.older_s)
        if request.keep is not None:
            held = sum(stored.bytes for _, stored in await self._upkeep.chosen(mine))
            return Goal(max(0, held - request.keep), float("inf"))
        free = request.free
        if free is None:
            free = self._cache.surplus_bytes(self._bytes_max())
        return Goal(free, float("inf"))

    def _chosen(self, uid: int, name: str | None) -> Chosen:
        """What is this user's, of the checkpoint with that directory, or of all (None)."""
        everybody = is_ours(uid)
        return lambda origin: (everybody or origin.uid == uid) and name in (None, origin.name)

    async def _named(self, uid: int, wanted: str) -> str | None:
        """The directory of a checkpoint, as `Origin` has it, that is named by it, with or without
        the user, or by the checkpoint's own name; None: all are meant. Raises LocationError."""
        if not wanted:
            return None
        if directory := _DIRECTORY.fullmatch(wanted):
            return directory[1]
        names = {
            stored.origin.name
            for _, stored in await self._upkeep.chosen(self._chosen(uid, None))
            if stored.origin.name.rpartition("-")[0] == wanted
        }
        if len(names) == 1:
            return names.pop()
        if names:
            some = ", ".join(sorted(names)[:4])
            raise LocationError(
                f"{len(names)} checkpoints in the cache are called {printable(wanted)}; give the "
                f"URI, or one of {some}"
            )
        raise LocationError(
            f"nothing of {printable(wanted)} is in the cache; ckptfs cache ls lists what is"
        )
