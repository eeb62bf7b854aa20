"""Plans: the reads of a restore in their order, by the names of tensors if the format is known.

ckptfs makes a plan from the trace of one checkpoint, and applies it to the next one of the same
job, whose tensors have the same names and other places. It trusts no plan that it applies: a plan
can name only files of the checkpoint, and the daemon only fetches these.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec

from ckptfs._model.formats.headers import Tensor
from ckptfs._model.plans import ranges
from ckptfs._model.plans.trace import Access, Reads
from ckptfs.errors import LimitExceeded, PlanError

STEPS_MAX = 10_000
"""Most steps of one plan: some 600 kB of JSON, which have to fit in one control message."""
_PLAN_BYTES_MAX = 900_000
_WHOLE_SHARE = 0.98
"""Share of a file or tensor. A program that has read so much of it wants all of it."""
_NOISE_BYTES = 2 << 20
"""Distance to which the kernel reads beyond a program's request, observed with a readahead of 1
MiB."""

_NAME_LENGTH_MAX = 4096
_Name = Annotated[str, msgspec.Meta(max_length=_NAME_LENGTH_MAX)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Step(msgspec.Struct, array_like=True, frozen=True):
    """Bytes to read.

    Attributes:
        file: Position of their file in the plan's `files`.
        tensor: Name of their tensor; "" if `start` and `stop` count in the file.
        start: First byte.
        stop: End of the bytes; 0 for the end of the tensor or file.
        ranks: The ranks that read them; empty if unknown.
    """

    file: _Count
    tensor: _Name
    start: _Count
    stop: _Count
    ranks: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=100_000)]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The reads of a restore.

    Attributes:
        plan: Version of the format.
        uri: The checkpoint from whose trace ckptfs has made the plan.
        version: Version of that checkpoint's listing.
        files: Paths of the files.
        steps: The steps in the order of their first reads.
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
        """All ranks of its steps."""
        return sorted({rank for step in self.steps for rank in step.ranks})

    def of_ranks(self, ranks: Collection[int]) -> "Plan":
        """The part of these ranks: their steps, and those of unknown ranks."""
        wanted = frozenset(ranks)
        steps = [s for s in self.steps if not s.ranks or not wanted.isdisjoint(s.ranks)]
        return msgspec.structs.replace(self, steps=steps)


class Wanted(msgspec.Struct, frozen=True):
    """The goal of a prefetch.

    Attributes:
        globs: Patterns of files, in this order.
        rate: Most bytes per second; 0 for no limit.
        plan: The ranges to fetch instead of `globs`.
        rank: The rank whose steps of the plan to fetch; -1 for all.
        keep: Whether to fetch all files or none, check them, and keep them in the cache until the
            attachment ends.
    """

    globs: list[str] = []
    rate: int = 0
    plan: Plan | None = None
    rank: int = -1
    keep: bool = False


class Piece(NamedTuple):
    """Bytes of the file at position `file` of a checkpoint."""

    file: int
    start: int
    stop: int


_decoder = msgspec.json.Decoder(Plan)


def encode(plan: Plan) -> bytes:
    """The plan as JSON. Raises LimitExceeded."""
    data = msgspec.json.encode(plan)
    if len(data) > _PLAN_BYTES_MAX or len(plan.steps) > STEPS_MAX:
        raise LimitExceeded(
            f"{plan.uri}: its plan has {len(plan.steps)} steps and {len(data)} bytes, more than "
            f"{STEPS_MAX} and {_PLAN_BYTES_MAX}; prefetch files by globs instead"
        )
    return data


def decode(data: bytes | str) -> Plan:
    """The plan in a user's file. Raises PlanError."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"this is not a plan: {error}; ckptfs plan save makes one") from None


def joined(plans: Sequence[Plan]) -> Plan:
    """One plan with the steps of all these, each once: first all first steps, then all second ones.

    It joins the plans of a job's nodes, each of which has the steps of its own ranks. Raises
    LimitExceeded for a plan that is too long.
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
        uri: URI of the checkpoint.
        version: Version of its listing.
        files: Path and size of each file, by the position that `accesses` name.
        accesses: The reads.
        rank_of: The known ranks by process.
        tensors_of: Function from a path to the file's tensors by position, or [] if unknown.

    Raises:
        LimitExceeded: The plan would be too long.
    """
    found: dict[tuple[int, str, int, int], tuple[float, set[int]]] = {}
    by_use: dict[tuple[int, int], list[Access]] = {}
    # A file that changed while it was attached has a position for each version.
    newest = {path: index for index, (path, _) in files.items()}
    for access in accesses:
        if access.file in files:
            index = newest[files[access.file][0]]
            by_use.setdefault((index, rank_of.get(access.pid, -1)), []).append(access)
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
    """Time of the first read, tensor, start, and stop (0 for the end) of each step."""
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
    """Time of the first access to these bytes, if possible of one to at least a quarter of them,
    because a read of the file's header also gets the first bytes of a tensor."""

    def overlap(access: Access) -> int:
        return min(access.stop, stop) - max(access.start, start)

    def moment(access: Access) -> float:  # as if the bytes of an access came evenly
        share = max(0, start - access.start) / (access.stop - access.start)
        return access.began_s + share * (access.ended_s - access.began_s)

    found = use.overlapping(start, stop)
    much = [a for a in found if 4 * overlap(a) >= stop - start]
    return min(moment(access) for access in much or found)


# -- applying one


def match_files(plan: Plan, paths: Mapping[str, int]) -> dict[int, int]:
    """Positions in a checkpoint by positions in the plan's `files`, without missing files.

    A path without an equal one matches the only path that differs from it in the numbers of folders
    (``global_step100/…``), or else in any numbers.

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


_NUMBERS = re.compile(r"\d+")


def _without_numbers(path: str) -> str:
    return _NUMBERS.sub("#", path)


def _without_numbers_of_folders(path: str) -> str:
    folders, slash, name = path.rpartition("/")
    return _without_numbers(folders) + slash + name


def pieces_of(
    plan: Plan,
    rank: int,
    matched: Mapping[int, int],
    sizes: Mapping[int, int],
    layouts: Mapping[int, Sequence[Tensor]],
    piece_bytes_max: int,
) -> list[Piece]:
    """The pieces of a checkpoint to fetch, in this order.

    Args:
        plan: The plan.
        rank: The rank whose steps to fetch; -1 for all.
        matched: The result of `match_files`.
        sizes: Bytes of the matched files, by position in the checkpoint.
        layouts: Known tensors of these files. A tensor that has left its file counts where another
            file has it.
        piece_bytes_max: Longest piece.
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
    """Add pieces, and join the first with the last one if it follows directly."""
    index, start, stop = new
    if pieces and pieces[-1].file == index and pieces[-1].stop == start:
        start = pieces.pop().start
    while start < stop:
        end = min(stop, start + piece_bytes_max)
        pieces.append(Piece(index, start, end))
        start = end
