"""Words of messages: counts, a hint that several modules give, and the valid values of a setting by
its declaration. Pure."""

import math
from typing import Any, cast

import msgspec
from msgspec import inspect

INSTALL_DAEMON = "install ckptfs with its extra 'daemon' (README, Install)"
"""Remedy for a missing package of the daemon. It names no command, because ckptfs can come from a
clone, a wheel, or the wheels of the node."""
INSTALL_CSI = "install ckptfs with its extra 'csi' (README, Install)"
_SHOWN_CHARACTERS_MAX = 40
_NOT_SHOWN = ("credentials", "uri", "endpoint")
"""Keys whose values can contain a secret by mistake."""
_SPECIAL = {
    "metrics": 'an address such as "127.0.0.1:9467" or "unix:/run/ckptfs/metrics.sock"',
    "users": 'a list of names or numbers, or "*"',
    "groups": 'a list of names or numbers, or "*"',
    "credentials": '"default", "anonymous", or a table such as { file = "/etc/ckptfs/keys" }',
}


def counted(count: int, noun: str) -> str:
    """``1 file``, ``2 files``, ``3 processes``."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun if count == 1 else plural}"


def expectation(struct: type[msgspec.Struct], key: str, value: object) -> str:
    """Describe the valid values of a struct's key, and the invalid `value`."""
    fields = cast("inspect.StructType", inspect.type_info(struct)).fields
    [field] = [field for field in fields if field.name == key]
    kind = field.type.type if isinstance(field.type, inspect.Metadata) else field.type
    found = "" if key in _NOT_SHOWN else f", not {_shown(value)}"
    return _wanted(key, kind) + found


def _wanted(name: str, kind: inspect.Type) -> str:
    if name in _SPECIAL:
        return _SPECIAL[name]
    match kind:
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(f'"{each}"' for each in values)
        case inspect.IntType() if "bytes" in name:
            return f'a number of bytes {_range_of(kind)}, or text such as "500G" or "64MiB"'
        case inspect.IntType():
            return f"a whole number {_range_of(kind)}"
        case inspect.FloatType() if name.endswith("_s"):
            return f'a number of seconds {_range_of(kind)}, or text such as "30s" or "5min"'
        case inspect.FloatType():
            return f"a number {_range_of(kind)}"
        case inspect.UnionType(types=(inspect.IntType() as number, inspect.LiteralType() as word)):
            return f"{_wanted(name, number)}, or {_wanted(name, word).removeprefix('one of ')}"
        case _:
            return "text in quotes"


def _range_of(kind: inspect.IntType | inspect.FloatType) -> str:
    low = 0 if kind.ge is None else kind.ge
    return f"of at least {low:,}" if kind.le is None else f"from {low:,} to {kind.le:,.15g}"


def _shown(value: Any) -> str:
    """Return a value as the file has it, cut if it is long; of a table or a list its type."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if not isinstance(value, bool | int | float | str):  # a date or time
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN_CHARACTERS_MAX else f"{text[:_SHOWN_CHARACTERS_MAX]}…"
