"""What a trace says about a restore, in figures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptfs._model import ranges
from ckptfs._model.formats import Tensor
from ckptfs._model.ranges import Ranges
from ckptfs._model.reads import Reads
from ckptfs._model.trace import Access, Fetch


@dataclass
class FileUse:
    """How one file was used.

    Attributes:
        path: Relative to the checkpoint.
        size: Bytes.
        accesses, fetches: Of this file, in time's order.
        read: Which bytes were handed to the kernel.
        fetched: Which bytes came from the store.
        is_lent: The kernel has read it by itself, too, so that `read` is not all of it.
        waste: Which of `fetched` were not read; unknown, and empty, where `is_lent`.
    """

    path: str
    size: int
    is_lent: bool = False
    accesses: list[Access] = field(default_factory=list[Access])
    fetches: list[Fetch] = field(default_factory=list[Fetch])
    read: Ranges = field(default_factory=Ranges)
    fetched: Ranges = field(default_factory=Ranges)
    waste: Ranges = field(default_factory=Ranges)

    @property
    def began_s(self) -> float:
        """When the first of it was read or fetched."""
        firsts = [a.began_s for a in self.accesses[:1]] + [f.wanted_s for f in self.fetches]
        return min(firsts, default=0.0)


@dataclass
class ProcessUse:
    """What one process has read. `waited_s` adds up what its reads have waited, also side by
    side."""

    pid: int
    files: int
    read_bytes: int
    reads: int
    waits: int
    waited_s: float


@dataclass
class TensorUse:
    """How much of a tensor was read, and when the first of it was."""

    path: str
    tensor: Tensor
    read_bytes: int
    first_s: float


@dataclass
class Summary:
    """All of it.

    Attributes:
        files: What was used, in the order of first use.
        seconds: From the attach to the last answer.
        read_bytes: What was handed to the kernel, with what was handed over again.
        fetched_bytes: What the store has sent, with what it has sent again.
        waste_bytes: What was fetched and not read.
        reads, waits: Requests of the kernel, and how many of them had to wait.
        waited_s: What they have waited, added up.
        requests: To the store.
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
        """The share of reads that found their bytes."""
        return 1 - self.waits / self.reads if self.reads else 1.0


def summarise(
    files: Mapping[int, tuple[str, int]],
    accesses: Sequence[Access],
    fetches: Sequence[Fetch],
    lent: Iterable[int] = (),
) -> Summary:
    """Put a trace in figures.

    Args:
        files: Path and size of those that the others name, by position in the manifest.
        accesses: The reads.
        lent: Positions of files that the kernel has read by itself, too.
        fetches: The fetches. An access or fetch of another file is left out.
    """
    used: dict[int, FileUse] = {}
    unseen = set(lent)

    def use_of(index: int) -> FileUse:
        if index not in used:
            used[index] = FileUse(*files[index], is_lent=index in unseen)
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
        use.waste = [] if use.is_lent else ranges.without(use.fetched, use.read)
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
    """Those of the file's tensors of which something was read, in the order of that."""
    reads = Reads(use.accesses) if use.accesses else None
    found: list[TensorUse] = []
    for tensor in tensors:
        read = ranges.within(use.read, tensor.start, tensor.end)
        if read and reads is not None:
            first_s = min(a.began_s for a in reads.overlapping(tensor.start, tensor.end))
            found.append(TensorUse(use.path, tensor, read, first_s))
    return sorted(found, key=lambda found: (found.first_s, found.tensor.start))


def rates(moments: Iterable[tuple[float, float, int]], seconds: float, slots: int) -> list[float]:
    """Bytes per second over time.

    Args:
        moments: Begin, end and bytes of what is taken to have flowed evenly.
        seconds: Length of the time axis, from 0.
        slots: How many equal pieces to cut it into.
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
