"""What is where in a file, read through the cache."""

from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.remote import RemoteFile
from ckptfs._daemon.slots import Priority
from ckptfs._model.blocks import BLOCK_BYTES, blocks_of
from ckptfs._model.formats import Tensor
from ckptfs._model.layout import Layout, layout


async def bytes_of(fetcher: Fetcher, file: RemoteFile, start: int, stop: int) -> list[bytes]:
    """The bytes [start, stop) of an open file, in pieces. Raises what `Fetcher.read` raises."""
    blocks = blocks_of(start, stop - start)
    await fetcher.fetch(file, blocks, Priority.READAHEAD)
    pieces: list[bytes] = []
    for index in blocks:
        first = max(start, index * BLOCK_BYTES)
        last = min(stop, (index + 1) * BLOCK_BYTES)
        pieces += map(bytes, await fetcher.read(file, first, last - first))
    return pieces


async def tensors_of(fetcher: Fetcher, offload: Offload, file: RemoteFile) -> list[Tensor]:
    """The tensors of an open file. Raises what `Fetcher.read` raises."""
    asking = layout(file.pin.size)
    try:
        start, stop = next(asking)
        while True:
            data = b"".join(await bytes_of(fetcher, file, start, stop))
            found = await offload.compute(_sent, asking, data)
            if not isinstance(found, tuple):
                return found
            start, stop = found
    except StopIteration:
        return []


def _sent(asking: Layout, data: bytes) -> tuple[int, int] | list[Tensor]:
    """Blocking, because a header can be long: the next range, or the result."""
    try:
        return asking.send(data)
    except StopIteration as found:
        return found.value
