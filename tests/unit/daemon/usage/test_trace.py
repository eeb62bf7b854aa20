"""The trace of a checkpoint's reads joins reads to entries, and stays small."""

import time

from ckptfs._daemon.usage import trace as trace_module
from ckptfs._daemon.usage.trace import About, Trace, Traces
from ckptfs._model.manifest import ListedFile

MIB = 1 << 20
KEY = 0, "place", ""
ABOUT = About("s3://b/run", "v", 0.0, 2, 3 * MIB)
FILES = [ListedFile(f"f{i}", MIB * (i + 1), 0) for i in range(4)]


def begin(traces: Traces | None = None, key: tuple[int, str, str] = KEY) -> tuple[Trace, float]:
    """A trace, and about the time of its beginning."""
    trace = (traces or Traces()).begin(key, ABOUT, lambda: FILES)
    return trace, time.perf_counter()


def read(trace: Trace, start: int, at_s: float, *, file: int = 0, pid: int = 1) -> None:
    trace.read(file, pid, start, start + 100, at_s, 0)


def test_trace_consecutive_reads_are_one_entry() -> None:
    trace, now_s = begin()
    trace.read(0, 1, 0, 100, now_s, 0)
    trace.read(0, 1, 200, 300, now_s + 0.01, 0)  # the kernel's requests can overtake each other
    trace.read(0, 1, 100, 200, now_s + 0.02, now_s + 0.12)
    first, ahead = trace.accesses
    assert (first.start, first.stop, first.reads, first.waits) == (0, 200, 2, 1)
    assert round(first.waited_s, 3) == 0.1
    assert round(first.ended_s - first.began_s, 3) == 0.12
    assert (ahead.start, ahead.stop, ahead.waits, ahead.waited_s) == (200, 300, 0, 0.0)


def test_trace_other_offsets_files_processes_and_times_are_new_entries() -> None:
    trace, now_s = begin()
    read(trace, 0, now_s)
    read(trace, 5000, now_s)
    read(trace, 100, now_s, file=1)
    read(trace, 100, now_s, pid=2)
    read(trace, 100, now_s + 10)
    assert [(a.file, a.pid, a.start) for a in trace.accesses] == [
        (0, 1, 0), (0, 1, 5000), (1, 1, 100), (0, 2, 100), (0, 1, 100)
    ]  # fmt: skip


def test_trace_threads_of_one_process_have_their_own_entries() -> None:
    trace, now_s = begin()
    for step in range(5):
        for cursor in range(4):
            read(trace, 10_000 * cursor + 100 * step, now_s)
    assert [(a.start, a.stop, a.reads) for a in trace.accesses] == [
        (10_000 * cursor, 10_000 * cursor + 500, 5) for cursor in range(4)
    ]


def test_trace_beyond_its_limit_counts_left_out_entries() -> None:
    traces = Traces(entries_max=3)
    trace, now_s = begin(traces)
    for index in range(5):
        read(trace, 1000 * index, now_s)
    trace.fetched(0, 0, MIB, "demand", 1, "", (now_s, now_s, now_s))
    assert (len(trace.accesses), trace.fetches, trace.left_out) == (3, [], 3)
    read(trace, 100, now_s)  # it continues an entry
    assert (trace.accesses[0].reads, trace.left_out) == (2, 3)
    other, _ = begin(traces, (0, "other", ""))
    read(other, 0, now_s)
    assert (other.accesses, other.left_out) == ([], 1)
    traces.end(KEY)
    read(other, 0, now_s)  # the ended trace makes space
    assert len(other.accesses) == 1
    assert traces.find(KEY) is None


def test_trace_of_one_attachment_leaves_entries_for_others() -> None:
    trace, now_s = begin()
    for index in range(trace_module.ENTRIES_MAX + 7):
        read(trace, 1000 * index, now_s)
    assert (len(trace.accesses), trace.left_out) == (trace_module.ENTRIES_MAX, 7)


def test_trace_of_an_ended_attachment_keeps_its_files() -> None:
    traces = Traces()
    trace, now_s = begin(traces)
    read(trace, 0, now_s, file=2)
    trace.note_passthrough(3)
    traces.end(KEY)
    assert traces.find(KEY) is trace
    assert [(file.index, file.path) for file in trace.files()] == [(2, "f2"), (3, "f3")]
    read(trace, 5000, now_s)  # by a handle that was open when it was detached
    assert len(trace.accesses) == 1


def test_trace_without_entries_does_not_replace_an_earlier_one() -> None:
    traces = Traces()
    restored, now_s = begin(traces)
    read(restored, 0, now_s)
    traces.end(KEY)
    looked_at, _ = begin(traces)
    assert traces.find(KEY) is restored
    traces.end(KEY)
    assert traces.find(KEY) is restored
    again, now_s = begin(traces)
    read(again, 0, now_s)
    assert traces.find(KEY) is again
    traces.end(KEY)
    assert traces.find(KEY) is again
    assert not looked_at.entries


def test_trace_error_is_cut() -> None:
    trace, now_s = begin()
    trace.fetched(1, 0, 5, "prefetch", 3, "x" * 10_000, (now_s, now_s + 1, now_s + 3))
    (fetch,) = trace.fetches
    assert (fetch.tries, len(fetch.error), round(fetch.ended_s - fetch.began_s)) == (3, 200, 2)
