"""What a file's own header says about its parts. Pure functions on untrusted bytes.

safetensors (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the length N of the
header, little endian; N bytes of JSON, which begins with ``{`` and maps each tensor's name to
``dtype``, ``shape`` and ``data_offsets`` (start and end, counted from the end of the header).
"""

import msgspec

SAFETENSORS_PREFIX_BYTES = 8
HEADER_BYTES_MAX = 1 << 20
"""Longest header that is looked at: some 10,000 tensors. Files with more get plain readahead."""


class Parts(msgspec.Struct, frozen=True):
    """Consecutive parts of a file that are read as a whole: byte ranges, ascending."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]


class _Tensor(msgspec.Struct):
    data_offsets: tuple[int, int] = (0, 0)


_header = msgspec.json.Decoder(dict[str, _Tensor])


def safetensors_header_length(prefix: bytes, size: int) -> int:
    """Bytes that prefix and header take together, or 0 if this cannot be a safetensors file.

    Args:
        prefix: The first `SAFETENSORS_PREFIX_BYTES` + 1 bytes of the file.
        size: Bytes of the file.
    """
    header = int.from_bytes(prefix[:SAFETENSORS_PREFIX_BYTES], "little")
    if prefix[SAFETENSORS_PREFIX_BYTES:] != b"{" or header > HEADER_BYTES_MAX:
        return 0
    length = SAFETENSORS_PREFIX_BYTES + header
    return length if length <= size else 0


def safetensors_parts(head: bytes, size: int) -> Parts | None:
    """The tensors' byte ranges, or None if the header does not make sense.

    Args:
        head: Prefix and header.
        size: Bytes of the file.
    """
    try:
        tensors = _header.decode(head[SAFETENSORS_PREFIX_BYTES:])
    except (ValueError, RecursionError):  # also UnicodeDecodeError
        return None
    tensors.pop("__metadata__", None)
    ranges = sorted(tensor.data_offsets for tensor in tensors.values())
    found = [(len(head) + start, len(head) + stop) for start, stop in ranges if start != stop]
    end = len(head)
    for start, stop in found:
        if not end <= start < stop <= size:
            return None
        end = stop
    return Parts(tuple(s for s, _ in found), tuple(s for _, s in found)) if found else None
