"""Counters are exact, and their memory is bounded."""

import os
from pathlib import Path

import pytest

from ckptfs._daemon.usage import counters as activity_module
from ckptfs._daemon.usage import procfs
from ckptfs._daemon.usage.counters import NAMED_MAX, PROCESSES_MAX, Activities, Activity, Usage
from ckptfs.errors import StoreTimeout


@pytest.fixture(autouse=True)
def _made_up_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace proc(5), because the tests' processes do not exist."""
    monkeypatch.setattr(procfs, "started", lambda pid: 1)
    monkeypatch.setattr(procfs, "name", lambda pid: f"process {pid}")
    monkeypatch.setattr(procfs, "owner", lambda pid: 0)


def read(usage: Usage, length: int = 10, took_ns: int = 1000) -> None:
    """Count a read as `Vfs.note_read` does."""
    usage.read_bytes += length
    usage.read_ns += took_ns
    usage.latency_ns[took_ns.bit_length()] += 1


def test_activity_counts_each_process_by_itself() -> None:
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
    assert (total.opens, total.open_files, total.fetches, total.fetched_bytes) == (3, 3, 2, 150)
    first.open_files -= 1
    assert (first.open_files, first.opens) == (1, 2)


def test_activity_tells_processes_with_the_same_pid_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    activity = Activity()
    first = activity.opened(7)
    read(first)
    first.open_files -= 1
    assert activity.opened(7) is first
    first.open_files -= 1
    monkeypatch.setattr(procfs, "started", lambda pid: 2)
    second = activity.opened(7)
    assert second is not first
    assert (second.reads, activity.others.reads, activity.total().reads) == (0, 1, 1)
    activity.fetched(first, 5)  # it was under way
    assert activity.total().fetched_bytes == activity.others.fetched_bytes == 5


@pytest.mark.parametrize("closes", [True, False])
def test_activity_sum_is_exact_for_any_number_of_processes(closes: bool) -> None:
    activities, activity = Activities(), Activity()
    activity.begin(activities)
    count = 5 * PROCESSES_MAX
    for pid in range(1, count + 1):
        usage = activity.opened(pid)
        read(usage)
        if closes:
            usage.open_files -= 1
    assert len(list(activity.usages())) == PROCESSES_MAX + 2
    assert activities.records == PROCESSES_MAX
    total = activity.total()
    assert (total.reads, total.opens, total.read_bytes) == (count, count, 10 * count)
    assert total.open_files == (0 if closes else count)
    # The last processes have counters of their own, or the first if no file was closed.
    assert (activity.of(count) is not None) == closes
    activity.end()
    assert activities.records == 0
    assert (activities.total().reads, activities.total().open_files) == (count, 0)


def test_activities_bound_the_processes_of_all_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_activities_keep_the_counts_of_ended_checkpoints() -> None:
    activities, activity = Activities(), Activity()
    for number in range(3):
        activity = Activity()
        activity.begin(activities)
        read(activity.opened(7), 100)
        activity.failed(StoreTimeout("x"))
        activity.background.retries += 1
        activity.background.taken_bytes += 50
        activity.background.given_bytes += 60
        assert activities.total().read_bytes == 100 * (number + 1)
        activity.end()
        activity.end()
        activity.failed(StoreTimeout("x"))  # what was under way
        assert activities.total().read_bytes == 100 * (number + 1)
    assert activities.begun == []
    assert activities.total().failures == {"store-timeout": 6}
    assert activities.total().retries == 3
    assert (activities.total().taken_bytes, activities.total().given_bytes) == (150, 180)
    assert (activity.background.taken_bytes, activity.background.given_bytes) == (50, 60)


def test_activities_name_a_hundred_checkpoints() -> None:
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


def test_activity_rates_cover_the_last_seconds() -> None:
    activities, activity = Activities(), Activity()
    activity.begin(activities)
    assert activity.rates().reads == 0
    for second in range(100):
        activities.sample(float(second))
        read(activity.others, 1000)
        activity.fetched(activity.others, 10)
    rates = activity.rates()
    assert (rates.reads, rates.read_bytes, rates.fetched_bytes) == (1, 1000, 10)


def test_procfs_describes_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    me = os.getpid()
    assert procfs.process_of(me) == me
    assert procfs.owner(me) == os.geteuid()
    assert procfs.started(me) > 0
    assert procfs.command(me)
    assert procfs.name(me) == Path("/proc/self/comm").read_text().strip()
    said = procfs.started(0), procfs.name(0), procfs.command(0), procfs.owner(0)
    assert said == (0, "", "", -1)
    assert procfs.process_of(-1) == -1


def test_procfs_tells_the_user_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert procfs.user_of(os.getpid()) == os.geteuid()
    assert procfs.user_of(0) == -1  # of another PID namespace
    status = b"Name:\tx\nUmask:\t0022\nUid:\t1000\t1001\t1002\t1003\nGid:\t1\t2\t3\t4\n"
    for kernel_thread, user in ((b"0", 1003), (b"1", -1)):
        said = status + b"Kthread:\t" + kernel_thread + b"\n"
        monkeypatch.setattr(procfs, "_read", lambda path, said=said: said)
        assert procfs.user_of(7) == user


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
def test_procfs_command_shows_no_secret(
    monkeypatch: pytest.MonkeyPatch, words: list[bytes], shown: str
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(procfs, "_read", lambda path: b"\0".join(words) + b"\0")
    assert procfs.command(1) == shown
