"""Conversion of the values of a file, a variable or a flag to a `Config` or an error. Pure.

Functions import modules that only errors need, because each process of ckptfs imports this module
at its start.
"""

import os
from collections.abc import Callable, Iterable
from typing import cast

import msgspec

from ckptfs._model.config import Config
from ckptfs._model.named_store import CredentialSource, StoreTable, check_table
from ckptfs._model.units import parse_duration, parse_size
from ckptfs.errors import AgeError, ConfigError, PlaceUnusable, SizeError

SOCKET_BYTES_MAX = 107
"""Longest path of a unix socket, see unix(7)."""
PATHS = ("socket", "mount", "cache_dir")

Where = Callable[..., str]
"""Function from a key and its tables, outermost first, to their place in the words of a message."""


def checked(values: dict[str, object], where: Where) -> Config:
    """Return the configuration of `values`. Raises ConfigError, which names the place."""
    found: dict[str, object] = {}
    for key, value in values.items():
        refuse_unknown(where(key), [key], Config.__struct_fields__)
        found[key] = _stores(where, value) if key == "store" else _with_unit(key, value)
        if not _fits(Config, {**_SOME_PATHS, key: found[key]}):
            raise _wrong(where(key), Config, key, key, value)
    config = msgspec.convert(found, Config)
    for key in PATHS:
        path: str = getattr(config, key)
        if not os.path.isabs(path):
            raise ConfigError(f"{where(key)}: {key} must be an absolute path, not {path!r}")
    if len(os.fsencode(config.socket)) > SOCKET_BYTES_MAX:
        raise PlaceUnusable(
            f"{where('socket')}: socket is {config.socket!r}, which is longer than the "
            f"{SOCKET_BYTES_MAX} bytes that a unix socket's path may have; set CKPTFS_SOCKET to a "
            "shorter path"
        )
    return config


_SOME_PATHS = dict.fromkeys(PATHS, "/")


def refuse_unknown(where: str, keys: Iterable[str], known: Iterable[str], table: str = "") -> None:
    """Raise ConfigError for the first unknown key, with the nearest known one."""
    known = list(known)
    for key in keys:
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key, known, 1)
            # All settings fill half a screen; the keys of a table are few.
            others = f"known keys: {', '.join(known)}" if table else "ckptfs help config lists all"
            hint = f"did you mean {near[0]!r}?" if near else others
            inside = f" in [{table}]" if table else ""
            raise ConfigError(f"{where}: unknown key {key!r}{inside}; {hint}")


def _with_unit(key: str, value: object) -> object:
    """Return the number of a text with a unit; other values as they are."""
    if isinstance(value, str):
        try:
            if "bytes" in key:
                return parse_size(value)
            if key.endswith("_s"):
                return parse_duration(value)
        except (AgeError, SizeError):
            pass  # `checked` rejects the text
    return value


def _fits(kind: type[msgspec.Struct], value: object) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _stores(where: Where, value: object) -> dict[str, StoreTable]:
    """Return the tables of the named stores. Raises ConfigError."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where('store')}: store must be tables, such as [store.prod]")
    found: dict[str, StoreTable] = {}
    for name, table in cast("dict[str, object]", value).items():
        found[name] = table if isinstance(table, StoreTable) else _store(where, name, table)
    return found


def _store(where: Where, name: str, table: object) -> StoreTable:
    place, heading = where("store", name), f"store.{name}"
    if not isinstance(table, dict):
        raise ConfigError(f"{place}: {heading} must be a table, such as [{heading}]")
    keys = cast("dict[str, object]", table)
    for key, value in keys.items():
        at = where("store", name, key)
        refuse_unknown(at, [key], StoreTable.__struct_fields__, heading)
        if key == "credentials":
            _check_source(where, name, value)
        if not _fits(StoreTable, {"uri": "", key: value}):
            raise _wrong(at, StoreTable, key, f"{heading}.{key}", value)
    if "uri" not in keys:
        raise ConfigError(f'{place}: [{heading}] has no uri; give e.g. uri = "s3://bucket/path"')
    store = msgspec.convert(keys, StoreTable)
    try:
        check_table(name, store)
    except ConfigError as error:
        key = str(error).partition(":")[0].split(".")[2:]
        raise ConfigError(f"{where('store', name, *key)}: {error}") from None
    return store


def _check_source(where: Where, name: str, source: object) -> None:
    """Raise ConfigError for a table of credentials with an unknown key or a wrong value."""
    if not isinstance(source, dict):
        return
    table = f"store.{name}.credentials"
    for key, value in cast("dict[str, object]", source).items():
        at = where("store", name, "credentials", key)
        refuse_unknown(at, [key], CredentialSource.__struct_fields__, table)
        if not isinstance(value, str):
            raise ConfigError(f"{at}: {table}.{key} must be text in quotes")


def _wrong(
    where: str, struct: type[msgspec.Struct], key: str, name: str, value: object
) -> ConfigError:
    from ckptfs._model.wording import expectation

    return ConfigError(f"{where}: {name} must be {expectation(struct, key, value)}")
