"""``config`` and ``reload``, and the flags by which ``mount`` sets what the file does, too."""

import os
from typing import Annotated, Any

import msgspec
import typer

from ckptfs import _client
from ckptfs._config import Flags, Loaded, load, load_config, parse_setting
from ckptfs._model.units import parse_size
from ckptfs.cli import output
from ckptfs.errors import ConfigError


def _flag(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, show_default=False)


ConfigFlag = Annotated[str, _flag("--config", "FILE", "The TOML file.")]
SocketFlag = Annotated[str, _flag("--socket", "PATH", "Control socket.")]
MountFlag = Annotated[str, _flag("--mount", "DIR", "Where to mount.")]
CacheDirFlag = Annotated[str, _flag("--cache-dir", "DIR", "Directory of the cache.")]
CacheSizeFlag = Annotated[
    str, _flag("--cache-size", "BYTES", "Most bytes in the cache, e.g. 500G; 0: no limit.")
]
AllowOtherFlag = Annotated[
    bool | None,
    typer.Option("--allow-other/--no-allow-other", help="Serve other users.", show_default=False),
]
SetFlag = Annotated[
    list[str] | None,
    _flag("--set", "KEY=VALUE", "Any other setting, as in the file; can be repeated."),
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
    """What was given on the command line. Raises ConfigError, SizeError."""
    values: dict[str, object] = {}
    names: dict[str, str] = {}
    for setting in others or []:
        key, value = parse_setting(setting)
        values[key], names[key] = value, "--set"
    paths = ("socket", socket), ("mount", mount), ("cache_dir", cache_dir)
    for key, path in paths:
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
    """Show the effective configuration, and where each setting comes from.

    It is the one that ckptfs mount would have with these flags, in this environment.
    """
    flags = flags_of(file, socket, mount, cache_dir, cache_size, allow_other, others)
    loaded = load(flags=flags)
    settings = _settings(loaded)
    if as_json:
        file_ = None if loaded.file is None else str(loaded.file)
        rows = [dict(zip(("key", "value", "source"), setting, strict=True)) for setting in settings]
        output.print_json({"file": file_, "settings": rows})
        return
    print(f"file: {loaded.file or 'none'}")
    output.print_table(
        ["KEY", "VALUE", "SOURCE"],
        [[key, _text_of(value), source] for key, value, source in settings],
    )


def _settings(loaded: Loaded) -> list[tuple[str, Any, str]]:
    """Key, value and source of each setting; those of a store are one each."""
    found: list[tuple[str, Any, str]] = []
    plain: dict[str, Any] = msgspec.to_builtins(loaded.config)
    stores: dict[str, dict[str, Any]] = plain.pop("store")
    for key, value in plain.items():
        found.append((key, value, loaded.sources[key]))
    for name, table in stores.items():
        given = {k: v for k, v in table.items() if v not in ("", [])}
        found += [
            (f"store.{name}.{k}", _public(v), loaded.sources["store"]) for k, v in given.items()
        ]
    return found


def _public(value: Any) -> Any:
    """Without what is not given. There are no secrets: the file says only where they are."""
    return {k: v for k, v in value.items() if v} if isinstance(value, dict) else value  # type: ignore[reportUnknownVariableType]


def _text_of(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def reload(as_json: output.JsonOption = False) -> None:
    """Have the running daemon read its configuration anew; what is attached goes on.

    A file that is not valid changes nothing.
    """
    with _client.connect(load_config()) as connection:
        reply = connection.reload()
    if as_json:
        output.print_json(reply)
    else:
        print(f"reloaded: {', '.join(reply.changed) or 'nothing has changed'}")
        for uri in reply.ended:
            print(f"ended: {uri}")
    if reply.unchanged:
        raise ConfigError(
            f"a mount keeps its {', '.join(reply.unchanged)}; ckptfs umount, and mount again"
        )
