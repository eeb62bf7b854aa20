"""A file's header is recognised by its content, never trusted, and steers the readahead."""

import io
import json
import struct
import zipfile
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.archives import write_torch_zip
from support.fakes import MIB

from ckptfs._daemon.fetch.readahead import Readahead
from ckptfs._model.blocks import BLOCK_BYTES
from ckptfs._model.formats.headers import (
    HEADER_BYTES_MAX,
    ZIP_DIRECTORY_BYTES_MAX,
    ZIP_END_BYTES,
    ZIP_MAGIC,
    Parts,
    Tensor,
    format_of,
    parts_of,
    safetensors_header_length,
    safetensors_parts,
    safetensors_tensors,
    zip_directory_range,
    zip_parts,
)
from ckptfs._model.formats.headers import PART_BYTES_MIN as MIN


def head_of(tensors: "dict[str, tuple[int, int]]", **extra: object) -> bytes:
    """Prefix and header of a safetensors file."""
    header: dict[str, object] = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": list(offsets)}
        for name, offsets in tensors.items()
    }
    raw = json.dumps(header | extra).encode()
    return len(raw).to_bytes(8, "little") + raw


def test_tensors_become_parts_in_the_order_of_their_bytes() -> None:
    tensors = {"b": (4 * MIN, 10 * MIN), "a": (0, 4 * MIN), "empty": (4 * MIN, 4 * MIN)}
    head = head_of(tensors, __metadata__={"format": "pt"})
    base = len(head)
    size = base + 10 * MIN
    assert safetensors_header_length(head[:9], size) == base
    assert safetensors_parts(head, size) == Parts((base, base + 4 * MIN), (base + 4 * MIN, size))


@pytest.mark.parametrize(
    ("lengths", "expected"),  # in KiB
    [
        ([320, 320], [320, 320]),
        ([320, 32, 32, 320], [384, 320]),  # short ones belong to what is before them
        ([6, 6, 320, 320], [332, 320]),  # at the beginning, to what is behind them
        ([320, *[32] * 8, 320], [384, 128, 64, 320]),  # but not more and more of them
        ([16] * 16, [128, 128]),
    ],
)
def test_short_ranges_join_their_neighbours(lengths: list[int], expected: list[int]) -> None:
    def ranges(lengths: list[int]) -> "list[tuple[int, int]]":
        return list(pairwise([0, *accumulate(kib << 10 for kib in lengths)]))

    wanted = ranges(expected)
    parts = Parts(tuple(start for start, _ in wanted), tuple(stop for _, stop in wanted))
    assert parts_of(ranges(lengths), 0, 100 * MIN) == parts


def test_short_ranges_far_from_each_other_are_not_joined() -> None:
    assert parts_of([(0, 10), (5 * MIN, 5 * MIN + 10)], 0, 100 * MIN) == Parts(
        (0, 5 * MIN), (10, 5 * MIN + 10)
    )


@pytest.mark.parametrize(
    "prefix",
    [
        b"",
        b"PK\x03\x04\x00\x00\x00\x00\x08",
        (2).to_bytes(8, "little") + b"[",
        (1000).to_bytes(8, "little") + b"{",  # behind the end of the file
        (HEADER_BYTES_MAX + 1).to_bytes(8, "little") + b"{",
        b"\xff" * 8 + b"{",
    ],
)
def test_other_files_are_not_recognised(prefix: bytes) -> None:
    size = 2 * HEADER_BYTES_MAX if len(prefix) == 9 and prefix[0] == 1 else 900
    assert safetensors_header_length(prefix, size) == 0


@pytest.mark.parametrize(
    "offsets", [[(0, 10), (5, 20)], [(10, 5)], [(0, 10_000)], [(-4, 10)], [(0, 2**70)]]
)
def test_senseless_offsets_are_refused(offsets: "list[tuple[int, int]]") -> None:
    head = head_of({str(i): pair for i, pair in enumerate(offsets)})
    assert safetensors_parts(head, len(head) + 100) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_harmless(raw: bytes) -> None:
    head = len(raw).to_bytes(8, "little") + raw
    parts = safetensors_parts(head, len(head) + 1000)
    assert parts is None or all(len(head) <= s <= len(head) + 1000 for s in parts.stops)


def test_deep_nesting_is_harmless() -> None:
    raw = b'{"a":' + b"[" * 100_000
    assert safetensors_parts(len(raw).to_bytes(8, "little") + raw, 10**9) is None


def test_tensors_are_told_as_the_header_has_them() -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "second": {"dtype": "BF16", "shape": [2, 3, 4], "data_offsets": [4, 52]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "I64", "shape": [0], "data_offsets": [52, 52]},
    }
    raw = json.dumps(header).encode()
    head = len(raw).to_bytes(8, "little") + raw
    base = len(head)
    assert safetensors_tensors(head) == [
        Tensor("scalar", "F32", (), base, base + 4),
        Tensor("second", "BF16", (2, 3, 4), base + 4, base + 52),
        Tensor("empty", "I64", (0,), base + 52, base + 52),
    ]


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_header_gives_tensors_or_none(raw: bytes) -> None:
    for text in (raw, b'{"t":' + raw + b"}"):
        found = safetensors_tensors(len(text).to_bytes(8, "little") + text)
        assert all(isinstance(tensor, Tensor) for tensor in found)


# -- zip archives


def found_in(raw: bytes, size: int = 0) -> Parts | None:
    """The parts of an archive whose last bytes are `raw`, as they are looked for."""
    size = size or len(raw)
    where = zip_directory_range(raw[-ZIP_END_BYTES:], size)
    assert where.stop <= size
    before = size - len(raw)
    return zip_parts(raw[where.start - before : where.stop - before], where.start)


def test_each_tensor_of_a_torch_archive_is_a_part() -> None:
    file = io.BytesIO()
    places = write_torch_zip(file, [bytes(n * MIN) for n in (3, 1, 2)])
    raw = file.getvalue()
    assert raw.startswith(ZIP_MAGIC)
    parts = found_in(raw)
    assert parts is not None
    assert parts.starts[0] == 0  # what comes before the tensors belongs to the first
    assert parts.starts[1:] == parts.stops[:-1]
    assert all(
        start < begin < start + 200 and end <= stop
        for start, stop, (begin, end) in list(zip(parts.starts, parts.stops, places, strict=True))[
            1:
        ]
    )
    assert parts.stops[-1] < len(raw)  # the central directory is behind it


class Gap(io.BytesIO):
    """A file that is 5 GiB longer than its content: what is before 5 GiB is dropped."""

    shift = 0

    def tell(self) -> int:
        return super().tell() + self.shift

    def seek(self, offset: int, whence: int = 0) -> int:
        return super().seek(offset - self.shift if whence == 0 else offset, whence) + self.shift


def test_an_archive_beyond_4_gib() -> None:
    file = Gap()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("near", bytes(2 * MIN))
        boundary = file.tell()
        file.shift = 5 << 30
        archive.start_dir = file.tell()
        for number in range(2):
            archive.writestr(f"far{number}", bytes(2 * MIN))
        end = archive.start_dir
    size = file.tell()
    raw = file.getvalue()
    parts = found_in(raw[boundary:], size)
    assert parts is not None
    first = boundary + (5 << 30)
    second = first + 30 + len("far0") + 2 * MIN
    assert parts == Parts((0, first, second), (first, second, end))


def test_numpys_archives_have_parts_too() -> None:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(MIN), b=np.zeros(2 * MIN))
    parts = found_in(file.getvalue())
    assert parts is not None
    assert len(parts.starts) == 2


def archive(*names: str, length: int = 2 * MIN) -> bytes:
    """A plain archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, bytes(length))
    return file.getvalue()


def test_other_ends_say_nothing() -> None:
    raw = archive("a", "b")
    assert found_in(raw) is not None
    assert found_in(raw + raw) is None  # archives one after the other: offsets do not fit
    assert found_in(b"x" + raw) is None
    assert found_in(raw[:-1]) is None
    assert found_in(raw[:-2] + b"\x01\x00") is None  # a comment that is not there
    assert zip_directory_range(b"", 0) == range(0)
    huge = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, ZIP_DIRECTORY_BYTES_MAX + 1, 0, 0)
    assert not zip_directory_range(huge, ZIP_DIRECTORY_BYTES_MAX + 1 + len(huge))


@given(st.data())
def test_a_damaged_archive_is_harmless(data: st.DataObject) -> None:
    raw = bytearray(archive("a", "bb", "ccc", length=100))
    tail = data.draw(st.sampled_from([raw[-22:], raw[-250:]]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(tail) - 1))
        tail[at : at + 1] = data.draw(st.binary(max_size=2))
    raw[-len(tail) :] = tail
    size = len(raw)
    where = zip_directory_range(bytes(raw), size)
    assert 0 <= where.start <= where.stop <= size
    parts = zip_parts(bytes(raw[where.start : where.stop]), where.start)
    for part in zip(parts.starts, parts.stops, strict=True) if parts else ():
        assert 0 <= part[0] < part[1] <= where.start


@given(st.binary(max_size=300), st.integers(0, 2**33))
def test_any_directory_is_harmless(raw: bytes, start: int) -> None:
    for directory in (raw, b"PK\x01\x02" + raw):
        parts = zip_parts(directory, start)
        assert parts is None or parts.stops[-1] <= start
    assert zip_directory_range(raw, len(raw) + start).stop <= len(raw) + start


# -- the format of a checkpoint


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "unknown"),
        (["notes.txt", "config.json"], "unknown"),
        (["weights.safetensors"], "safetensors"),
        (["deep/er/weights.safetensors", "README.md"], "safetensors"),
        (["config.json", "model-00001-of-00002.safetensors"], "huggingface"),
        (["config.json", "pytorch_model.bin"], "huggingface"),
        (["adapter_config.json", "adapter_model.safetensors"], "huggingface"),
        (["deep/config.json", "model.safetensors"], "safetensors"),
        (["__0_0.distcp", "__1_0.distcp", ".metadata"], "torch-dcp"),
        (["deep/__0_0.distcp", "model.pt"], "torch-dcp"),
        (["_CHECKPOINT_METADATA", "default/manifest.ocdbt"], "orbax"),
        (["default/_CHECKPOINT_METADATA"], "orbax"),
        (["manifest.ocdbt"], "orbax"),
        (["saved_model.pb", "variables/variables.index"], "tensorflow"),
        (["model.ckpt.data-00000-of-00001", "model.ckpt.index"], "tensorflow"),
        (["safetensors", "x.safetensors.tmp", "distcp"], "unknown"),
    ],
)
def test_the_format_by_names(names: "list[str]", expected: str) -> None:
    for order in (names, names[::-1]):
        assert format_of(order) == (expected, "")


@pytest.mark.parametrize("name", ["model.pt", "a/b/last.pth", "epoch=1.ckpt", "pytorch_model.bin"])
def test_a_torch_file_has_to_be_looked_into(name: str) -> None:
    assert format_of(["other.txt", name]) == ("torch-zip", name)
    assert format_of(["x.safetensors", name]) == ("safetensors", "")


# -- what the readahead does with it

HEAD = 10_000
PARTS = [(HEAD, 50 * MIB), (50 * MIB, 51 * MIB), (51 * MIB, 120 * MIB), (120 * MIB, 300 * MIB)]
SIZE = 300 * MIB


def fetched_by(accesses: "list[tuple[int, int]]", window: int = 64 * MIB) -> set[int]:
    """The blocks that are fetched, by the accesses themselves or ahead of them."""
    readahead = Readahead(SIZE, window)
    readahead.learn_parts(Parts(tuple(p[0] for p in PARTS), tuple(p[1] for p in PARTS)))
    blocks: set[int] = set()
    for offset, length in accesses:
        blocks |= set(range(offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES + 1))
        blocks |= set(readahead.access(offset, length))
    return blocks


@given(st.sampled_from([0, 2, 3]), st.sampled_from([128 << 10, MIB]), st.integers(0, 3))
def test_a_part_is_fetched_whole_and_only_it(which: int, piece: int, overshoot_mib: int) -> None:
    start, stop = PARTS[which]
    stop = min(stop + overshoot_mib * MIB, SIZE)  # the kernel's own readahead goes on
    accesses = [(o, min(piece, stop - o)) for o in range(start, stop, piece)]
    blocks = fetched_by([(0, HEAD), *accesses])
    assert blocks <= {0, *range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))}
    # Soon after the first two MiB the rest is on its way, in windows of at most the maximum.
    some = [access for access in accesses if access[0] < start + 4 * MIB]
    ahead = fetched_by([(0, HEAD), *some])
    assert len(ahead) >= min((PARTS[which][1] - start) // MIB, 60)


@pytest.mark.parametrize("start", [PARTS[2][0], PARTS[2][0] + 4096, PARTS[3][0] - 8192])
def test_a_few_bytes_read_through_a_buffer_are_no_reason_to_fetch_a_part(start: int) -> None:
    touch = [(start, MIB), (start + MIB, MIB), (start + 2 * MIB, MIB)]  # see _TOUCH_BYTES
    touched = {i for o, n in touch for i in range(o // MIB, (o + n - 1) // MIB + 1)}
    assert len(fetched_by(touch) - touched) <= 1
    assert len(fetched_by([*touch, (start + 3 * MIB, MIB)])) > 60


@pytest.mark.parametrize("page", [0, 100, 4095])
def test_a_page_fault_at_the_start_of_a_part_is_about_that_part(page: int) -> None:
    start = PARTS[2][0]
    fault = (start // 4096) * 4096 - page // 4096 * 4096
    around = [(fault - MIB // 2, MIB)]  # the kernel reads as much before as after the fault
    accesses = [*around, *((o, MIB) for o in range(fault + MIB // 2, fault + 6 * MIB, MIB))]
    blocks = fetched_by(accesses)
    assert max(blocks) <= PARTS[2][1] // BLOCK_BYTES
    assert len(blocks) > 60


def test_a_reader_of_everything_is_not_held_up_at_each_part() -> None:
    readahead = Readahead(SIZE, 64 * MIB)
    readahead.learn_parts(Parts(tuple(p[0] for p in PARTS), tuple(p[1] for p in PARTS)))
    ahead_of: dict[int, int] = {}
    asked = 0
    for offset in range(0, SIZE, MIB):
        if ahead := readahead.access(offset, MIB):
            asked = ahead.stop * BLOCK_BYTES
        ahead_of[offset + MIB] = asked - offset - MIB
    third = PARTS[2][0] + 8 * MIB  # two parts are behind it
    assert all(
        ahead >= 32 * MIB or at + ahead == SIZE for at, ahead in ahead_of.items() if at > third
    )
