"""A file's header is recognised by its content, never trusted, and steers the readahead."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.fakes import MIB

from ckptfs._daemon.readahead import Readahead
from ckptfs._model.blocks import BLOCK_BYTES
from ckptfs._model.formats import (
    HEADER_BYTES_MAX,
    Parts,
    Tensor,
    format_of,
    safetensors_header_length,
    safetensors_parts,
    safetensors_tensors,
)


def head_of(tensors: "dict[str, tuple[int, int]]", **extra: object) -> bytes:
    """Prefix and header of a safetensors file."""
    header: dict[str, object] = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": list(offsets)}
        for name, offsets in tensors.items()
    }
    raw = json.dumps(header | extra).encode()
    return len(raw).to_bytes(8, "little") + raw


def test_tensors_become_parts_in_the_order_of_their_bytes() -> None:
    head = head_of({"b": (40, 100), "a": (0, 40), "empty": (40, 40)}, __metadata__={"format": "pt"})
    size = len(head) + 100
    assert safetensors_header_length(head[:9], size) == len(head)
    base = len(head)
    assert safetensors_parts(head, size) == Parts((base, base + 40), (base + 40, base + 100))


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


@given(st.sampled_from([0, 2, 3]), st.sampled_from([128 << 10, MIB]), st.integers(0, 2))
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
