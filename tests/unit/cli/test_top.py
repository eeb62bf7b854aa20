"""What top shows: the difference of two looks, on terminals of any size."""

import io
import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ckptfs._model.counters import Counts, RequestCounts
from ckptfs._model.protocol.replies import (
    ActivityReply,
    CheckpointActivity,
    ProcessActivity,
)
from ckptfs._model.units import brief_count, brief_duration, brief_size
from ckptfs.cli.counter_deltas import SORTS, Picture, percentile, picture
from ckptfs.cli.top import Screen

MIB = 1 << 20


def look(at_s: float = 0.0, pid: int = 1, factor: int = 1, checkpoints: int = 2) -> ActivityReply:
    """What the daemon says, `factor` times as much of everything."""

    def counts(number: int) -> Counts:
        return Counts(
            opens=number,
            kernel_opens=2,
            open_files=1,
            waiting=number,
            read_bytes=number * factor * MIB,
            misses=10 * factor,
            missed_bytes=factor * MIB // 2,
            errors={"store-timeout": 1},
            fetches=factor,
            fetched_bytes=factor * 3 * MIB // number,
            latency_ns=[0] * 16 + [100 * number * factor],
        )

    return ActivityReply(
        version="1.0",
        pid=pid,
        mount="/run/ckptfs/mnt",
        at_s=at_s,
        started=1000.0,
        restarts=1,
        passthrough="on",
        cache_bytes=MIB,
        cache_bytes_max=10 * MIB,
        evicted_bytes=5,
        evicted_objects=1,
        fetched_bytes=8 * MIB * factor,
        fetched_spans=2 * factor,
        hedged=4,
        running=4,
        in_flight_bytes=MIB,
        queue={"demand": 1, "readahead": 2, "prefetch": 0, "dark": 0},
        counts=msgspec.structs.replace(counts(1), retries=3, failures={"store-timeout": 2}),
        requests=[
            RequestCounts("read", {"ok": 9 * factor, "timeout": factor}, [0] * 20 + [10 * factor])
        ],
        checkpoints=[
            CheckpointActivity(
                name=f"step-{number}-abc",
                uri=f"s3://bucket/a-rather-long-name-of-an-experiment/run/step-{number}?x=y",
                in_flight=3,
                queued=2,
                counts=counts(number),
                processes=[
                    ProcessActivity(4242, "python3 train.py", counts(1)),
                    ProcessActivity(0, "(prefetch)", Counts()),
                ],
                processes_left_out=0,
            )
            for number in range(1, checkpoints + 1)
        ],
        checkpoints_left_out=0,
    )


def test_rates_are_of_the_time_between() -> None:
    found = picture(look(10.0), look(12.0, factor=3), 1050.0, "read")
    assert (found.interval_s, found.up_s) == (2.0, 50.0)
    assert [line.name for line in found.checkpoints] == ["step-2-abc", "step-1-abc"]
    line = found.checkpoints[0]
    assert line.reads_per_s == 200
    assert line.read_bytes_per_s == 2 * MIB
    assert line.cache_bytes_per_s == 1.5 * MIB
    assert line.store_bytes_per_s == 1.5 * MIB
    assert line.hit_ratio == pytest.approx(0.95)
    assert line.p50_s is not None
    assert 2**15 / 1e9 <= line.p50_s <= 2**16 / 1e9
    assert (line.errors, line.waiting, line.in_flight, line.queued) == (1, 2, 3, 2)
    assert line.processes[0].pid == 4242
    assert line.processes[0].reads_per_s == 100
    assert found.node.store_bytes_per_s == 8 * MIB
    assert (found.requests_per_s, found.request_errors_per_s) == (10, 1)
    assert (found.node.queued, found.node.failures) == (3, 2)


def test_a_daemon_after_another_counts_from_zero() -> None:
    found = picture(look(10.0, pid=1, factor=9), look(1.0, pid=2), 1050.0, "read")
    assert found.interval_s == 0
    assert found.node.reads_per_s == 0
    assert found.checkpoints[0].reads_per_s == 0


def test_a_checkpoint_that_is_new_is_shown() -> None:
    found = picture(look(0.0, checkpoints=1), look(1.0, checkpoints=2), 1050.0, "name")
    assert [line.reads_per_s for line in found.checkpoints] == [0, 200]


@pytest.mark.parametrize("sort", SORTS)
def test_it_is_sorted(sort: str) -> None:
    found = picture(look(0.0), look(1.0, factor=2), 1050.0, sort)  # type: ignore[arg-type]
    names = [line.name for line in found.checkpoints]
    assert names[0] == ("step-1-abc" if sort in ("store", "errors", "name") else "step-2-abc")


def test_percentiles() -> None:
    assert percentile([], 0.5) is None
    assert percentile([0] * 64, 0.99) is None
    histogram = [0] * 64
    histogram[10], histogram[20] = 90, 10
    half, most = percentile(histogram, 0.5), percentile(histogram, 0.99)
    assert half is not None
    assert most is not None
    assert 2**9 <= half * 1e9 <= 2**10
    assert 2**19 <= most * 1e9 <= 2**20
    assert percentile(histogram, 1.0) == 2**20 / 1e9


@given(st.lists(st.integers(0, 1 << 40), max_size=64), st.floats(0.01, 1.0))
def test_a_percentile_lies_where_its_count_does(histogram: list[int], share: float) -> None:
    found = percentile(histogram, share)
    if not any(histogram):
        assert found is None
        return
    assert found is not None
    below = list(itertools.accumulate(histogram))
    power = next(i for i, total in enumerate(below) if total >= share * sum(histogram))
    assert found * 1e9 <= 2**power * (1 + 1e-9)


def shown(screen: Screen, width: int, height: int | None, checkpoints: int = 2) -> list[str]:
    """The lines on a terminal of that size."""
    after = look(1.0, factor=2, checkpoints=checkpoints)
    found = picture(look(0.0, checkpoints=checkpoints), after, 1050.0, screen.sort)
    stream = io.StringIO()
    console = Console(file=stream, width=width, height=height or 25, force_terminal=False)
    console.print(screen.shown(found, width, height))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 110, 160, 250])
def test_it_fits_on_a_terminal(width: int) -> None:
    lines = shown(Screen("read"), width, 24)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for part in ("READS/s", "STORE/s", "HIT", "P99", "ERR", "4242 python3 train.py", "q end"):
        assert part in text
    assert ("QUEUE" in text) == (width >= 110)
    assert "…" not in next(line for line in lines if "READS/s" in line)
    assert "/run/step-2" in text
    assert "?x=y" not in text
    assert "(prefetch)" not in text  # it does nothing
    assert all("…" not in line for line in lines[:5])


@pytest.mark.parametrize("height", [10, 24])
def test_what_does_not_fit_is_counted(height: int) -> None:
    screen = Screen("read")
    lines = shown(screen, 80, height, checkpoints=50)
    assert len(lines) <= height
    assert any("more checkpoints" in line for line in lines)
    screen.apply_key("p")
    without = shown(screen, 80, height, checkpoints=50)
    assert not any("python3" in line for line in without)
    assert len(shown(screen, 160, None, checkpoints=50)) > 50


def test_keys() -> None:
    screen = Screen("read")
    seen = []
    for _ in SORTS:
        screen.apply_key("s")
        seen.append(screen.sort)
    assert seen == [*SORTS[1:], "read"]
    assert "sort: store" in "\n".join(shown(Screen("store"), 80, 24))


def test_nothing_is_attached() -> None:
    found = picture(look(0.0, checkpoints=0), look(1.0, checkpoints=0), 1050.0, "read")
    assert msgspec.json.encode(found)
    assert "no checkpoint is attached" in "\n".join(shown(Screen("read"), 80, 24, checkpoints=0))


@given(st.floats(0, 1e15))
def test_numbers_are_short(value: float) -> None:
    assert len(brief_count(value)) <= 6
    assert len(brief_duration(min(value, 1e9))) <= 6
    assert len(brief_size(min(value, 1e13))) <= 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (brief_count(0), "0"),
        (brief_count(999), "999"),
        (brief_count(1234), "1.2k"),
        (brief_count(123_456), "123k"),
        (brief_count(5e9), "5.0G"),
        (brief_size(0), "0B"),
        (brief_size(1536), "1.5KiB"),
        (brief_size(200 * MIB), "200MiB"),
        (brief_size(1000 * MIB), "1.0GiB"),
        (brief_duration(None), ""),
        (brief_duration(45e-6), "45µs"),
        (brief_duration(1.5e-3), "1.5ms"),
        (brief_duration(0.25), "250ms"),
        (brief_duration(2.5), "2.5s"),
        (brief_duration(600), "10min"),
        (brief_duration(86400 * 5), "5d"),
    ],
)
def test_numbers(text: str, expected: str) -> None:
    assert text == expected


def test_processes_that_have_ended_are_dropped() -> None:
    def at(up_s: float, ended: bool, busy: bool = False) -> Picture:
        before, after = look(0.0), look(1.0, factor=2 if busy else 1)
        [first, *others] = after.checkpoints
        gone = [msgspec.structs.replace(first.processes[0], ended=ended), *first.processes[1:]]
        first = msgspec.structs.replace(first, processes=gone)
        after = msgspec.structs.replace(after, checkpoints=[first, *others])
        return picture(before, after, after.started + up_s, "name")

    def lines(screen: Screen, found: Picture) -> int:
        console = Console(file=io.StringIO(), width=80)
        with console.capture() as captured:
            console.print(screen.shown(found, 80, 24))
        return captured.get().count("4242")

    screen = Screen("name")
    assert lines(screen, at(10, False)) == 2
    assert lines(screen, at(11, True)) == 2
    assert lines(screen, at(13, True)) == 2
    assert lines(screen, at(17, True)) == 1  # it has ended some time ago
    assert lines(screen, at(18, True, busy=True)) == 2  # what it asked for comes now
    assert lines(screen, at(19, False)) == 2  # another one with the same id
    assert lines(Screen("name", ended_shown_s=0), at(10, True)) == 1
