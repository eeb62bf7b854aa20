"""How long a client waits for first bytes."""

import math

import pytest

from ckptfs._store.transport.patience import PATIENCE_S_MAX, Patience


def wait_for(first_byte_s: float, deadline_s: float, patience: Patience) -> list[float]:
    """The waits of a read that is tried until its deadline; the last one brought the answer."""
    waits: list[float] = []
    while (left_s := deadline_s - sum(waits)) > 0:
        wait_s = patience.for_request(left_s)
        if first_byte_s < wait_s:
            patience.answered(first_byte_s)
            return [*waits, first_byte_s]
        patience.was_silent(wait_s)
        waits.append(wait_s)
    raise TimeoutError(f"{waits}")


@pytest.mark.parametrize("first_byte_s", [0.1, 2.9, 4, 12, 30])
def test_a_slow_server_answers_within_the_deadline(first_byte_s: float) -> None:
    patience = Patience(3)
    waits = wait_for(first_byte_s, 60, patience)
    assert sum(waits) <= 60
    assert (patience.seconds > 3) == (first_byte_s > 3)
    assert len(wait_for(first_byte_s, 60, patience)) == 1  # the next one knows


def test_patience_grows_once_for_requests_that_began_together() -> None:
    patience = Patience(3)
    for _ in range(16):
        patience.was_silent(3)
    assert patience.seconds == 6


def test_fast_answers_lower_it_slowly() -> None:
    patience = Patience(3)
    patience.was_silent(3)
    patience.was_silent(6)
    patience.answered(6)  # no fast one
    assert patience.seconds == 12
    count = 0
    while patience.seconds > 3:
        patience.answered(0.1)
        count += 1
    assert (count, patience.seconds) == (28, 3)


def test_a_last_try_gets_all_that_is_left() -> None:
    patience = Patience(3)
    assert patience.for_request(4) == 3  # a server that is not known to be slow is asked again
    patience.was_silent(3)
    assert patience.for_request(17) == 16.5
    assert patience.for_request(18) == 6


def test_an_error_is_there_at_the_deadline() -> None:
    patience = Patience(3)
    assert patience.for_request(1) == 0.9
    assert patience.for_request(3.1) == pytest.approx(2.79)


def test_without_a_deadline() -> None:
    patience = Patience(3)
    for _ in range(20):
        patience.was_silent(patience.for_request(math.inf))
    assert patience.seconds == PATIENCE_S_MAX
