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
from ckptfs._daemon.cache import Cache, disk_bytes
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.offload import Offload
from ckptfs._model.blocks import blocks_of
from ckptfs._model.manifest import ListedFile
from ckptfs.errors import CkptfsError, StoreUnavailable

log = logging.getLogger(__name__)

_FILES = 8
"""Files under way at the same time: hides the round trips of small ones."""
_CHUNK_BYTES = 64 << 20
"""Bytes of one file that are asked for at once: eight requests, so that one file alone uses many
connections, and a queue that readers can overtake."""


def chosen(files: Sequence[tuple[int, ListedFile]], globs: Sequence[str]) -> dict[int, ListedFile]:
    """The files that match, by position, in the order of the globs, each once."""
    return {
        index: file
        for glob in globs
        for index, file in files
        if fnmatch.fnmatchcase(file.path, glob)
    }


async def prefetch(
    attachment: Attachment,
    globs: Sequence[str],
    fetcher: Fetcher,
    cache: Cache,
    offload: Offload,
) -> None:
    """Run one prefetch; returns when it has ended, for whatever reason."""
    with trio.CancelScope() as scope:
        attachment.background.add(scope)
        try:
            files = await offload.control(chosen, list(attachment.shown()), globs)
            remaining = _within(files, cache.capacity_bytes(), attachment.location.uri)

            async def work() -> None:
                for index in remaining:
                    await _fetch_file(attachment, index, fetcher)

            async with trio.open_nursery() as nursery:
                for _ in range(_FILES):
                    nursery.start_soon(_until_dark, work, scope)
        finally:
            attachment.background.discard(scope)


def _within(files: dict[int, ListedFile], budget_bytes: int, uri: str) -> Iterator[int]:
    """Positions of the files, until they are more than `budget_bytes`."""
    left_bytes = budget_bytes
    for index, file in files.items():
        left_bytes -= disk_bytes(file.size)
        if left_bytes < 0:
            log.info("prefetch of %s ends: the cache holds %d bytes", uri, budget_bytes)
            return
        yield index


async def _until_dark(work: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    try:
        await work()
    except StoreUnavailable as error:
        log.info("prefetch ends: %s", error)
        scope.cancel()


async def _fetch_file(attachment: Attachment, index: int, fetcher: Fetcher) -> None:
    file = attachment.file(index)
    size = file.pin.size
    try:
        with fetcher.opened(file):
            for offset in range(0, size, _CHUNK_BYTES):
                await fetcher.fetch(file, blocks_of(offset, min(_CHUNK_BYTES, size - offset)))
    except StoreUnavailable:
        raise
    except CkptfsError:
        return  # noted at the file
