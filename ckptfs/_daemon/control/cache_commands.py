"""Commands on the whole cache, with the objects that each user may list, check and remove.

An object in the cache belongs to the user for whose attachment the daemon has cached it first. Root
and the daemon's own user see and remove all objects. Other users see and remove their own objects.
"""

import re
import time
from collections.abc import Iterable

import trio

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.jobs import CacheJob
from ckptfs._daemon.cache.maintenance import Chosen, Goal, Upkeep
from ckptfs._daemon.control.permissions import may_see
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.quotas import RunningQuota, is_ours
from ckptfs._model.manifest import printable
from ckptfs._model.named_store import is_uri
from ckptfs._model.protocol.requests import CacheRequest, ClearCache, CollectCache, VerifyCache
from ckptfs.errors import LocationError, ProtocolError

_COMMANDS_MAX = 16
"""Commands at the same time. One thread works for all of them."""
_DIRECTORY = re.compile(r"(.+-[0-9a-f]{12})(-[0-9]{1,10})?")
"""A checkpoint's directory in the mount, for any user."""


class CacheCommands:
    """Begins commands, and limits how many run for each user."""

    def __init__(
        self, cache: Cache, offload: Offload, nursery: trio.Nursery, attached: Iterable[Attachment]
    ) -> None:
        self._cache = cache
        self._nursery = nursery
        self._attached = attached
        self._upkeep = Upkeep(cache, offload)
        self._quota = RunningQuota(_COMMANDS_MAX, "cache commands")

    def begin(self, request: CacheRequest, uid: int) -> CacheJob:
        """Begin a user's command. Raises LimitExceeded, ProtocolError."""
        if isinstance(request, CollectCache):
            goals = [request.free, request.keep, request.older_s]
            if sum(each is not None for each in goals) > 1:
                raise ProtocolError("a cache can be collected for one goal at a time")
        self._quota.take(uid)
        job = CacheJob()
        job.removed_at_start = self._cache.index.removed if is_ours(uid) else 0
        self._nursery.start_soon(self._run, job, request, uid)
        return job

    async def _run(self, job: CacheJob, request: CacheRequest, uid: int) -> None:
        try:
            await job.run(lambda job: self._do(job, request, uid))
        finally:
            self._quota.give_back(uid)

    async def _do(self, job: CacheJob, request: CacheRequest, uid: int) -> None:
        upkeep = self._upkeep
        if isinstance(request, CollectCache):
            mine = self._chosen(uid, None)
            await upkeep.collect(job, mine, await self._goal(request, mine))
            return
        chosen = self._chosen(uid, await self._named(uid, request.checkpoint))
        if isinstance(request, VerifyCache):
            await upkeep.verify(job, chosen, request.rate)
        elif isinstance(request, ClearCache):
            await upkeep.collect(job, chosen, Goal(None, float("inf")))
        elif request.checkpoint:
            await upkeep.list_files(job, chosen)
        else:
            visible = [a for a in self._attached if may_see(uid, a)]
            pinned = {a.origin.name for a in visible if a.leases.pinned}
            attached = {a.origin.name: a.origin.name in pinned for a in visible}
            await upkeep.list_checkpoints(job, chosen, attached)

    async def _goal(self, request: CollectCache, mine: Chosen) -> Goal:
        if request.older_s is not None:
            return Goal(None, time.time() - request.older_s)
        if request.keep is not None:
            cached = sum(stored.bytes for _, stored in await self._upkeep.chosen(mine))
            return Goal(max(0, cached - request.keep), float("inf"))
        free = request.free
        if free is None:
            free = self._cache.index.surplus_bytes()
        return Goal(free, float("inf"))

    def _chosen(self, uid: int, name: str | None) -> Chosen:
        """The objects of a user, of the checkpoint with that directory or of all checkpoints
        (None)."""
        sees_all = is_ours(uid)
        return lambda origin: (sees_all or origin.uid == uid) and name in (None, origin.name)

    async def _named(self, uid: int, wanted: str) -> str | None:
        """The directory of a user's checkpoint, as in `Origin`; None for all checkpoints ("").
        `wanted` is the directory with or without the user's part, the checkpoint's own name, or its
        URI in a named store. Raises LocationError."""
        if not wanted:
            return None
        if is_uri(wanted):
            return await self._at_uri(uid, wanted)
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

    async def _at_uri(self, uid: int, uri: str) -> str:
        """The directory of the checkpoint with that URI; the URI itself if the cache has no such
        checkpoint."""
        origins = [a.origin for a in self._attached if may_see(uid, a)]
        origins += [s.origin for _, s in await self._upkeep.chosen(self._chosen(uid, None))]
        return next((origin.name for origin in origins if origin.uri == uri), uri)
