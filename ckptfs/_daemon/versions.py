"""Version checks: bytes count only if the store says that they are of the pinned version.

**The first check** of a file happens before its first read: it learns the ETag, and lets cached
blocks of an earlier attachment be used. It is not needed where the listing had the ETag, or where
size and mtime settle it (see ``cache.SETTLED_S``); with `allow_other` it always is, because cached
bytes are for those whose own credentials have passed a check.

**After a read** whose answer does not itself name the version, a check that *began after* it says
that the object is still the pinned one. Checks are shared: all spans of a file that wait are
covered by the next one (like a group commit), so a running reader pays no round trip.
"""

from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cached import CachedObject
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.outages import Outages
from ckptfs._daemon.remote import Check, RemoteFile
from ckptfs._store.base import Pin
from ckptfs.errors import CkptfsError, ObjectChanged


class Versions:
    """Checks versions. `allow_other`: whether there are users whose rights differ."""

    def __init__(
        self, cache: Cache, offload: Offload, outages: Outages, *, allow_other: bool
    ) -> None:
        self._cache = cache
        self._offload = offload
        self._outages = outages
        self._allow_other = allow_other

    def opened(self, file: RemoteFile) -> None:
        """Use what is known of the file's version without asking the store."""
        entry = file.entry
        if file.trusted:
            if not entry.about.etag:  # nothing of it is cached
                self._cache.learn(entry, file.pin.etag)
        elif not self._allow_other:
            if entry.about.settled and not file.pin.etag:
                file.pin_etag(entry.about.etag)
            if file.pin.etag:
                self._cache.learn(entry, file.pin.etag)
                file.trusted = True

    async def learn(self, file: RemoteFile, entry: CachedObject) -> None:
        """Do the first check, if it was not done: from here on the version is pinned with its
        ETag."""
        if file.trusted:
            return
        async with file.check_lock:
            if not file.trusted:
                confirmed = await self._ask(file)
                file.pin_etag(confirmed.etag)
                self._cache.learn(entry, file.pin.etag)
                file.trusted = True

    async def confirm(self, file: RemoteFile) -> None:
        """Return after a check that began after this call; raises ObjectChanged."""
        check = file.next_check
        while check is not None:
            await check.done.wait()
            if not check.cancelled:
                break
            check = file.next_check
        else:
            check = await self._next_check(file)
        if check.error is not None:
            raise check.error

    async def _next_check(self, file: RemoteFile) -> Check:
        """Do one for all who come before it begins."""
        check = file.next_check = Check()
        try:
            async with file.check_lock:
                file.next_check = None  # begun: whoever comes now needs the next one
                await self._ask(file)
        except CkptfsError as error:
            check.error = error
        except BaseException:
            check.cancelled = True
            raise
        finally:
            if file.next_check is check:
                file.next_check = None
            check.done.set()
        return check

    async def _ask(self, file: RemoteFile) -> Pin:
        store, pin = file.store, file.pin

        def confirm_unless_dark() -> Pin | None:
            return None if self._outages.is_dark(store) else store.confirm(pin)

        if not self._outages.is_dark(store):
            confirmed = await self._offload.control(confirm_unless_dark)
            if confirmed is not None:
                return confirmed
            # It became dark while this check was in the queue, where it must not hold up others.
        return await self._offload.dark(store.confirm, pin)

    @staticmethod
    def check_cached(file: RemoteFile, entry: CachedObject, when: str) -> None:
        """Raise ObjectChanged where the cache has blocks of another version; `when` says since when
        that can be."""
        if file.pin.etag != entry.about.etag:
            raise ObjectChanged(f"{file.name} was written again {when}")
