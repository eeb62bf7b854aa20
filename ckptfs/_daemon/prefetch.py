"""Prefetch: fetch files of an attachment in the background, in an order that somebody gave.

Behind all readers (`slots` says how it yields to them). It ends when everything is there, when the
attachment ends, when it has fetched as much as the cache can hold (more would push out its own
first files), or when the store stops answering: readers then ask for themselves. A file that cannot
be fetched for a reason of its own (it changed, access is denied) is left out; its attributes say
why.

**With a limit of bytes per second** each chunk waits until the ones before it are paid for. Only
what is not in the cache costs anything. A chunk is at most a quarter of a second's bytes (at least
a block), so in any time the store is asked for no more than its share and, for each of `_FILES`
files that waited, one chunk.
"""

import fnmatch
import logging
import re
from collections.abc import Iterator, Sequence

import trio

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cached import ABSENT, CachedObject, disk_bytes
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.offload import Offload
from ckptfs._model.blocks import BLOCK_BYTES, block_length, blocks_of
from ckptfs._model.manifest import ListedFile
from ckptfs._model.units import size_text
from ckptfs._model.wire import FileError, Prefetching
from ckptfs.errors import CkptfsError, LimitExceeded, NotAttached, StoreUnavailable

log = logging.getLogger(__name__)

_FILES = 8
"""Files under way at the same time: hides the round trips of small ones."""
_CHUNK_BYTES = 64 << 20
"""Bytes of one file that are asked for at once: sixteen requests, so that one file alone uses many
connections, and a queue that readers can overtake."""
_ERRORS_MAX = 100
"""Files that are named in the state with their errors; the count is always whole."""
_COMPARISONS_MAX = 20_000_000
"""Of globs with files: some ten seconds of a thread that nobody can stop."""
_IS_PATTERN = re.compile(r"[*?[]")


def chosen(files: Sequence[tuple[int, ListedFile]], globs: Sequence[str]) -> dict[int, ListedFile]:
    """The files that match, by position, in the order of the globs, each once.

    Raises LimitExceeded where that takes too long.
    """
    patterns = sum(1 for glob in globs if _IS_PATTERN.search(glob))
    if patterns * len(files) > _COMPARISONS_MAX:
        raise LimitExceeded(
            f"{patterns} globs with {len(files)} files are more than {_COMPARISONS_MAX} "
            "comparisons; give fewer globs, or names without wildcards"
        )
    by_path = {file.path: (index, file) for index, file in files}
    found: dict[int, ListedFile] = {}
    for glob in globs:
        if _IS_PATTERN.search(glob):
            matches = re.compile(fnmatch.translate(glob)).match  # fnmatch itself remembers 32,768
            found |= {i: file for i, file in files if i not in found and matches(file.path)}
        elif named := by_path.get(glob):
            found.setdefault(*named)
    return found


class Prefetch:
    """One prefetch. It is its attachment's from the start, and ends with it.

    Args:
        attachment: Whose files.
        globs: Which of them, and in which order.
        rate: Most bytes per second; 0: no limit.
        fetcher: Fetches them.
        cache: Asked for what it can hold.
        offload: Matches the globs.

    Attributes:
        ended: Set when it has ended, for whatever reason.
    """

    def __init__(
        self,
        attachment: Attachment,
        globs: Sequence[str],
        rate: int,
        fetcher: Fetcher,
        cache: Cache,
        offload: Offload,
    ) -> None:
        self._attachment = attachment
        self._globs = globs
        self._rate = rate
        self._fetcher = fetcher
        self._cache = cache
        self._offload = offload
        self._scope = trio.CancelScope()
        self._paid_s = 0.0
        self._files = self._bytes = self._cached_bytes = self._fetched_bytes = 0
        self._under_way: dict[int, tuple[CachedObject, list[int]]] = {}  # absent blocks, by file
        self._errors: list[FileError] = []
        self._error_count = 0
        self._early: CkptfsError | None = None
        self.ended = trio.Event()
        attachment.background.add(self._scope)

    def cancel(self) -> None:
        """Let it end."""
        self._scope.cancel()

    def state(self) -> Prefetching:
        """How far it is."""
        arrived = sum(
            block_length(index, entry.size)
            for entry, blocks in self._under_way.values()
            for index in blocks
            if entry.state[index] != ABSENT
        )
        return Prefetching(
            ended=self.ended.is_set(),
            files=self._files,
            bytes=self._bytes,
            cached=self._cached_bytes,
            fetched=self._fetched_bytes + arrived,
            errors=list(self._errors),
            error_count=self._error_count,
            early_code=self._early.code if self._early else "",
            early_message=str(self._early) if self._early else "",
        )

    async def run(self) -> None:
        """Fetch; returns when it has ended, for whatever reason."""
        try:
            with self._scope:
                try:
                    await self._run()
                except LimitExceeded as error:  # of the globs
                    self._end_early(error)
            if self._scope.cancelled_caught and self._early is None:
                self._early = NotAttached(f"{self._attachment.location.uri} was detached")
        finally:
            self._attachment.background.discard(self._scope)
            self.ended.set()

    async def _run(self) -> None:
        shown = list(self._attachment.shown())
        files = await self._offload.control(chosen, shown, self._globs)
        self._files = len(files)
        self._bytes = sum(file.size for file in files.values())
        remaining = self._within_cache(files)
        async with trio.open_nursery() as nursery:
            for _ in range(_FILES):
                nursery.start_soon(self._work, remaining)

    def _within_cache(self, files: dict[int, ListedFile]) -> Iterator[int]:
        """Positions of the files, until they are more than the cache can hold."""
        capacity_bytes = self._cache.capacity_bytes()
        left_bytes = capacity_bytes
        for count, (index, file) in enumerate(files.items()):
            left_bytes -= disk_bytes(file.size)
            if left_bytes < 0:
                self._end_early(
                    LimitExceeded(
                        f"the cache holds {size_text(capacity_bytes)}: that is the first {count} "
                        f"of {len(files)} files ({size_text(self._bytes)}); name fewer, or give "
                        "the cache more room (cache_bytes_max, cache_free_share_min)"
                    )
                )
                return
            yield index

    def _end_early(self, error: CkptfsError) -> None:
        if self._early is None:
            self._early = error
            log.info("prefetch of %s ends: %s", self._attachment.location.uri, error)

    async def _work(self, remaining: Iterator[int]) -> None:
        for index in remaining:
            try:
                await self._fetch_file(index)
            except StoreUnavailable as error:
                self._end_early(error)
                self._scope.cancel()
            except CkptfsError as error:  # noted at the file, too
                self._error_count += 1
                if len(self._errors) < _ERRORS_MAX:
                    path = self._attachment.listed[index].path
                    self._errors.append(FileError(path, error.code, str(error)))

    async def _fetch_file(self, index: int) -> None:
        file = self._attachment.file(index)
        size = file.pin.size
        if not size:
            return
        with self._fetcher.opened(file):
            await self._fetcher.fetch(file, range(0))  # the first check: what is cached is known
            entry = file.entry
            for offset in range(0, size, self._chunk_bytes()):
                length = min(self._chunk_bytes(), size - offset)
                blocks = blocks_of(offset, length)
                absent = [i for i in blocks if entry.state[i] == ABSENT]
                absent_bytes = sum(block_length(i, size) for i in absent)
                self._cached_bytes += length - absent_bytes
                await self._pay(absent_bytes)
                self._under_way[index] = entry, absent
                try:
                    await self._fetcher.fetch(file, blocks)
                    self._fetched_bytes += absent_bytes
                finally:
                    del self._under_way[index]

    def _chunk_bytes(self) -> int:
        """Whole blocks."""
        if not self._rate:
            return _CHUNK_BYTES
        return min(_CHUNK_BYTES, max(1, self._rate // 4 // BLOCK_BYTES) * BLOCK_BYTES)

    async def _pay(self, count: int) -> None:
        """Wait until what came before is paid for."""
        if self._rate and count:
            start_s = max(self._paid_s, trio.current_time())
            self._paid_s = start_s + count / self._rate
            await trio.sleep_until(start_s)
