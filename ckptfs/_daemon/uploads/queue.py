"""The queue: accepted uploads, from the moment when the disk has their files.

At most `_RUNNING_MAX` uploads run at the same time. Uploads to one place run one after the other,
in the order of their acceptance, so the last one is what the place has in the end. An upload that
waits for its next attempt takes no turn of other places.

Each upload has a record on the disk (``spool``), and its target with credentials is in memory
(``credentials``). A daemon that follows another one therefore continues. Without that memory, an
upload that needs the caller's credentials has failed, and its files stay for another try.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import trio

from ckptfs._daemon.offload import Offload
from ckptfs._daemon.uploads import credentials
from ckptfs._daemon.uploads.changes import Changes
from ckptfs._daemon.uploads.removal import Removal
from ckptfs._daemon.uploads.sender import Sender
from ckptfs._daemon.uploads.spool import Spool
from ckptfs._daemon.uploads.upload import Upload
from ckptfs._model.location import Location
from ckptfs._model.upload_messages import NotSent, Setup
from ckptfs._model.uploads import Record, Sent, UploadStatus
from ckptfs._mount.handoff import Journal
from ckptfs.errors import AccessDenied, Busy, CacheError, CkptfsError, LocationError, NoUpload

if TYPE_CHECKING:
    from ckptfs._model.named_store import Credentials

log = logging.getLogger(__name__)

_RUNNING_MAX = 2
"""One upload fills a usual link with its 16 threads. The second one uses the time in which the
first one compares and verifies."""
_LOOK_S = 1.0
"""Time between two looks whether the cache's directory can be used by now."""
_RESTORED_S = 30.0
"""Longest wait for that before an error. The keeper kills a daemon that is stuck after 10 s."""

Resolve = Callable[[Location, int, int], "tuple[Location, Credentials]"]
"""Returns the place that a client's location names, and the credentials of its named store; for a
user and group. Raises LocationError, AccessDenied."""


@dataclass(eq=False)
class Queue:
    """The uploads of one daemon. Belongs to the event loop.

    Args:
        spool: The files and records.
        offload: The threads for them.
        journal: The memory for credentials.
        resolve: See `Resolve`.
        shows: Says whether an attachment shows a directory.
        keeps: Says whether one does that stays until a user or program ends its use.
        store_timeout_s, socket: See `Setup`.
        has_disk: Says whether this daemon has the cache's directory.

    Attributes:
        is_restored: Whether it knows the uploads that the daemon before it has left.
        changes: Tells each change of an upload.
        removal: Removes what no upload needs any more.
        sent_bytes: The bytes that uploads have brought to stores since the daemon started.
        ended: The number of uploads that have ended since then, by result.
    """

    spool: Spool
    offload: Offload
    journal: Journal
    resolve: Resolve
    shows: Callable[[str], bool]
    keeps: Callable[[str], bool]
    store_timeout_s: Callable[[], float]
    socket: str
    has_disk: Callable[[], bool]
    is_restored: bool = field(default=False, init=False)
    changes: Changes = field(default_factory=Changes, init=False)
    sent_bytes: int = field(default=0, init=False)
    ended: dict[str, int] = field(
        default_factory=lambda: {"done": 0, "failed": 0, "dropped": 0}, init=False
    )
    removal: Removal = field(init=False)
    _lock: trio.Lock = field(default_factory=trio.Lock, init=False)
    """Held while the record of an accepted upload changes on the disk."""
    _uploads: dict[str, Upload] = field(default_factory=dict[str, Upload], init=False)
    _order: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.removal = Removal(
            self.spool, self.offload, self.shows, self._uploads, self.changes, self._record_end
        )

    # -- the life of an upload

    async def restore(self) -> None:
        """Take over what the daemon before this one has left, if this daemon has the cache's
        directory by now. `run` tries again otherwise."""
        if self.is_restored or not self.has_disk():
            return
        try:
            found = await self.offload.spool(self.spool.recover)
        except OSError as error:
            about = {"once_for": "uploads-restore"}
            log.warning("uploads: cannot read their directory: %s", error.strerror, extra=about)
            return
        try:
            asked = credentials.kept(self.journal)
        except msgspec.DecodeError as error:  # of a daemon of another version
            log.error("uploads: cannot read the credentials of the daemon before: %s", error)
            asked = {}
        self.removal.unfinished += found.unfinished
        done = {record.place: record.order for record in found.records if record.state == "done"}
        for record in found.records:
            known = asked.pop(record.id, None if record.had_secrets else record.location)
            upload = self._add(record, known)
            uri, again = record.location.uri, f"ckptfs uploads --retry {record.id} sends"
            if not upload.goes_on:
                continue
            if record.order < done.get(record.place, 0):  # its turn was before
                text = (
                    f"{uri}: it has ended, but the disk did not take the record; the place has a "
                    f"later upload; {again} this one again, --drop removes it"
                )
                await self._fail(upload, NotSent(CacheError.code, text))
            elif known is None:
                text = (
                    f"{uri}: its credentials were in the memory of a daemon that has ended; "
                    f"{again} them again"
                )
                await self._fail(upload, NotSent(AccessDenied.code, text))
        for lost in asked:
            credentials.forget(self.journal, lost)
        self.is_restored = True
        self.changes.tell()

    async def _restore_later(self) -> None:
        """Restore as soon as the directory can be read. A daemon that ends may hold it still."""
        while not self.is_restored:
            await trio.sleep(_LOOK_S)
            await self.restore()

    async def accept(self, record: Record, asked: Location) -> None:
        """Queue an upload whose files are on the disk. Raises CacheError if the disk refuses the
        record."""
        record = msgspec.structs.replace(record, order=max(self._order + 1, time.time_ns()))
        credentials.keep(self.journal, record.id, asked)
        try:
            await self.offload.spool(self.spool.save, record)
        except OSError as error:
            credentials.forget(self.journal, record.id)
            raise CacheError(
                f"{record.location.uri}: the upload cannot be recorded: {error.strerror}; check "
                "the disk of cache_dir"
            ) from None
        self._add(record, asked)
        self._log(record, "accepted")
        self.changes.tell()

    def _add(self, record: Record, asked: Location | None) -> Upload:
        upload = Upload(record, asked)
        if (before := self._uploads.get(record.id)) is not None:
            upload = before.again(record, asked)
        if record.state == "done":
            upload.sent = record.bytes
        self._order = max(self._order, record.order)
        self._uploads[record.id] = upload
        return upload

    async def run(self) -> None:
        """Send the uploads until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.removal.run)
            nursery.start_soon(self._restore_later)
            while True:
                next_s = self._start(nursery)
                with trio.move_on_at(next_s):
                    await self.changes.wait()

    def _start(self, nursery: trio.Nursery) -> float:
        """Start the uploads whose turn it is. Returns the time at which to look again."""
        now_s = trio.current_time()
        next_s = now_s + 3600
        taken: set[str] = set()  # places, and those of earlier uploads come first
        running = sum(upload.sender is not None for upload in self._uploads.values())
        for upload in sorted(self._uploads.values(), key=lambda each: each.record.order):
            place = upload.record.place
            if not upload.goes_on or place in taken:
                continue
            taken.add(place)
            if upload.sender is not None or upload.is_dropped:
                continue
            if upload.not_before_s > now_s:
                next_s = min(next_s, upload.not_before_s)
            elif running < _RUNNING_MAX:
                running += 1
                upload.attempts.begun(now_s)
                upload.sender = Sender()
                nursery.start_soon(self._send, upload, upload.sender)
        return next_s

    async def _send(self, upload: Upload, sender: Sender) -> None:
        try:
            setup = self._setup(upload)
            result = await sender.run(setup, lambda count: self._progressed(upload, count))
        except CkptfsError as error:
            result = NotSent(error.code, str(error))
        except Exception:  # an upload must not end the daemon
            log.exception("unexpected error in the upload %s", upload.record.id)
            result = NotSent(CkptfsError.code, "internal error of the daemon; see its log")
        if upload.is_dropped:
            pass  # `drop` waits for this
        elif isinstance(result, Sent):
            await self._finish(upload, result)
        else:
            pause_s = upload.attempts.pause_s(
                result.code, result.retry_after_s, trio.current_time()
            )
            if pause_s is None:
                await self._fail(upload, result)
            else:
                upload.record = msgspec.structs.replace(
                    upload.record, code=result.code, message=result.message
                )
                upload.not_before_s = trio.current_time() + pause_s
        upload.sender = None
        self.changes.tell()

    def _setup(self, upload: Upload) -> Setup:
        record, asked = upload.record, upload.asked
        assert asked is not None
        location, known = self.resolve(asked, record.uid, record.gid)
        if location.identity != record.place:
            raise LocationError(
                f"{asked.uri}: the named store has another place than at the call of upload; "
                "upload the checkpoint again"
            )
        return Setup(
            directory=self.spool.path_of(record.id),
            files=record.files,
            bytes=record.bytes,
            location=location,
            credentials=known,
            asked=asked,
            options=record.options,
            store_timeout_s=self.store_timeout_s(),
            socket=self.socket,
        )

    def _progressed(self, upload: Upload, count: int) -> None:
        if count > upload.sent:
            self.sent_bytes += count - upload.sent
            upload.sent = count
            upload.attempts.progressed(trio.current_time())

    async def _finish(self, upload: Upload, sent: Sent) -> None:
        self._progressed(upload, upload.record.bytes)
        await self._end(upload, "done", sent, "", "")
        self._log(upload.record, "done")

    async def _fail(self, upload: Upload, result: NotSent) -> None:
        await self._end(upload, "failed", None, result.code, result.message)
        log.warning("upload %s failed: %s", upload.record.id, result.message)

    async def _end(
        self, upload: Upload, state: str, sent: Sent | None, code: str, message: str
    ) -> None:
        """Record the end of an upload. If the disk refuses the record, this daemon knows the end
        all the same, and tries again to record it."""
        record = msgspec.structs.replace(
            upload.record, state=state, sent=sent, code=code, message=message, ended=time.time()
        )
        upload.record = record
        upload.is_recorded = False
        self.ended[state] += 1
        await self._record_end(upload)
        self.changes.tell()

    async def _record_end(self, upload: Upload) -> None:
        async with self._lock:
            if upload.is_recorded or upload.is_dropped:
                return
            record = upload.record
            if await self.removal.on_disk("record the end of", record.id, self.spool.save, record):
                upload.is_recorded = True
            elif not await self.offload.spool(self.spool.has, record.id):
                # It went with a disk that was replaced, so the next daemon has nothing to learn.
                upload.is_recorded, upload.has_files = True, False
                self.changes.tell()
            if upload.is_recorded:
                credentials.forget(self.journal, record.id)

    # -- the commands of users

    def statuses(self, uid: int, *, with_done: bool) -> list[UploadStatus]:
        """The uploads that a user may see, the oldest first."""
        uploads = sorted(self._uploads.values(), key=lambda each: each.record.order)
        return [
            upload.status()
            for upload in uploads
            if uid in (0, upload.record.uid) and (with_done or upload.record.state != "done")
        ]

    async def wait_ended(self, upload_id: str, uid: int, seconds: float) -> UploadStatus:
        """The state of an upload when it has ended, or after `seconds`. Raises NoUpload; CacheError
        as `wait_restored`."""
        await self.wait_restored()
        upload = self.find(upload_id, uid)
        await self.changes.wait_until(lambda: not upload.goes_on or upload.is_dropped, seconds)
        return self.find(upload_id, uid).status()

    async def wait_restored(self) -> None:
        """Wait until all uploads are known. Raises CacheError if the cache's directory cannot be
        used for long."""
        if not self.is_restored:
            await self.changes.wait_until(lambda: self.is_restored, _RESTORED_S)
            self.require_restored()

    def require_restored(self) -> None:
        """Raise CacheError unless all uploads are known."""
        if not self.is_restored:
            raise CacheError(
                "the daemon does not know its uploads yet, because cache_dir cannot be used; the "
                "log has the reason; try again, or restart the daemon"
            )

    def find(self, upload_id: str, uid: int) -> Upload:
        """The user's upload. Raises NoUpload; CacheError before the uploads are known."""
        upload = self._uploads.get(upload_id)
        if upload is None:
            self.require_restored()
        if upload is None or upload.is_dropped or uid not in (0, upload.record.uid):
            raise NoUpload(
                f"there is no upload {upload_id}; it was dropped, or is done since long ago; "
                "ckptfs uploads lists those that are known"
            )
        return upload

    async def drop(self, upload_id: str, uid: int) -> None:
        """End an upload that is not done, and remove its files. Files that an attachment shows go
        when it ends. Raises NoUpload; CacheError if the disk refuses."""
        async with self._lock:
            upload = self.find(upload_id, uid)
            if upload.record.state == "done":
                return
            upload.is_dropped = True
            remove = self.spool.remove_record
            if not await self.removal.on_disk("drop", upload_id, remove, upload_id):
                upload.is_dropped = False
                self.changes.tell()
                raise CacheError(
                    f"the upload {upload_id} cannot be dropped, because the disk of cache_dir "
                    "refuses that; see the daemon's log"
                )
        if upload.sender is not None:
            upload.sender.end()
        self.changes.tell()
        while upload.sender is not None:
            await self.changes.wait()
        self._log(upload.record, "dropped")
        self.ended["dropped"] += 1
        credentials.forget(self.journal, upload_id)
        await self.removal.forget(upload)

    async def retry(self, upload_id: str, uid: int, asked: Location) -> None:
        """Begin a failed upload again, after all others, with the credentials in `asked`. Raises
        NoUpload, LocationError for another target, Busy for one that has not failed."""
        async with self._lock:
            await self._retry(self.find(upload_id, uid), uid, asked)

    async def _retry(self, upload: Upload, uid: int, asked: Location) -> None:
        record = upload.record
        upload_id = record.id
        if self.resolve(asked, uid, record.gid)[0].identity != record.place:
            raise LocationError(
                f"the upload {upload_id} is one to {record.location.uri}, not to {asked.uri}; name "
                "its own target"
            )
        if upload.state != "failed":
            raise Busy(f"the upload {upload_id} has not failed; it is {upload.state}")
        public = msgspec.structs.replace(asked, secrets={})
        again = msgspec.structs.replace(
            record,
            state="waiting",
            ended=0.0,
            code="",
            message="",
            location=public,
            had_secrets=bool(asked.secrets),
        )
        await self.accept(again, asked)

    def newest(self, place: str, uid: int) -> Upload | None:
        """The user's newest upload to a place that is not done."""
        found = [
            upload
            for upload in self._uploads.values()
            if upload.record.place == place
            and upload.record.uid == uid
            and upload.record.state != "done"
            and not upload.is_dropped
        ]
        return max(found, key=lambda upload: upload.record.order, default=None)

    def hold_newest(self, place: str, uid: int, leaves: list[Callable[[], None]]) -> str:
        """The directory of `newest`; "" without one. It stays until the last of `leaves` is
        called, to which this adds."""
        upload = self.newest(place, uid)
        if upload is None:
            return ""

        def let_go() -> None:
            upload.holders -= 1
            self.changes.tell()

        upload.holders += 1
        leaves.append(let_go)
        return self.spool.path_of(upload.record.id)

    # -- sums

    def active(self) -> int:
        """The number of uploads that wait or run."""
        return sum(upload.goes_on for upload in self._uploads.values())

    def kept_bytes(self, *, failed: bool = False) -> int:
        """The bytes of the files on the disk; with `failed` those of failed uploads only."""
        kept = [upload for upload in self._uploads.values() if upload.has_files]
        wanted = [upload for upload in kept if not failed or upload.record.state == "failed"]
        return sum(upload.record.bytes for upload in wanted)

    def shown_bytes(self) -> int:
        """The bytes of ended uploads on the disk that only the end of an attachment removes."""
        ended = [
            upload
            for upload in self._uploads.values()
            if upload.has_files and (upload.is_dropped or upload.record.state == "done")
        ]
        kept = [upload for upload in ended if self.keeps(self.spool.path_of(upload.record.id))]
        return sum(upload.record.bytes for upload in kept)

    def count(self) -> dict[str, int]:
        """The number of uploads by state."""
        found: dict[str, int] = {"waiting": 0, "running": 0, "failed": 0}
        for upload in self._uploads.values():
            if upload.state in found:
                found[upload.state] += 1
        return found

    def _log(self, record: Record, event: str) -> None:
        uri = record.location.uri
        about = {"event": f"upload-{event}", "checkpoint": uri, "uid": record.uid}
        log.info("upload %s to %s: %s", record.id, uri, event, extra=about)
