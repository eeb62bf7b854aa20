"""The attachments, their holders, and their end.

All attaches of the same place by the same user share an attachment. A volume has one for itself.
Open directories, open files, control connections and the pin hold it. It ends `linger_s` after its
last holder is gone.
"""

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import trio

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.journal import StoreChanged, forget, unrecorded
from ckptfs._daemon.control.current_config import CurrentConfig
from ckptfs._daemon.control.permissions import may_see
from ckptfs._daemon.fs.vfs import Vfs
from ckptfs._daemon.usage.counters import Activities
from ckptfs._daemon.usage.trace import Key, Traces
from ckptfs._model.attributes import OTHER_CONTAINERS
from ckptfs._model.location import Location
from ckptfs._mount.handoff import Journal
from ckptfs._store.base import Store
from ckptfs.errors import Busy, NotAttached

log = logging.getLogger(__name__)


class Attachments:
    """Owns the attachments. Belongs to the event loop.

    Args:
        make_vfs: Makes the tree that shows the attachments. Its argument is the function that the
            tree calls after it has closed a handle of an attachment.
        forget_name: Tells the kernel that an attachment's directory is gone.

    Attributes:
        vfs: The tree that shows the attachments.
        traces: Records of their reads.
        activities: Counters of the attachments.
        last_end_s: Event loop time at which the last attachment ended.
    """

    def __init__(
        self,
        make_vfs: Callable[[Callable[[Attachment], None]], Vfs],
        activities: Activities,
        current: CurrentConfig,
        nursery: trio.Nursery,
        journal: Journal,
        forget_name: Callable[[str], None],
    ) -> None:
        self.vfs = make_vfs(self.released)
        self.traces = Traces()
        self.activities = activities
        self._current = current
        self._nursery = nursery
        self._journal = journal
        self._forget_name = forget_name
        self._by_key: dict[Key, Attachment] = {}
        self._opened: dict[Key, Location] = {}  # with the stores' credentials
        self.last_end_s = trio.current_time()

    def __iter__(self) -> Iterator[Attachment]:
        return iter(list(self._by_key.values()))

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: Key) -> Attachment | None:
        """The attachment with that key."""
        return self._by_key.get(key)

    def find(self, uid: int, name: str, location: Location | None) -> Attachment:
        """The user's attachment by directory name or location. A location never names a volume.
        Raises NotAttached."""
        for attachment in self:
            same_place = (
                location is not None
                and attachment.volume is None
                and attachment.location.identity == location.identity
            )
            if may_see(uid, attachment) and (attachment.name == name or same_place):
                return attachment
        what = location.uri if location else name
        raise NotAttached(f"{what} is not attached; ckptfs status lists what is")

    def add(self, attachment: Attachment, location: Location) -> None:
        """Show an attachment, whose store was opened for `location`."""
        self._by_key[attachment.key] = attachment
        self._opened[attachment.key] = location
        attachment.trace = self.traces.begin(
            attachment.key, attachment.about(), lambda: attachment.snapshot.listed
        )
        attachment.activity.begin(self.activities)
        self.vfs.add(attachment)

    def remove(self, attachment: Attachment) -> None:
        """End an attachment, although it may have holders."""
        for scope in attachment.background:
            scope.cancel()
        self.vfs.remove(attachment)
        if attachment.trace is not None:
            attachment.trace.named(attachment.activity.commands())
        self.traces.end(attachment.key)
        attachment.activity.end()
        del self._by_key[attachment.key]
        del self._opened[attachment.key]
        attachment.store.close()
        attachment.record = unrecorded
        forget(self._journal, attachment.ordinal)
        self._forget_name(attachment.name)
        self.last_end_s = trio.current_time()
        uri = attachment.location.uri
        about = {"event": "detached", "checkpoint": uri, "uid": attachment.uid}
        log.info("detached %s", uri, extra=about)

    def detach(self, attachment: Attachment, *, force: bool) -> None:
        """End a pinned attachment, or with `force` any attachment. Raises Busy while processes hold
        it."""
        was_pinned = attachment.leases.pinned
        attachment.pin(False)
        if not attachment.leases.stays or force:
            self.remove(attachment)
        elif not was_pinned:
            pids = attachment.leases.holders
            holders = ", ".join(str(pid or OTHER_CONTAINERS) for pid in pids) or "open files"
            raise Busy(
                f"{attachment.location.uri} is held by {holders}; end these processes, or detach "
                "with --force (their reads will fail)"
            )

    # -- stores

    def opened_for(self, attachment: Attachment) -> Location:
        """The location for which the attachment's store was opened, with the credentials."""
        return self._opened[attachment.key]

    def use_store(self, attachment: Attachment, location: Location, store: Store) -> None:
        """Read an attachment from now on with this store, which was opened for `location`."""
        if location != self._opened[attachment.key]:
            attachment.record(StoreChanged(location))
        attachment.use_store(store)
        self._opened[attachment.key] = location

    def show_directory(self, path: str) -> bool:
        """Whether an attachment shows the local directory `path`."""
        return any(self._showing(path))

    def keep_directory(self, path: str) -> bool:
        """Whether an attachment that has to stay now shows the local directory `path`."""
        return any(a.leases.stays for a in self._showing(path))

    def _showing(self, path: str) -> "Iterator[Attachment]":
        return (a for a in self if a.location.kind == "local" and a.location.path == path)

    # -- holders

    def hold(self, attachment: Attachment) -> None:
        """Hold the attachment for a control connection, until `let_go`."""
        attachment.leases.clients += 1

    def let_go(self, attachment: Attachment) -> None:
        """End the hold of a control connection."""
        attachment.leases.clients -= 1
        self.released(attachment)

    @contextmanager
    def holding(self, attachment: Attachment | None) -> Generator[None]:
        """Hold an attachment, if there is one. Only a detach by force ends it, and its store,
        meanwhile."""
        if attachment is None:
            yield
            return
        self.hold(attachment)
        try:
            yield
        finally:
            self.let_go(attachment)

    def released(self, attachment: Attachment) -> None:
        """Start the timer of an attachment that has lost a holder, if it was the last one."""
        if not attachment.leases.stays:
            attachment.leases.idle_since_s = trio.current_time()
            self._nursery.start_soon(self._linger, attachment, attachment.leases.idle_since_s)

    def release_all(self) -> None:
        """Start the timers of all attachments without a holder, after a restart."""
        for attachment in self:
            self.released(attachment)

    async def _linger(self, attachment: Attachment, since_s: float) -> None:
        await trio.sleep(self._current.config.linger_s)
        current = self._by_key.get(attachment.key) is attachment
        if current and not attachment.leases.stays and attachment.leases.idle_since_s == since_s:
            self.remove(attachment)
