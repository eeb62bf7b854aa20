"""A program's calls of a store end in time; reading content ends when no more bytes come."""

import threading
import time
from collections.abc import Iterator

import pytest

from ckptfs._store.request_context import Progress, current_progress, ends_in, left_s
from ckptfs._store.retrying import Places
from ckptfs._store.wrappers import while_bytes_come, within
from ckptfs.errors import StoreTimeout


def test_within_read_lasts_while_bytes_come() -> None:
    def read() -> str:
        for _ in range(10):
            assert left_s() > 0
            time.sleep(0.1)
            current_progress().came(1)
        return "all of it"

    assert while_bytes_come(0.4, "store", read) == "all of it"


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """Set when the test is over, so that no thread outlives it."""
    event = threading.Event()
    yield event
    event.set()


def test_reading_ends_and_is_given_up_when_no_more_bytes_come(over: threading.Event) -> None:
    seen: list[Progress] = []

    def read() -> None:
        seen.append(current_progress())
        current_progress().came(1)
        over.wait(30)

    with pytest.raises(StoreTimeout, match=r"store: no answer within 0\.2 s"):
        while_bytes_come(0.2, "store", read)
    with pytest.raises(TimeoutError, match="given the request up"):
        seen[0].hold(None)  # type: ignore[arg-type]


def test_the_deadline_of_the_caller_counts_although_bytes_come(over: threading.Event) -> None:
    def read() -> None:
        while not over.wait(0.05):
            current_progress().came(1)

    with ends_in(0.3), pytest.raises(StoreTimeout):
        while_bytes_come(60, "store", read)


def test_a_call_has_its_limit_in_its_thread() -> None:
    assert within(5, "store", left_s) <= 5
    with ends_in(1):
        assert within(5, "store", left_s) <= 1


def test_a_timeout_halves_the_places_and_answers_bring_them_back() -> None:
    places = Places(16)
    for expected in (8, 4, 2, 2):
        with pytest.raises(StoreTimeout), places.one():
            raise StoreTimeout("silent")
        assert int(places._aimd.limit) == expected
    for _ in range(200):
        with places.one():
            pass
    assert int(places._aimd.limit) == 16


def test_timeouts_of_one_burst_count_once() -> None:
    places = Places(4)
    together, ended = threading.Barrier(4), []

    def request() -> None:
        try:
            with places.one():
                together.wait(10)
                raise StoreTimeout("silent")
        except StoreTimeout as error:
            ended.append(error)

    threads = [threading.Thread(target=request) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(ended) == 4
    assert int(places._aimd.limit) == 2
