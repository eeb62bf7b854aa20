"""The daemon's service: attach, detach, status, and when things end.

An attachment is shared by all attaches of the same place by the same user. It ends `linger_s` after
nobody holds it any more: no open directory or file, no control connection, not pinned. An attach
that finds it in nobody's use (lingering, or only pinned) lists the store again, and shows the new
version if there is one; one that finds it in use joins the snapshot of the others.

All state belongs to the event loop. `_locks` makes attaches of one place wait for each other; those
that waited for one which found the store dark share its answer, instead of asking one by one.
"""

import logging
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib.metadata import version as version_of

import msgspec
import trio

from ckptfs._daemon.attachment import Attachment, object_key
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.metadata import MetadataKeeper
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.prefetch import Prefetch
from ckptfs._daemon.recognise import Recogniser
from ckptfs._daemon.vfs import Vfs
from ckptfs._daemon.xattrs import Xattrs
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.manifest import Manifest, build_manifest
from ckptfs._model.wire import AttachmentStatus, StatusReply
from ckptfs._store.base import Store, pin_of
from ckptfs._store.resolve import OpenStore
from ckptfs.errors import (
    Busy,
    LimitExceeded,
    NotAttached,
    ObjectChanged,
    StoreTimeout,
    StoreUnavailable,
)

log = logging.getLogger(__name__)

_SKIPPED_IN_STATUS = 100
"""Skipped objects that a status lists per attachment; the count is always whole."""


class Service:
    """Owns the attachments.

    Args:
        config: Limits and times.
        cache: For sizes in `status`.
        fetcher: Reads the files.
        offload: Runs the listings.
        nursery: Runs the timers.
        forget_name: Tells the kernel that an attachment's directory is gone.
        open_store: Makes the stores.
        passthrough: For `status`: "on", or why not.
    """

    def __init__(
        self,
        config: Config,
        cache: Cache,
        fetcher: Fetcher,
        offload: Offload,
        nursery: trio.Nursery,
        forget_name: Callable[[str], None],
        open_store: OpenStore,
        passthrough: str = "off",
    ) -> None:
        self._passthrough = passthrough
        self._config = config
        self._cache = cache
        self._fetcher = fetcher
        self._offload = offload
        self._nursery = nursery
        self._forget_name = forget_name
        self._open_store = open_store
        recogniser = Recogniser(fetcher, offload, nursery)
        self.vfs = Vfs(fetcher, recogniser, cache, os.geteuid(), os.getegid(), self.released)
        self.metadata = MetadataKeeper(offload, config.read_deadline_s)
        self.xattrs = Xattrs(self.vfs, fetcher, cache, offload, self.metadata, self.prefetch)
        self.stopped = trio.Event()
        self._attachments: dict[tuple[int, str], Attachment] = {}
        self._opened: dict[tuple[int, str], Location] = {}  # what their stores were opened for
        self._locks: dict[tuple[int, str], trio.Lock] = {}
        self._outages: dict[tuple[int, str], tuple[Location, StoreUnavailable]] = {}
        self._ordinal = 0
        self._clients = 0
        self._last_use_s = trio.current_time()

    # -- attach and detach

    async def attach(self, location: Location, uid: int, gid: int, *, pinned: bool) -> Attachment:
        """The attachment of `location` for that user, with one control connection holding it.

        Raises LocationError, CheckpointNotFound, CheckpointIsFile, AccessDenied, StoreError and its
        kinds (StoreTimeout at the latest after `attach_deadline_s`), LimitExceeded.
        """
        key = (uid, location.identity)
        lock = self._locks.setdefault(key, trio.Lock())
        try:
            with trio.fail_after(self._config.attach_deadline_s):
                async with lock:
                    asked, outage = self._outages.get(key, (None, None))
                    if outage is not None and asked == location:
                        raise type(outage)(*outage.args)
                    attachment = await self._attach(key, location, uid, gid)
                    self.hold(attachment)
        except StoreUnavailable as error:
            self._outages[key] = location, error
            raise
        except trio.TooSlowError:
            raise StoreTimeout(
                f"{location.uri}: the store gave no listing within "
                f"{self._config.attach_deadline_s:g} s; try again, or raise attach_deadline_s"
            ) from None
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._locks.pop(key, None)
                self._outages.pop(key, None)
        attachment.pinned |= pinned
        return attachment

    async def _attach(
        self, key: tuple[int, str], location: Location, uid: int, gid: int
    ) -> Attachment:
        known = self._attachments.get(key)
        if known is not None and known.in_use:
            if location.secrets == self._opened[key].secrets:
                return known
            store = self._open_store(location, self._config.store_timeout_s)
            await self._offload.control(_prove_access, store, known.manifest)
            if self._attachments.get(key) is known:  # it may have ended meanwhile
                known.use_store(store)
                self._opened[key] = location
                return known
            known = self._attachments.get(key)
        if known is None:
            self._check_limit()
        lent = self._store_of(known, location)
        store = lent or self._open_store(location, self._config.store_timeout_s)
        shown = known.manifest.version if known is not None else ""
        self._ordinal += 1
        with self._holding(known):
            try:
                manifest, fresh = await self._offload.control(
                    self._build, self._ordinal, location, store, uid, gid, shown
                )
            except BaseException:
                if lent is None:
                    store.close()
                raise
        known = self._attachments.get(key)  # it may have ended meanwhile, or found a holder
        if known is not None and (known.in_use or known.manifest.version == manifest.version):
            known.use_store(store)
            self._opened[key] = location
            self.metadata.listed_again(known, manifest)
            return known
        if fresh is None:  # what was shown was detached by force
            return await self._attach(key, location, uid, gid)
        if lent is not None:  # it ends with `known`
            fresh.use_store(self._open_store(location, self._config.store_timeout_s))
        if known is not None:
            fresh.pinned = known.pinned
            self._remove(known)
        self._check_limit()  # other places may have been attached meanwhile
        self._attachments[key] = fresh
        self._opened[key] = location
        self.vfs.add(fresh)
        log.info("attached %s: %d files", fresh.location.uri, len(fresh.manifest.files))
        for skipped in fresh.manifest.skipped[:_SKIPPED_IN_STATUS]:
            log.warning("%s: left out %s: %s", fresh.location.uri, skipped.name, skipped.reason)
        return fresh

    def _store_of(self, known: Attachment | None, location: Location) -> Store | None:
        """The store of `known`, which has connections, if it is the one that would be opened for
        `location`. A store that finds its credentials by itself looks for them anew."""
        same = known is not None and location.secrets and location == self._opened[known.key]
        return known.store if known is not None and same else None

    @contextmanager
    def _holding(self, attachment: Attachment | None) -> Generator[None]:
        """Only `detach` with force ends the attachment, and its store, meanwhile."""
        if attachment is None:
            yield
            return
        self.hold(attachment)
        try:
            yield
        finally:
            self.let_go(attachment)

    def _check_limit(self) -> None:
        if len(self._attachments) >= self._config.attachments_max:
            raise LimitExceeded(
                f"{len(self._attachments)} checkpoints are attached, the most that attachments_max "
                "allows; detach one, or raise it"
            )

    def _build(
        self, ordinal: int, location: Location, store: Store, uid: int, gid: int, shown: str
    ) -> tuple[Manifest, Attachment | None]:
        """Blocking. List the store and build everything that follows from the listing, unless it is
        of the version that is `shown` already."""
        manifest = build_manifest(store.list(self._config.files_max))
        if manifest.version == shown:
            return manifest, None
        public = msgspec.structs.replace(location, secrets={})
        digests = [object_key(public, file).digest() for file in manifest.files]
        return manifest, Attachment(ordinal, public, store, manifest, digests, uid, gid)

    def prefetch(self, attachment: Attachment, globs: Sequence[str], rate: int = 0) -> Prefetch:
        """Begin to fetch the files that match, in the background; `rate`: bytes per second at
        most."""
        prefetch = Prefetch(attachment, globs, rate, self._fetcher, self._cache, self._offload)
        self._nursery.start_soon(prefetch.run)
        return prefetch

    async def metadata_changed(self, location: Location, uid: int) -> None:
        """This user has changed the metadata of the checkpoint at `location` at the store."""
        for attachment in list(self._attachments.values()):
            same_place = attachment.location.identity == location.identity
            if same_place and self._may_see(uid, attachment):
                await self.metadata.refresh(attachment)

    def hold(self, attachment: Attachment) -> None:
        """A control connection holds the attachment from now on, until `let_go`."""
        attachment.clients += 1

    def let_go(self, attachment: Attachment) -> None:
        """A control connection that held the attachment has ended."""
        attachment.clients -= 1
        self.released(attachment)

    def released(self, attachment: Attachment) -> None:
        """Something that held the attachment is gone."""
        if not attachment.held:
            attachment.idle_since_s = trio.current_time()
            self._nursery.start_soon(self._linger, attachment, attachment.idle_since_s)

    async def _linger(self, attachment: Attachment, since_s: float) -> None:
        await trio.sleep(self._config.linger_s)
        current = self._attachments.get(attachment.key) is attachment
        if current and not attachment.held and attachment.idle_since_s == since_s:
            self._remove(attachment)

    def detach(self, attachment: Attachment, *, force: bool) -> None:
        """End a pinned attachment, or with `force` any. Raises Busy while processes hold it."""
        was_pinned, attachment.pinned = attachment.pinned, False
        if not attachment.held or force:
            self._remove(attachment)
        elif not was_pinned:
            holders = (
                ", ".join(map(str, sorted(set(attachment.directories.values())))) or "open files"
            )
            raise Busy(
                f"{attachment.location.uri} is held by {holders}; end these processes, or detach "
                "with --force (their reads will fail)"
            )

    def find(self, uid: int, name: str, location: Location | None) -> Attachment:
        """The user's attachment by directory name or location. Raises NotAttached."""
        for attachment in self._attachments.values():
            same_place = location is not None and attachment.location.identity == location.identity
            if self._may_see(uid, attachment) and (attachment.name == name or same_place):
                return attachment
        what = location.uri if location else name
        raise NotAttached(f"{what} is not attached; ckptfs status lists what is")

    def _remove(self, attachment: Attachment) -> None:
        for scope in attachment.background:
            scope.cancel()
        self.vfs.remove(attachment)
        del self._attachments[attachment.key]
        del self._opened[attachment.key]
        attachment.store.close()
        self._forget_name(attachment.name)
        self._last_use_s = trio.current_time()
        log.info("detached %s", attachment.location.uri)

    # -- the daemon's own end

    def client_came(self) -> None:
        """A control connection was opened."""
        self._clients += 1

    def client_left(self) -> None:
        """A control connection was closed."""
        self._clients -= 1
        self._last_use_s = trio.current_time()

    async def wait_idle(self) -> None:
        """Return when nobody has used the daemon for `idle_exit_s`."""
        idle_exit_s = self._config.idle_exit_s
        while True:
            used = self._clients or self._attachments or not idle_exit_s
            left_s = self._last_use_s + idle_exit_s - trio.current_time()
            if not used and left_s <= 0:
                return
            await trio.sleep(min(1.0, max(0.05, left_s)) if not used else 1.0)

    def stop(self, *, force: bool) -> None:
        """Ask the daemon to end. Raises Busy while checkpoints are in use, unless `force`."""
        used = [a for a in self._attachments.values() if a.directories or a.open_handles]
        if used and not force:
            raise Busy(
                f"{len(used)} checkpoints are in use (first: {used[0].location.uri}); end their "
                "users, or use --force (their reads will fail)"
            )
        self.stopped.set()

    # -- status

    def status(self, uid: int) -> StatusReply:
        """The daemon's state, with the attachments that this user may see."""
        return StatusReply(
            version=version_of("ckptfs"),
            pid=os.getpid(),
            mount=self._config.mount,
            cache_dir=self._config.cache_dir,
            cache_bytes=self._cache.used_bytes,
            cache_bytes_max=self._config.cache_bytes_max,
            fetched_bytes=self._fetcher.fetched_bytes,
            fetched_spans=self._fetcher.fetched_spans,
            passthrough=self._passthrough,
            attachments=[
                self._status_of(a) for a in self._attachments.values() if self._may_see(uid, a)
            ],
        )

    def _status_of(self, attachment: Attachment) -> AttachmentStatus:
        manifest = attachment.manifest
        cached = attachment.cached_bytes(self._cache)
        return AttachmentStatus(
            name=attachment.name,
            path=f"{self._config.mount}/{attachment.name}",
            uri=attachment.location.uri,
            version=manifest.version,
            state=attachment.state(cached),
            files=attachment.file_count,
            size=attachment.size,
            cached=cached,
            holders=sorted(set(attachment.directories.values())),
            open_files=attachment.open_handles,
            pinned=attachment.pinned,
            attached=attachment.attached_s,
            uid=attachment.uid,
            error=attachment.error,
            skipped=list(manifest.skipped[:_SKIPPED_IN_STATUS]),
            skipped_count=len(manifest.skipped),
        )

    @staticmethod
    def _may_see(uid: int, attachment: Attachment) -> bool:
        return uid in (0, attachment.uid)


def _prove_access(store: Store, manifest: Manifest) -> None:
    """Blocking. Raise AccessDenied if the store's credentials cannot read the checkpoint."""
    if not manifest.files:
        return
    first = manifest.files[0]
    try:
        store.confirm(pin_of(first))
    except ObjectChanged:
        return  # it could be read, and readers will hear of the change
