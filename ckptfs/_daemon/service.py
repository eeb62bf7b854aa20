"""The daemon's service: attach, detach, status, and when things end.

An attachment is shared by all attaches of the same place by the same user. It ends `linger_s` after
nobody holds it any more: no open directory or file, no control connection, not pinned. An attach
that finds it in nobody's use (lingering, or only pinned) lists the store again, and shows the new
version if there is one; one that finds it in use joins the snapshot of the others.

All state belongs to the event loop. `_locks` makes attaches of one place wait for each other; those
that waited for one which found the store dark share its answer, instead of asking one by one.

Limits hold for all users together. Of each, one user other than root and the daemon's own may take
a quarter (`limit_for`), so that nobody is shut out by one of the others.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version as version_of
from typing import ParamSpec, TypeVar

import trio

from ckptfs._daemon.attachment import Attachment, new_attachment
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.handoff import Handoff
from ckptfs._daemon.metadata import MetadataKeeper
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.prefetch import Prefetch
from ckptfs._daemon.recognise import Recogniser
from ckptfs._daemon.records import (
    Made,
    PrefetchBegun,
    PrefetchEnded,
    StoreChanged,
    recorded,
    recorder,
    unrecorded,
)
from ckptfs._daemon.restore import Last
from ckptfs._daemon.vfs import Vfs
from ckptfs._daemon.xattrs import Xattrs
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.manifest import Manifest, build_manifest
from ckptfs._model.wire import AttachmentStatus, StatusReply
from ckptfs._store.base import Store, pin_of
from ckptfs._store.lending import lent_for
from ckptfs._store.resolve import OpenStore
from ckptfs.errors import (
    AccessDenied,
    Busy,
    CkptfsError,
    LimitExceeded,
    NotAttached,
    ObjectChanged,
    StoreTimeout,
    StoreUnavailable,
)

log = logging.getLogger(__name__)

_SKIPPED_IN_STATUS = 100
"""Skipped objects that a status lists per attachment; the count is always whole."""
_PREFETCHES_MAX = 1024
"""That run at the same time: each has up to eight files open."""
_AT_STORE_MAX = 8
"""Listings and checks for one of the other users at the same time, of the sixteen that there can be
(``offload``): who attaches at stores that do not answer keeps nobody else waiting."""
_ONE_USERS_SHARE = 4
"""One of the other users may take the fourth part of what there is for all."""

P = ParamSpec("P")
T = TypeVar("T")


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
        handoff: Where it is written down for the next daemon.
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
        handoff: Handoff,
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
        owner = os.geteuid(), os.getegid()
        self.vfs = Vfs(fetcher, recogniser, cache, handoff.handles, *owner, self.released)
        self.metadata = MetadataKeeper(offload, config.read_deadline_s)
        self.xattrs = Xattrs(self.vfs, fetcher, cache, offload, self.metadata, self.prefetch_unheld)
        self.stopped = trio.Event()
        self.restarts = False
        self._attachments: dict[tuple[int, str], Attachment] = {}
        self._opened: dict[tuple[int, str], Location] = {}  # what their stores were opened for
        self._locks: dict[tuple[int, str], trio.Lock] = {}
        self._outages: dict[tuple[int, str], tuple[Location, StoreUnavailable]] = {}
        self._handoff = handoff
        self._prefetches: Counter[int] = Counter()  # by user
        self._at_store: dict[int, trio.CapacityLimiter] = {}  # by user, for all but ours
        self._clients = 0
        self._last_use_s = trio.current_time()

    # -- attach and detach

    async def attach(self, location: Location, uid: int, gid: int, *, pinned: bool) -> Attachment:
        """The attachment of `location` for that user, with one control connection holding it.

        Raises LocationError, CheckpointNotFound, CheckpointIsFile, AccessDenied, StoreError and its
        kinds (StoreTimeout at the latest after `attach_deadline_s`), LimitExceeded.
        """
        self._check_rights(uid, location)
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
        if pinned:
            attachment.pin(True)
        return attachment

    async def _attach(
        self, key: tuple[int, str], location: Location, uid: int, gid: int
    ) -> Attachment:
        known = self._attachments.get(key)
        if known is not None and known.in_use:
            if location.secrets == self._opened[key].secrets:
                return known
            store = self._open_store(location, self._config.store_timeout_s)
            await self._ask(uid, _prove_access, store, known.manifest)
            if self._attachments.get(key) is known:  # it may have ended meanwhile
                self._use_store(known, location, store)
                return known
            known = self._attachments.get(key)
        if known is None:
            self._check_limit(uid)
        lent = self._store_of(known, location)
        store = lent or self._open_store(location, self._config.store_timeout_s)
        shown = known.manifest.version if known is not None else ""
        with self._holding(known):
            ordinal = self._handoff.next_ordinal()
            try:
                manifest, fresh = await self._ask(
                    uid, self._build, ordinal, location, store, uid, gid, shown
                )
            except BaseException:
                if lent is None:
                    store.close()
                raise
        known = self._attachments.get(key)  # it may have ended meanwhile, or found a holder
        if known is not None and (known.in_use or known.manifest.version == manifest.version):
            self._use_store(known, location, store)
            self.metadata.listed_again(known, manifest)
            return known
        if fresh is None:  # what was shown was detached by force
            return await self._attach(key, location, uid, gid)
        if lent is not None:  # it ends with `known`
            fresh.use_store(self._open_store(location, self._config.store_timeout_s))
        pinned = known is not None and known.pinned
        if known is not None:
            self._remove(known)
        # Other places may have been attached meanwhile.
        self._check_limit(uid, len(fresh.manifest.files))
        fresh.record = recorder(self._handoff.journal, fresh.ordinal)
        fresh.record(Made(location, fresh.manifest, uid, gid, fresh.attached_s))
        fresh.pin(pinned)
        self._add(fresh, location)
        log.info("attached %s: %d files", fresh.location.uri, len(fresh.manifest.files))
        for skipped in fresh.manifest.skipped[:_SKIPPED_IN_STATUS]:
            log.warning("%s: left out %s: %s", fresh.location.uri, skipped.name, skipped.reason)
        return fresh

    def _add(self, attachment: Attachment, location: Location) -> None:
        self._attachments[attachment.key] = attachment
        self._opened[attachment.key] = location
        self.vfs.add(attachment)

    def _use_store(self, attachment: Attachment, location: Location, store: Store) -> None:
        if location != self._opened[attachment.key]:
            attachment.record(StoreChanged(location))
        attachment.use_store(store)
        self._opened[attachment.key] = location

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

    def _check_rights(self, uid: int, location: Location) -> None:
        """Raise AccessDenied where the daemon would lend its own rights to another user."""
        if is_ours(uid) or self._config.lend_daemon_rights:
            return
        if lent := lent_for(location):
            raise AccessDenied(
                f"{location.uri} would be read with the ckptfs daemon's own {lent}, which are not "
                f"for uid {uid}; give credentials of your own (e.g. AWS_ACCESS_KEY_ID), or start a "
                "daemon of your own (CKPTFS_SOCKET), or have lend_daemon_rights set"
            )

    def _check_limit(self, uid: int, more_files: int = 0) -> None:
        """Raise LimitExceeded where one more checkpoint, with so many files, is too much."""
        attached = list(self._attachments.values())
        own = [a for a in attached if a.uid == uid]
        for those, who, share in ((own, uid, " for one user"), (attached, os.geteuid(), "")):
            if len(those) >= limit_for(who, self._config.attachments_max):
                raise LimitExceeded(
                    f"{len(those)} checkpoints are attached, the most that attachments_max allows"
                    f"{share}; detach one, or raise it"
                )
            files = sum(len(a.manifest.files) for a in those)
            if files + more_files > limit_for(who, self._config.attached_files_max):
                raise LimitExceeded(
                    f"{files} files are attached, and {more_files} more are more than "
                    f"attached_files_max allows{share}; detach a checkpoint, or raise it"
                )

    async def _ask(self, uid: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a small request to a store for that user. A call that nobody waits for any more still
        counts, until its thread is free."""
        if is_ours(uid):
            return await self._offload.control(call, *args, **kwargs)
        limiter = self._at_store.setdefault(uid, trio.CapacityLimiter(_AT_STORE_MAX))
        borrower = object()
        loop = trio.lowlevel.current_trio_token()
        begun = False

        def give_back() -> None:
            if borrower in limiter.statistics().borrowers:
                limiter.release_on_behalf_of(borrower)
            if not limiter.statistics().borrowers and not limiter.statistics().tasks_waiting:
                self._at_store.pop(uid, None)

        def counted() -> T:
            nonlocal begun
            begun = True
            try:
                return call(*args, **kwargs)
            finally:
                with suppress(trio.RunFinishedError):
                    loop.run_sync_soon(give_back)

        await limiter.acquire_on_behalf_of(borrower)
        try:
            return await self._offload.control(counted)
        finally:
            if not begun:
                give_back()

    def _build(
        self, ordinal: int, location: Location, store: Store, uid: int, gid: int, shown: str
    ) -> tuple[Manifest, Attachment | None]:
        """Blocking. List the store and build everything that follows from the listing, unless it is
        of the version that is `shown` already."""
        manifest = build_manifest(store.list(self._config.files_max))
        if manifest.version == shown:
            return manifest, None
        return manifest, new_attachment(ordinal, location, store, manifest, uid, gid)

    def prefetch(self, attachment: Attachment, globs: Sequence[str], rate: int = 0) -> Prefetch:
        """Begin to fetch the files that match, in the background; `rate`: bytes per second at
        most. Raises LimitExceeded."""
        uid = attachment.uid
        most = limit_for(uid, _PREFETCHES_MAX)
        if self._prefetches[uid] >= most or sum(self._prefetches.values()) >= _PREFETCHES_MAX:
            raise LimitExceeded(
                f"{attachment.location.uri}: {most} prefetches are running, the most that there "
                f"can be for uid {uid}; wait for one to end"
            )
        prefetch = Prefetch(attachment, globs, rate, self._fetcher, self._cache, self._offload)
        self._prefetches[uid] += 1
        self._nursery.start_soon(self._run_prefetch, prefetch, uid)
        return prefetch

    async def _run_prefetch(self, prefetch: Prefetch, uid: int) -> None:
        try:
            await prefetch.run()
        finally:
            self._prefetches -= Counter([uid])  # zeros go

    def prefetch_unheld(self, attachment: Attachment, globs: Sequence[str]) -> None:
        """The same; no connection waits for it, so the next daemon goes on with it."""
        begun = PrefetchBegun(time.monotonic_ns(), list(globs), 0)
        self._go_on(attachment, begun)
        attachment.record(begun)

    def _go_on(self, attachment: Attachment, begun: PrefetchBegun) -> None:
        prefetch = self.prefetch(attachment, begun.globs, begun.rate)
        self._nursery.start_soon(self._note_end, attachment, prefetch, begun.number)

    async def _note_end(self, attachment: Attachment, prefetch: Prefetch, number: int) -> None:
        await prefetch.ended.wait()
        attachment.record(PrefetchEnded(number))

    # -- after another daemon

    async def restore(self) -> None:
        """Have all attachments that an earlier daemon had, as they were. To be called once, before
        anything else. Raises DaemonError."""
        for ordinal, events in recorded(self._handoff.journal).items():
            last = Last(ordinal, events)
            try:
                store = self._open_store(last.location, self._config.store_timeout_s)
            except CkptfsError as error:
                log.error("%s: cannot be restored: %s", last.location.uri, error)
                self._handoff.journal.forget(ordinal)
                continue
            attachment = await self._offload.control(last.attachment, store)
            attachment.record = recorder(self._handoff.journal, ordinal)
            self._add(attachment, last.location)
            for begun in last.prefetches:
                with suppress(LimitExceeded):
                    self._go_on(attachment, begun)

    def restored(self) -> None:
        """To be called when the handles that are open have been restored, too."""
        for attachment in self._attachments.values():
            self.released(attachment)

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
        was_pinned = attachment.pinned
        attachment.pin(False)
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
        attachment.record = unrecorded
        self._handoff.journal.forget(attachment.ordinal)
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

    def restart(self) -> None:
        """Ask the daemon to end, and to be followed by another one that goes on with everything."""
        self.restarts = True
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
            restarts=self._handoff.restarts,
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


def is_ours(uid: int) -> bool:
    """Whether it is root or the daemon's own user, for whom there are no limits of a user."""
    return uid in (0, os.geteuid())


def limit_for(uid: int, limit: int) -> int:
    """How much of a limit that user may take."""
    return limit if is_ours(uid) else max(1, limit // _ONE_USERS_SHARE)


def _prove_access(store: Store, manifest: Manifest) -> None:
    """Blocking. Raise AccessDenied if the store's credentials cannot read the checkpoint."""
    if not manifest.files:
        return
    first = manifest.files[0]
    try:
        store.confirm(pin_of(first))
    except ObjectChanged:
        return  # it could be read, and readers will hear of the change
