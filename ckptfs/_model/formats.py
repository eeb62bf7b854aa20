"""Formats of checkpoints and files, by names and headers. Pure functions on untrusted bytes.

safetensors (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the length N of the
header, little endian; N bytes of JSON, which begins with ``{`` and maps each tensor's name to
``dtype``, ``shape`` and ``data_offsets`` (start and end, counted from the end of the header).
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal

import msgspec

SAFETENSORS_PREFIX_BYTES = 8
SAFETENSORS_HEADER_BYTES_MAX = 100_000_000
"""The longest header that the format allows."""
HEADER_BYTES_MAX = 1 << 20
"""Longest header that readahead looks at: some 10,000 tensors. Files with more get plain
readahead."""
ZIP_MAGIC = b"PK\x03\x04"
"""How a zip archive begins (PKWARE, APPNOTE.TXT, 4.3.7), as torch.save writes since 1.6."""

Format = Literal[
    "safetensors", "torch-zip", "torch-dcp", "orbax", "huggingface", "tensorflow", "unknown"
]
"""What ``user.ckptfs.format`` says. torch-dcp is torch.distributed.checkpoint."""

_PATTERNS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("torch-dcp", ("*.distcp",)),
    ("orbax", ("_CHECKPOINT_METADATA", "*/_CHECKPOINT_METADATA", "*manifest.ocdbt")),
    ("huggingface", ("adapter_config.json", "model*.safetensors", "pytorch_model*.bin")),
    ("safetensors", ("*.safetensors",)),
    ("tensorflow", ("saved_model.pb", "*/saved_model.pb", "*.data-00000-of-?????")),
)
_TORCH = ("*.pt", "*.pth", "*.ckpt", "*model*.bin")


class Parts(msgspec.Struct, frozen=True):
    """Consecutive parts of a file that are read as a whole: byte ranges, ascending."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]


class Tensor(msgspec.Struct, frozen=True):
    """A tensor in a safetensors file; `start` and `end` are positions in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class _Tensor(msgspec.Struct):
    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] = (0, 0)


_header = msgspec.json.Decoder(dict[str, _Tensor])


def format_of(paths: Iterable[str]) -> tuple[Format, str]:
    """The format of a checkpoint with these files, and the file to look into; "": none.

    Where there is one, the format is that only if the file begins with `ZIP_MAGIC`.
    """
    names = list(paths)
    for format_, patterns in _PATTERNS:
        if format_ == "huggingface" and not {"config.json", "adapter_config.json"} & set(names):
            continue
        if any(fnmatchcase(name, pattern) for pattern in patterns for name in names):
            return format_, ""
    torch = (name for name in names if any(fnmatchcase(name, pattern) for pattern in _TORCH))
    first = next(torch, "")
    return ("torch-zip", first) if first else ("unknown", "")


def safetensors_header_length(prefix: bytes, size: int, bytes_max: int = HEADER_BYTES_MAX) -> int:
    """Bytes that prefix and header take together, or 0 if this cannot be a safetensors file.

    Args:
        prefix: The first `SAFETENSORS_PREFIX_BYTES` + 1 bytes of the file.
        size: Bytes of the file.
        bytes_max: Longest header.
    """
    header = int.from_bytes(prefix[:SAFETENSORS_PREFIX_BYTES], "little")
    if prefix[SAFETENSORS_PREFIX_BYTES:] != b"{" or header > bytes_max:
        return 0
    length = SAFETENSORS_PREFIX_BYTES + header
    return length if length <= size else 0


def safetensors_tensors(head: bytes) -> list[Tensor]:
    """The tensors of a file in the order of their bytes; [] if the header does not make sense.

    Args:
        head: Prefix and header.
    """
    try:
        found = _header.decode(head[SAFETENSORS_PREFIX_BYTES:])
    except (ValueError, RecursionError):  # also UnicodeDecodeError
        return []
    found.pop("__metadata__", None)
    base = len(head)
    tensors = [
        Tensor(name, t.dtype, t.shape, base + t.data_offsets[0], base + t.data_offsets[1])
        for name, t in found.items()
    ]
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.end))


def safetensors_parts(head: bytes, size: int) -> Parts | None:
    """The tensors' byte ranges, or None if the header does not make sense.

    Args:
        head: Prefix and header.
        size: Bytes of the file.
    """
    tensors = safetensors_tensors(head)
    found = [(tensor.start, tensor.end) for tensor in tensors if tensor.start != tensor.end]
    end = len(head)
    for start, stop in found:
        if not end <= start < stop <= size:
            return None
        end = stop
    return Parts(tuple(s for s, _ in found), tuple(s for _, s in found)) if found else None
