"""The exchange of blocks with clients, so a cluster reads a checkpoint from its store once, and a
node that has uploaded a checkpoint not at all.

One node's daemon *gives* blocks, clients carry them, and the daemons of the other nodes *take*
them. The client passes a memfd with each request. A client that has uploaded a checkpoint has its
node's daemon *save* the blocks, from a memfd that the daemon has lent. The daemon copies bytes into
a memfd or out of it, and never touches a mapping of it.

**Verification.** The giving daemon has fetched the blocks for its own attachment, of the version
that is pinned there, and sends their checksums. These are the cache's own checksums. They cover the
object's place, size, time and ETag, the block's position, and its bytes. The taking daemon makes
the first check of the file with its own credentials, copies the blocks into a buffer of its own,
and computes their checksums there. Bytes that were damaged on the way, or belong to another
version, place or block, do not have the checksum. The daemon refuses them, and then reads these
blocks from the store.

Blocks to save come from the process that has uploaded them, with the ETag that the store has
answered then. The daemon makes the first check of the file, and saves the blocks only if the store
has that ETag now. It trusts the client for the rest.

**Permission.** Only root and the daemon's own user may give and take blocks, because they could
also write to the cache's directory. Another user could poison the cache of all users, because a
checksum in a message does not prove its origin. The blocks that another user saves are for that
user only (``quotas.saved_scope``).

**Amount.** A request has at most `PIECE_BLOCKS_MAX` blocks. Taken bytes count as in flight, like
fetched bytes. Given bytes go block by block. An attachment takes no more than the cache can hold,
because further blocks would evict the first ones.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.cache import object_dir
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import disk_bytes
from ckptfs._daemon.cache.object_dir import About
from ckptfs._daemon.fetch.fetcher import Fetcher
from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.fetch.scheduler import Priority
from ckptfs._daemon.quotas import is_ours
from ckptfs._daemon.usage.counters import current
from ckptfs._model.blocks import BLOCK_BYTES, block_count, block_length, blocks_length, runs
from ckptfs._model.manifest import METADATA_NAME, printable
from ckptfs._model.protocol.replies import Found, Given, Taken
from ckptfs._model.protocol.requests import FindBlocks, GiveBlocks, SaveBlocks, TakeBlocks
from ckptfs._os.write_all import pwrite_all
from ckptfs.errors import (
    AccessDenied,
    LimitExceeded,
    NotAttached,
    ObjectChanged,
    ProtocolError,
    StoreError,
)

log = logging.getLogger(__name__)

_F_GET_SEALS = 1034
"""F_GET_SEALS of fcntl(2), the seals of a memfd. It fails for every other kind of file but those of
tmpfs. Python's fcntl has the name from 3.9 on, but not on every platform that is type-checked."""


@dataclass(eq=False)
class Exchange:
    """Gives and takes blocks. Belongs to the event loop."""

    fetcher: Fetcher
    cache: Cache

    async def give(self, attachment: Attachment, request: GiveBlocks, memfd: int) -> Given:
        """Write blocks into `memfd`. Blocks that the cache lacks are fetched first.

        Raises what a read raises, and ProtocolError for an invalid request.
        """
        file = _file(attachment, request.path)
        blocks = _blocks(file, request.first, request.count)
        _check_memfd(memfd, request.at + blocks_length(blocks, file.size))
        sums: list[int] = []
        with self.fetcher.opened(file):
            await self.fetcher.fetch(file, range(0))  # the first check
            fetched_bytes = _bytes_of(file, file.entry.absent(blocks))
            await self.fetcher.fetch(file, blocks, Priority.DEMAND)
            about, at = file.entry.about, request.at
            for index in blocks:
                length = block_length(index, file.size)
                views = await self.fetcher.read(file, index * BLOCK_BYTES, length)
                # The views are valid until the next await.
                data = views[0] if len(views) == 1 else b"".join(views)
                sums.append(object_dir.checksum(about, index, data))
                _write(memfd, memoryview(data), at)
                at += length
            if file.entry.about.etag != about.etag:
                raise ObjectChanged(f"{file.name} changed while another node copied it")
            current(file.activity.background).given_bytes += at - request.at
            return Given(etag=about.etag, sums=sums, fetched=fetched_bytes)

    async def find(self, attachment: Attachment, request: FindBlocks) -> Found:
        """The blocks of a file in the cache. Raises what the first check of the file raises."""
        file = _file(attachment, request.path)
        with self.fetcher.opened(file):
            await self.fetcher.fetch(file, range(0))  # which drops those of another version
            blocks = range(block_count(file.size))
            absent = set(file.entry.absent(blocks))
            present = runs((index for index in blocks if index not in absent), len(blocks))
        return Found(runs=[(run.start, len(run)) for run in present])

    async def take(self, attachment: Attachment, request: TakeBlocks, memfd: int) -> Taken:
        """Put the blocks from `memfd` into the cache that it neither has nor is fetching.

        Raises StoreError for bytes without the right checksums, ObjectChanged for another version
        than the pinned one, LimitExceeded if the cache cannot hold any more, and what the first
        check of the file raises.
        """
        file = _file(attachment, request.path)

        def check(about: About, first: int, data: memoryview) -> None:
            for index, found in enumerate(object_dir.checksums(about, first, data), first):
                if found != request.sums[index - request.first]:
                    error = StoreError(
                        f"{file.name}: refused block {index} of another node, because it is "
                        "damaged or of another version"
                    )
                    log.warning("%s", error)
                    raise error

        blocks = _blocks(file, request.first, len(request.sums))
        return await self._insert(attachment, file, blocks, request, memfd, check)

    async def save(self, attachment: Attachment, request: SaveBlocks, memfd: int) -> Taken:
        """Put uploaded blocks from `memfd` into the cache that it neither has nor is fetching.

        Raises ObjectChanged if the store has another version than was uploaded, LimitExceeded if
        the cache cannot hold any more, AccessDenied if other users would share the blocks, and what
        the first check of the file raises.
        """
        if not is_ours(attachment.uid) and not attachment.cache_scope:
            raise AccessDenied(
                f"uid {attachment.uid} may save no blocks that other users would read; attach "
                f"{attachment.location.uri} for saving"
            )
        file = _file(attachment, request.path)
        blocks = _blocks(file, request.first, request.count)
        return await self._insert(attachment, file, blocks, request, memfd, _trusted)

    async def _insert(
        self,
        attachment: Attachment,
        file: RemoteFile,
        blocks: range,
        request: TakeBlocks | SaveBlocks,
        memfd: int,
        check: Callable[[About, int, memoryview], None],
    ) -> Taken:
        """Put those of `blocks` into the cache that are absent. `check` is called in a thread with
        the description of the object, the first block, and the bytes of some of the blocks."""
        length = blocks_length(blocks, file.size)
        at = request.at if isinstance(request, TakeBlocks) else 0
        _check_memfd(memfd, at + length)
        self._check_space(attachment, length)
        with self.fetcher.opened(file):
            await self.fetcher.fetch(file, range(0))  # the first check
            if file.pin.etag != request.etag:
                raise ObjectChanged(f"{file.name}: this node has another version than was sent")
            about = file.entry.about

            def fill(first: int, buffer: memoryview) -> None:
                """Blocking. Fill `buffer` with whole blocks from `first` on."""
                skipped = first - blocks.start
                _read(file.name, memfd, at + skipped * BLOCK_BYTES, buffer)
                check(about, first, buffer)

            taken = await self.fetcher.insert(file, blocks, fill)
        return Taken(taken=taken, had=length - taken)

    def _check_space(self, attachment: Attachment, length: int) -> None:
        taken_bytes = attachment.activity.background.taken_bytes
        if taken_bytes + disk_bytes(length) > self.cache.index.capacity_bytes():
            raise LimitExceeded(
                f"{attachment.location.uri}: the cache can hold no more blocks of other nodes; "
                "give it more space (cache_bytes_max, cache_free_share_min)"
            )


def _trusted(about: About, first: int, data: memoryview) -> None:
    """The check of blocks whose client is trusted."""


def _file(attachment: Attachment, path: str) -> RemoteFile:
    """The file of that path. Raises NotAttached for a missing file, and for the metadata file,
    which can change."""
    node = attachment.snapshot.tree.root
    for name in path.split("/"):
        child = node.children.get(name.encode("utf-8", "surrogatepass"))
        if child is None:
            raise NotAttached(f"{attachment.location.uri} has no file {printable(path)}")
        node = child
    if node.is_directory or path == METADATA_NAME:
        raise NotAttached(f"{printable(path)} of {attachment.location.uri} cannot be exchanged")
    return attachment.file(node.index)


def _blocks(file: RemoteFile, first: int, count: int) -> range:
    if first + count > block_count(file.size):
        raise ProtocolError(f"{file.name} has no blocks {first} to {first + count - 1}")
    return range(first, first + count)


def _bytes_of(file: RemoteFile, blocks: Iterable[int]) -> int:
    return sum(block_length(index, file.size) for index in blocks)


def _check_memfd(memfd: int, size: int) -> None:
    """Raise ProtocolError unless reading and writing it can neither wait nor make it longer."""
    try:
        fcntl.fcntl(memfd, _F_GET_SEALS)
    except OSError:
        raise ProtocolError("the passed descriptor is not a memfd") from None
    if os.fstat(memfd).st_size < size:
        raise ProtocolError("the passed memfd is too short")


def _read(name: str, memfd: int, at: int, buffer: memoryview) -> None:
    filled = 0
    while filled < len(buffer):
        try:
            count = os.preadv(memfd, [buffer[filled:]], at + filled)
        except OSError as error:  # the client opened it for writing only
            raise StoreError(f"the memfd cannot be read: {error.strerror}") from None
        if not count:
            raise StoreError(f"{name}: the client has shortened the memfd")
        filled += count


def _write(memfd: int, data: memoryview, at: int) -> None:
    try:
        pwrite_all(memfd, data, at)
    except OSError as error:  # sealed, or no memory
        raise StoreError(f"the memfd cannot be written: {error.strerror}") from None
