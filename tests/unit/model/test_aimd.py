"""Limits of concurrent requests that follow a server's timeouts."""

import math

from ckptfs._model.aimd import AimdLimit


def test_aimd_limit_is_halved_once_for_a_burst_of_timeouts() -> None:
    aimd = AimdLimit(2, 16)
    for _ in range(5):
        aimd.timed_out(begun_s=0.0, now_s=10.0)
    assert aimd.limit == 8
    aimd.timed_out(begun_s=10.0, now_s=20.0)
    assert aimd.limit == 4


def test_aimd_limit_does_not_fall_below_its_minimum() -> None:
    aimd = AimdLimit(2, 16)
    for second in range(10):
        aimd.timed_out(begun_s=second, now_s=second)
    assert aimd.limit == 2


def test_aimd_limit_grows_by_one_per_round_of_answers_up_to_its_maximum() -> None:
    aimd = AimdLimit(2, 5)
    aimd.timed_out(begun_s=0, now_s=0, running=4)
    for _ in range(3):
        aimd.answered()
    assert 3 <= aimd.limit < 4
    for _ in range(100):
        aimd.answered()
    assert aimd.limit == 5


def test_aimd_without_a_maximum_has_no_limit_until_a_timeout() -> None:
    aimd = AimdLimit(2)
    aimd.answered()
    assert aimd.limit == math.inf
    aimd.timed_out(begun_s=0, now_s=0, running=16)
    assert aimd.limit == 8
