"""What is where in a file of tensors, found out with few reads, by whoever can read.

``layout`` asks for byte ranges and is given the bytes, so that it serves a program with an open
file (`tensors_of_file`) as well as the daemon. The bytes are untrusted.
"""

import os
from collections.abc import Generator
from typing import BinaryIO

from ckptfs._model import dcp, formats
from ckptfs._model.formats import Tensor

Layout = Generator[tuple[int, int], bytes, list[Tensor]]


def layout(size: int, header_bytes_max: int = formats.HEADER_BYTES_MAX) -> Layout:
    """The tensors of a file of `size` bytes, by position; [] where nothing is known of its format.

    Yields ranges (start, stop), and has to be sent the bytes of each. Those of a zip archive
    (torch.save) are its entries: their names are not those of the tensors, but the same in the
    next checkpoint; dtype and shape are unknown.
    """
    length = formats.SAFETENSORS_PREFIX_BYTES + 1
    if size < length:
        return []
    head = yield 0, length
    if header := formats.safetensors_header_length(head, size, header_bytes_max):
        return formats.safetensors_tensors((yield 0, header))
    if not head.startswith(formats.ZIP_MAGIC):
        return []
    end = yield max(0, size - formats.ZIP_END_BYTES), size
    where = formats.zip_directory_range(end, size)
    if not where:
        return []
    return formats.zip_entries((yield where.start, where.stop), where.start)


def tensors_of_file(path: str) -> list[Tensor]:
    """The tensors of that file. Raises OSError."""
    with open(path, "rb") as file:
        return _read(file)


def tensors_beside(folder: str, size_of: dcp.SizeOf) -> dict[bytes, list[Tensor]]:
    """The tensors of the files in a folder, if that is a sharded checkpoint of
    torch.distributed.checkpoint, whose ``.metadata`` knows them; see `dcp.tensors_by_file`.

    Raises OSError, also where there is no such file.
    """
    with open(os.path.join(folder, os.fsdecode(dcp.NAME)), "rb") as file:
        raw = file.read(dcp.HEAD_BYTES)
        if not dcp.is_metadata(raw):
            return {}
        raw += file.read(dcp.BYTES_MAX)
    return dcp.tensors_by_file(raw, size_of, lambda: None)


def _read(file: BinaryIO) -> list[Tensor]:
    size = file.seek(0, 2)
    asking = layout(size, formats.SAFETENSORS_HEADER_BYTES_MAX)
    try:
        start, stop = next(asking)
        while True:
            file.seek(start)
            start, stop = asking.send(file.read(stop - start))
    except StopIteration as found:
        return found.value
