"""The threads of an upload: all works are done, or all threads end with the first error."""

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from ckptfs._store.request_context import current_progress
from ckptfs._store.worker_threads import Ended, Pace, WorkerThreads


def counts() -> tuple[list[int], Callable[[int], None]]:
    seen: list[int] = []
    return seen, seen.append


def test_all_works_are_done_and_counted_by_the_caller() -> None:
    seen, count = counts()
    WorkerThreads(4).work((partial(int, number) for number in range(100)), count)
    assert sorted(seen) == list(range(100))


def test_first_error_ends_the_other_threads_and_their_requests() -> None:
    threads, entered, given_up = WorkerThreads(2), threading.Event(), threading.Event()

    def wait() -> int:
        entered.set()
        try:
            while True:
                current_progress().hold(None)  # type: ignore[arg-type]
        except TimeoutError:
            given_up.set()
        threads.check()
        return 0

    def fail() -> int:
        assert entered.wait(10)
        raise ValueError("first")

    begun: list[int] = []

    def works() -> Iterator[Callable[[], int]]:
        yield wait
        yield fail
        while True:
            begun.append(1)
            yield lambda: 0

    with pytest.raises(ValueError, match="first"):
        threads.work(works(), lambda _: None)
    assert given_up.is_set()
    assert len(begun) <= 1
    with pytest.raises(Ended):
        threads.check()


def test_interrupted_caller_ends_the_threads() -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    done: list[int] = []

    def works() -> Iterator[Callable[[], int]]:
        while True:
            yield lambda: done.append(1) or 1

    with pytest.raises(KeyboardInterrupt):
        WorkerThreads(2).work(works(), interrupt)
    assert threading.active_count() == 1 or not [
        each for each in threading.enumerate() if each.name.startswith("ckptfs-upload")
    ]


def test_pace_spreads_bytes_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("ckptfs._store.worker_threads.time.monotonic", lambda: now_s)
    pace = Pace(1000)
    assert pace.delay_s(500) == 0
    assert pace.delay_s(1000) == 0.5
    assert pace.delay_s(1) == 1.5
    now_s = 200.0
    assert pace.delay_s(1) == 0
