"""The effective configuration: defaults, then one TOML file, then the environment, then flags.

| variable | sets |
| --- | --- |
| CKPTFS_CONFIG | the TOML file (``/etc/ckptfs.toml`` for root, else in the user's config folder) |
| CKPTFS_SOCKET, CKPTFS_MOUNT, CKPTFS_CACHE_DIR | `socket`, `mount`, `cache_dir` |

The later wins. Flags are those of ``ckptfs mount``; its keeper remembers them for a reload.

The file holds no secrets. Whoever can write it decides what a daemon does, so it has to belong to
this user or root and be writable by nobody else.

What only some of that needs is imported there: each process of ckptfs begins with this module.
"""

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import msgspec

from ckptfs._model.config import Config
from ckptfs._model.stores import CredentialSource, StoreTable, check_table
from ckptfs._model.units import parse_size
from ckptfs.errors import ConfigError, SizeError

_ENVIRONMENT = {
    "CKPTFS_SOCKET": "socket",
    "CKPTFS_MOUNT": "mount",
    "CKPTFS_CACHE_DIR": "cache_dir",
}
_FLAGS = "CKPTFS_MOUNT_FLAGS"
_PATHS = tuple(_ENVIRONMENT.values())

SOCKET_BYTES_MAX = 107
"""unix(7)"""


NODE_SOCKET = "/run/ckptfs/control.sock"
"""Where root's daemon listens, unless it is configured otherwise."""

_FILE_BYTES_MAX = 256 << 10
"""A daemon tells its keeper what it has reloaded through a pipe of 1 MiB: ``_daemon.reload``."""


class Flags(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was given to ``ckptfs mount``.

    Attributes:
        config: The TOML file; "": none was named.
        values: Settings by their key, as the file would have them.
        names: The flag that each was given by.
    """

    config: str = ""
    values: dict[str, object] = {}
    names: dict[str, str] = {}


class Loaded(NamedTuple):
    """A configuration, and where it comes from.

    Attributes:
        config: The settings.
        sources: Where each is from: ``default``, ``file:PATH``, a variable's name, or a flag.
        file: The TOML file; None: there is none.
    """

    config: Config
    sources: dict[str, str]
    file: Path | None


def load_config(environ: Mapping[str, str] | None = None, flags: Flags | None = None) -> Config:
    """Read the configuration of this process. The arguments and errors are those of `load`."""
    return load(environ, flags).config


def load(environ: Mapping[str, str] | None = None, flags: Flags | None = None) -> Loaded:
    """Read the configuration of this process, with the source of each setting.

    Args:
        environ: The environment; None means ``os.environ``.
        flags: What was given on the command line; None: what a keeper was started with.

    Raises:
        ConfigError: The file that is named is missing, a file cannot be parsed or may be written by
            others, a key is unknown, or a value is of the wrong type or out of range.
    """
    environ = os.environ if environ is None else environ
    flags = flags or _flags_of(environ)
    defaults = _default_paths(environ)
    values: dict[str, object] = {**defaults}
    named = flags.config or environ.get("CKPTFS_CONFIG")
    file = Path(named) if named else _default_file()
    is_there = bool(named) or file.is_file()
    sources = dict.fromkeys(Config.__struct_fields__, "default")
    if is_there:
        found = _read(file, "--config" if flags.config else "CKPTFS_CONFIG")
        values |= found
        sources |= dict.fromkeys(found, f"file:{file}")
    for variable, field in _ENVIRONMENT.items():
        if environ.get(variable):
            values[field] = environ[variable]
            sources[field] = variable
    values |= flags.values
    sources |= flags.names
    if "node_socket" not in values and values["socket"] == defaults["socket"]:
        values["node_socket"] = NODE_SOCKET
    return Loaded(_checked(values, sources), sources, file if is_there else None)


def parse_setting(text: str) -> tuple[str, object]:
    """Key and value of ``key=value``, whose value is TOML; other text is a string.

    Raises ConfigError.
    """
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator:
        raise ConfigError(f"--set {key}: must be like key=value")
    refuse_unknown("--set", [key], Config.__struct_fields__)
    try:
        return key, msgspec.toml.decode(f"value = {value}".encode(), type=dict[str, object])[
            "value"
        ]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        return key, value.strip()


def flags_variable(flags: Flags) -> dict[str, str]:
    """What hands flags on to a keeper, and so to its daemons: a variable of the environment."""
    return {_FLAGS: msgspec.json.encode(flags).decode()}


def _flags_of(environ: Mapping[str, str]) -> Flags:
    if not environ.get(_FLAGS):
        return Flags()
    try:
        return msgspec.json.decode(environ[_FLAGS], type=Flags)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{_FLAGS}: {error}; unset it: it is for ckptfs mount alone") from None


def _checked(values: dict[str, object], sources: Mapping[str, str]) -> Config:
    """The configuration of `values`. Raises ConfigError, which names the source."""
    for key, value in values.items():
        where = sources.get(key, "default").removeprefix("file:")
        refuse_unknown(where, [key], Config.__struct_fields__)
        try:
            if "bytes" in key and isinstance(value, str):
                values[key] = parse_size(value)
        except SizeError as error:
            raise ConfigError(f"{where}: {key}: {error}") from None
        if key == "store":
            values[key] = _stores(where, value)
        try:
            # One by one, so that the message names the source.
            msgspec.convert({**_SOME_PATHS, key: values[key]}, Config)
        except msgspec.ValidationError as error:
            text = str(error).replace("`$.", "`")
            raise ConfigError(f"{where}: {text}; correct the value") from None
    config = msgspec.convert(values, Config)
    for field in _PATHS:
        if not os.path.isabs(getattr(config, field)):
            raise ConfigError(f"{field} must be an absolute path, not {getattr(config, field)!r}")
    if len(os.fsencode(config.socket)) > SOCKET_BYTES_MAX:
        raise ConfigError(
            f"socket: {config.socket!r} is longer than the {SOCKET_BYTES_MAX} bytes that a unix "
            "socket's path may have; set CKPTFS_SOCKET to a shorter one"
        )
    return config


_SOME_PATHS = dict.fromkeys(_PATHS, "/")


def _stores(where: str, value: object) -> dict[str, StoreTable]:
    """The tables of the named stores. Raises ConfigError."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: store: must be tables, like [store.prod]")
    found: dict[str, StoreTable] = {}
    for name, table in cast("dict[str, object]", value).items():
        if isinstance(table, StoreTable):
            found[name] = table
            continue
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: store.{name}: must be a table, like [store.{name}]")
        keys = cast("dict[str, object]", table)
        refuse_unknown(f"{where}: store.{name}", keys, StoreTable.__struct_fields__)
        if isinstance(source := keys.get("credentials"), dict):
            refuse_unknown(
                f"{where}: store.{name}.credentials",
                cast("dict[str, object]", source),
                CredentialSource.__struct_fields__,
            )
        try:
            found[name] = msgspec.convert(keys, StoreTable)
            check_table(name, found[name])
        except msgspec.ValidationError as error:
            text = str(error).replace("`$.", f"`store.{name}.")
            raise ConfigError(f"{where}: {text}; correct the value in [store.{name}]") from None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return found


def refuse_unknown(where: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for the first key that is not known, with the nearest that is."""
    known = list(known)
    for key in keys:
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def log_path(config: Config) -> Path:
    """Where a daemon in the background logs: beside its cache, which it alone uses."""
    return Path(config.cache_dir, "daemon.log")


def runtime_dir(environ: Mapping[str, str]) -> Path:
    """The directory for this user's socket and mount point. It may not exist yet."""
    if os.geteuid() == 0:
        return Path("/run/ckptfs")
    for candidate in (environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.geteuid()}"):
        if candidate and os.path.isdir(candidate) and os.stat(candidate).st_uid == os.geteuid():
            return Path(candidate, "ckptfs")
    import tempfile

    return Path(tempfile.gettempdir(), f"ckptfs-{os.geteuid()}")


def _default_paths(environ: Mapping[str, str]) -> dict[str, str]:
    runtime = runtime_dir(environ)
    return {
        "socket": str(runtime / "control.sock"),
        "mount": str(runtime / "mnt"),
        "cache_dir": str(_cache_dir()),
    }


def _cache_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/var/cache/ckptfs")
    import platformdirs

    return platformdirs.user_cache_path("ckptfs")


def _default_file() -> Path:
    if os.geteuid() == 0:
        return Path("/etc/ckptfs.toml")
    import platformdirs

    return platformdirs.user_config_path("ckptfs") / "ckptfs.toml"


def _read(file: Path, named_by: str) -> dict[str, object]:
    try:
        with file.open("rb") as opened:
            _refuse_others(file, os.fstat(opened.fileno()))
            text = opened.read(_FILE_BYTES_MAX + 1)
        if len(text) > _FILE_BYTES_MAX:
            raise ConfigError(f"{file}: longer than {_FILE_BYTES_MAX} bytes")
        return msgspec.toml.decode(text, type=dict[str, object])
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}; {named_by} must name a readable file"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _refuse_others(file: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):  # e.g. /dev/null
        return
    ours = os.geteuid()
    # A user's own group is often of that user alone, and may write then.
    writable = info.st_mode & (0o022 if ours == 0 else 0o002)
    if writable or info.st_uid not in (0, ours):
        raise ConfigError(
            f"{file}: belongs to another user or is writable by others, who could so change what "
            "is done with your rights; chown it, or chmod go-w"
        )
