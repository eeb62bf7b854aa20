"""The daemon's parts, and how they are put together."""

import functools
import os
from collections.abc import Callable

import trio

from ckptfs._daemon.attachment.block_exchange import Exchange
from ckptfs._daemon.attachment.format_detection import FormatDetector
from ckptfs._daemon.attachment.metadata import MetadataKeeper
from ckptfs._daemon.attachment.prefetch import Prefetches
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.control.attach import Attaching
from ckptfs._daemon.control.cache_commands import CacheCommands
from ckptfs._daemon.control.current_config import CurrentConfig
from ckptfs._daemon.control.lifetime import Lifetime
from ckptfs._daemon.control.named_stores import OpenFor
from ckptfs._daemon.control.permissions import StoreCalls
from ckptfs._daemon.control.registry import Attachments
from ckptfs._daemon.control.status import Reporter
from ckptfs._daemon.fetch.fetcher import Fetcher
from ckptfs._daemon.fs.vfs import Vfs
from ckptfs._daemon.fs.xattrs import Xattrs
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.uploads.handing_over import HandingOver
from ckptfs._daemon.uploads.queue import Queue, Resolve
from ckptfs._daemon.uploads.spool import Spool
from ckptfs._daemon.usage.counters import Activities, Usage
from ckptfs._daemon.usage.procfs import command
from ckptfs._mount.handoff import Handoff


class Service:
    """The parts of the daemon, which belong to the event loop.

    Args:
        forget_name: Tells the kernel that an attachment's directory is gone.
        upload_target: See ``ckptfs._daemon.uploads.queue.Resolve``.
        passthrough: "on", or the reason why not, for `status`.
    """

    def __init__(
        self,
        *,
        current: CurrentConfig,
        cache: Cache,
        fetcher: Fetcher,
        offload: Offload,
        nursery: trio.Nursery,
        forget_name: Callable[[str], None],
        open_store: OpenFor,
        upload_target: Resolve,
        handoff: Handoff,
        passthrough: str = "off",
    ) -> None:
        self.current = current
        self.fetcher = fetcher
        self.offload = offload
        self.open_store = open_store
        self.handoff = handoff

        async def find_command(usage: Usage) -> None:
            usage.command = await offload.names(command, usage.pid) or usage.command

        formats = FormatDetector(fetcher, offload, nursery)
        self.attachments = Attachments(
            functools.partial(Vfs, fetcher, formats, handoff.handles, os.geteuid(), os.getegid()),
            Activities(functools.partial(nursery.start_soon, find_command)),
            current,
            nursery,
            handoff.journal,
            forget_name,
        )
        self.vfs = self.attachments.vfs
        self.metadata = MetadataKeeper(offload, current.config.read_deadline_s)
        self.prefetches = Prefetches(fetcher, cache, offload, nursery)
        self.attaching = Attaching(
            current,
            self.attachments,
            self.metadata,
            StoreCalls(offload),
            open_store,
            handoff,
            cache,
        )
        self.xattrs = Xattrs(
            self.vfs, fetcher, cache, offload, self.metadata, self.prefetches.begin_recorded
        )
        self.exchange = Exchange(fetcher, cache)
        self.cache_commands = CacheCommands(cache, offload, nursery, self.attachments)

        def has_disk() -> bool:
            return cache.index.root.lock_fd >= 0

        self.uploads = Queue(
            spool=Spool(cache.index.root.path, cache.directory),
            offload=offload,
            journal=handoff.journal,
            resolve=upload_target,
            shows=self.attachments.show_directory,
            keeps=self.attachments.keep_directory,
            store_timeout_s=lambda: current.config.store_timeout_s,
            socket=current.config.socket,
            has_disk=has_disk,
        )
        self.handing_over = HandingOver(
            queue=self.uploads,
            offload=offload,
            nursery=nursery,
            limit_bytes=lambda: current.config.upload_bytes_max,
            has_disk=has_disk,
            free_disk=fetcher.free_disk,
        )
        self.reporter = Reporter(
            current,
            self.attachments,
            cache,
            fetcher,
            handoff,
            offload,
            passthrough,
            self.uploads,
            self.handing_over,
        )
        self.lifetime = Lifetime(
            current,
            self.attachments,
            lambda: self.uploads.active() + self.handing_over.active(),
        )
