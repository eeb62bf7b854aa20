"""Handing over: from a client's first request to an accepted upload.

The files arrive in pieces (``staging``). They belong to the connection until the client commits
them. Until then, its end removes them.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
import trio

from ckptfs._daemon.offload import Offload
from ckptfs._daemon.uploads.queue import Queue
from ckptfs._daemon.uploads.staging import StagedTree
from ckptfs._model.location import Location
from ckptfs._model.protocol.uploads import BeginUpload, StageFile
from ckptfs._model.units import size_text
from ckptfs._model.uploads import Record, UploadStatus
from ckptfs.errors import CacheError, CannotUpload, CkptfsError, LimitExceeded, ProtocolError

_WAIT_S = 5.0
"""Longest time until the answer to a client that waits for space, or for its commit."""


@dataclass(eq=False)
class Staging:
    """An upload whose files arrive.

    Attributes:
        record: The record that it will have.
        asked: The target with credentials, as the client names it.
        tree: Its files.
        lock: Held for each piece, the commit and the removal.
        outcome: The result of the commit: accepted, or the error.
        is_committed: Whether the client has committed it.
        is_ended: Whether the connection has ended before.
        staged: The bytes that have arrived.
    """

    record: Record
    asked: Location
    tree: StagedTree
    lock: trio.Lock = field(default_factory=trio.Lock)
    outcome: CkptfsError | bool = False
    is_committed: bool = False
    is_ended: bool = False
    staged: int = 0


@dataclass(eq=False)
class HandingOver:
    """The uploads that arrive. Belongs to the event loop.

    Args:
        queue: Gets the accepted uploads.
        offload: The threads for the disk.
        nursery: Runs the commits and removals.
        limit_bytes: The most bytes of all uploads on the disk; 0 for no limit.
        has_disk: Whether the cache has its directory.
        free_disk: Has so many bytes of the disk free, or returns False.
    """

    queue: Queue
    offload: Offload
    nursery: trio.Nursery
    limit_bytes: Callable[[], int]
    has_disk: Callable[[], bool]
    free_disk: Callable[[int], Awaitable[bool]]
    _stagings: dict[str, Staging] = field(default_factory=dict[str, Staging], init=False)
    _beginning_bytes: int = field(default=0, init=False)

    def active(self) -> int:
        """The number of uploads that arrive."""
        return len(self._stagings)

    def kept_bytes(self) -> int:
        """The bytes of the files that will have arrived."""
        staged = sum(staging.record.bytes for staging in self._stagings.values())
        return staged + self._beginning_bytes

    def statuses(self, uid: int) -> list[UploadStatus]:
        """The arriving uploads that a user may see."""
        return [
            _status_of(staging)
            for staging in self._stagings.values()
            if uid in (0, staging.record.uid)
        ]

    # -- the requests

    async def begin(self, request: BeginUpload, place: str, uid: int, gid: int) -> Staging | None:
        """Begin an upload to `place`; None if other uploads take the space now, and the client asks
        again. Raises LimitExceeded if they will take it, CacheError without a directory for it."""
        uri = request.location.uri
        if not self.has_disk():
            raise CacheError(
                f"{uri}: cache_dir cannot be used, so it cannot keep the files; see the daemon's "
                "log, or upload with wait=True"
            )
        queue = self.queue
        await queue.wait_restored()  # what the daemon before has left counts, too
        await queue.changes.wait_until(lambda: self._fits(uri, request.bytes), _WAIT_S)
        if not self._fits(uri, request.bytes):
            return None
        public = msgspec.structs.replace(request.location, secrets={})
        record = Record(
            id="",
            uid=uid,
            gid=gid,
            location=public,
            place=place,
            had_secrets=bool(request.location.secrets),
            options=request.options,
            files=request.files,
            bytes=request.bytes,
            order=0,
            accepted=0.0,
        )
        self._beginning_bytes += request.bytes
        try:
            upload, top = await self.offload.spool(queue.spool.make)
        except OSError as error:
            raise CacheError(
                f"{uri}: cache_dir cannot keep the files: {error.strerror}; check its disk, or "
                "upload with wait=True"
            ) from None
        finally:
            self._beginning_bytes -= request.bytes
        tree = StagedTree(top, queue.spool.path_of(upload), request.files, request.bytes)
        record = msgspec.structs.replace(record, id=upload)
        staging = self._stagings[upload] = Staging(record, request.location, tree)
        self.queue.changes.tell()
        return staging

    def _fits(self, uri: str, size: int) -> bool:
        """Whether so many bytes are within the limit now. Raises LimitExceeded if no end of an
        upload will change that."""
        limit = self.limit_bytes()
        if not limit:
            return True
        if size > limit:
            raise LimitExceeded(
                f"{uri}: the directory has {size_text(size)}, and upload_bytes_max allows "
                f"{size_text(limit)} for all uploads; raise it, or upload with wait=True"
            )
        if size + self.queue.kept_bytes(failed=True) > limit:
            raise LimitExceeded(
                f"{uri}: failed uploads keep {size_text(self.queue.kept_bytes(failed=True))} of "
                f"the {size_text(limit)} that upload_bytes_max allows; ckptfs uploads lists them, "
                "--retry sends them again, --drop removes them"
            )
        if size + self.queue.kept_bytes(failed=True) + self.queue.shown_bytes() > limit:
            raise LimitExceeded(
                f"{uri}: {size_text(self.queue.shown_bytes())} of the {size_text(limit)} that "
                "upload_bytes_max allows are files of ended uploads that are attached; ckptfs "
                "status names the processes; end their use, or upload with wait=True"
            )
        return size + self.queue.kept_bytes() + self.kept_bytes() <= limit

    async def stage(self, staging: Staging, request: StageFile, source: int) -> None:
        """Take over a piece from the descriptor `source`.

        Raises ProtocolError for a piece that was not announced, CannotUpload if the disk cannot
        have it.
        """
        async with staging.lock:
            if staging.is_committed or staging.is_ended:
                raise ProtocolError(f"the upload {request.id} takes no more files")
            staging.tree.begin(request.path, request.size, request.offset, request.length)
            piece = source, request.offset, request.length
            if not await self.offload.spool(staging.tree.clone, *piece):
                if not await self.free_disk(request.length):
                    raise CannotUpload(
                        f"{staging.asked.uri}: the disk of cache_dir has no room "
                        "for it beside the free share; free space, or upload with wait=True"
                    )
                await self.offload.spool(staging.tree.copy, *piece)
            staging.tree.arrived(request.length)
            staging.staged += request.length

    async def commit(self, staging: Staging) -> UploadStatus:
        """Have the disk keep the files, and accept the upload. Returns its state, which is
        `staging` if that takes longer. Raises CacheError; ProtocolError if files are missing."""
        upload = staging.record.id
        async with staging.lock:
            if not staging.is_committed:
                if staging.is_ended or not staging.tree.is_complete():
                    raise ProtocolError(f"the upload {upload} lacks files that were announced")
                staging.is_committed = True
                self.nursery.start_soon(self._accept, staging)
        await self.queue.changes.wait_until(lambda: staging.outcome is not False, _WAIT_S)
        if isinstance(staging.outcome, CkptfsError):
            raise staging.outcome
        if staging.outcome:
            return await self.queue.wait_ended(upload, staging.record.uid, 0)
        return _status_of(staging)

    async def _accept(self, staging: Staging) -> None:
        upload = staging.record.id
        try:
            await self.offload.spool(self.queue.spool.persist, upload)
            record = msgspec.structs.replace(staging.record, accepted=time.time())
            await self.queue.accept(record, staging.asked)
            staging.outcome = True
            staging.tree.close()
            del self._stagings[upload]
        except OSError as error:
            staging.outcome = CacheError(
                f"{staging.asked.uri}: the disk of cache_dir cannot keep the files: "
                f"{error.strerror}; upload with wait=True"
            )
            await self._remove(staging)
        except CkptfsError as error:
            staging.outcome = error
            await self._remove(staging)
        self.queue.changes.tell()

    def leave(self, staging: Staging) -> None:
        """The connection has ended. Without a commit, the files go."""
        if not staging.is_committed and not staging.is_ended:
            staging.is_ended = True
            self.nursery.start_soon(self._remove, staging)

    async def _remove(self, staging: Staging) -> None:
        async with staging.lock:
            staging.tree.close()
            upload = staging.record.id
            await self.queue.removal.remove_unfinished(upload)
            del self._stagings[upload]
        self.queue.changes.tell()


def _status_of(staging: Staging) -> UploadStatus:
    record = staging.record
    return UploadStatus(
        id=record.id,
        uri=record.location.uri,
        uid=record.uid,
        state="staging",
        files=record.files,
        bytes=record.bytes,
        sent=0,
    )
