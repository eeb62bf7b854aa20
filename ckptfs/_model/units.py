"""Bytes, rates and times as people write them."""

import re
from collections.abc import Mapping

from ckptfs.errors import AgeError, RateError, SizeError

_QUANTITY = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([A-Za-z]*)")
_SIZES = {"": 1} | {
    f"{prefix}{infix}": base**power
    for base, infix in ((1000, ""), (1024, "i"))
    for prefix, power in (("k", 1), ("K", 1), ("M", 2), ("G", 3), ("T", 4))
}
_AGES_S = {"ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
RATE_MAX = 1 << 50
"""More than any network has, and exact in JSON."""
AGE_S_MAX = 1e11
"""More than three thousand years."""


def size_text(count: int) -> str:
    """Bytes for people: ``1.5 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def exact_size_text(count: int) -> str:
    """Bytes exactly and briefly, as `parse_size` reads them: ``8MiB``, ``500GB``, ``1500``."""
    texts = [str(count)]
    for base, infix in ((1024, "iB"), (1000, "B")):
        power = next((p for p in (4, 3, 2, 1) if count and count % base**p == 0), 0)
        if power:
            unit = "kKMGT"[power if base == 1024 or power > 1 else 0]
            texts.append(f"{count // base**power}{unit}{infix}")
    return min(texts, key=len)


def parse_rate(text: str) -> int:
    """Bytes per second of e.g. ``50M``, ``1.5G``, ``500k`` (powers of 1000), ``64MiB`` or ``64Mi``
    (of 1024); ``B`` and ``/s`` may follow. Raises RateError."""
    rate = _parsed(text.strip().removesuffix("/s").removesuffix("B"), _SIZES, RATE_MAX)
    if rate is None or rate < 1:
        raise RateError(
            f"{text[:40]!r} is not a rate; give bytes per second, e.g. 500k, 50M, 1.5G, 64MiB"
        )
    return int(rate)


def parse_size(text: str) -> int:
    """Bytes of e.g. ``500G`` (powers of 1000), ``1.5TiB`` or ``64Mi`` (of 1024); ``B`` may follow.
    Raises SizeError."""
    size = _parsed(text.strip().removesuffix("B"), _SIZES, RATE_MAX)
    if size is None:
        raise SizeError(f"{text[:40]!r} is not a size; give bytes, e.g. 500G, 1.5TiB, 64MiB")
    return int(size)


def parse_age(text: str) -> float:
    """Seconds of e.g. ``90s``, ``30m``, ``12h``, ``7d`` or ``2w``. A number needs a unit, because
    users are as likely to mean days. Raises AgeError."""
    age_s = _parsed(text.strip(), _AGES_S, AGE_S_MAX)
    if age_s is None:
        raise AgeError(
            f"{text[:40]!r} is not an age; give a number with s, m, h, d or w, e.g. 12h, 7d"
        )
    return age_s


def parse_duration(text: str) -> float:
    """Seconds of e.g. ``30s``, ``500ms``, ``5min``, ``1.5h``, ``7d`` or ``30`` (seconds). Raises
    AgeError."""
    duration_s = _parsed(text.strip(), _AGES_S | {"": 1}, AGE_S_MAX)
    if duration_s is None:
        raise AgeError(
            f"{text[:40]!r} is not a duration; give a number with ms, s, min, h, d or w, e.g. 30s, "
            "5min"
        )
    return duration_s


def _parsed(text: str, units: Mapping[str, float], most: float) -> float | None:
    found = _QUANTITY.fullmatch(text)
    if found is None or found[2] not in units:
        return None
    value = float(found[1]) * units[found[2]]
    return value if value <= most else None


def duration_text(seconds: float) -> str:
    """A duration as people write it, which `parse_duration` reads: ``500ms``, ``30s``, ``5min``,
    ``7d``: in the largest unit of which it is a whole number."""
    for unit in ("w", "d", "h", "min"):
        if seconds and seconds % _AGES_S[unit] == 0:
            return f"{seconds / _AGES_S[unit]:.0f}{unit}"
    if 0 < seconds < 1 and float(f"{seconds * 1000:g}") == seconds * 1000:
        return f"{seconds * 1000:g}ms"
    return f"{seconds:.12g}s"


def age_text(seconds: float) -> str:
    """An age for people: ``3 d``."""
    for unit in ("w", "d", "h", "m"):
        if seconds >= 2 * _AGES_S[unit]:
            return f"{int(seconds / _AGES_S[unit])} {unit}"
    return f"{max(0, int(seconds))} s"


# -- figures of narrow columns


def brief_count(value: float) -> str:
    """A number in at most five characters."""
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if not unit or value >= 99.5 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.0f}T"


def brief_size(value: float) -> str:
    """Bytes in at most six characters."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if value >= 9.95 or unit == "B" else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}TiB"


def brief_duration(seconds: float | None) -> str:
    """Seconds in at most six characters."""
    if seconds is None:
        return ""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f}µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.{1 if seconds < 0.00995 else 0}f}ms"
    if seconds < 99.5:
        return f"{seconds:.1f}s"
    minutes = seconds / 60
    if minutes < 99.5:
        return f"{minutes:.0f}min"
    hours = minutes / 60
    return f"{hours:.0f}h" if hours < 99.5 else f"{hours / 24:.0f}d"
