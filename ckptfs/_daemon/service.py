"""The daemon's service: its parts put together, what an earlier daemon had, and its own end."""

import functools
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from ckptfs._daemon.activity import Activities, Usage
from ckptfs._daemon.attaching import Attaching
from ckptfs._daemon.attachments import Attachments
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cachetasks import CacheTasks
from ckptfs._daemon.exchange import Exchange
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.handoff import Handoff
from ckptfs._daemon.limits import StoreCalls, may_see
from ckptfs._daemon.metadata import MetadataKeeper
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.prefetches import Prefetches
from ckptfs._daemon.processes import command
from ckptfs._daemon.recognise import Recogniser
from ckptfs._daemon.records import forget, recorded, recorder
from ckptfs._daemon.restore import Last
from ckptfs._daemon.status import Reporter
from ckptfs._daemon.stores import OpenFor
from ckptfs._daemon.vfs import Vfs
from ckptfs._daemon.xattrs import Xattrs
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.replies import Trace
from ckptfs.errors import Busy, CkptfsError, LimitExceeded, StoreTimeout

if TYPE_CHECKING:
    from ckptfs._store.base import Store

log = logging.getLogger(__name__)

_REOPEN_S = 10.0
"""Longest that all readers wait, after a restart, for one store to be opened, which asks no server;
the keeper waits for 30 s (``process``)."""


class Service:
    """What the daemon does for the kernel and for its clients. Belongs to the event loop.

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

    Attributes:
        attachments: All of them, and who holds them.
        vfs: The tree that the kernel sees; `xattrs`, `metadata`: likewise.
        exchange: Blocks that go to other nodes, or come from there.
        reporter: Knows what happens.
        cache_tasks: What is done to the cache as a whole.
        stopped: Set when the daemon is to end; `restarts`: and to be followed by another one.
        attach, detach, find, hold, let_go, released, prefetch, prefetch_unheld, status,
            activity: Those of the parts.
    """

    def __init__(
        self,
        config: Config,
        cache: Cache,
        fetcher: Fetcher,
        offload: Offload,
        nursery: trio.Nursery,
        forget_name: Callable[[str], None],
        open_store: OpenFor,
        handoff: Handoff,
        passthrough: str = "off",
    ) -> None:
        self._config = config
        self._offload = offload
        self._nursery = nursery
        self._open_store = open_store
        self._handoff = handoff
        owner = os.geteuid(), os.getegid()
        recogniser = Recogniser(fetcher, offload, nursery)
        make_vfs = functools.partial(Vfs, fetcher, recogniser, cache, handoff.handles, *owner)
        attachments = self.attachments = Attachments(
            make_vfs, Activities(self._name), config.linger_s, nursery, handoff.journal, forget_name
        )
        self.vfs = attachments.vfs
        self.metadata = MetadataKeeper(offload, config.read_deadline_s)
        self._store_calls = StoreCalls(offload)
        self._attaching = Attaching(
            config, attachments, self.metadata, self._store_calls, open_store, handoff
        )
        self.cache_tasks = CacheTasks(cache, lambda: cache.bytes_max, offload, nursery, attachments)
        self._prefetches = Prefetches(fetcher, cache, offload, nursery)
        self.exchange = Exchange(fetcher, cache)
        self.attach = self._attaching.attach
        self.detach, self.find = attachments.detach, attachments.find
        self.hold, self.let_go = attachments.hold, attachments.let_go
        self.released, self.holding = attachments.released, attachments.holding
        self.prefetch = self._prefetches.begin
        self.prefetch_unheld = self._prefetches.begin_unheld
        self.reporter = Reporter(config, attachments, cache, fetcher, handoff, passthrough)
        self.status, self.activity = self.reporter.status, self.reporter.activity
        self.xattrs = Xattrs(self.vfs, fetcher, cache, offload, self.metadata, self.prefetch_unheld)
        self.stopped = trio.Event()
        self.restarts = False
        self._clients = 0
        self._last_client_s = trio.current_time()

    def _name(self, usage: Usage) -> None:
        self._nursery.start_soon(self._find_command, usage)

    async def _find_command(self, usage: Usage) -> None:
        usage.command = await self._offload.names(command, usage.pid) or usage.command

    def configure(self, config: Config) -> None:
        """Take in settings that have changed. What is read from `config` itself is so already."""
        self.attachments.linger_s = config.linger_s
        self.metadata.deadline_s = config.read_deadline_s

    async def metadata_changed(self, location: Location, uid: int) -> None:
        """This user has changed the metadata of the checkpoint at `location` at the store."""
        for attachment in self.attachments:
            same_place = attachment.location.identity == location.identity
            if same_place and may_see(uid, attachment):
                await self.metadata.refresh(attachment)

    def trace(self, uid: int, name: str, location: Location | None) -> Trace:
        """How a checkpoint was read: one that is attached, or was. Raises NotAttached."""
        traces = self.attachments.traces
        trace = traces.find((uid, location.identity)) if location is not None else None
        attachment = None
        if trace is None or not trace.has_ended:
            attachment = self.find(uid, name, location)
            trace = traces.find(attachment.key) or traces.running(attachment.key)
            trace.named(attachment.activity.commands())
        return Trace(
            mount=self._config.mount,
            name="" if attachment is None or trace.has_ended else attachment.name,
            uri=trace.about.uri,
            version=trace.about.version,
            attached=trace.about.attached_s,
            file_count=trace.about.file_count,
            size=trace.about.size,
            files=trace.files(),
            processes=trace.processes(),
            accesses=trace.accesses,
            fetches=trace.fetches,
            left_out=trace.left_out,
            lent=sorted(trace.lent),
            restarts=self._handoff.restarts,
        )

    # -- after another daemon

    async def restore(self) -> None:
        """Have all attachments that an earlier daemon had, as they were. To be called once, before
        anything else. Raises DaemonError."""
        found = [Last(*item) for item in recorded(self._handoff.journal).items()]
        stores: dict[int, Store | CkptfsError] = {}
        async with trio.open_nursery() as nursery:
            for last in found:
                nursery.start_soon(self._reopen, last, stores)
        for last in found:
            store = stores[last.ordinal]
            if isinstance(store, CkptfsError):
                log.error("%s: cannot be restored: %s", last.location.uri, store)
                forget(self._handoff.journal, last.ordinal)
                continue
            attachment = last.attachment(store)
            attachment.record = recorder(self._handoff.journal, last.ordinal)
            self.attachments.add(attachment, last.location)
            for begun in last.prefetches:
                with suppress(LimitExceeded):
                    self._prefetches.go_on(attachment, begun)

    async def _reopen(self, last: Last, stores: "dict[int, Store | CkptfsError]") -> None:
        opened = self._open_store, last.location, self._config.store_timeout_s, last.uid
        try:
            with trio.fail_after(_REOPEN_S):
                stores[last.ordinal] = await self._offload.control(*opened)
        except CkptfsError as error:
            stores[last.ordinal] = error
        except trio.TooSlowError:
            stores[last.ordinal] = StoreTimeout(f"its store did not open within {_REOPEN_S:g} s")

    def restored(self) -> None:
        """To be called when the handles that are open have been restored, too."""
        for attachment in self.attachments:
            self.released(attachment)

    # -- the daemon's own end

    def client_came(self) -> None:
        """A control connection was opened."""
        self._clients += 1

    def client_left(self) -> None:
        """A control connection was closed."""
        self._clients -= 1
        self._last_client_s = trio.current_time()

    async def wait_idle(self) -> None:
        """Return when nobody has used the daemon for `idle_exit_s`."""
        while True:
            idle_exit_s = self._config.idle_exit_s
            used = self._clients or len(self.attachments) or not idle_exit_s
            last_use_s = max(self._last_client_s, self.attachments.last_end_s)
            left_s = last_use_s + idle_exit_s - trio.current_time()
            if not used and left_s <= 0:
                return
            await trio.sleep(min(1.0, max(0.05, left_s)) if not used else 1.0)

    def stop(self, *, force: bool) -> None:
        """Ask the daemon to end. Raises Busy while checkpoints are in use, unless `force`."""
        used = [a for a in self.attachments if a.directories or a.open_handles]
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
