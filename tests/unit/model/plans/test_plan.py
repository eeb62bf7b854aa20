"""Plans: made of what was read, and applied to a checkpoint whose bytes are elsewhere."""

import io
import json
import struct
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs._model.formats.headers import Tensor
from ckptfs._model.formats.tensors import layout
from ckptfs._model.plans.plan import (
    STEPS_MAX,
    Piece,
    Plan,
    Step,
    decode,
    encode,
    joined,
    make_plan,
    match_files,
    pieces_of,
)
from ckptfs._model.plans.trace import Access
from ckptfs.errors import LimitExceeded, PlanError

MIB = 1 << 20
TENSORS = [
    Tensor("a", "F32", (), 100, 10 * MIB),
    Tensor("b", "F32", (), 10 * MIB, 30 * MIB),
    Tensor("bias", "F32", (), 30 * MIB, 30 * MIB + 4096),
    Tensor("c", "F32", (), 30 * MIB + 4096, 40 * MIB),
]
SIZE = 40 * MIB


def access(start: int, stop: int, at_s: float, *, pid: int = 1, file: int = 0) -> Access:
    return Access(file, pid, start, stop, 1, 0, 0.0, at_s, at_s + 1)


def made(accesses: list[Access], ranks: dict[int, int] | None = None) -> list[tuple[object, ...]]:
    """The steps of a plan: file, tensor, start, stop, ranks."""
    files = {0: ("m.safetensors", SIZE), 7: ("x.bin", 5 * MIB)}
    plan = make_plan(
        "s3://b/run", "v", files, accesses, ranks or {}, lambda p: TENSORS if p[0] == "m" else []
    )
    assert decode(encode(plan)) == plan
    return [(plan.files[s.file], s.tensor, s.start, s.stop, s.ranks) for s in plan.steps]


def test_tensors_are_named_in_the_order_of_their_first_bytes() -> None:
    assert made(
        [
            access(30 * MIB, 40 * MIB, 1.0),
            access(0, 12 * MIB, 5.0),  # the kernel reads on into "b"
            access(0, MIB, 0.5),  # the header
        ]
    ) == [
        ("m.safetensors", "bias", 0, 0, ()),
        ("m.safetensors", "c", 0, 0, ()),
        ("m.safetensors", "a", 0, 0, ()),
    ]


def test_a_file_that_changed_while_it_was_attached_is_named_once() -> None:
    files = {0: (".metadata.json", 13), 1: ("m.bin", 100), 2: (".metadata.json", 31)}
    accesses = [access(0, 13, 1.0), access(0, 100, 2.0, file=1), access(0, 31, 3.0, file=2)]
    plan = make_plan("s3://b/run", "v", files, accesses, {}, lambda _: [])
    steps = [(plan.files[step.file], step.start, step.stop) for step in plan.steps]
    assert steps == [(".metadata.json", 0, 0), ("m.bin", 0, 0)]
    assert sorted(plan.files) == [".metadata.json", "m.bin"]


def test_a_part_of_a_tensor_counts_from_its_beginning() -> None:
    steps = made([access(15 * MIB, 20 * MIB, 1.0), access(29 * MIB, 29 * MIB + 4096, 2.0)])
    assert steps == [("m.safetensors", "b", 5 * MIB, 10 * MIB, ())]


def test_ranks_are_kept_apart_and_joined() -> None:
    steps = made(
        [
            access(0, 10 * MIB, 2.0, pid=11),
            access(0, 10 * MIB, 1.0, pid=12),
            access(10 * MIB, 20 * MIB, 3.0, pid=11),
            access(20 * MIB, 30 * MIB, 4.0, pid=12),
            access(10 * MIB, 30 * MIB, 6.0, pid=13),
        ],
        {11: 0, 12: 5},
    )
    assert steps == [
        ("m.safetensors", "a", 0, 0, (0, 5)),
        ("m.safetensors", "b", 0, 10 * MIB, (0,)),
        ("m.safetensors", "b", 10 * MIB, 20 * MIB, (5,)),
        ("m.safetensors", "b", 0, 0, ()),
    ]


def test_whole_files_and_unknown_formats() -> None:
    steps = made(
        [
            access(0, SIZE, 3.0),
            access(MIB, 2 * MIB, 1.0, file=7),
            access(0, 1, 0.0, file=99),  # not one of the files that were named
        ]
    )
    assert steps == [("x.bin", "", MIB, 2 * MIB, ()), ("m.safetensors", "", 0, 0, ())]


def test_too_long_a_plan_is_refused() -> None:
    tensors = [Tensor(f"t{i}", "F32", (), 10 * i, 10 * i + 5) for i in range(STEPS_MAX + 1)]
    accesses = [access(t.start, t.end, float(t.start)) for t in tensors]
    with pytest.raises(LimitExceeded, match="steps"):
        make_plan("u", "v", {0: ("f", 10**6)}, accesses, {}, lambda _: tensors)


# -- applying


def plan_of(*steps: Step, files: tuple[str, ...] = ("m.safetensors", "n.safetensors")) -> Plan:
    return Plan(uri="u", version="v", files=list(files), steps=list(steps))


def test_bytes_are_found_where_the_tensors_are_now() -> None:
    plan = plan_of(
        Step(0, "c", 0, 0, ()),
        Step(0, "b", 5 * MIB, 10 * MIB, ()),
        Step(0, "gone", 0, 0, ()),
        Step(1, "moved", 0, 0, ()),
        Step(1, "", 0, 0, ()),
    )
    layouts = {
        4: [Tensor("b", "", (), 8, 8 + 20 * MIB), Tensor("moved", "", (), 50 * MIB, 51 * MIB)],
        5: [Tensor("c", "", (), 100, 200)],
    }
    found = pieces_of(plan, -1, {0: 4, 1: 5}, {4: 60 * MIB, 5: 3 * MIB}, layouts, 2 * MIB)
    assert found == [
        Piece(5, 100, 200),
        Piece(4, 8 + 5 * MIB, 8 + 7 * MIB),
        Piece(4, 8 + 7 * MIB, 8 + 9 * MIB),
        Piece(4, 8 + 9 * MIB, 8 + 10 * MIB),
        Piece(4, 50 * MIB, 51 * MIB),
        Piece(5, 0, 2 * MIB),
        Piece(5, 2 * MIB, 3 * MIB),
    ]


def test_what_follows_is_joined() -> None:
    plan = plan_of(Step(0, "", 0, 10, ()), Step(0, "", 10, 20, ()), Step(0, "", 30, 40, ()))
    assert pieces_of(plan, -1, {0: 0}, {0: 100}, {}, MIB) == [Piece(0, 0, 20), Piece(0, 30, 40)]


def test_a_rank_gets_its_own_and_what_is_of_nobody() -> None:
    plan = plan_of(Step(0, "", 0, 10, (1,)), Step(0, "", 20, 30, (0, 2)), Step(0, "", 40, 50, ()))
    assert [p.start for p in pieces_of(plan, 2, {0: 0}, {0: 100}, {}, MIB)] == [20, 40]
    assert [p.start for p in pieces_of(plan, 7, {0: 0}, {0: 100}, {}, MIB)] == [40]
    assert [p.start for p in pieces_of(plan, -1, {0: 0}, {0: 100}, {}, MIB)] == [0, 20, 40]
    assert plan.ranks() == [0, 1, 2]


def test_the_plans_of_nodes_become_one() -> None:
    one = plan_of(Step(0, "a", 0, 0, (0,)), Step(1, "", 0, 0, (0, 1)), Step(1, "b", 0, 0, ()))
    other = plan_of(
        Step(1, "a", 0, 0, (4,)), Step(0, "", 0, 0, (4, 5)), files=("x", "m.safetensors")
    )
    whole = joined([one, other])
    assert whole.files == ["m.safetensors", "n.safetensors", "x"]
    assert whole.steps == [
        Step(0, "a", 0, 0, (0, 4)),
        Step(1, "", 0, 0, (0, 1)),
        Step(2, "", 0, 0, (4, 5)),
        Step(1, "b", 0, 0, ()),
    ]
    assert joined([whole, one]) == whole
    assert [s.tensor for s in whole.of_ranks([1, 5]).steps] == ["", "", "b"]
    assert whole.of_ranks([9]).steps == [Step(1, "b", 0, 0, ())]
    assert joined([]).steps == []
    long = plan_of(*(Step(0, "", i, i + 1, ()) for i in range(STEPS_MAX)))
    with pytest.raises(LimitExceeded, match="steps"):
        joined([long, one])


def test_files_may_differ_in_their_numbers() -> None:
    plan = plan_of(files=("global_step100/mp_rank_00.pt", "same.bin", "a1", "b7", "b8", "no"))
    paths = {
        "global_step200/mp_rank_00.pt": 3, "same.bin": 1, "a2": 4, "a3": 5, "b9": 6
    }  # fmt: skip
    assert match_files(plan, paths) == {0: 3, 1: 1}
    of_step = plan_of(
        files=("step10/0_0", "step10/0_1", "step10/x/7", "step10/gone1", "3/a", "4/a")
    )
    names = ("step20/0_1", "step20/0_0", "step20/x/8", "step20/other", "5/a")
    paths = {name: index for index, name in enumerate(names)}
    assert match_files(of_step, paths) == {0: 1, 1: 0, 2: 2}


@given(
    st.lists(st.builds(
        Step, st.integers(0, 1), st.sampled_from(["", "b", "bias", "x"]), st.integers(0, 1 << 60),
        st.integers(0, 1 << 60), st.just(()),
    ), max_size=5),
    st.integers(1, 1 << 20),
)  # fmt: skip
def test_no_plan_leaves_the_files(steps: list[Step], size: int) -> None:
    plan = plan_of(*steps)
    for piece in pieces_of(plan, -1, {0: 9, 1: 8}, {9: size, 8: 5}, {9: TENSORS}, 1 << 30):
        assert 0 <= piece.start < piece.stop <= {9: size, 8: 5}[piece.file]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000,
        b'{"plan":2,"uri":"u","version":"v","files":[],"steps":[]}',
        b'{"uri":"u","version":"v","files":[],"steps":[[0,"",0,0,[]]]}',
        b'{"uri":"u","version":"v","files":["a"],"steps":[[-1,"",0,0,[]]]}',
        b'{"uri":"u","version":"v","files":["a"],"steps":[[0,"",-1,0,[]]]}',
        b'{"uri":"u","version":"v","files":["a"],"steps":[[0,"",0,0,["x"]]]}',
        b'{"uri":"u","version":"v","files":["a"],"steps":[],"more":1}',
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(data: bytes) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        decode(data)


# -- layouts


def tensors_in(data: bytes) -> list[Tensor]:
    asking = layout(len(data))
    try:
        start, stop = next(asking)
        while True:
            start, stop = asking.send(data[start:stop])
    except StopIteration as found:
        return found.value


def test_layouts_of_known_formats() -> None:
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"a": "b"}}
    ).encode()
    raw = struct.pack("<Q", len(header)) + header + bytes(8)
    assert tensors_in(raw) == [Tensor("w", "F32", (2,), len(raw) - 8, len(raw))]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"p" * 50)
        file.writestr("archive/data/0", b"0" * 1000)
    found = tensors_in(archive.getvalue())
    assert [tensor.name for tensor in found] == ["archive/data.pkl", "archive/data/0"]
    assert found[0].start == 0
    assert found[0].end == found[1].start
    assert b"0" * 1000 in archive.getvalue()[found[1].start : found[1].end]


@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\x03\x04", b"\x20" + bytes(7) + b"{"]))
def test_layouts_of_anything(data: bytes, magic: bytes) -> None:
    tensors_in(magic + data)
