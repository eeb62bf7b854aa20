"""Numbers in a few characters, for tables."""


def count(value: float) -> str:
    """A number in at most five characters."""
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if not unit or value >= 99.5 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.0f}T"


def size(value: float) -> str:
    """Bytes in at most six characters."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if value >= 9.95 or unit == "B" else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}TiB"


def duration(seconds: float | None) -> str:
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
