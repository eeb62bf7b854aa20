"""Figures about a restore, computed from its trace."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptfs._model.formats.headers import Tensor
from ckptfs._model.plans import ranges
from ckptfs._model.plans.ranges import Ranges
from ckptfs._model.plans.trace import Access, Fetch, Reads


@dataclass
class FileUse:
    """The use of one file.

    Attributes:
        path: The path in the checkpoint.
        size: The size in bytes.
        is_passthrough: Whether the kernel has also read the file itself, so that `read` has only a
            part of the reads.
        accesses, fetches: The reads and fetches of this file, by time.
        read: The bytes that the kernel got from the daemon.
        fetched: The bytes that came from the store.
        waste: The bytes of `fetched` that were not read. Empty if `is_passthrough`, because they
            are unknown then.
    """

    path: str
    size: int
    is_passthrough: bool = False
    accesses: list[Access] = field(default_factory=list[Access])
    fetches: list[Fetch] = field(default_factory=list[Fetch])
    read: Ranges = field(default_factory=Ranges)
    fetched: Ranges = field(default_factory=Ranges)
    waste: Ranges = field(default_factory=Ranges)

    @property
    def began_s(self) -> float:
        """The time of the first read or fetch."""
        firsts = [a.began_s for a in self.accesses[:1]] + [f.wanted_s for f in self.fetches]
        return min(firsts, default=0.0)


@dataclass
class ProcessUse:
    """The reads of one process. `waited_s` is the sum of their waiting times, also of concurrent
    ones."""

    pid: int
    files: int
    read_bytes: int
    reads: int
    waits: int
    waited_s: float


@dataclass
class TensorUse:
    """The bytes of a tensor that were read, and the time of the first read."""

    path: str
    tensor: Tensor
    read_bytes: int
    first_s: float


@dataclass
class Summary:
    """The figures of a trace.

    Attributes:
        files: The used files, in the order of first use.
        seconds: The time from the attach to the last answer.
        read_bytes: Bytes that the kernel got, repeated ones included.
        fetched_bytes: Bytes that the store sent, repeated ones included.
        waste_bytes: Bytes that were fetched and not read.
        reads, waits: Number of the kernel's requests, and of those that waited.
        waited_s: The sum of their waiting times.
        requests: Number of requests to the store.
        failed: Number of failed fetches.
    """

    files: list[FileUse]
    processes: list[ProcessUse]
    seconds: float
    read_bytes: int
    fetched_bytes: int
    waste_bytes: int
    reads: int
    waits: int
    waited_s: float
    requests: int
    failed: int

    @property
    def hit_ratio(self) -> float:
        """The share of reads that did not wait."""
        return 1 - self.waits / self.reads if self.reads else 1.0


def summarise(
    files: Mapping[int, tuple[str, int]],
    accesses: Sequence[Access],
    fetches: Sequence[Fetch],
    passthrough: Iterable[int] = (),
) -> Summary:
    """Compute the figures of a trace.

    Args:
        files: Path and size of files by position in the manifest. Accesses and fetches of other
            files are left out.
        accesses: The reads.
        fetches: The fetches, also failed ones.
        passthrough: Positions of files that the kernel has also read itself.
    """
    used: dict[int, FileUse] = {}
    unseen = set(passthrough)

    def use_of(index: int) -> FileUse:
        if index not in used:
            used[index] = FileUse(*files[index], is_passthrough=index in unseen)
        return used[index]

    accesses = [a for a in accesses if a.file in files]
    fetches = [f for f in fetches if f.file in files]
    for access in accesses:
        use_of(access.file).accesses.append(access)
    for fetch in fetches:
        use_of(fetch.file).fetches.append(fetch)
    for use in used.values():
        use.read = ranges.union((a.start, a.stop) for a in use.accesses)
        use.fetched = ranges.union((f.start, f.stop) for f in use.fetches if not f.error)
        use.waste = [] if use.is_passthrough else ranges.without(use.fetched, use.read)
    return Summary(
        files=sorted(used.values(), key=lambda use: use.began_s),
        processes=_processes(accesses),
        seconds=max([a.ended_s for a in accesses] + [f.ended_s for f in fetches], default=0.0),
        read_bytes=sum(a.stop - a.start for a in accesses),
        fetched_bytes=sum(f.stop - f.start for f in fetches if not f.error),
        waste_bytes=sum(ranges.length(use.waste) for use in used.values()),
        reads=sum(a.reads for a in accesses),
        waits=sum(a.waits for a in accesses),
        waited_s=sum(a.waited_s for a in accesses),
        requests=sum(f.tries for f in fetches),
        failed=sum(1 for f in fetches if f.error),
    )


def _processes(accesses: Iterable[Access]) -> list[ProcessUse]:
    by_pid: dict[int, list[Access]] = {}
    for access in accesses:
        by_pid.setdefault(access.pid, []).append(access)
    found = [
        ProcessUse(
            pid=pid,
            files=len({a.file for a in own}),
            read_bytes=sum(a.stop - a.start for a in own),
            reads=sum(a.reads for a in own),
            waits=sum(a.waits for a in own),
            waited_s=sum(a.waited_s for a in own),
        )
        for pid, own in by_pid.items()
    ]
    return sorted(found, key=lambda process: -process.read_bytes)


def tensor_uses(use: FileUse, tensors: Iterable[Tensor]) -> list[TensorUse]:
    """The file's tensors with reads, by the time of the first read."""
    reads = Reads(use.accesses) if use.accesses else None
    found: list[TensorUse] = []
    for tensor in tensors:
        read = ranges.within(use.read, tensor.start, tensor.end)
        if read and reads is not None:
            first_s = min(a.began_s for a in reads.overlapping(tensor.start, tensor.end))
            found.append(TensorUse(use.path, tensor, read, first_s))
    return sorted(found, key=lambda found: (found.first_s, found.tensor.start))


def rates(moments: Iterable[tuple[float, float, int]], seconds: float, slots: int) -> list[float]:
    """Return bytes per second over time.

    Args:
        moments: Begin, end and bytes of transfers, whose rate is assumed to be constant.
        seconds: Length of the time axis, which begins at 0.
        slots: Number of equal pieces of the axis.
    """
    width_s = seconds / slots
    result = [0.0] * slots
    if width_s <= 0:
        return result
    for began_s, ended_s, count in moments:
        ended_s = max(ended_s, began_s + width_s / 100)
        rate = count / (ended_s - began_s)
        first, last = int(began_s / width_s), int(ended_s / width_s)
        for slot in range(max(0, first), min(slots - 1, last) + 1):
            share_s = min(ended_s, (slot + 1) * width_s) - max(began_s, slot * width_s)
            result[slot] += rate * max(0.0, share_s) / width_s
    return result
