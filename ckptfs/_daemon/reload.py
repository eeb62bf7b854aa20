"""Reloads: the configuration is read anew while everything goes on.

The daemon's `Config` is one object that all parts have, and it is changed in place: what is read
when it is needed (limits, times) counts at once. What was copied or built from it is told
(`configure`). Only settings that may change so do (``_model.settings.changes``); an invalid file
changes nothing.

The keeper gets the new configuration, before it counts, as a line in the pipe on which the daemon
has said that it is ready: the next daemon has to begin with it.

**Named stores.** Attachments whose store now has other credentials go on with these. Those whose
name now stands for another place or for none, or is not for their user any more, end, as do those
that would be read with daemon's rights which are not lent any more.
"""

import logging
import os
from collections.abc import Callable, Mapping

import msgspec
import trio

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.limits import check_rights
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.service import Service
from ckptfs._daemon.stores import Stores, known_stores
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.replies import Reloaded
from ckptfs._model.settings import changes
from ckptfs._model.stores import StoreTable
from ckptfs.errors import AccessDenied, CkptfsError

log = logging.getLogger(__name__)


class Reloading:
    """Does reloads, one at a time.

    Args:
        config: The daemon's; changed in place.
        load: Blocking. Reads the new one. Raises ConfigError.
        tell: Blocking. Takes the new one for the next daemon.
        service, fetcher, offload, stores: What is told.
    """

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        tell: Callable[[Config], None],
        service: Service,
        fetcher: Fetcher,
        offload: Offload,
        stores: Stores,
    ) -> None:
        self._config = config
        self._load = load
        self._tell = tell
        self._service = service
        self._fetcher = fetcher
        self._offload = offload
        self._stores = stores
        self._lock = trio.Lock()

    async def reload(self) -> Reloaded:
        """Read it, and have it count. Raises ConfigError; then all stays as it was."""
        async with self._lock:
            try:
                new = await self._offload.control(self._load)
            except CkptfsError as error:
                log.error("the configuration was not reloaded: %s", error)
                raise
            when = changes()
            others = [n for n in when if getattr(new, n) != getattr(self._config, n)]
            changed = [name for name in others if when[name] == "reload"]
            fixed = {n: getattr(self._config, n) for n, change in when.items() if change == "mount"}
            new = msgspec.structs.replace(new, **fixed)
            known = await self._offload.control(known_stores, new.store)
            ended: list[str] = []
            with trio.CancelScope(shield=True):  # never half of it
                await self._offload.control(self._tell, new)
                before = self._config.store
                for name in changed:
                    msgspec.structs.force_setattr(self._config, name, getattr(new, name))
                self._stores.known = known
                self._service.configure(self._config)
                await self._fetcher.configure(self._config)
                ended = await self._end_forbidden()
                self._reopen(before)
        unchanged = [name for name in others if when[name] == "mount"]
        log.info("reloaded: %s", ", ".join(changed) or "nothing has changed")
        if unchanged:
            log.warning("not reloaded, because a mount keeps them: %s", ", ".join(unchanged))
        return Reloaded(changed=changed, unchanged=unchanged, ended=ended)

    async def _end_forbidden(self) -> list[str]:
        attachments = self._service.attachments
        ended: list[str] = []
        for attachment in attachments:
            if attachments.get(attachment.key) is not attachment:
                continue  # it has ended meanwhile
            if await self._goes_on(attachment, attachments.opened_for(attachment)):
                continue
            if attachments.get(attachment.key) is attachment:
                uri = attachment.location.uri
                log.warning("%s is not for uid %d any more", uri, attachment.uid)
                attachments.remove(attachment)
                ended.append(uri)
        return ended

    async def _goes_on(self, attachment: Attachment, location: Location) -> bool:
        uid, gid = attachment.uid, attachment.gid
        try:
            check_rights(uid, location, self._config)
        except AccessDenied:
            return False
        if location.store is None:
            return True
        return await self._offload.control(self._stores.still_for, location, uid, gid)

    def _reopen(self, before: Mapping[str, StoreTable]) -> None:
        """Have attachments use the new credentials of their stores."""
        attachments = self._service.attachments
        for attachment in attachments:
            location = attachments.opened_for(attachment)
            if location.store is None:
                continue
            name = location.store.name
            if before.get(name) == self._config.store.get(name):
                continue
            try:
                timeout_s = self._config.store_timeout_s
                store = self._stores.open(location, timeout_s, attachment.uid)
            except CkptfsError as error:
                log.error("%s goes on with its former credentials: %s", location.uri, error)
            else:
                attachments.use_store(attachment, location, store)


def tell_by(fd: int) -> Callable[[Config], None]:
    """What writes to the keeper's pipe. Blocking, though the pipe has room for each: see
    ``process.DaemonProcess``."""

    def tell(config: Config) -> None:
        line = memoryview(msgspec.json.encode(config) + b"\n")
        while line:
            line = line[os.write(fd, line) :]

    return tell
