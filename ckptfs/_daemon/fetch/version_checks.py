"""Version checks: bytes count only if the store says that they are of the pinned version.

**The first check** of a file precedes its first read. It learns the ETag, and lets the daemon use
cached blocks of an earlier attachment. The daemon leaves it out if the listing had the ETag, or if
size and mtime identify the version (see ``cache.SETTLED_S``). With `allow_other` it always does the
check, because cached bytes are for users whose own credentials have passed one.

**After a read** whose answer does not name the version itself, a check that *began after* the read
confirms that the object still is the pinned version. Checks are shared: the next check is for all
spans of a file that wait (like a group commit), so a running reader pays no round trip.

**After a refused read**, which the store says is of another version, a check follows, too. If the
check finds the pinned version, the pin says from then on how to read it (``base.repinned``).
"""

from collections.abc import Callable

from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._daemon.fetch.remote_file import Check, RemoteFile
from ckptfs._daemon.fetch.retry import Retry
from ckptfs._daemon.offload import Offload
from ckptfs._store.base import Pin, Store, changed, repinned
from ckptfs._store.versions import is_strong
from ckptfs.errors import CkptfsError, ObjectChanged


def _confirmed(store: Store, pin: Pin) -> Pin:
    return store.confirm(pin)


class VersionChecks:
    """Checks versions. `allow_other` says whether there are users with other rights."""

    def __init__(self, cache: Cache, offload: Offload, retry: Retry, *, allow_other: bool) -> None:
        self._cache = cache
        self._offload = offload
        self._retry = retry
        self._allow_other = allow_other

    def opened(self, file: RemoteFile) -> None:
        """Trust the version of a file that was just opened, if that needs no request."""
        entry, version = file.entry, file.version
        if version.trusted:
            if not entry.about.etag:  # the cache has nothing of the file
                self._cache.learn(entry, file.pin.etag)
            return
        if self._allow_other:
            return
        if entry.about.settled and not file.pin.etag:
            version.pin_etag(entry.about.etag)
        # Blocks of another ETag may be of this version: the listing may have an ETag of its own.
        has_other_etag = entry.about.etag not in ("", file.pin.etag)
        if is_strong(file.pin.etag) and not (file.pin.etag_of == "listing" and has_other_etag):
            self._cache.learn(entry, file.pin.etag)
            version.trusted = True

    async def learn(self, file: RemoteFile, entry: CachedObject) -> None:
        """Do the first check, unless it is done. From then on the ETag is pinned."""
        version = file.version
        if version.trusted:
            return
        async with version.check_lock:
            if not version.trusted:
                await self._check(file, entry)
                version.trusted = True

    async def repin(self, file: RemoteFile, entry: CachedObject, refused: Pin) -> None:
        """Find the pin to read with, after the store has refused a read with the pin `refused`.

        Raises ObjectChanged.
        """
        async with file.version.check_lock:
            if file.pin == refused:
                await self._check(file, entry, repinned)

    def prove(self, file: RemoteFile, pin: Pin) -> None:
        """Pin the version of `pin`, which the answer to a read has named.

        Raises ObjectChanged if another version was pinned meanwhile.
        """
        if file.pin.etag != pin.etag:
            raise changed(file.store.name, pin, "two answers named two versions")
        file.version.pin_etag(pin.etag, file.pin.etag_of)

    async def confirm(self, file: RemoteFile, entry: CachedObject) -> None:
        """Return after a check that began after this call. Raises ObjectChanged."""
        check = await self._joined_check(file) or await self._next_check(file, entry)
        if check.error is not None:
            raise check.error

    async def _joined_check(self, file: RemoteFile) -> Check | None:
        """Wait for the check that has not begun yet; None if there is none, or it was cancelled."""
        while (check := file.version.next_check) is not None:
            await check.done.wait()
            if not check.cancelled:
                return check
        return None

    async def _next_check(self, file: RemoteFile, entry: CachedObject) -> Check:
        """Do one check for all callers that come before it begins."""
        version = file.version
        check = version.next_check = Check()
        try:
            async with version.check_lock:
                version.next_check = None  # begun: later callers need the next check
                await self._check(file, entry)
        except CkptfsError as error:
            check.error = error
        except BaseException:
            check.cancelled = True
            raise
        finally:
            if version.next_check is check:
                version.next_check = None
            check.done.set()
        return check

    async def _check(
        self, file: RemoteFile, entry: CachedObject, ask: Callable[[Store, Pin], Pin] = _confirmed
    ) -> None:
        """Have the store confirm the pinned version, and pin its ETag."""
        known = file.pin.etag
        confirmed = await self._ask(file, ask)
        file.version.pin_etag(confirmed.etag, confirmed.etag_of)
        # A newer attachment uses the cache, too, so the cache may know a later ETag than this file.
        if not file.version.trusted or confirmed.etag != known:
            self._cache.learn(entry, confirmed.etag)

    async def _ask(self, file: RemoteFile, ask: Callable[[Store, Pin], Pin]) -> Pin:
        store, pin = file.store, file.pin

        def confirm_unless_dark() -> Pin | None:
            return None if self._retry.is_dark(store) else ask(store, pin)

        if not self._retry.is_dark(store):
            confirmed = await self._offload.control(confirm_unless_dark)
            if confirmed is not None:
                return confirmed
            # It became dark while this check was in the queue, where it must not hold up others.
        return await self._offload.dark(ask, store, pin)

    @staticmethod
    def check_cached(file: RemoteFile, entry: CachedObject, when: str) -> None:
        """Raise ObjectChanged if the cache has blocks of another version than the pinned one. The
        message says `when` the file has changed."""
        if file.pin.etag != entry.about.etag:
            raise ObjectChanged(f"{file.name} was written again {when}")
