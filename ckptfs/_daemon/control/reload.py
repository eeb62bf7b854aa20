"""Reloads: the daemon reads its configuration again while it serves.

`CurrentConfig` holds the configuration, and a reload replaces it as a whole. Code that reads a
setting from there at each use has the new value at once. A reload calls the parts that keep a copy
of a setting, or a value made from it. Only settings that may change do
(``ckptfs._model.config.changes``), and an invalid file changes nothing.

Before the new configuration is in force, the keeper gets it as a line in the pipe on which the
daemon has said that it is ready. The next daemon starts with it.

**Named stores.** If a store has other credentials now, its attachments continue with these. A
reload ends each attachment whose store's name now stands for another place or for none, whose user
may not use the store any more, or that would be read with the daemon's rights although the daemon
does not lend these any more.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import trio

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.control.named_stores import Stores, known_stores
from ckptfs._daemon.control.permissions import check_rights
from ckptfs._daemon.control.service import Service
from ckptfs._model.config import Config, changes
from ckptfs._model.location import Location
from ckptfs._model.named_store import StoreTable
from ckptfs._model.protocol.replies import Reloaded
from ckptfs.errors import AccessDenied, CkptfsError

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Reloading:
    """Does reloads, one at a time.

    Args:
        service: The daemon's parts.
        stores: The named stores.
        load: Reads the new configuration. Blocking. Raises ConfigError.
        tell_keeper: Sends the new configuration to the keeper. Blocking, although the pipe has
            space for a configuration (``ckptfs._keeper.daemon_process``).
    """

    service: Service
    stores: Stores
    load: Callable[[], Config]
    tell_keeper: Callable[[Config], None]
    _lock: trio.Lock = field(default_factory=trio.Lock, init=False)

    async def reload(self) -> Reloaded:
        """Read the configuration, and put it in force. After a ConfigError the old configuration
        stays in force."""
        offload = self.service.offload
        async with self._lock:
            before = self.service.current.config
            try:
                loaded = await offload.control(self.load)
            except CkptfsError as error:
                log.error("the configuration was not reloaded: %s", error)
                raise
            when = changes()
            others = [name for name in when if getattr(loaded, name) != getattr(before, name)]
            fixed = {name: getattr(before, name) for name in when if when[name] == "mount"}
            new = msgspec.structs.replace(loaded, **fixed)
            known = await offload.control(known_stores, new.store)
            ended: list[str] = []
            with trio.CancelScope(shield=True):  # a part of a reload must not happen alone
                await offload.control(self.tell_keeper, new)
                self.service.current.config = new
                self.stores.known = known
                self.service.metadata.deadline_s = new.read_deadline_s
                await self.service.fetcher.configure(new)
                ended = await self._end_forbidden()
                self._reopen(before.store)
        changed = [name for name in others if when[name] == "reload"]
        unchanged = [name for name in others if when[name] == "mount"]
        log.info("reloaded: %s", ", ".join(changed) or "nothing has changed")
        if unchanged:
            log.warning("not reloaded, because a mount keeps them: %s", ", ".join(unchanged))
        return Reloaded(changed=changed, unchanged=unchanged, ended=ended)

    async def _end_forbidden(self) -> list[str]:
        """End the attachments whose users have lost their right, and return their URIs."""
        attachments = self.service.attachments
        ended: list[str] = []
        for attachment in attachments:
            if attachments.get(attachment.key) is not attachment:
                continue  # it has ended meanwhile
            if await self._is_allowed(attachment, attachments.opened_for(attachment)):
                continue
            if attachments.get(attachment.key) is attachment:
                uri = attachment.location.uri
                log.warning("%s is not for uid %d any more", uri, attachment.uid)
                attachments.remove(attachment)
                ended.append(uri)
        return ended

    async def _is_allowed(self, attachment: Attachment, location: Location) -> bool:
        uid, gid = attachment.uid, attachment.gid
        try:
            check_rights(uid, location, self.service.current.config, attachment.volume)
        except AccessDenied:
            return False
        if location.store is None:
            return True
        return await self.service.offload.control(self.stores.still_for, location, uid, gid)

    def _reopen(self, before: Mapping[str, StoreTable]) -> None:
        attachments = self.service.attachments
        config = self.service.current.config
        for attachment in attachments:
            location = attachments.opened_for(attachment)
            if location.store is None:
                continue
            name = location.store.name
            if before.get(name) == config.store.get(name):
                continue
            try:
                store = self.stores.open(location, config.store_timeout_s, attachment.uid)
            except CkptfsError as error:
                log.error("%s continues with its former credentials: %s", location.uri, error)
            else:
                attachments.use_store(attachment, location, store)
