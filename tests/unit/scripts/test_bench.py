"""The benchmark's results: the reference that is kept, and the pages that show it."""

from benchmark.report import README, RESULTS, headlines, markdown
from benchmark.results import REFERENCE, amount, ratio, read


def test_pages_show_the_reference() -> None:
    assert markdown(read(REFERENCE)) in RESULTS.read_text()
    assert headlines(read(REFERENCE)) in README.read_text()


def test_a_ratio_is_that_of_the_medians_and_its_spread_that_of_the_rounds() -> None:
    goal = ratio("load", "a / b", [4.0, 6.0, 20.0], [2.0, 2.0, 4.0], at_least=3)
    assert (goal.value, goal.low, goal.high) == (3.0, 2.0, 5.0)
    assert goal.is_reached


def test_a_bound_from_above() -> None:
    assert amount("attach", "a", "ms", [3.0], at_most=3).is_reached
    assert not amount("attach", "a", "ms", [3.1], at_most=3).is_reached


def test_what_was_not_measured_is_not_reached() -> None:
    goal = ratio("load", "a / b", None, [2.0], at_most=3)
    assert goal.value is None
    assert goal.reason
    assert not goal.is_reached
