"""What `ckptfs status` says."""

import os
from importlib.metadata import version as version_of

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.attachments import Attachments
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.handoff import Handoff
from ckptfs._daemon.limits import may_see
from ckptfs._model.config import Config
from ckptfs._model.wire import AttachmentStatus, StatusReply

_SKIPPED_IN_STATUS = 100
"""Skipped objects that a status lists per attachment; the count is always whole."""


class Reporter:
    """Looks at all that a status tells. `passthrough`: "on", or why not."""

    def __init__(
        self,
        config: Config,
        attachments: Attachments,
        cache: Cache,
        fetcher: Fetcher,
        handoff: Handoff,
        passthrough: str,
    ) -> None:
        self._config = config
        self._attachments = attachments
        self._cache = cache
        self._fetcher = fetcher
        self._handoff = handoff
        self._passthrough = passthrough

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
            attachments=[self._status_of(a) for a in self._attachments if may_see(uid, a)],
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
