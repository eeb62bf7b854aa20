"""Removal of what no upload needs any more: the files and records of those that have ended.

Files that an attachment shows stay until it ends. Files of an upload that is done stay until the
disk has the record of its end, because the next daemon would send them again without it.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from ckptfs._daemon.offload import Offload
from ckptfs._daemon.uploads.changes import Changes
from ckptfs._daemon.uploads.spool import Spool
from ckptfs._daemon.uploads.upload import Upload

log = logging.getLogger(__name__)

T = TypeVar("T")

_DONE_MAX = 1000
_DONE_S = 7 * 86400.0
"""The most records of uploads that are done, and the time for which they stay. A program asks for
the last upload when it saves the next checkpoint, which may be hours later."""
_LOOK_S = 1.0
"""Time between two looks whether attachments still show the files of an upload that has ended."""


@dataclass(eq=False)
class Removal:
    """Removes files and records, one upload after the other.

    Args:
        spool: The files and records.
        offload: The threads for them.
        shows: Says whether an attachment shows a directory.
        uploads: All uploads by their ids.
        changes: Tells each change of an upload.
        record_end: Has the disk record the end of an upload.

    Attributes:
        unfinished: The ids of directories without a record, which the daemon before has left.
    """

    spool: Spool
    offload: Offload
    shows: Callable[[str], bool]
    uploads: dict[str, Upload]
    changes: Changes
    record_end: Callable[[Upload], Awaitable[None]]
    unfinished: list[str] = field(default_factory=list[str], init=False)
    _lock: trio.Lock = field(default_factory=trio.Lock, init=False)

    async def run(self) -> None:
        """Record the ends of uploads, and remove the rest, until cancelled."""
        while True:
            await self._remove_unfinished()
            for upload in self.uploads.copy().values():
                if not upload.is_recorded:
                    await self.record_end(upload)
                if upload.is_dropped and upload.sender is None:
                    await self.forget(upload)
                elif _has_spare_files(upload) and upload.is_recorded:
                    await self._remove(upload, self.spool.remove_files)
                    self.changes.tell()
            await self._remove_old()
            left = self.unfinished or any(
                upload.is_dropped or not upload.is_recorded or _has_spare_files(upload)
                for upload in self.uploads.values()
            )
            with trio.move_on_after(_LOOK_S if left else _DONE_S):
                await self.changes.wait()

    async def forget(self, upload: Upload) -> None:
        """Remove all of an upload, unless an attachment shows it."""
        if await self._remove(upload, self.spool.remove):
            self.uploads.pop(upload.record.id, None)
            self.changes.tell()

    async def remove_unfinished(self, upload_id: str) -> None:
        """Remove a directory without a record, now or when the disk lets it go."""
        if not await self.on_disk("remove", upload_id, self.spool.remove, upload_id):
            self.unfinished.append(upload_id)
            self.changes.tell()

    async def _remove_unfinished(self) -> None:
        """Remove the directories without a record. An attachment may show one of an upload that
        was dropped."""
        for upload_id in self.unfinished.copy():
            if self.shows(self.spool.path_of(upload_id)):
                continue
            if await self.on_disk("remove", upload_id, self.spool.remove, upload_id):
                self.unfinished.remove(upload_id)

    async def _remove_old(self) -> None:
        done = [each for each in self.uploads.values() if each.record.state == "done"]
        done.sort(key=lambda upload: upload.record.ended)
        before = time.time() - _DONE_S
        for position, upload in enumerate(done):
            if len(done) - position > _DONE_MAX or upload.record.ended < before:
                await self.forget(upload)

    async def _remove(self, upload: Upload, remove: Callable[[str], None]) -> bool:
        upload_id = upload.record.id
        async with self._lock:
            if upload.holders or self.shows(self.spool.path_of(upload_id)):
                return False
            if not await self.on_disk("remove", upload_id, remove, upload_id):
                return False
            upload.has_files = False
            return True

    async def on_disk(
        self, verb: str, upload_id: str, call: Callable[[T], None], argument: T
    ) -> bool:
        """Have the disk do something. Returns whether it does; the log says why not. A failure is
        a warning as those of the cache are, because a later try may succeed."""
        try:
            await self.offload.spool(call, argument)
        except OSError as error:
            about = {"once_for": f"upload-{verb}"}
            log.warning("uploads: cannot %s %s: %s", verb, upload_id, error.strerror, extra=about)
            return False
        return True


def _has_spare_files(upload: Upload) -> bool:
    return upload.record.state == "done" and upload.has_files
