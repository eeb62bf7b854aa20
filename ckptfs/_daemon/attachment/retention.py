"""Retention: files that stay in the cache until their attachment ends, because a program has waited
for them.

A program that enters ``as_directory(wait=True)`` maps files, and must not depend on the store any
more. So its files stay open for the cache, and eviction passes over their blocks
(``cache.eviction``). Each file takes two descriptors of the daemon.
"""

import resource
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import CachedObject, disk_bytes
from ckptfs._daemon.quotas import is_ours, share_of
from ckptfs._model.plans.plan import Piece
from ckptfs._model.units import size_text
from ckptfs.errors import LimitExceeded

_DESCRIPTORS_SHARE = 4
"""Kept files may take at most this part of the daemon's descriptors, here a quarter."""


class Kept:
    """Counts the kept files of a cache, by user. Belongs to the event loop."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._bytes: Counter[int] = Counter()
        self._files: Counter[int] = Counter()

    def check_space(self, attachment: Attachment, pieces: Sequence[Piece]) -> None:
        """Raise LimitExceeded if the cache cannot keep these files, too, for the attachment's user.

        This reserves nothing. `keeping` checks each file again, because other prefetches may have
        taken the space meanwhile.
        """
        sizes = [piece.stop for piece in pieces if piece.file not in attachment.kept]
        self._require_space(attachment.uid, sizes)

    def _require_space(self, uid: int, sizes: Sequence[int]) -> None:
        descriptors_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        files_max = descriptors_max // 2 // _DESCRIPTORS_SHARE
        bytes_max = capacity_bytes = self._cache.index.capacity_bytes()
        files_left = files_max - self._files.total()
        bytes_left = capacity_bytes - self._bytes.total()
        if not is_ours(uid):
            files_max, bytes_max = share_of(files_max), share_of(capacity_bytes)
            files_left = min(files_left, files_max - self._files[uid])
            bytes_left = min(bytes_left, bytes_max - self._bytes[uid])
        needed_bytes = sum(map(disk_bytes, sizes))
        if needed_bytes > bytes_left:
            raise LimitExceeded(
                f"{len(sizes)} files of {size_text(needed_bytes)} do not fit into the cache, which "
                f"can keep {size_text(max(0, bytes_left))} more of the {size_text(bytes_max)} that "
                f"are for uid {uid}; name fewer files, give the cache more space "
                "(cache_bytes_max, cache_free_share_min), or leave out wait=True"
            )
        if len(sizes) > files_left:
            raise LimitExceeded(
                f"the daemon can keep {max(0, files_left)} more of the {files_max} files that are "
                f"for uid {uid}, and not {len(sizes)}; name fewer files, raise the daemon's limit "
                "of descriptors (ulimit -n), or leave out wait=True"
            )

    @contextmanager
    def keeping(self, attachment: Attachment, index: int, entry: CachedObject) -> Generator[None]:
        """Keep the file at `index` in the cache during the context. `entry` is its open object.
        Several contexts of one attachment count once. Raises LimitExceeded."""
        kept = attachment.kept
        if not kept[index]:
            self._require_space(attachment.uid, [entry.size])
        with self._cache.held(entry):
            entry.kept += 1
            if not kept[index]:
                self._count(attachment.uid, entry, 1)
            kept[index] += 1
            try:
                yield
            finally:
                entry.kept -= 1
                kept[index] -= 1
                if not kept[index]:
                    del kept[index]
                    self._count(attachment.uid, entry, -1)

    def _count(self, uid: int, entry: CachedObject, sign: int) -> None:
        self._bytes[uid] += sign * disk_bytes(entry.size)
        self._files[uid] += sign
        if not self._files[uid]:
            del self._files[uid], self._bytes[uid]
