"""Attaching: from a location to an attachment that shows it.

An attach that finds the place attached and in nobody's use (lingering, or only pinned) lists the
store again, and shows the new version if there is one; one that finds it in use joins the snapshot
of the others.

`_locks` makes attaches of one place wait for each other; those that waited for one which found the
store dark share its answer, instead of asking one by one.
"""

import logging

import trio

from ckptfs._daemon.attachment import Attachment, new_attachment
from ckptfs._daemon.attachments import Attachments, Key
from ckptfs._daemon.handoff import Handoff
from ckptfs._daemon.limits import StoreCalls, check_attached, check_files, check_rights
from ckptfs._daemon.metadata import MetadataKeeper
from ckptfs._daemon.records import Made, recorder
from ckptfs._daemon.stores import OpenFor
from ckptfs._daemon.users import cache_scope
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.manifest import Manifest, build_manifest
from ckptfs._store.base import Store, pin_of
from ckptfs.errors import Busy, ObjectChanged, StoreTimeout, StoreUnavailable

log = logging.getLogger(__name__)

_SKIPPED_IN_LOG = 100
"""Skipped objects that are logged for each attachment."""


class Attaching:
    """Attaches.

    Args:
        config: Limits and times.
        attachments: What is attached.
        metadata: Told of what is listed again.
        store_calls: Runs the listings.
        open_store: Makes the stores.
        handoff: Where attachments are written down for the next daemon.
    """

    def __init__(
        self,
        config: Config,
        attachments: Attachments,
        metadata: MetadataKeeper,
        store_calls: StoreCalls,
        open_store: OpenFor,
        handoff: Handoff,
    ) -> None:
        self._config = config
        self._attachments = attachments
        self._metadata = metadata
        self._store_calls = store_calls
        self._open_store = open_store
        self._handoff = handoff
        self._locks: dict[Key, trio.Lock] = {}
        self._outages: dict[Key, tuple[Location, StoreUnavailable]] = {}

    async def attach(self, location: Location, uid: int, gid: int, *, pinned: bool) -> Attachment:
        """The attachment of `location` for that user, with one control connection holding it.

        Raises LocationError, CheckpointNotFound, CheckpointIsFile, AccessDenied, StoreError and its
        kinds (StoreTimeout at the latest after `attach_deadline_s`), LimitExceeded.
        """
        check_rights(uid, location, self._config)
        check_files(location)
        key = (uid, location.identity)
        lock = self._locks.setdefault(key, trio.Lock())
        try:
            with trio.fail_after(self._config.attach_deadline_s):
                async with lock:
                    asked, outage = self._outages.get(key, (None, None))
                    if outage is not None and asked == location:
                        raise type(outage)(*outage.args)
                    attachment = await self._attach(key, location, uid, gid)
                    self._attachments.hold(attachment)
        except StoreUnavailable as error:
            self._outages[key] = location, error
            raise
        except trio.TooSlowError:
            raise StoreTimeout(
                f"{location.uri}: the store gave no listing within "
                f"{self._config.attach_deadline_s:g} s; check the endpoint, or raise "
                "attach_deadline_s"
            ) from None
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._locks.pop(key, None)
                self._outages.pop(key, None)
        if pinned:
            attachment.pin(True)
        return attachment

    async def _attach(self, key: Key, location: Location, uid: int, gid: int) -> Attachment:
        known = self._attachments.get(key)
        if known is not None and known.cache_scope != cache_scope(uid, location):
            self._end_other_way(known)
            known = None
        if known is not None and known.in_use:
            if location == self._attachments.opened_for(known):
                return known
            store = await self._open(location, uid)
            await self._store_calls.run(uid, _prove_access, store, known.manifest)
            if self._attachments.get(key) is known:  # it may have ended meanwhile
                self._attachments.use_store(known, location, store)
                return known
            known = self._attachments.get(key)
        if known is None:
            check_attached(uid, self._attachments, self._config)
        lent = self._store_of(known, location)
        shown = known.manifest.version if known is not None else ""
        with self._attachments.holding(known):
            store = lent or await self._open(location, uid)
            ordinal = self._handoff.next_ordinal()
            try:
                manifest, fresh = await self._store_calls.run(
                    uid, self._build, ordinal, location, store, uid, gid, shown
                )
                if lent is not None and fresh is not None:  # `lent` ends with `known`
                    fresh.store = await self._open(location, uid)
            except BaseException:
                if lent is None:
                    store.close()
                raise
        known = self._attachments.get(key)  # it may have ended meanwhile, or found a holder
        if known is not None and (known.in_use or known.manifest.version == manifest.version):
            self._attachments.use_store(known, location, store)
            self._metadata.listed_again(known, manifest)
            return known
        if fresh is None:  # what was shown was detached by force
            return await self._attach(key, location, uid, gid)
        self._show(fresh, location, known)
        return fresh

    def _end_other_way(self, known: Attachment) -> None:
        """End what was attached by another way: its cached bytes are not for this one, nor the
        other way round. Raises Busy."""
        if known.in_use:
            raise Busy(
                f"{known.location.uri} is in use by another way (proxy or certificates); end its "
                "use, or give the same settings"
            )
        self._attachments.remove(known)

    def _show(self, fresh: Attachment, location: Location, known: Attachment | None) -> None:
        """Show `fresh`, in place of `known`."""
        pinned = known is not None and known.pinned
        if known is not None:
            self._attachments.remove(known)
        manifest = fresh.manifest
        # Other places may have been attached meanwhile.
        check_attached(fresh.uid, self._attachments, self._config, len(manifest.files))
        fresh.record = recorder(self._handoff.journal, fresh.ordinal)
        fresh.record(Made(location, manifest, fresh.uid, fresh.gid, fresh.attached_s))
        fresh.pin(pinned)
        self._attachments.add(fresh, location)
        uri = fresh.location.uri
        about = {"event": "attached", "checkpoint": uri, "uid": fresh.uid}
        log.info("attached %s: %d files", uri, len(manifest.files), extra=about)
        for skipped in manifest.skipped[:_SKIPPED_IN_LOG]:
            left_out = {"event": "left-out", "checkpoint": uri, "file": skipped.name}
            log.warning("%s: left out %s: %s", uri, skipped.name, skipped.reason, extra=left_out)

    async def _open(self, location: Location, uid: int) -> Store:
        """In a thread: it may have to read a file."""
        timeout_s = self._config.store_timeout_s
        return await self._store_calls.run(uid, self._open_store, location, timeout_s, uid)

    def _store_of(self, known: Attachment | None, location: Location) -> Store | None:
        """The store of `known`, which has connections, if it is the one that would be opened for
        `location`. A store that finds its credentials by itself looks for them anew."""
        if known is None or not location.secrets:
            return None
        return known.store if location == self._attachments.opened_for(known) else None

    def _build(
        self, ordinal: int, location: Location, store: Store, uid: int, gid: int, shown: str
    ) -> tuple[Manifest, Attachment | None]:
        """Blocking. List the store and build everything that follows from the listing, unless it is
        of the version that is `shown` already."""
        manifest = build_manifest(store.list(self._config.files_max))
        if manifest.version == shown:
            return manifest, None
        return manifest, new_attachment(ordinal, location, store, manifest, uid, gid)


def _prove_access(store: Store, manifest: Manifest) -> None:
    """Blocking. Raise AccessDenied if the store's credentials cannot read the checkpoint."""
    if not manifest.files:
        return
    first = manifest.files[0]
    try:
        store.confirm(pin_of(first))
    except ObjectChanged:
        return  # it could be read, and readers will hear of the change
