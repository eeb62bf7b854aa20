"""Bytes and rates as people write them."""

import re

from ckptfs.errors import RateError

_RATE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?(?:([kKMGT])(i)?)?B?(?:/s)?")
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
    found = _RATE.fullmatch(text.strip())
    if found:
        number, prefix, binary = found.groups()
        power = " kMGT".index((prefix or " ").replace("K", "k"))
        rate = float(number) * (1024 if binary else 1000) ** power
        if 1 <= rate <= RATE_MAX:
            return int(rate)
    raise RateError(f"{text[:40]!r} is no rate; give bytes per second, e.g. 500k, 50M, 1.5G, 64MiB")
