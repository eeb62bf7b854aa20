"""The commands on the control socket: for each request type, who may send it and what it does.

`COMMANDS` is the table. A new command needs a request type, a row, and a method here.
"""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ckptfs._daemon.attachment.prefetch import Prefetch
from ckptfs._daemon.cache.jobs import CacheJob
from ckptfs._daemon.control.descriptors import Lent, Passed
from ckptfs._daemon.control.named_stores import Peer, Stores
from ckptfs._daemon.control.permissions import check_files, check_namespace, may_see
from ckptfs._daemon.control.service import Service
from ckptfs._daemon.quotas import is_ours
from ckptfs._daemon.uploads.handing_over import Staging
from ckptfs._model.blocks import BLOCK_BYTES
from ckptfs._model.location import Location
from ckptfs._model.plans.plan import Wanted
from ckptfs._model.protocol.replies import (
    ActivityReply,
    Attached,
    CacheResults,
    Done,
    Found,
    Given,
    Prefetching,
    Reloaded,
    Reply,
    StatusReply,
    Taken,
    Trace,
)
from ckptfs._model.protocol.requests import (
    PIECE_BLOCKS_MAX,
    Activity,
    Attach,
    BorrowMemory,
    CacheProgress,
    CacheRequest,
    ClearCache,
    CollectCache,
    Detach,
    FindBlocks,
    GetTrace,
    GiveBlocks,
    ListCache,
    MetadataChanged,
    PrefetchProgress,
    Reload,
    Request,
    Restart,
    SaveBlocks,
    StartPrefetch,
    Status,
    Stop,
    TakeBlocks,
    VerifyCache,
)
from ckptfs._model.protocol.uploads import (
    AwaitUpload,
    BeginUpload,
    CommitUpload,
    DropUpload,
    FindUpload,
    ListUploads,
    PendingUpload,
    RetryUpload,
    StageFile,
    UploadBegun,
    UploadReply,
    UploadsReply,
)
from ckptfs.errors import AccessDenied, Busy, CkptfsError, ProtocolError

if TYPE_CHECKING:
    from ckptfs._daemon.attachment.attachment import Attachment

_LACKING_SHOWN = 10
"""Most unreadable files that a reply to an attach names."""


Job: TypeAlias = Prefetch | CacheJob
"""Background work for a connection, which ends with it."""


class ConnectionState:
    """The state of an open connection.

    Attributes:
        peer: The user and groups of the client.
        pid: The client's process.
        attachments: The attachments that the connection holds.
        passed: The descriptor that came with the last request.
        lent: The memory that the client has borrowed.
        stagings: The uploads whose files arrive by the connection, by id.
        leaves: Functions to call at its end.
    """

    def __init__(self, peer: Peer, pid: int = 0) -> None:
        self.peer = peer
        self.pid = pid
        self.attachments: list[Attachment] = []
        self.passed = Passed()
        self.lent = Lent()
        self.stagings: dict[str, Staging] = {}
        self.leaves: list[Callable[[], None]] = []
        self._jobs: dict[str, Job] = {}

    def require_no(self, name: str) -> None:
        """Raise Busy if the connection's last job of that name has not ended."""
        if name in self._jobs and not self._jobs[name].has_ended:
            raise Busy(f"the last {name} of this connection has not ended; use another connection")

    def keep(self, name: str, job: Job) -> None:
        """Keep a job that has begun, until the connection's end or its next job of that name."""
        self._jobs[name] = job

    async def progress(self, name: str) -> Any:
        """Progress of the connection's job of that name. Raises ProtocolError if there is no such
        job."""
        if name not in self._jobs:
            raise ProtocolError(f"this connection has no {name}")
        return await self._jobs[name].progress()

    def end(self) -> None:
        """End the jobs, and close the descriptors."""
        self.passed.close()
        self.lent.close()
        for job in self._jobs.values():
            job.cancel()
        for leave in self.leaves:
            leave()


@dataclass(eq=False)
class Commands:
    """Runs the commands. Each method runs one request of a connection.

    `read_config` reads the configuration again. A private daemon has none. `name` is the daemon's
    name in messages.
    """

    service: Service
    stores: Stores
    read_config: Callable[[], Awaitable[Reloaded]] | None
    name: str

    async def run(self, request: Request[Any], client: ConnectionState) -> Reply:
        """Run a request. Raises AccessDenied if the user may not send it."""
        command = COMMANDS[type(request)]
        if command.is_for_owners and not is_ours(client.peer.uid):
            raise AccessDenied(
                f"only root and uid {os.geteuid()} may reload, restart or stop {self.name}, "
                "exchange blocks of other nodes with it, or have it upload"
            )
        return await command.run(self, request, client)

    # -- attachments

    async def attach(self, request: Attach, client: ConnectionState) -> Attached:
        service, peer = self.service, client.peer
        if request.volume is not None and not is_ours(peer.uid):
            raise AccessDenied(
                f"only root and uid {os.geteuid()} may attach volumes at {self.name}"
            )
        location = self.stores.find(request.location, peer)
        attachment = await service.attaching.attach(
            location,
            peer.uid,
            peer.gid,
            pinned=request.pinned,
            saves=request.saves,
            volume=request.volume,
        )
        client.attachments.append(attachment)
        self._check_store_again(request.location, location, peer, attachment)
        if attachment.trace is not None:
            attachment.trace.joined(client.pid, request.rank)
        if request.plan is not None:
            wanted = Wanted(plan=request.plan, rank=request.rank)
            service.prefetches.begin_recorded(attachment, wanted)
        if request.prefetch:
            service.prefetches.begin_recorded(attachment, Wanted(request.prefetch))
        manifest = attachment.manifest
        return Attached(
            mount=service.current.config.mount,
            name=attachment.name,
            uri=attachment.location.uri,
            version=manifest.version,
            files=len(manifest.files),
            size=manifest.size,
            skipped=len(manifest.skipped),
            lacking=tuple(islice((s for s in manifest.skipped if s.is_lacking), _LACKING_SHOWN)),
        )

    def _check_store_again(
        self, asked: Location, found: Location, peer: Peer, attachment: "Attachment"
    ) -> None:
        """Detach the attachment if a reload has changed its named store during the listing."""
        attachments = self.service.attachments
        if found.store is None or attachment not in attachments:
            return
        try:
            now = self.stores.find(asked, peer)
        except CkptfsError:
            attachments.detach(attachment, force=True)
            raise
        if now != found:
            attachments.detach(attachment, force=True)
            raise Busy(f"{found.uri}: the configuration was reloaded meanwhile; try again")

    async def detach(self, request: Detach, client: ConnectionState) -> Done:
        location = self._find(request.location, client.peer)
        attachment = self.service.attachments.find(client.peer.uid, request.name, location)
        self.service.attachments.detach(attachment, force=request.force)
        return Done()

    async def metadata_changed(self, request: MetadataChanged, client: ConnectionState) -> Done:
        location = self.stores.find(request.location, client.peer)
        for attachment in self.service.attachments:
            same_place = attachment.location.identity == location.identity
            if same_place and may_see(client.peer.uid, attachment):
                await self.service.metadata.refresh(attachment)
        return Done()

    def _find(self, location: Location | None, peer: Peer) -> Location | None:
        return None if location is None else self.stores.find(location, peer)

    # -- reports

    async def status(self, request: Status, client: ConnectionState) -> StatusReply:
        return self.service.reporter.status(client.peer.uid, request.name)

    async def activity(self, request: Activity, client: ConnectionState) -> ActivityReply:
        return self.service.reporter.activity(client.peer.uid)

    async def trace(self, request: GetTrace, client: ConnectionState) -> Trace:
        location = self._find(request.location, client.peer)
        return self.service.reporter.trace(client.peer.uid, request.name, location)

    # -- jobs

    async def start_prefetch(self, request: StartPrefetch, client: ConnectionState) -> Prefetching:
        client.require_no("prefetch")
        attachment = self.service.attachments.find(client.peer.uid, request.name, None)
        self.service.attachments.hold(attachment)
        client.attachments.append(attachment)
        wanted = Wanted(request.globs, request.rate, request.plan, request.rank, request.keep)
        prefetch = self.service.prefetches.begin(attachment, wanted)
        client.keep("prefetch", prefetch)
        return prefetch.state()

    async def prefetch_progress(
        self, request: PrefetchProgress, client: ConnectionState
    ) -> Prefetching:
        return await client.progress("prefetch")

    async def start_cache_command(
        self, request: CacheRequest, client: ConnectionState
    ) -> CacheResults:
        client.require_no("cache command")
        job = self.service.cache_commands.begin(request, client.peer.uid)
        client.keep("cache command", job)
        return await job.progress()

    async def cache_progress(self, request: CacheProgress, client: ConnectionState) -> CacheResults:
        return await client.progress("cache command")

    # -- blocks

    async def give_blocks(self, request: GiveBlocks, client: ConnectionState) -> Given:
        attachment = self.service.attachments.find(client.peer.uid, request.name, None)
        with self.service.attachments.holding(attachment), client.passed.used() as memfd:
            return await self.service.exchange.give(attachment, request, memfd)

    async def find_blocks(self, request: FindBlocks, client: ConnectionState) -> Found:
        attachment = self.service.attachments.find(client.peer.uid, request.name, None)
        with self.service.attachments.holding(attachment):
            return await self.service.exchange.find(attachment, request)

    async def take_blocks(self, request: TakeBlocks, client: ConnectionState) -> Taken:
        attachment = self.service.attachments.find(client.peer.uid, request.name, None)
        with self.service.attachments.holding(attachment), client.passed.used() as memfd:
            return await self.service.exchange.take(attachment, request, memfd)

    async def borrow_memory(self, request: BorrowMemory, client: ConnectionState) -> Done:
        client.lent.make(PIECE_BLOCKS_MAX * BLOCK_BYTES)
        return Done()

    async def save_blocks(self, request: SaveBlocks, client: ConnectionState) -> Taken:
        attachment = self.service.attachments.find(client.peer.uid, request.name, None)
        with self.service.attachments.holding(attachment):
            return await self.service.exchange.save(attachment, request, client.lent.fd)

    # -- uploads

    async def begin_upload(self, request: BeginUpload, client: ConnectionState) -> UploadBegun:
        uid, gid, _ = client.peer
        location, _ = self.stores.target(request.location, uid, gid)
        check_files(location)
        check_namespace(location, request.namespace)
        handing_over = self.service.handing_over
        staging = await handing_over.begin(request, location.identity, uid, gid)
        if staging is None:
            return UploadBegun("")
        client.stagings[staging.record.id] = staging
        client.leaves.append(lambda: handing_over.leave(staging))
        return UploadBegun(staging.record.id)

    async def stage_file(self, request: StageFile, client: ConnectionState) -> Done:
        with client.passed.used() as fd:
            await self.service.handing_over.stage(_staging(client, request.id), request, fd)
        return Done()

    async def commit_upload(self, request: CommitUpload, client: ConnectionState) -> UploadReply:
        staging = _staging(client, request.id)
        return UploadReply(await self.service.handing_over.commit(staging))

    async def await_upload(self, request: AwaitUpload, client: ConnectionState) -> UploadReply:
        uid = client.peer.uid
        return UploadReply(await self.service.uploads.wait_ended(request.id, uid, request.seconds))

    async def list_uploads(self, request: ListUploads, client: ConnectionState) -> UploadsReply:
        return self.service.reporter.all_uploads(client.peer.uid)

    async def drop_upload(self, request: DropUpload, client: ConnectionState) -> Done:
        await self.service.uploads.drop(request.id, client.peer.uid)
        return Done()

    async def retry_upload(self, request: RetryUpload, client: ConnectionState) -> Done:
        check_files(request.location)
        await self.service.uploads.retry(request.id, client.peer.uid, request.location)
        return Done()

    async def find_upload(self, request: FindUpload, client: ConnectionState) -> PendingUpload:
        uid, gid, _ = client.peer
        place = self.stores.target(request.location, uid, gid)[0].identity
        await self.service.uploads.wait_restored()
        return PendingUpload(self.service.uploads.hold_newest(place, uid, client.leaves))

    # -- the daemon

    async def reload(self, request: Reload, client: ConnectionState) -> Reloaded:
        if self.read_config is None:
            raise ProtocolError("this daemon has no configuration of its own to read")
        return await self.read_config()

    async def restart(self, request: Restart, client: ConnectionState) -> Done:
        self.service.lifetime.restart()
        return Done()

    async def stop(self, request: Stop, client: ConnectionState) -> Done:
        self.service.lifetime.stop(force=request.force)
        return Done()


def _staging(client: ConnectionState, upload: str) -> Staging:
    staging = client.stagings.get(upload)
    if staging is None:
        raise ProtocolError(f"this connection has begun no upload {upload}")
    return staging


class Command(NamedTuple):
    """A row of `COMMANDS`.

    Attributes:
        run: Runs the request.
        is_for_owners: Whether only root and the daemon's own user may send the request. Other
            requests are for all users whom the daemon serves. Each sees and changes only what is
            theirs.
        is_frequent: Whether clients send it many times a second, so the log has it at DEBUG only.
        is_charged: Whether another user pays for the time that the reply takes.
    """

    run: Callable[[Commands, Any, ConnectionState], Awaitable[Reply]]
    is_for_owners: bool = False
    is_frequent: bool = False
    is_charged: bool = False


COMMANDS: dict[type[Request[Any]], Command] = {
    Attach: Command(Commands.attach),
    Detach: Command(Commands.detach),
    MetadataChanged: Command(Commands.metadata_changed),
    Status: Command(Commands.status, is_frequent=True, is_charged=True),
    Activity: Command(Commands.activity, is_frequent=True, is_charged=True),
    GetTrace: Command(Commands.trace, is_frequent=True),
    StartPrefetch: Command(Commands.start_prefetch),
    PrefetchProgress: Command(Commands.prefetch_progress, is_frequent=True),
    ListCache: Command(Commands.start_cache_command),
    CollectCache: Command(Commands.start_cache_command),
    VerifyCache: Command(Commands.start_cache_command),
    ClearCache: Command(Commands.start_cache_command),
    CacheProgress: Command(Commands.cache_progress, is_frequent=True),
    GiveBlocks: Command(Commands.give_blocks, is_for_owners=True, is_frequent=True),
    FindBlocks: Command(Commands.find_blocks, is_for_owners=True, is_frequent=True),
    TakeBlocks: Command(Commands.take_blocks, is_for_owners=True, is_frequent=True),
    BorrowMemory: Command(Commands.borrow_memory, is_frequent=True),
    SaveBlocks: Command(Commands.save_blocks, is_frequent=True),
    BeginUpload: Command(Commands.begin_upload, is_for_owners=True),
    StageFile: Command(Commands.stage_file, is_for_owners=True, is_frequent=True),
    CommitUpload: Command(Commands.commit_upload, is_for_owners=True),
    AwaitUpload: Command(Commands.await_upload, is_for_owners=True, is_frequent=True),
    ListUploads: Command(Commands.list_uploads, is_for_owners=True, is_frequent=True),
    DropUpload: Command(Commands.drop_upload, is_for_owners=True),
    RetryUpload: Command(Commands.retry_upload, is_for_owners=True),
    FindUpload: Command(Commands.find_upload, is_for_owners=True),
    Reload: Command(Commands.reload, is_for_owners=True),
    Restart: Command(Commands.restart, is_for_owners=True),
    Stop: Command(Commands.stop, is_for_owners=True),
}
"""The action of each request, and the users who may send it."""
