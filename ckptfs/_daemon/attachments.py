"""All attachments: who holds them, and when they end.

An attachment is shared by all attaches of the same place by the same user. It ends `linger_s` after
nobody holds it any more: no open directory or file, no control connection, not pinned.
"""

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import trio

from ckptfs._daemon.activity import Activities
from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.handoff import Journal
from ckptfs._daemon.limits import may_see
from ckptfs._daemon.records import StoreChanged, forget, unrecorded
from ckptfs._daemon.trace import Traces
from ckptfs._daemon.vfs import Vfs
from ckptfs._model.attributes import OTHER_CONTAINERS
from ckptfs._model.location import Location
from ckptfs._store.base import Store
from ckptfs.errors import Busy, NotAttached

log = logging.getLogger(__name__)

Key = tuple[int, str]
"""See `Attachment.key`."""


class Attachments:
    """Owns the attachments. All of it belongs to the event loop.

    Args:
        make_vfs: Makes the tree that shows them; given what it has to call when a handle of an
            attachment was closed.
        activities: What happens in them.
        linger_s: How long one that nobody holds stays.
        nursery: Runs the timers.
        journal: Where they are written down for the next daemon.
        forget_name: Tells the kernel that an attachment's directory is gone.

    Attributes:
        vfs: What `make_vfs` has made.
        traces: How they were read.
        linger_s: As given; can be changed.
        last_end_s: When one ended last (event loop time).
    """

    def __init__(
        self,
        make_vfs: Callable[[Callable[[Attachment], None]], Vfs],
        activities: Activities,
        linger_s: float,
        nursery: trio.Nursery,
        journal: Journal,
        forget_name: Callable[[str], None],
    ) -> None:
        self.vfs = make_vfs(self.released)
        self.traces = Traces()
        self.activities = activities
        self.linger_s = linger_s
        self._nursery = nursery
        self._journal = journal
        self._forget_name = forget_name
        self._by_key: dict[Key, Attachment] = {}
        self._opened: dict[Key, Location] = {}  # what their stores were opened for
        self.last_end_s = trio.current_time()

    def __iter__(self) -> Iterator[Attachment]:
        return iter(list(self._by_key.values()))

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: Key) -> Attachment | None:
        """The one with that key."""
        return self._by_key.get(key)

    def find(self, uid: int, name: str, location: Location | None) -> Attachment:
        """The user's attachment by directory name or location. Raises NotAttached."""
        for attachment in self:
            same_place = location is not None and attachment.location.identity == location.identity
            if may_see(uid, attachment) and (attachment.name == name or same_place):
                return attachment
        what = location.uri if location else name
        raise NotAttached(f"{what} is not attached; ckptfs status lists what is")

    def add(self, attachment: Attachment, location: Location) -> None:
        """Show it; its store was opened for `location`."""
        self._by_key[attachment.key] = attachment
        self._opened[attachment.key] = location
        attachment.trace = self.traces.begin(
            attachment.key, attachment.about(), lambda: attachment.listed
        )
        attachment.activity.begin(self.activities)
        self.vfs.add(attachment)

    def remove(self, attachment: Attachment) -> None:
        """End it, whoever holds it."""
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
        """End a pinned attachment, or with `force` any. Raises Busy while processes hold it."""
        was_pinned = attachment.pinned
        attachment.pin(False)
        if not attachment.held or force:
            self.remove(attachment)
        elif not was_pinned:
            pids = sorted(set(attachment.directories.values()))
            holders = ", ".join(str(pid or OTHER_CONTAINERS) for pid in pids) or "open files"
            raise Busy(
                f"{attachment.location.uri} is held by {holders}; end these processes, or detach "
                "with --force (their reads will fail)"
            )

    # -- stores

    def opened_for(self, attachment: Attachment) -> Location:
        """What its store was opened for, with the credentials."""
        return self._opened[attachment.key]

    def use_store(self, attachment: Attachment, location: Location, store: Store) -> None:
        """Read with this store, opened for `location`, from now on."""
        if location != self._opened[attachment.key]:
            attachment.record(StoreChanged(location))
        attachment.use_store(store)
        self._opened[attachment.key] = location

    # -- holders

    def hold(self, attachment: Attachment) -> None:
        """A control connection holds the attachment from now on, until `let_go`."""
        attachment.clients += 1

    def let_go(self, attachment: Attachment) -> None:
        """A control connection that held the attachment has ended."""
        attachment.clients -= 1
        self.released(attachment)

    @contextmanager
    def holding(self, attachment: Attachment | None) -> Generator[None]:
        """Only `detach` with force ends the attachment, and its store, meanwhile."""
        if attachment is None:
            yield
            return
        self.hold(attachment)
        try:
            yield
        finally:
            self.let_go(attachment)

    def released(self, attachment: Attachment) -> None:
        """Something that held the attachment is gone."""
        if not attachment.held:
            attachment.idle_since_s = trio.current_time()
            self._nursery.start_soon(self._linger, attachment, attachment.idle_since_s)

    async def _linger(self, attachment: Attachment, since_s: float) -> None:
        await trio.sleep(self.linger_s)
        current = self._by_key.get(attachment.key) is attachment
        if current and not attachment.held and attachment.idle_since_s == since_s:
            self.remove(attachment)
