"""Bytes and rates as people write them."""

import re

from ckptfs.errors import RateError, SizeError

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
