"""The places of the tensors in a file, found with few reads.

`layout` yields byte ranges and receives their bytes, so a program with an open file
(`tensors_of_file`) and the daemon can both use it. The bytes are untrusted.
"""

import os
from collections.abc import Generator

from ckptfs._model.formats import dcp, headers
from ckptfs._model.formats.headers import Tensor

Layout = Generator[tuple[int, int], bytes, list[Tensor]]


def layout(size: int, header_bytes_max: int = headers.HEADER_BYTES_MAX) -> Layout:
    """The tensors of a file of `size` bytes, by position; [] for an unknown format.

    Yields ranges (start, stop), and receives the bytes of each. For a zip archive (torch.save) it
    returns the entries. Their names are not those of the tensors, but they are the same in the next
    checkpoint. Their dtype and shape are unknown.
    """
    length = headers.SAFETENSORS_PREFIX_BYTES + 1
    if size < length:
        return []
    head = yield 0, length
    if header := headers.safetensors_header_length(head, size, header_bytes_max):
        return headers.safetensors_tensors((yield 0, header))
    if not head.startswith(headers.ZIP_MAGIC):
        return []
    end = yield max(0, size - headers.ZIP_END_BYTES), size
    where = headers.zip_directory_range(end, size)
    if not where:
        return []
    return headers.zip_entries((yield where.start, where.stop), where.start)


def tensors_of_file(path: str) -> list[Tensor]:
    """The tensors of a file. Raises OSError."""
    with open(path, "rb") as file:
        asking = layout(file.seek(0, os.SEEK_END), headers.SAFETENSORS_HEADER_BYTES_MAX)
        try:
            start, stop = next(asking)
            while True:
                file.seek(start)
                start, stop = asking.send(file.read(stop - start))
        except StopIteration as found:
            return found.value


def tensors_beside(folder: str, size_of: dcp.SizeOf) -> dict[bytes, list[Tensor]]:
    """The tensors of the files in a folder, from the ``.metadata`` of a sharded checkpoint of
    torch.distributed.checkpoint (`dcp.tensors_by_file`).

    Raises OSError, also for a folder without that file.
    """
    with open(os.path.join(folder, os.fsdecode(dcp.NAME)), "rb") as file:
        raw = file.read(dcp.HEAD_BYTES)
        if not dcp.is_metadata(raw):
            return {}
        raw += file.read(dcp.BYTES_MAX)
    return dcp.tensors_by_file(raw, size_of, lambda: None)
