"""Blocks that a client takes to another node, and those that it brings from there.

So a cluster reads a checkpoint from its store once: one node's daemon *gives* blocks, clients carry
them, and the daemons of the others *take* them. The client passes a memfd with each request: bytes
are copied into it, or out of it, and no mapping of it is ever touched here.

**Nothing unverified is taken.** The giving daemon has fetched the blocks for its own attachment, of
the version that is pinned there, and says their checksums. Those are the cache's own: of the
object's place, size, time and ETag, the block's position, and its bytes. The taking daemon makes
the first check of the file with its own credentials, copies the blocks into a buffer of its own,
and computes their checksums there. Bytes that were damaged on the way, or are of another version,
another place or another block, do not have the checksum, and are refused; then these blocks are
read from the store as ever.

**Who may.** Root and the daemon's own user only: they could write to the cache's directory, too.
From anybody else it would be poison for the other users, since a checksum that is sent along proves
nothing about who computed it.

**How much.** A request has at most `PIECE_BLOCKS_MAX` blocks. What is taken counts as in flight,
like what is fetched; what is given goes block by block. An attachment takes no more than the cache
can hold: the rest would push out what came first.
"""

import fcntl
import logging
import os

from ckptfs._daemon import cachedir
from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cached import disk_bytes
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.remote import RemoteFile
from ckptfs._daemon.slots import Priority
from ckptfs._model.blocks import BLOCK_BYTES, block_count, block_length, blocks_length
from ckptfs._model.manifest import METADATA_NAME, printable
from ckptfs._model.replies import Given, Taken
from ckptfs._model.requests import GiveBlocks, TakeBlocks
from ckptfs.errors import LimitExceeded, NotAttached, ObjectChanged, ProtocolError, StoreError

log = logging.getLogger(__name__)

_F_GET_SEALS = 1034
"""fcntl(2): which seals a memfd has; an error for every other kind of file (but tmpfs's). A name
for it is in Python's fcntl from 3.9 on, but not on every platform that is type-checked."""


class Exchange:
    """Gives and takes. Belongs to the event loop."""

    def __init__(self, fetcher: Fetcher, cache: Cache) -> None:
        self._fetcher = fetcher
        self._cache = cache

    async def give(self, attachment: Attachment, request: GiveBlocks, memfd: int) -> Given:
        """Write blocks into `memfd`, fetched where they are not here.

        Raises what a read raises, and ProtocolError for a request that makes no sense.
        """
        file = _file(attachment, request.path)
        blocks = _blocks(file, request.first, request.count)
        _check_memfd(memfd, request.at + blocks_length(blocks, file.pin.size))
        sums: list[int] = []
        with self._fetcher.opened(file):
            await self._fetcher.fetch(file, blocks, Priority.DEMAND)
            about, at = file.entry.about, request.at
            for index in blocks:
                length = block_length(index, file.pin.size)
                views = await self._fetcher.read(file, index * BLOCK_BYTES, length)
                # They are valid until the next await.
                data = views[0] if len(views) == 1 else b"".join(views)
                sums.append(cachedir.checksum(about, index, data))
                _write(memfd, memoryview(data), at)
                at += length
            if file.entry.about.etag != about.etag:
                raise ObjectChanged(f"{file.name} was written again while it was given")
            file.activity.gave(at - request.at)
            return Given(etag=about.etag, sums=sums)

    async def take(self, attachment: Attachment, request: TakeBlocks, memfd: int) -> Taken:
        """Put blocks from `memfd` into the cache, those that are neither here nor being fetched.

        Raises StoreError for bytes that do not have their checksums, ObjectChanged for those of
        another version than the pinned one, LimitExceeded where the cache cannot hold any more, and
        what the first check of the file raises.
        """
        file = _file(attachment, request.path)
        blocks = _blocks(file, request.first, len(request.sums))
        length = blocks_length(blocks, file.pin.size)
        _check_memfd(memfd, request.at + length)
        self._check_room(attachment, length)
        with self._fetcher.opened(file):
            await self._fetcher.fetch(file, range(0))  # the first check
            if file.pin.etag != request.etag:
                raise ObjectChanged(
                    f"{file.name}: the other node has another version of it than this one"
                )
            about = file.entry.about
            brought = _Brought(file.name, memfd, request, about)
            taken = await self._fetcher.take_in(file, blocks, brought.fill)
        return Taken(taken=taken, had=length - taken)

    def _check_room(self, attachment: Attachment, length: int) -> None:
        taken_bytes = attachment.activity.taken_bytes
        if taken_bytes + disk_bytes(length) > self._cache.capacity_bytes():
            raise LimitExceeded(
                f"{attachment.location.uri}: the cache can hold no more of what other nodes bring; "
                "give it more room (cache_bytes_max, cache_free_share_min)"
            )


class _Brought:
    """The blocks in a memfd."""

    def __init__(self, name: str, memfd: int, request: TakeBlocks, about: cachedir.About) -> None:
        self._name = name
        self._memfd = memfd
        self._request = request
        self._about = about

    def fill(self, first: int, buffer: memoryview) -> None:
        """Blocking. Fill `buffer` with whole blocks from `first` on, and check them there."""
        skipped = first - self._request.first
        at = self._request.at + skipped * BLOCK_BYTES
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(self._memfd, [buffer[filled:]], at + filled)
            except OSError as error:  # it was opened for writing only
                raise StoreError(f"the memfd cannot be read: {error.strerror}") from None
            if not count:
                raise StoreError(f"{self._name}: the memfd was cut")
            filled += count
        for index, found in enumerate(cachedir.checksums(self._about, first, buffer), first):
            if found != self._request.sums[index - self._request.first]:
                error = StoreError(
                    f"{self._name}: block {index}, as another node has brought it, is "
                    "damaged or of another version: refused"
                )
                log.warning("%s", error)
                raise error


def _file(attachment: Attachment, path: str) -> RemoteFile:
    """The file of that path. Raises NotAttached where there is none that cannot change."""
    node = attachment.tree.root
    for name in path.split("/"):
        child = node.children.get(name.encode("utf-8", "surrogatepass"))
        if child is None:
            raise NotAttached(f"{attachment.location.uri} has no file {printable(path)}")
        node = child
    if node.is_directory or path == METADATA_NAME:
        raise NotAttached(f"{printable(path)} of {attachment.location.uri} cannot be exchanged")
    return attachment.file(node.index)


def _blocks(file: RemoteFile, first: int, count: int) -> range:
    if first + count > block_count(file.pin.size):
        raise ProtocolError(f"{file.name} has no blocks {first} to {first + count - 1}")
    return range(first, first + count)


def _check_memfd(memfd: int, size: int) -> None:
    """Reading and writing it must neither wait nor make it longer."""
    try:
        fcntl.fcntl(memfd, _F_GET_SEALS)
    except OSError:
        raise ProtocolError("the descriptor that was passed along is no memfd") from None
    if os.fstat(memfd).st_size < size:
        raise ProtocolError("the memfd that was passed along is too short")


def _write(memfd: int, data: memoryview, at: int) -> None:
    while data:
        try:
            count = os.pwrite(memfd, data, at)
        except OSError as error:  # sealed, or no memory
            raise StoreError(f"the memfd cannot be written: {error.strerror}") from None
        data, at = data[count:], at + count
