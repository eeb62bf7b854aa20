"""Rates are understood as people write them, and nonsense is not."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs._model.units import (
    age_text,
    duration_text,
    exact_size_text,
    parse_age,
    parse_duration,
    parse_rate,
    parse_size,
    size_text,
)
from ckptfs.errors import AgeError, RateError, SizeError


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1", 1),
        ("500k", 500_000),
        ("500K", 500_000),
        ("50M", 50_000_000),
        ("50MB", 50_000_000),
        ("50 MB/s", 50_000_000),
        ("1.5G", 1_500_000_000),
        ("0.5T", 500_000_000_000),
        ("64MiB", 64 << 20),
        ("64Mi", 64 << 20),
        (" 1.5GiB/s ", 3 << 29),
        ("100B", 100),
    ],
)
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "0", "0.4", "-5", "+5", "M", ".5M", "5.", "5,5M", "1e9", "inf", "nan", "5X"),
        *("50Mb", "50Mbit/s", "50MM", "50iB", "5M/h", "5 apples", "99999T", "1" * 400, "٣", "5\n6"),
    ],
)
def test_nonsense_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(RateError) as caught:
        parse_rate(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 150


@given(st.text(max_size=30))
def test_anything_is_a_rate_or_refused(text: str) -> None:
    with contextlib.suppress(RateError):
        assert 1 <= parse_rate(text) <= 1 << 50


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 55, "32768.0 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("500G", 500 * 10**9), ("1.5TiB", 3 << 39), (" 64 Mi ", 64 << 20), ("5B", 5)],
)
def test_sizes_are_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "5M/s", "G", "1e9", "99999T", "5 apples", "5\n6"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SizeError) as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("90s", 90), ("30 m", 1800), ("1.5h", 5400), (" 7d ", 604_800), ("2w", 1_209_600)],
)
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "d", "-1d", "1y", "1d2h", "1e3s", "9" * 20 + "w", "٣d"])
def test_an_age_that_is_none(text: str) -> None:
    with pytest.raises(AgeError, match="is not an age"):
        parse_age(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (119, "119 s"), (120, "2 m"), (7200, "2 h"), (2e5, "2 d"), (2e6, "3 w")],
)
def test_ages_for_people(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("30", 30),
        ("30s", 30),
        ("500ms", 0.5),
        ("5min", 300),
        ("5m", 300),
        ("1.5 h", 5400),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "1y", "1h2m", "much", "inf", "9" * 20 + "w"])
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(AgeError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.2, "200ms"),
        (2.5, "2.5s"),
        (60, "1min"),
        (90, "90s"),
        (7200, "2h"),
        (1e6 + 1, "1000001s"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@given(st.integers(0, 10**9).map(lambda ms: ms / 1000))
def test_a_duration_is_read_back(seconds: float) -> None:
    assert parse_duration(duration_text(seconds)) == pytest.approx(seconds, rel=1e-4)


@given(st.integers(0, 1 << 50))
def test_an_exact_size_is_read_back(count: int) -> None:
    assert parse_size(exact_size_text(count)) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (8 << 20, "8MiB"),
        (5 * 10**11, "500GB"),
        (1500, "1500"),
        (2000, "2kB"),
        (1 << 40, "1TiB"),
    ],
)
def test_exact_sizes(count: int, text: str) -> None:
    assert exact_size_text(count) == text
