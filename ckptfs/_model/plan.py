"""Plans: what a restore has read, in which order, by tensors' names where the format is known.

A plan is made of the trace of one checkpoint, and applied to the next one of the same job, whose
tensors have the same names and other places. It is untrusted when it is applied: it says what to
fetch, and can name nothing but files of the checkpoint.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec

from ckptfs._model import ranges
from ckptfs._model.formats import Tensor
from ckptfs._model.reads import Reads
from ckptfs._model.trace import Access
from ckptfs.errors import LimitExceeded, PlanError

STEPS_MAX = 10_000
"""Of one plan: some 600 kB of JSON, which has to fit in one control message."""
_PLAN_BYTES_MAX = 900_000
_WHOLE_SHARE = 0.98
"""Who has read so much of a file, or of a tensor, wants all of it."""
_NOISE_BYTES = 2 << 20
"""How far the kernel reads beyond what a program has asked for: seen with a readahead of 1 MiB."""

_NAME_LENGTH_MAX = 4096
_Name = Annotated[str, msgspec.Meta(max_length=_NAME_LENGTH_MAX)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Step(msgspec.Struct, array_like=True, frozen=True):
    """Bytes that are read.

    Attributes:
        file: Position in the plan's `files`.
        tensor: Name of the tensor that they are in; "": `start` and `stop` count in the file.
        start: Of the bytes.
        stop: Of the bytes; 0: all of it.
        ranks: Who reads them; empty: nobody knows.
    """

    file: _Count
    tensor: _Name
    start: _Count
    stop: _Count
    ranks: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=100_000)]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a restore reads.

    Attributes:
        plan: Of the format.
        uri: The checkpoint that it was made of, and its `version`.
        files: Their paths.
        steps: In the order of the first reads.
    """

    plan: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    uri: _Name
    version: _Name
    files: Annotated[list[_Name], msgspec.Meta(max_length=STEPS_MAX)]
    steps: Annotated[list[Step], msgspec.Meta(max_length=STEPS_MAX)]

    def __post_init__(self) -> None:
        if any(step.file >= len(self.files) for step in self.steps):
            raise ValueError("a step names a file that the plan does not have")

    def ranks(self) -> list[int]:
        """All that it names."""
        return sorted({rank for step in self.steps for rank in step.ranks})

    def of_ranks(self, ranks: Collection[int]) -> "Plan":
        """The part of these: their steps, and those of nobody."""
        wanted = frozenset(ranks)
        steps = [s for s in self.steps if not s.ranks or not wanted.isdisjoint(s.ranks)]
        return msgspec.structs.replace(self, steps=steps)


class Wanted(msgspec.Struct, frozen=True):
    """What to fetch.

    Attributes:
        globs: Files, in this order.
        rate: Most bytes per second; 0: no limit.
        plan: Instead of globs; of it only the steps of `rank`, if that is not -1.
    """

    globs: list[str] = []
    rate: int = 0
    plan: Plan | None = None
    rank: int = -1


class Piece(NamedTuple):
    """Bytes of the file at position `file` of a checkpoint."""

    file: int
    start: int
    stop: int


_decoder = msgspec.json.Decoder(Plan)


def encode(plan: Plan) -> bytes:
    """As JSON. Raises LimitExceeded."""
    data = msgspec.json.encode(plan)
    if len(data) > _PLAN_BYTES_MAX or len(plan.steps) > STEPS_MAX:
        raise LimitExceeded(
            f"{plan.uri}: its plan has {len(plan.steps)} steps and {len(data)} bytes, more than "
            f"{STEPS_MAX} and {_PLAN_BYTES_MAX}; prefetch files by globs instead"
        )
    return data


def decode(data: bytes | str) -> Plan:
    """A plan that somebody gives. Raises PlanError."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"this is no plan: {error}; ckptfs plan save makes one") from None


def joined(plans: Sequence[Plan]) -> Plan:
    """What each of these has, once: the first steps of all come first, then the second ones.

    So the plans that the nodes of one job have, each of its own ranks, become that of the job.

    Raises:
        LimitExceeded: It would be too long.
    """
    files: dict[str, int] = {}
    found: dict[tuple[int, str, int, int], set[int]] = {}
    in_turns = sorted(
        ((place, plan, step) for plan in plans for place, step in enumerate(plan.steps)),
        key=lambda each: each[0],
    )
    for _, plan, step in in_turns:
        file = files.setdefault(plan.files[step.file], len(files))
        found.setdefault((file, step.tensor, step.start, step.stop), set()).update(step.ranks)
    about = plans[0] if plans else Plan(uri="", version="", files=[], steps=[])
    steps = [Step(*bytes_, tuple(sorted(ranks))) for bytes_, ranks in found.items()]
    plan = msgspec.structs.replace(about, files=list(files), steps=steps)
    encode(plan)
    return plan


# -- making one


def make_plan(
    uri: str,
    version: str,
    files: Mapping[int, tuple[str, int]],
    accesses: Iterable[Access],
    rank_of: Mapping[int, int],
    tensors_of: Callable[[str], Sequence[Tensor]],
) -> Plan:
    """The plan of a trace.

    Args:
        uri: Of the checkpoint; so is `version`.
        files: Path and size by position, of what `accesses` name.
        accesses: See ``_model.trace``.
        rank_of: Ranks of processes, as far as they are known.
        tensors_of: The tensors of the file with that path, by position; [] where unknown.

    Raises:
        LimitExceeded: It would be too long.
    """
    found: dict[tuple[int, str, int, int], tuple[float, set[int]]] = {}
    by_use: dict[tuple[int, int], list[Access]] = {}
    for access in accesses:
        if access.file in files:
            by_use.setdefault((access.file, rank_of.get(access.pid, -1)), []).append(access)
    layouts: dict[int, Sequence[Tensor]] = {}
    for (index, rank), own in by_use.items():
        path, size = files[index]
        if index not in layouts:
            layouts[index] = [t for t in tensors_of(path) if 0 < len(t.name) <= _NAME_LENGTH_MAX]
        use = Reads(own)
        for at_s, tensor, start, stop in _steps_of(use, size, layouts[index]):
            first_s, ranks = found.setdefault((index, tensor, start, stop), (at_s, set()))
            ranks.add(rank)
            found[index, tensor, start, stop] = min(first_s, at_s), ranks
    used = sorted({index for index, *_ in found})
    position = {index: place for place, index in enumerate(used)}
    in_order = sorted(found.items(), key=lambda item: (item[1][0], item[0]))
    steps = [
        Step(position[index], tensor, start, stop, tuple(sorted(ranks - {-1})))
        for (index, tensor, start, stop), (_, ranks) in in_order
    ]
    plan = Plan(uri=uri, version=version, files=[files[i][0] for i in used], steps=steps)
    encode(plan)
    return plan


def _steps_of(
    use: Reads, size: int, tensors: Sequence[Tensor]
) -> Iterable[tuple[float, str, int, int]]:
    """First moment, tensor, start and stop (0: all) of what was read."""
    if ranges.length(use.read) >= _WHOLE_SHARE * size:
        yield use.began_s, "", 0, 0
        return
    if not tensors:
        for start, stop in use.read:
            yield _first_s(use, start, stop), "", start, stop
        return
    for tensor in tensors:
        length = tensor.end - tensor.start
        read = ranges.within(use.read, tensor.start, tensor.end)
        is_small = length <= 2 * _NOISE_BYTES
        if length and read > (0.5 if is_small else _WHOLE_SHARE) * length:
            yield _first_s(use, tensor.start, tensor.end), tensor.name, 0, 0
        elif not is_small:
            for start, stop in ranges.inside(use.read, tensor.start, tensor.end):
                if stop - start > _NOISE_BYTES:
                    first_s = _first_s(use, start, stop)
                    yield first_s, tensor.name, start - tensor.start, stop - tensor.start


def _first_s(use: Reads, start: int, stop: int) -> float:
    """When these bytes were read first: a quarter of them at once, if there is such an access,
    because who reads the file's header gets the first bytes of a tensor with it."""

    def overlap(access: Access) -> int:
        return min(access.stop, stop) - max(access.start, start)

    def moment(access: Access) -> float:  # within an access they came evenly
        share = max(0, start - access.start) / (access.stop - access.start)
        return access.began_s + share * (access.ended_s - access.began_s)

    found = use.overlapping(start, stop)
    much = [a for a in found if 4 * overlap(a) >= stop - start]
    return min(moment(access) for access in much or found)


# -- applying one


def match_files(plan: Plan, paths: Mapping[str, int]) -> dict[int, int]:
    """Positions in a checkpoint by positions in the plan's `files`; without those it has not.

    One that is not there may differ in the numbers of its folders (``global_step100/…``), or else
    in all of its numbers, where only one does.

    Args:
        plan: The plan.
        paths: Positions by path.
    """
    found = {i: paths[path] for i, path in enumerate(plan.files) if path in paths}
    for pattern_of in (_without_numbers_of_folders, _without_numbers):
        if len(found) == len(plan.files):
            break
        by_pattern: dict[str, list[int]] = {}
        for path, index in paths.items():
            by_pattern.setdefault(pattern_of(path), []).append(index)
        wanted = [pattern_of(path) for path in plan.files]
        often = Counter(wanted)
        for i, pattern in enumerate(wanted):
            candidates = by_pattern.get(pattern, ())
            if i not in found and len(candidates) == 1 and often[pattern] == 1:
                found[i] = candidates[0]
    return found


def _without_numbers(path: str) -> str:
    return _NUMBERS.sub("#", path)


def _without_numbers_of_folders(path: str) -> str:
    folders, slash, name = path.rpartition("/")
    return _NUMBERS.sub("#", folders) + slash + name


_NUMBERS = re.compile(r"\d+")


def pieces_of(
    plan: Plan,
    rank: int,
    matched: Mapping[int, int],
    sizes: Mapping[int, int],
    layouts: Mapping[int, Sequence[Tensor]],
    piece_bytes_max: int,
) -> list[Piece]:
    """What to fetch of a checkpoint, in this order; pieces are at most `piece_bytes_max` long.

    Args:
        plan: The plan.
        rank: Whose steps; -1: those of all.
        matched: See `match_files`.
        sizes: Bytes of the matched files, by position in the checkpoint.
        layouts: Tensors of these, as far as they are known. A tensor that is not in its file any
            more is looked for in the others.
        piece_bytes_max: Of one piece.
    """
    places = {
        (index, tensor.name): tensor for index, tensors in layouts.items() for tensor in tensors
    }
    anywhere = {name: index for index, name in places}
    pieces: list[Piece] = []
    for step in (plan if rank < 0 else plan.of_ranks([rank])).steps:
        index = matched.get(step.file, -1)
        base, end = 0, sizes.get(index, 0)
        if step.tensor:
            if (index, step.tensor) not in places:
                index = anywhere.get(step.tensor, -1)
            tensor = places.get((index, step.tensor))
            if tensor is None:
                continue
            base, end = tensor.start, min(tensor.end, sizes[index])
        stop = min(end, base + step.stop) if step.stop else end
        _append(pieces, Piece(index, base + step.start, stop), piece_bytes_max)
    return pieces


def _append(pieces: list[Piece], new: Piece, piece_bytes_max: int) -> None:
    """Add bytes; those that follow the last ones are joined with them, as far as that goes."""
    index, start, stop = new
    if pieces and pieces[-1].file == index and pieces[-1].stop == start:
        start = pieces.pop().start
    while start < stop:
        end = min(stop, start + piece_bytes_max)
        pieces.append(Piece(index, start, end))
        start = end
