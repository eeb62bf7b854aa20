"""Attaching: from a location to an attachment that shows it.

An attach of a place that is attached and in use joins the snapshot of the other users. If the place
is attached and not in use (lingering, or only pinned), the attach lists the store again, and shows
the new version if there is one. A volume always counts as in use, because a pod may read it without
an open handle. So another attach of it only renews its credentials.

A user other than root and the daemon's own may have uploaded the checkpoint from this node, and
saved its blocks. Then the attachment reads those, which no other user shares (`saved_scope`).

`_locks` lets attaches of one place wait for each other. If the store is unavailable, the waiting
attaches share the error of the first one, so they do not ask the store one after the other.
"""

import functools
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import trio

from ckptfs._daemon.attachment.attachment import Attachment, key_of, new_attachment
from ckptfs._daemon.attachment.journal import Made, recorder
from ckptfs._daemon.attachment.metadata import MetadataKeeper
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.control.current_config import CurrentConfig
from ckptfs._daemon.control.named_stores import OpenFor
from ckptfs._daemon.control.permissions import (
    Caller,
    StoreCalls,
    check_attached,
    check_files,
    check_rights,
)
from ckptfs._daemon.control.registry import Attachments
from ckptfs._daemon.quotas import cache_scope, saved_scope
from ckptfs._daemon.usage.trace import Key
from ckptfs._model.location import Location
from ckptfs._model.manifest import Manifest, build_manifest
from ckptfs._model.volume import Volume
from ckptfs._mount.handoff import Handoff
from ckptfs._store.base import Store, pin_of
from ckptfs.errors import Busy, ObjectChanged, StoreTimeout, StoreUnavailable

log = logging.getLogger(__name__)

_SKIPPED_IN_LOG = 100
"""Skipped objects that the log names for each attachment."""


@dataclass(eq=False)
class Attaching:
    """Makes attachments."""

    current: CurrentConfig
    attachments: Attachments
    metadata: MetadataKeeper
    store_calls: StoreCalls
    open_store: OpenFor
    handoff: Handoff
    cache: Cache
    _locks: dict[Key, trio.Lock] = field(default_factory=dict[Key, trio.Lock], init=False)
    _outages: dict[Key, tuple[Location, StoreUnavailable]] = field(
        default_factory=dict[Key, "tuple[Location, StoreUnavailable]"], init=False
    )

    async def attach(
        self,
        location: Location,
        uid: int,
        gid: int,
        *,
        pinned: bool,
        saves: bool = False,
        volume: Volume | None = None,
    ) -> Attachment:
        """Attach `location` for a user, or for a volume. The attachment counts one control
        connection as its holder. `saves` says whether the user will save blocks of it.

        Raises LocationError, CheckpointNotFound, CheckpointIsFile, AccessDenied, LimitExceeded, and
        StoreError and its kinds. StoreTimeout comes after `attach_deadline_s` at the latest.
        """
        config = self.current.config
        check_rights(uid, location, config, volume)
        check_files(location)
        key = key_of(uid, location, volume)
        claim = _Claim(uid, gid, saves, volume)
        lock = self._locks.setdefault(key, trio.Lock())
        try:
            with trio.fail_after(config.attach_deadline_s):
                async with lock:
                    failed, outage = self._outages.get(key, (None, None))
                    if outage is not None and failed == location:
                        raise type(outage)(*outage.args)
                    attachment = await self._attach(key, location, claim)
                    self.attachments.hold(attachment)
        except StoreUnavailable as error:
            self._outages[key] = location, error
            raise
        except trio.TooSlowError:
            raise StoreTimeout(
                f"{location.uri}: the store gave no listing within "
                f"{config.attach_deadline_s:g} s; check the endpoint, or raise "
                "attach_deadline_s"
            ) from None
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._locks.pop(key, None)
                self._outages.pop(key, None)
        if pinned:
            attachment.pin(True)
        return attachment

    async def _attach(self, key: Key, location: Location, claim: "_Claim") -> Attachment:
        while True:
            known = self.attachments.get(key)
            if known is not None and _in_use(known):
                _check_fits(known, location, claim)
                attachment = await self._reuse(known, location, claim)
            else:
                attachment = await self._list(known, location, claim)
            if attachment is not None:
                return attachment
            # `known` has ended during a call to the store.

    async def _reuse(
        self, known: Attachment, location: Location, claim: "_Claim"
    ) -> Attachment | None:
        """Join an attachment that is in use, after a proof that other credentials can read it.
        Returns None if it has ended meanwhile."""
        if known.volume != claim.volume:
            _refuse_volume(known)
        if location == self.attachments.opened_for(known):
            return known
        with ExitStack() as unused:
            store = await self._open(location, claim, unused)
            await self.store_calls.run(claim.caller, _prove_access, store, known.manifest)
            if self.attachments.get(known.key) is not known:
                return None
            unused.pop_all()
        self.attachments.use_store(known, location, store)
        return known

    async def _list(
        self, known: Attachment | None, location: Location, claim: "_Claim"
    ) -> Attachment | None:
        """List the store, and publish an attachment if there is a new version, or if none is known
        that may have these cached bytes. Returns None if the known one was detached meanwhile.

        `unused` closes each store that no attachment owns in the end.
        """
        if known is None:
            check_attached(claim.uid, self.attachments, self.current.config)
        reused = self._store_of(known, location)
        shown = ""
        if known is not None and _fits(known, location, claim):
            shown = known.manifest.version
        build = functools.partial(self._build, shown=shown)
        with ExitStack() as unused:
            with self.attachments.holding(known):
                store = reused or await self._open(location, claim, unused)
                manifest, fresh = await self.store_calls.run(
                    claim.caller, build, self.handoff.next_ordinal(), location, store, claim
                )
                if reused is not None and fresh is not None:  # `reused` ends with `known`
                    fresh.store = await self._open(location, claim, unused)
            key = key_of(claim.uid, location, claim.volume)
            now = self.attachments.get(key)  # perhaps ended, or in use again
            if now is not None and _in_use(now):
                _check_fits(now, location, claim)
            if now is not None and (_in_use(now) or fresh is None):
                if reused is None:
                    unused.pop_all()
                    self.attachments.use_store(now, location, store)
                self.metadata.listed_again(now, manifest)
                return now
            if fresh is None:
                return None
            self._publish(fresh, location, now)
            unused.pop_all()
            return fresh

    def _publish(self, fresh: Attachment, location: Location, known: Attachment | None) -> None:
        """Show `fresh`, in place of `known`. Raises LimitExceeded, and Busy if its volume shows
        another place."""
        pinned = known is not None and known.leases.pinned
        if known is not None:
            self.attachments.remove(known)
        for other in self.attachments:
            if fresh.volume is not None and other.name == fresh.name:
                _refuse_volume(other)
        manifest = fresh.manifest
        # Other places may have been attached during the listing.
        check_attached(fresh.uid, self.attachments, self.current.config, len(manifest.files))
        fresh.record = recorder(self.handoff.journal, fresh.ordinal)
        has_saved = fresh.cache_scope != cache_scope(fresh.uid, location, fresh.volume)
        of_user = fresh.uid, fresh.gid, fresh.attached_s
        fresh.record(Made(location, manifest, *of_user, has_saved, fresh.volume))
        fresh.pin(pinned)
        self.attachments.add(fresh, location)
        uri = fresh.location.uri
        about = {"event": "attached", "checkpoint": uri, "uid": fresh.uid}
        log.info("attached %s: %d files", uri, len(manifest.files), extra=about)
        for skipped in manifest.skipped[:_SKIPPED_IN_LOG]:
            left_out = {"event": "left-out", "checkpoint": uri, "file": skipped.name}
            log.warning("%s: left out %s: %s", uri, skipped.name, skipped.reason, extra=left_out)

    async def _open(self, location: Location, claim: "_Claim", unused: ExitStack) -> Store:
        """Open a store in a thread, because that may read a file. `unused` closes it."""
        timeout_s = self.current.config.store_timeout_s
        store = await self.store_calls.run(
            claim.caller, self.open_store, location, timeout_s, claim.uid
        )
        unused.callback(store.close)
        return store

    def _store_of(self, known: Attachment | None, location: Location) -> Store | None:
        """The store of `known`, which has connections, if an attach of `location` would open the
        same one. A store that finds its credentials by itself is opened again, so it finds new
        ones."""
        if known is None or not location.secrets:
            return None
        return known.store if location == self.attachments.opened_for(known) else None

    def _build(
        self,
        ordinal: int,
        location: Location,
        store: Store,
        claim: "_Claim",
        *,
        shown: str,
    ) -> tuple[Manifest, Attachment | None]:
        """List the store, and make an attachment unless the listing is the version `shown`.
        Blocking."""
        manifest = build_manifest(store.list(self.current.config.files_max))
        if manifest.version == shown:
            return manifest, None
        uid, gid, saves, volume = claim
        make = functools.partial(
            new_attachment, ordinal, location, store, manifest, uid, gid, volume=volume
        )
        if cache_scope(uid, location, volume) != saved_scope(uid, location, volume):
            fresh = make(has_saved=True)
            if saves or any(map(self.cache.stored_bytes, fresh.snapshot.digests())):
                return manifest, fresh
        return manifest, make()


class _Claim(NamedTuple):
    """The user of an attach, whether that user saves blocks, and the volume that it is for."""

    uid: int
    gid: int
    saves: bool
    volume: Volume | None

    @property
    def caller(self) -> Caller:
        """The one who is charged for calls to stores (`StoreCalls`)."""
        return self.uid if self.volume is None else self.volume.owner


def _in_use(attachment: Attachment) -> bool:
    return attachment.leases.in_use or attachment.volume is not None


def _fits(known: Attachment, location: Location, claim: _Claim) -> bool:
    """Whether the attachment may have the cached bytes of an attach of `location`: they come by the
    same way, such as a proxy, and belong to the user if the user saves blocks."""
    uid, _, saves, volume = claim
    saved = saved_scope(uid, location, volume)
    usual = cache_scope(uid, location, volume)
    return known.cache_scope in ((saved,) if saves else (saved, usual))


def _check_fits(known: Attachment, location: Location, claim: _Claim) -> None:
    """Raise Busy unless `_fits`. The attachment is in use."""
    if not _fits(known, location, claim):
        raise Busy(
            f"{known.location.uri} is in use with other cached blocks (another proxy or other "
            "certificates, or without those of an upload); end its use, and try again"
        )


def _refuse_volume(known: Attachment) -> NoReturn:
    raise Busy(
        f"volume {known.name} shows {known.location.uri} with other settings; detach it, and try "
        "again"
    )


def _prove_access(store: Store, manifest: Manifest) -> None:
    """Raise AccessDenied if the store's credentials cannot read the checkpoint. Blocking."""
    if not manifest.files:
        return
    first = manifest.files[0]
    try:
        store.confirm(pin_of(first))
    except ObjectChanged:
        return  # the credentials can read it, and readers get the error
