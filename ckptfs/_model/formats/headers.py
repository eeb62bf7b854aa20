"""Formats of checkpoints and files, by names and headers. Pure functions on untrusted bytes.

safetensors (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the length N of the
header, little endian; N bytes of JSON, which begins with ``{`` and maps each tensor's name to
``dtype``, ``shape`` and ``data_offsets`` (start and end, counted from the end of the header).

zip (PKWARE, APPNOTE.TXT, 4.3): entries, each a local header and its data; then the central
directory, with the position of each local header; then, at the very end, the position of that
directory. torch.save (since 1.6) writes one entry per tensor, not compressed, and aligns its data
by a longer local header, so an entry here ends at the next one's header. numpy.savez writes such
files, too. Neither of them writes a comment at the end, so this module rejects an archive with one.
"""

import struct
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import msgspec

SAFETENSORS_PREFIX_BYTES = 8
SAFETENSORS_HEADER_BYTES_MAX = 100_000_000
"""The longest header that the format allows."""
HEADER_BYTES_MAX = 1 << 20
"""Longest header that readahead parses: some 10,000 tensors. Files with more get plain
readahead."""
ZIP_MAGIC = b"PK\x03\x04"
"""The beginning of a zip archive: a local header (APPNOTE.TXT, 4.3.7)."""
ZIP_END_BYTES = 64 << 10
"""Length of an archive's end to read first: the central directory of some 700 tensors."""
ZIP_DIRECTORY_BYTES_MAX = 4 << 20
"""Longest central directory that readahead parses: some 40,000 tensors."""
PART_BYTES_MIN = 64 << 10
"""Shortest part. Readahead does not count a shorter range (a bias, a norm, a small file of an
archive) as one that a reader has passed."""

Format = Literal[
    "safetensors", "torch-zip", "torch-dcp", "orbax", "huggingface", "tensorflow", "unknown"
]
"""The values of ``user.ckptfs.format``. torch-dcp is torch.distributed.checkpoint."""

_PATTERNS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("torch-dcp", ("*.distcp",)),
    ("orbax", ("_CHECKPOINT_METADATA", "*/_CHECKPOINT_METADATA", "*manifest.ocdbt")),
    ("huggingface", ("adapter_config.json", "model*.safetensors", "pytorch_model*.bin")),
    ("safetensors", ("*.safetensors",)),
    ("tensorflow", ("saved_model.pb", "*/saved_model.pb", "*.data-00000-of-?????")),
)
_TORCH = ("*.pt", "*.pth", "*.ckpt", "*model*.bin")


class Parts(msgspec.Struct, frozen=True):
    """Consecutive parts of a file, which programs read as a whole: ascending byte ranges."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]


_END = struct.Struct("<4s4H2LH")  # end of central directory record, 4.3.16
_END64_LOCATOR = struct.Struct("<4sLQL")  # 4.3.15
_END64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
_ENTRY = struct.Struct("<4s16x2L3H8xL")  # of the central directory, 4.3.12
_IN_EXTRA = 0xFFFFFFFF  # the number stands in the extra field, 4.5.3


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
    """The format of a checkpoint with these files, and the file to check; "" for none.

    The format is right only if that file begins with `ZIP_MAGIC`.
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
    """Bytes of prefix and header together, or 0 if this cannot be a safetensors file.

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
    """Parts (`parts_of`) from the header of a file of `size` bytes (`safetensors_tensors`)."""
    ranges = [(tensor.start, tensor.end) for tensor in safetensors_tensors(head)]
    return parts_of(ranges, len(head), size)


def zip_directory_range(end: bytes, size: int) -> range:
    """The place of the central directory in the file; empty if it is invalid or too long.

    Args:
        end: The last `ZIP_END_BYTES` bytes of the file, or all of it.
        size: Bytes of the file.
    """
    nothing = range(0)
    at = len(end) - _END.size
    if at < 0:
        return nothing
    magic, _, _, _, _, length, offset, comment = _END.unpack_from(end, at)
    if magic != b"PK\x05\x06" or comment:
        return nothing
    at -= _END64_LOCATOR.size + _END64.size
    if at >= 0 and end[at + _END64.size :].startswith(b"PK\x06\x07"):
        magic, *_, length, offset = _END64.unpack_from(end, at)
        if magic != b"PK\x06\x06":
            return nothing
    else:
        at = len(end) - _END.size
    # If it does not end at its end record, offsets do not count from the start of the file.
    if offset + length != size - len(end) + at or length > ZIP_DIRECTORY_BYTES_MAX:
        return nothing
    return range(offset, offset + length)


def zip_parts(directory: bytes, start: int) -> Parts | None:
    """Parts (`parts_of`) from the central directory of an archive (`zip_entries`)."""
    entries = zip_entries(directory, start)
    return parts_of([(entry.start, entry.end) for entry in entries], 0, start)


def zip_entries(directory: bytes, start: int) -> list[Tensor]:
    """The entries of an archive by position; [] if the central directory does not make sense.

    Args:
        directory: The central directory.
        start: Its position in the file.
    """
    found: list[tuple[int, bytes]] = []
    at = 0
    while at + _ENTRY.size <= len(directory):
        magic, packed, full, name, extra, comment, offset = _ENTRY.unpack_from(directory, at)
        if magic != b"PK\x01\x02":
            return []
        at += _ENTRY.size
        called = directory[at : at + name]
        at += name
        if offset == _IN_EXTRA:
            before = (full == _IN_EXTRA) + (packed == _IN_EXTRA)
            offset = _in_extra(directory[at : at + extra], before)
        found.append((offset, called))
        at += extra + comment
    found.sort()
    ends = [*(offset for offset, _ in found[1:]), start]
    if not found or found[0][0] < 0 or ends[-1] < found[-1][0]:
        return []
    return [
        Tensor(name.decode(errors="replace"), "", (), first, end)
        for (first, name), end in zip(found, ends, strict=True)
    ]


def _in_extra(extra: bytes, before: int) -> int:
    """The number after `before` others in the zip64 field of an extra field; -1 if it is absent."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        value = extra[at + 4 : at + 4 + length][8 * before : 8 * before + 8]
        if kind == 1 and len(value) == 8:
            return int.from_bytes(value, "little")
        at += 4 + length
    return -1


def parts_of(ranges: Sequence[tuple[int, int]], start: int, stop: int) -> Parts | None:
    """Parts from sorted byte ranges; None if there are none, or they overlap or do not lie in
    [start, stop).

    A range shorter than `PART_BYTES_MIN` belongs to the part before it, as long as such ranges and
    the gaps between them do not add up to that; a part that is still shorter takes in the next one.
    """
    starts: list[int] = []
    stops: list[int] = []
    end = start
    room = 0  # how far the last part may grow by short ranges
    for first, last in ranges:
        if first == last:
            continue
        if not end <= first < last <= stop:
            return None
        end = last
        is_short = bool(starts) and stops[-1] - starts[-1] < PART_BYTES_MIN
        if starts and (last <= room or (is_short and first <= room)):
            stops[-1] = last
        else:
            starts.append(first)
            stops.append(last)
            is_short = True
        if is_short:
            room = last + PART_BYTES_MIN
    return Parts(tuple(starts), tuple(stops)) if starts else None
