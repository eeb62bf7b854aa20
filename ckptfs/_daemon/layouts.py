"""What is where in a file, read through the cache."""

import time
from collections.abc import Callable
from typing import TypeVar

from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.remote import RemoteFile
from ckptfs._daemon.slots import Priority
from ckptfs._model import dcp
from ckptfs._model.blocks import BLOCK_BYTES, blocks_of
from ckptfs._model.formats import Tensor
from ckptfs._model.layout import Layout, layout

_PAUSE_S = 0.0005
"""How long parsing lets go of the interpreter's lock, as often as it has held it for as long."""
T = TypeVar("T")


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


async def of_metadata(
    fetcher: Fetcher,
    offload: Offload,
    file: RemoteFile,
    parse: Callable[[bytes, dcp.SizeOf, Callable[[], None]], dict[bytes, T]],
    size_of: dcp.SizeOf,
) -> dict[bytes, T]:
    """What an open ``.metadata`` says of the files beside it, according to `parse`; {} if it is not
    that of torch.distributed.checkpoint. Raises what `Fetcher.read` raises.

    Args:
        fetcher, offload, file: As of `tensors_of`.
        parse: ``dcp.parts_by_file`` or ``dcp.tensors_by_file``.
        size_of: Called in a thread; see there.
    """
    size = file.pin.size
    if not 0 < size <= dcp.BYTES_MAX:
        return {}
    head = await bytes_of(fetcher, file, 0, min(dcp.HEAD_BYTES, size))
    if not dcp.is_metadata(b"".join(head)):
        return {}
    raw = await bytes_of(fetcher, file, 0, size)
    return await offload.compute(
        lambda: parse(b"".join(raw), size_of, lambda: time.sleep(_PAUSE_S))
    )


def _sent(asking: Layout, data: bytes) -> tuple[int, int] | list[Tensor]:
    """Blocking, because a header can be long: the next range, or the result."""
    try:
        return asking.send(data)
    except StopIteration as found:
        return found.value
