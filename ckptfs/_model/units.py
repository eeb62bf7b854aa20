"""Bytes and rates as people write them."""

import re

from ckptfs.errors import AgeError, RateError, SizeError

_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?(?:([kKMGT])(i)?)?B?")
RATE_MAX = 1 << 50
"""More than any network has, and exact in JSON."""


def size_text(count: int) -> str:
    """Bytes for people: ``1.5 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def parse_rate(text: str) -> int:
    """Bytes per second of e.g. ``50M``, ``1.5G``, ``500k`` (powers of 1000), ``64MiB`` or ``64Mi``
    (of 1024); ``B`` and ``/s`` may follow. Raises RateError."""
    rate = _bytes_of(text.strip().removesuffix("/s"))
    if rate is None or rate < 1:
        raise RateError(
            f"{text[:40]!r} is no rate; give bytes per second, e.g. 500k, 50M, 1.5G, 64MiB"
        )
    return int(rate)


def parse_size(text: str) -> int:
    """Bytes of e.g. ``500G`` (powers of 1000), ``1.5TiB`` or ``64Mi`` (of 1024); ``B`` may follow.
    Raises SizeError."""
    size = _bytes_of(text.strip())
    if size is None:
        raise SizeError(f"{text[:40]!r} is no size; give bytes, e.g. 500G, 1.5TiB, 64MiB")
    return int(size)


def _bytes_of(text: str) -> float | None:
    found = _SIZE.fullmatch(text)
    if found is None:
        return None
    number, prefix, binary = found.groups()
    power = " kMGT".index((prefix or " ").replace("K", "k"))
    size = float(number) * (1024 if binary else 1000) ** power
    return size if size <= RATE_MAX else None


_AGE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([smhdw])")
_AGE_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
AGE_S_MAX = 1e11
"""More than three thousand years."""


def parse_age(text: str) -> float:
    """Seconds of e.g. ``90s``, ``30m``, ``12h``, ``7d`` or ``2w``. Raises AgeError."""
    found = _AGE.fullmatch(text.strip())
    if found:
        age_s = float(found[1]) * _AGE_S[found[2]]
        if age_s <= AGE_S_MAX:
            return age_s
    raise AgeError(f"{text[:40]!r} is no age; give a number with s, m, h, d or w, e.g. 12h, 7d")


def age_text(seconds: float) -> str:
    """An age for people: ``3 d``."""
    for unit in ("w", "d", "h", "m"):
        if seconds >= 2 * _AGE_S[unit]:
            return f"{int(seconds / _AGE_S[unit])} {unit}"
    return f"{max(0, int(seconds))} s"
