"""Prefetch: fetches files of an attachment in the background, in a given order.

Files that globs name have a lower priority than all reads (`scheduler`). Bytes that a plan names
have the priority of readahead, because programs will read them next. For a plan, the prefetch first
reads the headers of its files to find the tensors, and then fetches the bytes in the plan's order.

A prefetch ends when the cache has everything, when the attachment ends, when it has fetched as much
as the cache can hold (more would evict its own first files), or when the store stops answering. In
the last case reads ask the store themselves. A file that cannot be fetched for a reason of its own
(it changed, access is denied) is left out, and its attributes have the reason.

**Keeping** (``wait=True``: a program waits until it needs the store no more). The prefetch keeps
all files or none. It has the priority of readahead, because the waiting program should not be
slower than programs that read. If the files are more than the cache can keep, the prefetch ends at
once. Each file stays in the cache from the moment at which the prefetch begins it. Blocks in the
cache stay and are verified. When all files are complete, they stay until the attachment ends. The
next daemon keeps them, too, as far as it can.

**Rate.** With a limit of bytes per second each chunk waits until the chunks before it are paid for.
Only bytes that the cache lacks cost anything. A chunk has at most a quarter of a second's bytes (at
least a block). So in any time the prefetch asks the store for no more than its share, plus one
chunk for each of `_FILES` waiting files.
"""

import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import trio

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.format_detection import of_metadata, tensors_of
from ckptfs._daemon.attachment.journal import PrefetchBegun, PrefetchEnded
from ckptfs._daemon.attachment.retention import Kept
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import ABSENT, CachedObject, disk_bytes
from ckptfs._daemon.fetch.fetcher import Fetcher
from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.fetch.scheduler import Priority
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.quotas import Pace, RunningQuota
from ckptfs._model.blocks import BLOCK_BYTES, block_length, blocks_of
from ckptfs._model.formats import dcp
from ckptfs._model.globs import matcher
from ckptfs._model.manifest import ListedFile
from ckptfs._model.plans.plan import Piece, Plan, Wanted, match_files, pieces_of
from ckptfs._model.protocol.replies import FileError, Prefetching
from ckptfs._model.units import size_text
from ckptfs.errors import CkptfsError, LimitExceeded, NotAttached, StoreUnavailable

if TYPE_CHECKING:
    from ckptfs._model.formats.headers import Tensor

log = logging.getLogger(__name__)

_FILES = 8
"""Files under way at the same time, to hide the round trips of small files."""
_CHUNK_BLOCKS = 64
"""Blocks of one file that are requested at once. Sixteen requests let one file use many
connections, and keep the queue short enough for reads to overtake it."""
_ERRORS_MAX = 100
"""Failed files that the state lists. Its count includes all of them."""
_PIECE_BYTES = 16 << 20
"""Bytes of a plan that are requested at once, so the plan's first bytes come first."""
_COMPARISONS_MAX = 20_000_000
"""Comparisons of globs with files. They take some ten seconds of a thread that cannot be
stopped."""
_UNMATCHED_MAX = 20
"""Unmatched globs that a reply lists, because a message has a limited length."""
_PROGRESS_S = 0.2
"""Longest wait for the end before a progress reply: five replies a second look live."""
_PREFETCHES_MAX = 1024
"""Prefetches at the same time, each of which has up to eight files open."""
_METADATA = dcp.NAME.decode()
_IS_PATTERN = re.compile(r"[*?[]")
T = TypeVar("T")


def chosen(
    files: Sequence[tuple[int, ListedFile]], globs: Sequence[str]
) -> tuple[dict[int, ListedFile], list[str]]:
    """The matching files by position, in the order of the globs; and the globs that match no file.

    Raises LimitExceeded if the comparisons would take too long.
    """
    patterns = sum(1 for glob in globs if _IS_PATTERN.search(glob))
    if patterns * len(files) > _COMPARISONS_MAX:
        raise LimitExceeded(
            f"{patterns} globs with {len(files)} files are more than {_COMPARISONS_MAX} "
            "comparisons; give fewer globs, or names without wildcards"
        )
    by_path = {file.path: (index, file) for index, file in files}
    found: dict[int, ListedFile] = {}
    unmatched: list[str] = []
    for glob in globs:
        if _IS_PATTERN.search(glob):
            matches = matcher(glob)
            hits = {i: file for i, file in files if matches(file.path)}
        else:
            hits = dict([by_path[glob]]) if glob in by_path else {}
        if not hits:
            unmatched.append(glob)
        for index, file in hits.items():
            found.setdefault(index, file)
    return found, unmatched


class Prefetch:
    """One prefetch. It ends with its attachment.

    `again` says that an earlier daemon has begun it. Then it may keep a part of its files.

    Attributes:
        ended: Set when it has ended, for any reason.
    """

    def __init__(
        self,
        attachment: Attachment,
        wanted: Wanted,
        fetcher: Fetcher,
        cache: Cache,
        offload: Offload,
        kept: Kept,
        *,
        again: bool = False,
    ) -> None:
        self._kept = kept
        self._keeping = contextlib.ExitStack()
        self._again = again
        self._attachment = attachment
        self._wanted = wanted
        self._pace = Pace(wanted.rate, _CHUNK_BLOCKS)
        is_soon_read = wanted.plan is not None or wanted.keep  # a program waits for kept files
        self._priority = Priority.READAHEAD if is_soon_read else Priority.PREFETCH
        self._fetcher = fetcher
        self._cache = cache
        self._offload = offload
        self._scope = trio.CancelScope()
        self._files = self._bytes = self._cached_bytes = self._fetched_bytes = 0
        self._under_way: dict[Piece, tuple[CachedObject, list[int]]] = {}  # absent blocks
        self._errors: list[FileError] = []
        self._unmatched: list[str] = []
        self._failed_files: set[int] = set()
        self._to_keep: set[int] = set()
        self._early: CkptfsError | None = None
        self.ended = trio.Event()
        attachment.background.add(self._scope)

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self.ended.is_set()

    def cancel(self) -> None:
        """End it."""
        self._scope.cancel()

    async def progress(self) -> Prefetching:
        """The state after a moment, or as soon as it has ended."""
        with trio.move_on_after(_PROGRESS_S):
            await self.ended.wait()
        return self.state()

    def state(self) -> Prefetching:
        """Its progress."""
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
            error_count=len(self._failed_files),
            early_code=self._early.code if self._early else "",
            early_message=str(self._early) if self._early else "",
            unmatched=self._unmatched,
        )

    async def run(self) -> None:
        """Fetch, and return at the end, for any reason."""
        try:
            with self._scope:
                try:
                    await self._run()
                except LimitExceeded as error:  # from the globs or the limit of kept files
                    self._end_early(error)
            if self._scope.cancelled_caught and self._early is None:
                uri = self._attachment.location.uri
                self._early = NotAttached(f"{uri} was detached; attach it and prefetch it again")
        finally:
            self._attachment.background.discard(self._scope)
            if not self.keeps:
                self._keeping.close()
            self.ended.set()

    @property
    def keeps(self) -> bool:
        """Whether the ended prefetch has files that have to be kept from now on."""
        failed = self._early is not None or self._failed_files
        if self._scope.cancelled_caught or (failed and not self._again):
            return False
        return not self._to_keep <= self._attachment.stays

    async def keep(self) -> None:
        """Keep the files until the attachment ends. Call it after `run`, if the prefetch
        `keeps`."""
        with self._keeping, trio.CancelScope() as scope:
            self._attachment.stays |= self._to_keep
            self._attachment.background.add(scope)
            try:
                await trio.sleep_forever()
            finally:
                self._attachment.background.discard(scope)

    async def _run(self) -> None:
        shown = list(self._attachment.snapshot.shown())
        if self._wanted.plan is None:
            files, unmatched = await self._offload.control(chosen, shown, self._wanted.globs)
            self._unmatched = unmatched[:_UNMATCHED_MAX]
            pieces = [Piece(index, 0, file.size) for index, file in files.items()]
        else:
            pieces = await self._planned(self._wanted.plan, shown)
        self._files = len({piece.file for piece in pieces})
        self._bytes = sum(piece.stop - piece.start for piece in pieces)
        if self._wanted.keep:
            self._kept.check_space(self._attachment, pieces)
        await self._by_workers(self._work, self._within_cache(pieces))

    async def _by_workers(
        self, work: Callable[[Iterator[T]], Awaitable[None]], todo: Iterator[T]
    ) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(_FILES):
                nursery.start_soon(work, todo)

    async def _planned(self, plan: Plan, shown: list[tuple[int, ListedFile]]) -> list[Piece]:
        """The bytes that a plan names, according to the headers of its files."""
        places = {file.path: index for index, file in shown}
        matched = await self._offload.compute(match_files, plan, places)
        for index in matched.values():
            self._attachment.file(index).is_planned = True
        layouts = await self._layouts(plan, matched, places)
        listed = self._attachment.snapshot.listed
        sizes = {index: listed[index].size for index in (*matched.values(), *layouts)}
        rank = self._wanted.rank
        pieces = await self._offload.compute(
            pieces_of, plan, rank, matched, sizes, layouts, _PIECE_BYTES
        )
        for index in {piece.file for piece in pieces}:  # tensors may be in other files
            self._attachment.file(index).is_planned = True
        return pieces

    async def _layouts(
        self, plan: Plan, matched: dict[int, int], places: dict[str, int]
    ) -> "dict[int, list[Tensor]]":
        """The tensors of the plan's files, if the plan names tensors, by position of the file. A
        ``.metadata`` of torch.distributed.checkpoint beside one of them describes all files beside
        it."""
        layouts: dict[int, list[Tensor]] = {}
        if not any(step.tensor for step in plan.steps):
            return layouts
        listed = self._attachment.snapshot.listed
        folders = {"".join(listed[i].path.rpartition("/")[:2]) for i in matched.values()}
        knowing = {places[path] for folder in folders if (path := folder + _METADATA) in places}
        named = {matched[step.file] for step in plan.steps if step.tensor and step.file in matched}

        async def look(todo: Iterator[int]) -> None:
            for index in todo:
                file = self._attachment.file(index)
                try:
                    with self._fetcher.opened(file):
                        if index in knowing:
                            layouts.update(await self._tensors_beside(file, places))
                        else:
                            layouts[index] = await tensors_of(self._fetcher, self._offload, file)
                except CkptfsError as error:
                    self._failed(index, error)

        await self._by_workers(look, iter(sorted(knowing)))
        await self._by_workers(look, iter(sorted(named - layouts.keys())))
        return layouts

    async def _tensors_beside(
        self, file: RemoteFile, places: dict[str, int]
    ) -> "dict[int, list[Tensor]]":
        """The tensors of the files beside an open ``.metadata``, according to it."""
        listed = self._attachment.snapshot.listed
        prefix = file.path.removesuffix(_METADATA)

        def place(name: bytes) -> int:
            return places.get(prefix + name.decode(errors="replace"), -1)

        def size_of(name: bytes) -> int:
            return listed[place(name)].size if place(name) >= 0 else -1

        found = await of_metadata(self._fetcher, self._offload, file, dcp.tensors_by_file, size_of)
        return {place(name): tensors for name, tensors in found.items()}

    def _within_cache(self, pieces: list[Piece]) -> Iterator[Piece]:
        capacity_bytes = self._cache.index.capacity_bytes()
        left_bytes = capacity_bytes
        for count, piece in enumerate(pieces):
            left_bytes -= disk_bytes(piece.stop - piece.start)
            if left_bytes < 0:
                before = len({earlier.file for earlier in pieces[:count]} - {piece.file})
                self._end_early(
                    LimitExceeded(
                        f"the cache can hold {size_text(capacity_bytes)}, which is enough for the "
                        f"first {before} of {self._files} files ({size_text(self._bytes)}); name "
                        "fewer files, or give the cache more space (cache_bytes_max, "
                        "cache_free_share_min)"
                    )
                )
                return
            yield piece

    def _end_early(self, error: CkptfsError) -> None:
        if self._early is None:
            self._early = error
            log.info("prefetch of %s ends early: %s", self._attachment.location.uri, error)

    async def _work(self, remaining: Iterator[Piece]) -> None:
        for piece in remaining:
            try:
                await self._fetch_piece(piece)
            except CkptfsError as error:
                self._failed(piece.file, error)

    def _failed(self, index: int, error: CkptfsError) -> None:
        """Note a file that could not be fetched. The file itself has the error, too."""
        if isinstance(error, StoreUnavailable):
            self._end_early(error)
            self._scope.cancel()
            return
        if index in self._failed_files:
            return
        self._failed_files.add(index)
        if len(self._errors) < _ERRORS_MAX:
            path = self._attachment.snapshot.listed[index].path
            self._errors.append(FileError(path, error.code, str(error)))

    async def _fetch_piece(self, piece: Piece) -> None:
        index, start, stop = piece
        file = self._attachment.file(index)
        size = file.size
        if not start < stop <= size:
            return
        with self._fetcher.opened(file):
            await self._fetcher.fetch(file, range(0))  # the first check, which finds cached blocks
            entry = file.entry
            if self._wanted.keep:
                self._keep(index, entry)
            chunk_bytes = self._pace.blocks_max * BLOCK_BYTES
            for offset in range(start, stop, chunk_bytes):
                length = min(chunk_bytes, stop - offset)
                blocks = blocks_of(offset, length)
                absent = [i for i in blocks if entry.state[i] == ABSENT]
                absent_bytes = sum(block_length(i, size) for i in absent)
                self._cached_bytes += max(0, length - absent_bytes)
                await self._pace.wait(absent_bytes)
                self._under_way[piece] = entry, absent
                try:
                    await self._fetcher.fetch(file, blocks, self._priority)
                    self._fetched_bytes += absent_bytes
                finally:
                    del self._under_way[piece]
            if self._wanted.keep:
                await self._fetcher.secure(file, self._priority)

    def _keep(self, index: int, entry: CachedObject) -> None:
        self._to_keep.add(index)
        self._keeping.enter_context(self._kept.keeping(self._attachment, index, entry))


class Prefetches:
    """Begins prefetches, and limits how many run for each user."""

    def __init__(
        self, fetcher: Fetcher, cache: Cache, offload: Offload, nursery: trio.Nursery
    ) -> None:
        self._fetcher = fetcher
        self._cache = cache
        self._offload = offload
        self._nursery = nursery
        self._quota = RunningQuota(_PREFETCHES_MAX, "prefetches")
        self._kept = Kept(cache)

    def begin_recorded(self, attachment: Attachment, wanted: Wanted) -> None:
        """Begin a prefetch for which no connection waits. The journal has it, so the next daemon
        resumes it. Raises LimitExceeded."""
        begun = PrefetchBegun(time.monotonic_ns(), wanted)
        self.begin(attachment, wanted, begun)
        attachment.record(begun)

    def begin(
        self, attachment: Attachment, wanted: Wanted, begun: PrefetchBegun | None = None
    ) -> Prefetch:
        """Begin a prefetch in the background. `begun` is its event in the journal, if it has one.
        Raises LimitExceeded."""
        self._quota.take(attachment.uid, f"{attachment.location.uri}: ")
        prefetch = Prefetch(
            attachment,
            wanted,
            self._fetcher,
            self._cache,
            self._offload,
            self._kept,
            again=begun is not None,
        )
        self._nursery.start_soon(self._run, prefetch, attachment, wanted, begun)
        return prefetch

    async def _run(
        self,
        prefetch: Prefetch,
        attachment: Attachment,
        wanted: Wanted,
        begun: PrefetchBegun | None,
    ) -> None:
        try:
            await prefetch.run()
        finally:
            self._quota.give_back(attachment.uid)
        if prefetch.keeps:
            if begun is None:  # so the next daemon keeps the files, too
                attachment.record(PrefetchBegun(time.monotonic_ns(), wanted))
            await prefetch.keep()
        elif begun is not None:
            attachment.record(PrefetchEnded(begun.number))
