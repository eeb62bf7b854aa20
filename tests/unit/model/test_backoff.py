"""Pauses between tries."""

import pytest

from ckptfs._model.backoff import Backoff


def test_backoff_doubles_up_to_the_longest_pause() -> None:
    backoff = Backoff(0.1, 5.0)
    pauses = [backoff.longest_s(failures) for failures in range(1, 9)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
    assert backoff.longest_s(100_000) == 5.0


def test_backoff_with_another_factor_grows_by_it() -> None:
    backoff = Backoff(0.1, 10.0, factor=4)
    assert [backoff.longest_s(n) for n in (1, 2, 3)] == pytest.approx([0.1, 0.4, 1.6])


def test_backoff_jitters_between_half_and_all_of_a_pause() -> None:
    pauses = {Backoff(1.0, 1.0).pause_s(1) for _ in range(200)}
    assert len(pauses) > 100
    assert 0.5 <= min(pauses) < 0.6
    assert 0.9 < max(pauses) <= 1
