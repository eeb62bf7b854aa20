"""The pickle of torch.distributed.checkpoint is read without being unpickled, and never trusted."""

import os
import pickle
import pickletools
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.archives import pickle_metadata

from ckptfs._model.formats import dcp
from ckptfs._model.formats.headers import PART_BYTES_MIN, Parts

REAL = Path(__file__).parents[3] / "data" / "torch-2.13-checkpoint.metadata"
"""The metadata that `torch.distributed.checkpoint.save` of torch 2.13 wrote for an integer (1,261
bytes of `__0_0.distcp`), three tensors (401,577, 405,545 and 409,577) and a small one (1,577)."""
REAL_BYTES = 1_219_537
SHARDED = REAL.with_name("torch-2.13-sharded.metadata")
"""The same of two ranks: DTensors sharded by rows and by columns, and a replicated one, a scalar, a
tensor in a list, an integer."""
LENGTH = 3 * PART_BYTES_MIN
ITEMS = [(f"layer.{i}", f"__{i % 2}_0.distcp", i // 2 * LENGTH, LENGTH) for i in range(6)]


def parts_of(raw: bytes, size: int = 3 * LENGTH) -> dict[bytes, Parts]:
    """The parts that a metadata file gives to files of `size` bytes."""
    return dcp.parts_by_file(raw, lambda name: size, lambda: None)


def tensors_of(raw: bytes, sizes: dict[bytes, int]) -> dict[bytes, list[tuple[str, int, int]]]:
    """Names and places of the tensors in files of these sizes."""
    found = dcp.tensors_by_file(raw, lambda name: sizes.get(name, -1), lambda: None)
    return {path: [(t.name, t.start, t.end) for t in tensors] for path, tensors in found.items()}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_items_become_the_parts_of_their_files(protocol: int) -> None:
    raw = pickle_metadata(ITEMS, protocol)
    assert dcp.is_metadata(raw[: dcp.HEAD_BYTES])
    starts = (0, LENGTH, 2 * LENGTH)
    parts = Parts(starts, tuple(start + LENGTH for start in starts))
    assert parts_of(raw) == {b"__0_0.distcp": parts, b"__1_0.distcp": parts}
    assert parts_of(pickletools.optimize(raw)) == parts_of(raw)


def test_what_torch_wrote_is_understood() -> None:
    raw = REAL.read_bytes()
    assert dcp.is_metadata(raw[: dcp.HEAD_BYTES])
    parts = Parts((0, 402_838, 808_383), (402_838, 808_383, REAL_BYTES))
    assert parts_of(raw, REAL_BYTES) == {b"__0_0.distcp": parts}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_known_by_their_names_and_where_their_pieces_begin(protocol: int) -> None:
    items = [
        ("whole", "__0_0.distcp", 0, 10),
        ("split", "__1_0.distcp", 50, 7),
        ("split", "__1_0.distcp", 0, 50),
        ("cube", "__0_0.distcp", 10, 5),
        ("row", "__0_0.distcp", 20, 5),
        ("many", "__0_0.distcp", 30, 5),
        ("scalar", "__0_0.distcp", 25, 5),
        ("step", "__0_0.distcp", 15, 5),
        ("", "__0_0.distcp", 15, 5),
        ("beyond", "__0_0.distcp", 90, 50),
        ("elsewhere", "gone.distcp", 0, 5),
    ]
    offsets = {0: (0, 0), 1: (512, 0), 2: (0, 0), 3: (1, 2, 3), 4: (70_000,), 6: ()}
    offsets[5] = (1, 0, 0, 0, 2**40)
    raw = pickle_metadata(items, protocol, offsets=offsets)
    for same in (raw, pickletools.optimize(raw)):
        assert tensors_of(same, {b"__0_0.distcp": 100, b"__1_0.distcp": 57}) == {
            b"__0_0.distcp": [
                ("whole", 0, 10),
                ("cube[1,2,3]", 10, 15),
                ("step", 15, 20),
                ("row[70000]", 20, 25),
                ("scalar", 25, 30),
                ("many[1,0,0,0,1099511627776]", 30, 35),
            ],
            b"__1_0.distcp": [("split", 0, 50), ("split[512,0]", 50, 57)],
        }


def test_tensors_that_torch_wrote_have_their_names() -> None:
    assert tensors_of(
        SHARDED.read_bytes(), {b"__0_0.distcp": 643_154, b"__1_0.distcp": 649_402}
    ) == {
        b"__0_0.distcp": [("model.w", 0, 601_577), ("model.v", 601_577, 643_154)],
        b"__1_0.distcp": [
            ("step", 0, 1261),
            ("model.w[500,0]", 1261, 602_838),
            ("model.v[0,200]", 602_838, 644_415),
            ("model.r", 644_415, 646_248),
            ("model.s", 646_248, 647_825),
            ("opt.state.0", 647_825, 649_402),
        ],
    }


@pytest.mark.parametrize("odd", [(2**63,), (1,) * 17, ("x",), ((1,), 2), (None,), (-1, 2)])
def test_what_is_no_place_in_a_tensor_is_left_out(odd: "tuple[int, ...]") -> None:
    raw = pickle_metadata([("odd", "f", 0, 5)], offsets={0: odd})
    assert tensors_of(raw, {b"f": 5}) == {b"f": [("odd", 0, 5)]}


def test_items_of_one_place_are_one_part() -> None:
    twice = [*ITEMS, ("alias", *ITEMS[0][1:])]
    assert parts_of(pickle_metadata(twice)) == parts_of(pickle_metadata(ITEMS))


@pytest.mark.parametrize(
    "item",
    [
        ("x", "__0_0.distcp", LENGTH // 2, LENGTH),  # overlaps
        ("x", "__0_0.distcp", 3 * LENGTH, LENGTH),  # behind the end of the file
        ("x", "__0_0.distcp", 2**70, LENGTH),
    ],
)
def test_a_file_whose_items_make_no_sense_has_no_parts(item: "tuple[str, str, int, int]") -> None:
    assert list(parts_of(pickle_metadata([*ITEMS, item]))) == [b"__1_0.distcp"]


def test_files_that_are_not_there_have_no_parts() -> None:
    assert not parts_of(pickle_metadata(ITEMS), -1)


class Bomb:
    """Unpickled, it would create the file `exploded`."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mknod, ("exploded",)


def test_nothing_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = pickle_metadata(ITEMS)
    assert parts_of(pickle.dumps(Bomb(), 4)) == {}
    assert parts_of(pickle_metadata(ITEMS, planner_data=Bomb())) == parts_of(raw)
    assert not os.listdir(tmp_path)


def test_references_to_references_cost_nothing() -> None:
    doubling = b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(250))
    raw = b"\x80\x04)\x94" + doubling + b"."  # 2 ** 250 empty tuples
    assert parts_of(raw) == {}
    deep = b"\x80\x04" + b"]\x94" * 1 + b"(" * 100_000 + b"t" * 100_000 + b"."
    assert parts_of(deep) == {}


@pytest.mark.parametrize(
    "endless", [b"N0", b")", b"N\x94", b"(", b"\x8c\x02ab", b"K\x01" * 8 + b"0" * 8]
)
def test_more_than_the_limits_is_refused(endless: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "_OPCODES_MAX", 100_000)
    monkeypatch.setattr(dcp, "_HELD_MAX", 10_000)
    pauses = 0

    def pause() -> None:
        nonlocal pauses
        pauses += 1

    raw = b"\x80\x04" + endless * 200_000 + pickle_metadata(ITEMS)[2:]
    assert dcp.parts_by_file(raw, lambda name: 10**9, pause) == {}
    assert pauses <= 100_000 // dcp._SLICE
    assert parts_of(b"\x80\x04" + bytes(dcp.BYTES_MAX)) == {}


opcodes = st.sampled_from([op.code.encode("latin-1") for op in pickletools.opcodes])


@given(st.lists(opcodes | st.binary(max_size=4), max_size=60).map(b"".join))
@example(b"\x8c")
@example(b"u.")
@example(b"}" + b"(" * 3 + b"u.")
def test_any_bytes_are_harmless(raw: bytes) -> None:
    assert parts_of(b"\x80\x04" + raw) == {}
    parts_of(raw)
    assert tensors_of(b"\x80\x04" + raw, {}) == {}


@given(st.data())
def test_a_damaged_pickle_is_harmless(data: st.DataObject) -> None:
    seeds = [REAL.read_bytes(), SHARDED.read_bytes(), pickle_metadata(ITEMS)]
    raw = bytearray(data.draw(st.sampled_from(seeds)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(opcodes | st.binary(max_size=3))
    for parts in parts_of(bytes(raw), REAL_BYTES).values():
        assert list(parts.starts) == sorted(parts.starts)
        assert all(0 <= a < b <= REAL_BYTES for a, b in zip(parts.starts, parts.stops, strict=True))
        assert all(a <= b for a, b in zip(parts.stops, parts.starts[1:], strict=False))
    for tensors in tensors_of(bytes(raw), {b"__0_0.distcp": REAL_BYTES}).values():
        assert all(name and 0 <= start < end <= REAL_BYTES for name, start, end in tensors)
