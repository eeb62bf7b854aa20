"""Prefetch: fetch files of an attachment in the background, in an order that somebody gave.

What globs name is fetched behind all readers (`slots` says how it yields to them). What a plan
names is what readers will want next, and is fetched as their readahead is: first what is where in
the plan's files, then the bytes, in the plan's order. It ends when everything is there, when the
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
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import trio

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cached import ABSENT, CachedObject, disk_bytes
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.layouts import of_metadata, tensors_of
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.remote import RemoteFile
from ckptfs._daemon.slots import Priority
from ckptfs._model import dcp
from ckptfs._model.blocks import BLOCK_BYTES, block_length, blocks_of
from ckptfs._model.manifest import ListedFile
from ckptfs._model.plan import Piece, Plan, Wanted, match_files, pieces_of
from ckptfs._model.replies import FileError, Prefetching
from ckptfs._model.units import size_text
from ckptfs.errors import CkptfsError, LimitExceeded, NotAttached, StoreUnavailable

if TYPE_CHECKING:
    from ckptfs._model.formats import Tensor

log = logging.getLogger(__name__)

_FILES = 8
"""Files under way at the same time: hides the round trips of small ones."""
_CHUNK_BYTES = 64 << 20
"""Bytes of one file that are asked for at once: sixteen requests, so that one file alone uses many
connections, and a queue that readers can overtake."""
_ERRORS_MAX = 100
"""Files that are named in the state with their errors; the count is always whole."""
_PIECE_BYTES = 16 << 20
"""Of a plan at once: what is first in it comes first."""
_COMPARISONS_MAX = 20_000_000
"""Of globs with files: some ten seconds of a thread that nobody can stop."""
_METADATA = dcp.NAME.decode()
_IS_PATTERN = re.compile(r"[*?[]")
T = TypeVar("T")


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
        wanted: Which of them.
        fetcher: Fetches them.
        cache: Asked for what it can hold.
        offload: Matches the globs.

    Attributes:
        ended: Set when it has ended, for whatever reason.
    """

    def __init__(
        self,
        attachment: Attachment,
        wanted: Wanted,
        fetcher: Fetcher,
        cache: Cache,
        offload: Offload,
    ) -> None:
        self._attachment = attachment
        self._wanted = wanted
        self._rate = wanted.rate
        self._priority = Priority.READAHEAD if wanted.plan else Priority.PREFETCH
        self._fetcher = fetcher
        self._cache = cache
        self._offload = offload
        self._scope = trio.CancelScope()
        self._paid_s = 0.0
        self._files = self._bytes = self._cached_bytes = self._fetched_bytes = 0
        self._under_way: dict[Piece, tuple[CachedObject, list[int]]] = {}  # absent blocks
        self._errors: list[FileError] = []
        self._failed_files: set[int] = set()
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
            error_count=len(self._failed_files),
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
        if self._wanted.plan is None:
            files = await self._offload.control(chosen, shown, self._wanted.globs)
            pieces = [Piece(index, 0, file.size) for index, file in files.items()]
        else:
            pieces = await self._planned(self._wanted.plan, shown)
        self._files = len({piece.file for piece in pieces})
        self._bytes = sum(piece.stop - piece.start for piece in pieces)
        await self._by_workers(self._work, self._within_cache(pieces))

    async def _by_workers(
        self, work: Callable[[Iterator[T]], Awaitable[None]], todo: Iterator[T]
    ) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(_FILES):
                nursery.start_soon(work, todo)

    async def _planned(self, plan: Plan, shown: list[tuple[int, ListedFile]]) -> list[Piece]:
        """The bytes that a plan names. Looks into its files first."""
        places = {file.path: index for index, file in shown}
        matched = await self._offload.compute(match_files, plan, places)
        for index in matched.values():
            self._attachment.file(index).is_planned = True
        layouts = await self._layouts(plan, matched, places)
        listed = self._attachment.listed
        sizes = {index: listed[index].size for index in (*matched.values(), *layouts)}
        rank = self._wanted.rank
        pieces = await self._offload.compute(
            pieces_of, plan, rank, matched, sizes, layouts, _PIECE_BYTES
        )
        for index in {piece.file for piece in pieces}:  # tensors may be in others than before
            self._attachment.file(index).is_planned = True
        return pieces

    async def _layouts(
        self, plan: Plan, matched: dict[int, int], places: dict[str, int]
    ) -> "dict[int, list[Tensor]]":
        """What is where in the plan's files that it names tensors of, and in what is beside a
        ``.metadata`` of torch.distributed.checkpoint that is beside one of its files."""
        layouts: dict[int, list[Tensor]] = {}
        if not any(step.tensor for step in plan.steps):
            return layouts
        listed = self._attachment.listed
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
        """The tensors of the files beside an open ``.metadata``, as that says."""
        listed = self._attachment.listed
        prefix = file.pin.path.removesuffix(_METADATA)

        def place(name: bytes) -> int:
            return places.get(prefix + name.decode(errors="replace"), -1)

        def size_of(name: bytes) -> int:
            return listed[place(name)].size if place(name) >= 0 else -1

        parts = self._fetcher, self._offload
        found = await of_metadata(*parts, file, dcp.tensors_by_file, size_of)
        return {place(name): tensors for name, tensors in found.items()}

    def _within_cache(self, pieces: list[Piece]) -> Iterator[Piece]:
        """The pieces, until they are more than the cache can hold."""
        capacity_bytes = self._cache.capacity_bytes()
        left_bytes = capacity_bytes
        for count, piece in enumerate(pieces):
            left_bytes -= disk_bytes(piece.stop - piece.start)
            if left_bytes < 0:
                before = len({earlier.file for earlier in pieces[:count]} - {piece.file})
                self._end_early(
                    LimitExceeded(
                        f"the cache holds {size_text(capacity_bytes)}: that is the first {before} "
                        f"of {self._files} files ({size_text(self._bytes)}); name fewer, or give "
                        "the cache more room (cache_bytes_max, cache_free_share_min)"
                    )
                )
                return
            yield piece

    def _end_early(self, error: CkptfsError) -> None:
        if self._early is None:
            self._early = error
            log.info("prefetch of %s ends: %s", self._attachment.location.uri, error)

    async def _work(self, remaining: Iterator[Piece]) -> None:
        for piece in remaining:
            try:
                await self._fetch_piece(piece)
            except CkptfsError as error:
                self._failed(piece.file, error)

    def _failed(self, index: int, error: CkptfsError) -> None:
        """A file could not be fetched; that is noted at the file, too."""
        if isinstance(error, StoreUnavailable):
            self._end_early(error)
            self._scope.cancel()
            return
        if index in self._failed_files:
            return
        self._failed_files.add(index)
        if len(self._errors) < _ERRORS_MAX:
            path = self._attachment.listed[index].path
            self._errors.append(FileError(path, error.code, str(error)))

    async def _fetch_piece(self, piece: Piece) -> None:
        index, start, stop = piece
        file = self._attachment.file(index)
        size = file.pin.size
        if not start < stop <= size:
            return
        with self._fetcher.opened(file):
            await self._fetcher.fetch(file, range(0))  # the first check: what is cached is known
            entry = file.entry
            for offset in range(start, stop, self._chunk_bytes()):
                length = min(self._chunk_bytes(), stop - offset)
                blocks = blocks_of(offset, length)
                absent = [i for i in blocks if entry.state[i] == ABSENT]
                absent_bytes = sum(block_length(i, size) for i in absent)
                self._cached_bytes += max(0, length - absent_bytes)
                await self._pay(absent_bytes)
                self._under_way[piece] = entry, absent
                try:
                    await self._fetcher.fetch(file, blocks, self._priority)
                    self._fetched_bytes += absent_bytes
                finally:
                    del self._under_way[piece]

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
