"""The tables of the pages on settings and metrics, from their declarations in the code."""

from typing import cast

import msgspec
from msgspec import NODEFAULT, inspect

from ckptfs._model.config import Config, changes, descriptions
from ckptfs._model.metrics import CHECKPOINT, NODE, PREFIX, Metric
from ckptfs._model.named_store import CredentialSource, StoreTable

METRICS = {metric.name: metric for metric in (*NODE, *CHECKPOINT)}
_PATHS = {
    "socket": "`/run/ckptfs/control.sock`; for users in `/tmp/ckptfs-UID/`",
    "node_socket": "`/run/ckptfs/control.sock`",
    "mount": "`mnt` beside the socket",
    "cache_dir": "`/var/cache/ckptfs`; for users `~/.cache/ckptfs`",
}
"""Defaults that ``ckptfs._config.load`` computes."""
_SIZES = (("GiB", 1 << 30), ("MiB", 1 << 20))


def settings_markdown() -> str:
    """The tables of all settings."""
    when = changes()
    rows = [
        f"| `{name}` | {default} | {'yes' if when[name] == 'reload' else 'no'} | {text} |"
        for name, default, text in _settings_of(Config)
    ]
    return "\n".join(
        [
            "| key | default | reload | |",
            "| --- | --- | --- | --- |",
            *rows,
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
    rows = [f"| `{name}` | {default} | {text} |" for name, default, text in _settings_of(kind)]
    return ["| key | default | |", "| --- | --- | --- |", *rows]


def _settings_of(kind: type[msgspec.Struct]) -> list[tuple[str, str, str | None]]:
    """The name, the default and the description of each setting."""
    texts = descriptions(kind)
    fields = cast("inspect.StructType", inspect.type_info(kind)).fields
    return [(each.name, _default_of(each), texts[each.name].description) for each in fields]


def _default_of(field: inspect.Field) -> str:
    if field.name in _PATHS:
        return _PATHS[field.name]
    if field.default_factory is not NODEFAULT:
        return "none"
    if field.default is NODEFAULT:
        return "has to be given"
    name, value = field.name, field.default
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return f'`"{value}"`' if value else "none"
    if "bytes" in name and value:
        return next((f"{value // size} {unit}" for unit, size in _SIZES if value >= size), "")
    if name.endswith("_s"):
        return f"{value:g} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def names(metric: Metric) -> tuple[str, ...]:
    """The names of a metric's series."""
    name = PREFIX + metric.name
    if metric.kind == "counter":
        return (f"{name}_total",)
    if metric.kind == "histogram":
        return (f"{name}_bucket", f"{name}_count", f"{name}_sum")
    return (name,)


def metric_rows() -> list[str]:
    """The rows of the table of metrics."""
    return [
        f"| `{names(metric)[0].removesuffix('_bucket')}` | {metric.kind} "
        f"| {', '.join(f'`{label}`' for label in metric.labels)} | {metric.help} |"
        for metric in METRICS.values()
    ]
