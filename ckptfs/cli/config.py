"""``config`` and ``reload``, and the flags of ``mount`` for settings."""

import os
from typing import Annotated, Any

import msgspec
import typer

from ckptfs._client import client
from ckptfs._config import environment
from ckptfs._config.load import Flags, Loaded, load, load_config, parse_setting
from ckptfs._model.manifest import printable
from ckptfs._model.protocol.requests import Reload
from ckptfs._model.units import duration_text, exact_size_text, parse_size
from ckptfs.cli import output
from ckptfs.errors import ConfigError


def _flag(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text)


ConfigFlag = Annotated[str, _flag("--config", "FILE", "The TOML file (ckptfs help config).")]
SocketFlag = Annotated[str, _flag("--socket", "PATH", "The control socket.")]
MountFlag = Annotated[str, _flag("--mount", "DIR", "The directory to mount on.")]
CacheDirFlag = Annotated[str, _flag("--cache-dir", "DIR", "The directory of the cache.")]
CacheSizeFlag = Annotated[
    str, _flag("--cache-size", "BYTES", "Most bytes in the cache, e.g. 500G; 0 for no limit.")
]
AllowOtherFlag = Annotated[
    bool | None,
    typer.Option("--allow-other/--no-allow-other", help="Serve the other users of the node."),
]
SetFlag = Annotated[
    list[str] | None,
    _flag("--set", "KEY=VALUE", "Any other setting, as in the file. Repeat it for more."),
]


def flags_of(
    config: str,
    socket: str,
    mount: str,
    cache_dir: str,
    cache_size: str,
    allow_other: bool | None,
    others: list[str] | None,
) -> Flags:
    """Collect the flags of the command line. Raises ConfigError, SizeError."""
    values: dict[str, object] = {}
    names: dict[str, str] = {}
    for setting in others or []:
        key, value = parse_setting(setting)
        values[key], names[key] = value, "--set"
    for key, path in ("socket", socket), ("mount", mount), ("cache_dir", cache_dir):
        if path:
            values[key], names[key] = os.path.abspath(path), f"--{key.replace('_', '-')}"
    if cache_size:
        values["cache_bytes_max"], names["cache_bytes_max"] = parse_size(cache_size), "--cache-size"
    if allow_other is not None:
        values["allow_other"] = allow_other
        names["allow_other"] = "--allow-other" if allow_other else "--no-allow-other"
    return Flags(os.path.abspath(config) if config else "", values, names)


def config(
    file: ConfigFlag = "",
    socket: SocketFlag = "",
    mount: MountFlag = "",
    cache_dir: CacheDirFlag = "",
    cache_size: CacheSizeFlag = "",
    allow_other: AllowOtherFlag = None,
    others: SetFlag = None,
    as_json: output.JsonOption = False,
) -> None:
    """Show the effective configuration, with the source of each setting.

    ckptfs mount would have this configuration with the same flags and environment. ckptfs help
    config explains the settings.
    """
    flags = flags_of(file, socket, mount, cache_dir, cache_size, allow_other, others)
    loaded = load(flags=flags)
    settings = _settings(loaded)
    if as_json:
        file_ = None if loaded.file is None else str(loaded.file)
        rows = [dict(zip(("key", "value", "source"), setting, strict=True)) for setting in settings]
        ignored = sorted(environment.unknown())
        output.print_json({"file": file_, "settings": rows, "unknown_variables": ignored})
        return
    print(f"file: {loaded.file or 'none'}")
    output.print_table(
        ["KEY", "VALUE", "SOURCE"],
        [[key, _text_of(key, value), source] for key, value, source in settings],
    )


def _settings(loaded: Loaded) -> list[tuple[str, Any, str]]:
    """Key, value and source of each setting, also of those in the tables of stores."""
    plain: dict[str, Any] = msgspec.to_builtins(loaded.config)
    stores: dict[str, dict[str, Any]] = plain.pop("store")
    found = [(key, value, loaded.sources[key]) for key, value in plain.items()]
    for name, table in stores.items():
        for key, value in table.items():
            if value not in ("", []):
                found.append((f"store.{name}.{key}", _public(value), loaded.sources["store"]))
    return found


def _public(value: Any) -> Any:
    """A value without empty fields. It has no secrets, because the file has only their places."""
    return {k: v for k, v in value.items() if v} if isinstance(value, dict) else value  # type: ignore[reportUnknownVariableType]


def _text_of(key: str, value: Any) -> str:
    """A value for users, with the units of durations and sizes as in the file."""
    if key.endswith("_s") and isinstance(value, int | float):
        return duration_text(value)
    if "bytes" in key and isinstance(value, int):
        return exact_size_text(value)
    return printable(msgspec.json.encode(value).decode())


def reload(as_json: output.JsonOption = False) -> None:
    """Make the running daemon read its configuration again.

    Checkpoints stay attached. An invalid file changes nothing.
    """
    with client.connect(load_config()) as connection:
        reply = connection.ask(Reload())
    if as_json:
        output.print_json(reply)
    else:
        print(f"reloaded: {', '.join(reply.changed) or 'nothing has changed'}")
        for uri in reply.ended:
            print(f"ended: {uri}")
    if reply.unchanged:
        raise ConfigError(
            f"a running mount keeps its {', '.join(reply.unchanged)}; to change that, run ckptfs "
            "umount, then ckptfs mount"
        )
