"""Version checks: bytes count only if the store says that they are of the pinned version.

**The first check** of a file happens before its first read: it learns the ETag, and lets cached
blocks of an earlier attachment be used. It is not needed where the listing had the ETag, or where
size and mtime settle it (see ``cache.SETTLED_S``); with `allow_other` it always is, because cached
bytes are for those whose own credentials have passed a check.

**After a read** whose answer does not itself name the version, a check that *began after* it says
that the object is still the pinned one. Checks are shared: all spans of a file that wait are
covered by the next one (like a group commit), so a running reader pays no round trip.

**A read that is refused** because the object would be another version is checked, too: where the
check finds the pinned version, the pin says from then on how to read it (``base.repinned``).
"""

from collections.abc import Callable

from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cached import CachedObject
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.outages import Outages
from ckptfs._daemon.remote import Check, RemoteFile
from ckptfs._store.base import Pin, Store, repinned
from ckptfs.errors import CkptfsError, ObjectChanged


def _confirmed(store: Store, pin: Pin) -> Pin:
    return store.confirm(pin)


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
            # Blocks of another ETag may be of this version: the listing may have one of its own.
            is_of_listing = file.pin.etag_of == "listing" and entry.about.etag not in (
                "",
                file.pin.etag,
            )
            if file.pin.identifies and not is_of_listing:
                self._cache.learn(entry, file.pin.etag)
                file.trusted = True

    async def learn(self, file: RemoteFile, entry: CachedObject) -> None:
        """Do the first check, if it was not done: from here on the version is pinned with its
        ETag."""
        if file.trusted:
            return
        async with file.check_lock:
            if not file.trusted:
                await self._check(file, entry)
                file.trusted = True

    async def repin(self, file: RemoteFile, entry: CachedObject, refused: Pin) -> None:
        """To be called when the store has said of a read with the pin `refused` that the object has
        changed; returns when the file has another pin, to be read with. Raises ObjectChanged."""
        async with file.check_lock:
            if file.pin == refused:
                await self._check(file, entry, repinned)

    async def confirm(self, file: RemoteFile, entry: CachedObject) -> None:
        """Return after a check that began after this call; raises ObjectChanged."""
        check = file.next_check
        while check is not None:
            await check.done.wait()
            if not check.cancelled:
                break
            check = file.next_check
        else:
            check = await self._next_check(file, entry)
        if check.error is not None:
            raise check.error

    async def _next_check(self, file: RemoteFile, entry: CachedObject) -> Check:
        """Do one for all who come before it begins."""
        check = file.next_check = Check()
        try:
            async with file.check_lock:
                file.next_check = None  # begun: whoever comes now needs the next one
                await self._check(file, entry)
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

    async def _check(
        self,
        file: RemoteFile,
        entry: CachedObject,
        ask: Callable[[Store, Pin], Pin] = _confirmed,
    ) -> None:
        """Pin the version that the store says is the pinned one."""
        known = file.pin.etag
        confirmed = await self._ask(file, ask)
        file.pin_etag(confirmed.etag, confirmed.etag_of)
        # What is no news here may be old for the cache, which a newer attachment uses, too.
        if not file.trusted or confirmed.etag != known:
            self._cache.learn(entry, confirmed.etag)

    async def _ask(self, file: RemoteFile, ask: Callable[[Store, Pin], Pin]) -> Pin:
        store, pin = file.store, file.pin

        def confirm_unless_dark() -> Pin | None:
            return None if self._outages.is_dark(store) else ask(store, pin)

        if not self._outages.is_dark(store):
            confirmed = await self._offload.control(confirm_unless_dark)
            if confirmed is not None:
                return confirmed
            # It became dark while this check was in the queue, where it must not hold up others.
        return await self._offload.dark(ask, store, pin)

    @staticmethod
    def check_cached(file: RemoteFile, entry: CachedObject, when: str) -> None:
        """Raise ObjectChanged where the cache has blocks of another version; `when` says since when
        that can be."""
        if file.pin.etag != entry.about.etag:
            raise ObjectChanged(f"{file.name} was written again {when}")
