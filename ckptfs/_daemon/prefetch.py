"""Prefetch: fetch files of an attachment in the background, in an order that somebody gave.

Behind all readers (`Priority.PREFETCH`). It ends when everything is there, when the attachment
ends, when it has fetched as much as the cache can hold (more would push out its own first files),
or when the store stops answering: readers then ask for themselves. A file that cannot be fetched
for a reason of its own (it changed, access is denied) is left out; its attributes say why.
"""

import fnmatch
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.fetch import Fetcher
from ckptfs._model.blocks import blocks_of
from ckptfs._model.manifest import ListedFile
from ckptfs.errors import CkptfsError, StoreUnavailable

log = logging.getLogger(__name__)

_FILES = 8
"""Files under way at the same time: hides the round trips of small ones."""
_CHUNK_BYTES = 64 << 20
"""Bytes of one file that are asked for at once: eight requests, so that one file alone uses many
connections, and a queue that readers can overtake."""


def chosen(files: Sequence[ListedFile], globs: Sequence[str]) -> list[int]:
    """Positions of the files that match, in the order of the globs, each once."""
    found: dict[int, None] = {}
    for glob in globs:
        for index, file in enumerate(files):
            if fnmatch.fnmatchcase(file.path, glob):
                found[index] = None
    return list(found)


async def prefetch(
    attachment: Attachment, globs: Sequence[str], fetcher: Fetcher, cache: Cache
) -> None:
    """Run one prefetch; returns when it has ended, for whatever reason."""
    budget_bytes = cache.capacity_bytes()
    files = attachment.manifest.files

    def within_budget() -> Iterator[int]:
        left_bytes = budget_bytes
        for index in chosen(files, globs):
            left_bytes -= files[index].size
            if left_bytes < 0:
                log.info(
                    "prefetch of %s ends: the cache holds %d bytes",
                    attachment.location.uri,
                    budget_bytes,
                )
                return
            yield index

    remaining = within_budget()

    async def work() -> None:
        for index in remaining:
            await _fetch_file(attachment, index, fetcher)

    with trio.CancelScope() as scope:
        attachment.prefetches.add(scope)
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(_FILES):
                    nursery.start_soon(_until_dark, work, scope)
        finally:
            attachment.prefetches.discard(scope)


async def _until_dark(work: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    try:
        await work()
    except StoreUnavailable as error:
        log.info("prefetch ends: %s", error)
        scope.cancel()


async def _fetch_file(attachment: Attachment, index: int, fetcher: Fetcher) -> None:
    file = attachment.file(index)
    size = file.pin.size
    fetcher.open(file)
    try:
        for offset in range(0, size, _CHUNK_BYTES):
            await fetcher.fetch(file, blocks_of(offset, min(_CHUNK_BYTES, size - offset)))
    except StoreUnavailable:
        raise
    except CkptfsError:
        return  # noted at the file
    finally:
        if file.opens:  # 0 if the attachment was removed meanwhile
            fetcher.close(file)
