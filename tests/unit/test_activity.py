"""What is counted is exact, and its memory is bounded."""

import os
from pathlib import Path

import pytest

from ckptfs._daemon import activity as activity_module
from ckptfs._daemon import processes
from ckptfs._daemon.activity import (
    NAMED_MAX,
    PROCESSES_MAX,
    Activities,
    Activity,
    Usage,
)
from ckptfs.errors import StoreTimeout


@pytest.fixture(autouse=True)
def _made_up_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of the machine is any of those in these tests."""
    monkeypatch.setattr(processes, "started", lambda pid: 1)
    monkeypatch.setattr(processes, "name", lambda pid: f"process {pid}")
    monkeypatch.setattr(processes, "owner", lambda pid: 0)


def read(usage: Usage, length: int = 10, took_ns: int = 1000) -> None:
    """As `Vfs.note_read` counts it."""
    usage.read_bytes += length
    usage.read_ns += took_ns
    usage.latency_ns[took_ns.bit_length()] += 1


def test_processes_are_counted_by_themselves() -> None:
    activity = Activity()
    first, second = activity.opened(7), activity.opened(8)
    assert activity.opened(7) is first
    read(first, 10, took_ns=900)
    read(second, 20, took_ns=1024)
    activity.fetched(first, 100)
    activity.fetched(activity.background, 50)
    assert [u.pid for u in activity.usages()] == [7, 8, 0, 0]
    total = activity.total()
    assert (total.reads, total.read_bytes, total.read_ns) == (2, 30, 1924)
    assert (total.latency_ns[10], total.latency_ns[11]) == (1, 1)
    assert (total.opens, total.handles, total.fetches, total.fetched_bytes) == (3, 3, 2, 150)
    activity.closed(first)
    assert (first.handles, first.opens) == (1, 2)


def test_a_pid_that_is_used_again_is_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    activity = Activity()
    first = activity.opened(7)
    read(first)
    activity.closed(first)
    assert activity.opened(7) is first
    activity.closed(first)
    monkeypatch.setattr(processes, "started", lambda pid: 2)
    second = activity.opened(7)
    assert second is not first
    assert (second.reads, activity.others.reads, activity.total().reads) == (0, 1, 1)
    activity.fetched(first, 5)  # it was under way
    assert activity.total().fetched_bytes == activity.others.fetched_bytes == 5


@pytest.mark.parametrize("closes", [True, False])
def test_however_many_processes_there_are_the_sum_is_exact(closes: bool) -> None:
    activities, activity = Activities(), Activity()
    activity.begin(activities)
    count = 5 * PROCESSES_MAX
    for pid in range(1, count + 1):
        usage = activity.opened(pid)
        read(usage)
        if closes:
            activity.closed(usage)
    assert len(list(activity.usages())) == PROCESSES_MAX + 2
    assert activities.records == PROCESSES_MAX
    total = activity.total()
    assert (total.reads, total.opens, total.read_bytes) == (count, count, 10 * count)
    assert total.handles == (0 if closes else count)
    # The ones that are shown are the last, or, where nothing was closed, the first.
    assert (activity.of(count) is not None) == closes
    activity.end()
    assert activities.records == 0
    assert (activities.total().reads, activities.total().handles) == (count, 0)


def test_all_processes_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity_module, "_RECORDS_MAX", 10)
    activities = Activities()
    each = [Activity() for _ in range(4)]
    for number, activity in enumerate(each):
        activity.begin(activities)
        for pid in range(1, 6):
            read(activity.opened(pid))
            assert activity.total().reads == pid
        assert activities.records == min(10, 5 * (number + 1))
    assert activities.total().reads == 20


def test_what_has_ended_is_still_known_of_the_node() -> None:
    activities = Activities()
    for number in range(3):
        activity = Activity()
        activity.begin(activities)
        read(activity.opened(7), 100)
        activity.failed(StoreTimeout("x"))
        activity.retried()
        activity.took(50)
        activity.gave(60)
        assert activities.total().read_bytes == 100 * (number + 1)
        activity.end()
        activity.end()
        activity.failed(StoreTimeout("x"))  # what was under way
        assert activities.total().read_bytes == 100 * (number + 1)
    assert activities.begun == []
    assert activities.failures == {"store-timeout": 6}
    assert activities.retries == 3
    assert (activities.taken_bytes, activities.given_bytes) == (150, 180)
    assert (activity.taken_bytes, activity.given_bytes) == (50, 60)


def test_a_hundred_have_a_label_of_their_own() -> None:
    activities = Activities()
    each = [Activity() for _ in range(NAMED_MAX + 2)]
    for activity in each:
        activity.begin(activities)
        read(activity.others)
    assert sum(a.is_named for a in each) == NAMED_MAX
    assert not each[-1].is_named
    each[0].end()
    each[-1].end()
    assert activities.ended_unnamed.reads == 1
    again = Activity()
    again.begin(activities)
    assert again.is_named


def test_rates_are_those_of_the_last_seconds() -> None:
    activities, activity = Activities(), Activity()
    activity.begin(activities)
    assert activity.rates().reads == 0
    for second in range(100):
        activities.sample(float(second))
        read(activity.others, 1000)
        activity.fetched(activity.others, 10)
    rates = activity.rates()
    assert (rates.reads, rates.read_bytes, rates.fetched_bytes) == (1, 1000, 10)


def test_what_proc_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    me = os.getpid()
    assert processes.process_of(me) == me
    assert processes.owner(me) == os.geteuid()
    assert processes.started(me) > 0
    assert processes.command(me)
    assert processes.name(me) == Path("/proc/self/comm").read_text().strip()
    said = processes.started(0), processes.name(0), processes.command(0), processes.owner(0)
    assert said == (0, "", "", -1)
    assert processes.process_of(-1) == -1


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([b"/usr/bin/python3", b"-u", b"/home/a/train.py", b"--key=S"], "python3 train.py"),
        ([b"/bin/ckptfs", b"attach", b"s3://key:SECRET@b/c"], "ckptfs attach"),
        ([b"ckptfs", b"s3://key:SECRET@b/c"], "ckptfs"),
        ([b"env", b"KEY=SECRET"], "env"),
        ([b"nginx: worker process"], "nginx:"),
        ([b"sh", b"-c", b"echo SECRET"], "sh"),
        ([b"a\x1b[31m", b"b\nc"], "a?[31m"),
    ],
)
def test_a_command_shows_no_secret(
    monkeypatch: pytest.MonkeyPatch, words: list[bytes], shown: str
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(processes, "_read", lambda path: b"\0".join(words) + b"\0")
    assert processes.command(1) == shown
