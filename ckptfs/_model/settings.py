"""What can be known of the settings from their declarations: for documentation and for reloads."""

from typing import Any, NamedTuple, cast

import msgspec
from msgspec import NODEFAULT, inspect

from ckptfs._model.config import Change, Config
from ckptfs._model.stores import CredentialSource, StoreTable

_PATHS = {
    "socket": "`/run/ckptfs/control.sock`; for users in `$XDG_RUNTIME_DIR/ckptfs/`",
    "node_socket": "`/run/ckptfs/control.sock`",
    "mount": "`mnt` beside the socket",
    "cache_dir": "`/var/cache/ckptfs`; for users `~/.cache/ckptfs`",
}
"""Defaults that ``ckptfs._config`` finds when it is asked."""
_SIZES = (("GiB", 1 << 30), ("MiB", 1 << 20))


class Setting(NamedTuple):
    """One setting. `change` is None within tables, which change as a whole."""

    name: str
    default: str
    change: Change | None
    text: str


def settings_of(kind: type[msgspec.Struct]) -> list[Setting]:
    """The settings that a struct declares, in their order."""
    found = cast("inspect.StructType", inspect.type_info(kind))
    return [_setting(field) for field in found.fields]


def changes() -> dict[str, Change]:
    """When a change of each setting of `Config` counts."""
    return {s.name: s.change for s in settings_of(Config) if s.change is not None}


def settings_markdown() -> str:
    """The tables of all settings."""
    return "\n".join(
        [
            "| key | default | reload | |",
            "| --- | --- | --- | --- |",
            *(
                f"| `{s.name}` | {s.default} | {'yes' if s.change == 'reload' else 'no'} "
                f"| {s.text} |"
                for s in settings_of(Config)
            ),
            "",
            "Keys of a table `[store.NAME]`:",
            "",
            *_small_table(StoreTable),
            "",
            "Its `credentials`, if these are a table:",
            "",
            *_small_table(CredentialSource),
        ]
    )


def _small_table(kind: type[msgspec.Struct]) -> list[str]:
    rows = [f"| `{s.name}` | {s.default} | {s.text} |" for s in settings_of(kind)]
    return ["| key | default | |", "| --- | --- | --- |", *rows]


def _setting(field: inspect.Field) -> Setting:
    declared: Any = field.type  # msgspec.inspect.Metadata, whose types are partly unknown
    extra: dict[str, Change] = declared.extra or {}
    text: str = declared.extra_json_schema["description"]
    return Setting(field.name, _default_of(field, declared.type), extra.get("change"), text)


def _default_of(field: inspect.Field, kind: inspect.Type) -> str:
    if field.name in _PATHS:
        return _PATHS[field.name]
    if field.default_factory is not NODEFAULT:
        return "none"
    if field.default is NODEFAULT:
        return "has to be given"
    return _text_of(field.name, field.default, kind)


def _text_of(name: str, value: Any, kind: inspect.Type) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return f'`"{value}"`' if value else "none"
    if "bytes" in name and value:
        return next((f"{value // size} {unit}" for unit, size in _SIZES if value >= size), "")
    if isinstance(kind, inspect.FloatType) and name.endswith("_s"):
        return f"{value:g} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
