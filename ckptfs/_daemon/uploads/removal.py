"""Removal of what nobody needs any more: the files and records of uploads that have ended.

Files that an attachment shows stay until it ends.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from ckptfs._daemon.offload import Offload
from ckptfs._daemon.uploads.spool import Spool
from ckptfs._daemon.uploads.upload import Upload

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(eq=False)
class Removal:
    """Removes files and records, one upload after the other.

    Args:
        spool: The files and records.
        offload: The threads for them.
        shows: Says whether an attachment shows a directory.
    """

    spool: Spool
    offload: Offload
    shows: Callable[[str], bool]
    _lock: trio.Lock = field(default_factory=trio.Lock, init=False)

    async def files(self, upload: Upload) -> bool:
        """Remove the files, and keep the record. Returns whether they are gone now."""
        return await self._remove(upload, self.spool.remove_files)

    async def all(self, upload: Upload) -> bool:
        """Remove files and record. Returns whether they are gone now."""
        return await self._remove(upload, self.spool.remove)

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
        """Have the disk do something. Returns whether it does; the log says why not."""
        try:
            await self.offload.spool(call, argument)
        except OSError as error:
            about = {"once_for": f"upload-{verb}"}
            log.error("uploads: cannot %s %s: %s", verb, upload_id, error.strerror, extra=about)
            return False
        return True
