"""The effective configuration, from defaults, one TOML file, the environment and flags.

| variable | sets |
| --- | --- |
| CKPTFS_CONFIG | the TOML file (default: ``/etc/ckptfs.toml`` for root, else the user's) |
| CKPTFS_SOCKET, CKPTFS_MOUNT, CKPTFS_CACHE_DIR | `socket`, `mount`, `cache_dir` |

Each of these sources overrides the ones before it. Flags are those of ``ckptfs mount``. Its keeper
keeps them for a reload.

The file contains no secrets. A user who can write it controls the daemon, so the file must belong
to this user or root, and other users must not be able to write it.

Functions import modules that only they need, because each process of ckptfs imports this module at
its start.
"""

import functools
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from ckptfs._config.paths import SOCKET_NAME, cache_places, chosen, runtime_places, user_folder
from ckptfs._model.config import Config
from ckptfs._model.config_values import PATHS, checked, refuse_unknown
from ckptfs._os.ownership import is_this_users_alone
from ckptfs.errors import ConfigError

_ENVIRONMENT = {"CKPTFS_SOCKET": "socket", "CKPTFS_MOUNT": "mount", "CKPTFS_CACHE_DIR": "cache_dir"}
_FLAGS = "CKPTFS_MOUNT_FLAGS"
VARIABLES = ("CKPTFS_CONFIG", *_ENVIRONMENT)
"""Variables for users."""
INTERNAL_VARIABLES = (_FLAGS,)
"""Variables that ckptfs sets for its own processes."""

NODE_SOCKET = "/run/ckptfs/control.sock"
"""Default socket of root's daemon."""

_FILE_BYTES_MAX = 256 << 10
"""Limit for the pipe of 1 MiB by which a daemon sends a reloaded file to its keeper
(``control.reload``)."""


class Flags(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The flags of ``ckptfs mount``.

    Attributes:
        config: The named TOML file, or "".
        values: Settings by key, in the form that the file has.
        names: The name of each setting's flag, by key.
    """

    config: str = ""
    values: dict[str, object] = {}
    names: dict[str, str] = {}


class Loaded(NamedTuple):
    """A configuration, and the source of each setting: ``default``, ``file:PATH``, a variable or a
    flag."""

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
        flags: The flags of the command line; None means the flags of this process's keeper.

    Raises:
        ConfigError: The named file is missing, the file is invalid or writable by others, a key is
            unknown, or a value has the wrong type or is out of range.
    """
    environ = os.environ if environ is None else environ
    flags = flags or _flags_of(environ)
    values: dict[str, object] = {}
    named = flags.config or environ.get("CKPTFS_CONFIG")
    file = Path(named) if named else _default_file(environ)
    sources = dict.fromkeys(Config.__struct_fields__, "default")
    text = ""
    if file is not None:
        text, found = _read(file, "--config" if flags.config else "CKPTFS_CONFIG")
        values |= found
        sources |= dict.fromkeys(found, f"file:{file}")
    for variable, field in _ENVIRONMENT.items():
        if environ.get(variable):
            values[field] = environ[variable]
            sources[field] = variable
    values |= flags.values
    sources |= flags.names
    _add_default_paths(values, environ)
    config = checked(values, functools.partial(_where, sources, text))
    return Loaded(config, sources, file)


def load_again(current: Config) -> Config:
    """Reload the configuration of a daemon. Paths that ckptfs chose, and that are not configured,
    stay as they are in `current`. Raises ConfigError."""
    loaded = load()
    kept = [key for key in (*PATHS, "node_socket") if loaded.sources[key] == "default"]
    return msgspec.structs.replace(loaded.config, **{key: getattr(current, key) for key in kept})


def _where(sources: Mapping[str, str], text: str, key: str, *inner: str) -> str:
    """Return the source of a setting for messages: ``/etc/ckptfs.toml:12``."""
    kind, _, file = sources.get(key, "default").partition(":")
    if kind != "file":
        return kind
    from ckptfs._model.toml_lines import line_of, lines_of

    line = line_of(lines_of(text), key, *inner)
    return f"{file}:{line}" if line else file


def parse_setting(text: str) -> tuple[str, object]:
    """Parse ``key=value`` with a value in TOML. Text that is not TOML is a string.

    Raises ConfigError.
    """
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator:
        raise ConfigError(f"--set {key}: has no value; write --set KEY=VALUE")
    refuse_unknown("--set", [key], Config.__struct_fields__)
    try:
        return key, msgspec.toml.decode(f"value = {value}".encode(), type=dict[str, object])[
            "value"
        ]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        return key, value.strip()


def flags_variable(flags: Flags) -> dict[str, str]:
    """Return the variable of the environment that passes flags to a keeper and its daemons."""
    return {_FLAGS: msgspec.json.encode(flags).decode()}


def _flags_of(environ: Mapping[str, str]) -> Flags:
    if not environ.get(_FLAGS):
        return Flags()
    try:
        return msgspec.json.decode(environ[_FLAGS], type=Flags)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{_FLAGS}: {error}; unset it, because only ckptfs mount sets this variable"
        ) from None


def log_path(config: Config) -> Path:
    """Return the path of the log of a daemon in the background."""
    return Path(config.cache_dir, "daemon.log")


def runtime_dir(environ: Mapping[str, str]) -> Path:
    """Return the directory that ckptfs chooses for this user's socket and mount point. It may not
    exist yet."""
    return chosen(runtime_places(environ))


def _add_default_paths(values: dict[str, object], environ: Mapping[str, str]) -> None:
    """Add the chosen paths for those that are not configured."""
    runtime = runtime_dir(environ)
    values.setdefault("socket", str(runtime / SOCKET_NAME))
    values.setdefault("mount", str(runtime / "mnt"))
    if values["socket"] == str(runtime / SOCKET_NAME):
        values.setdefault("node_socket", NODE_SOCKET)
    if "cache_dir" not in values:
        values["cache_dir"] = str(chosen(cache_places(environ)))


def _default_file(environ: Mapping[str, str]) -> Path | None:
    if os.geteuid() == 0:
        file = Path("/etc/ckptfs.toml")
    else:
        folder = user_folder(environ, "CONFIG")
        file = None if folder is None else folder / "ckptfs.toml"
    return file if file is not None and os.path.isfile(file) else None


def _read(file: Path, named_by: str) -> tuple[str, dict[str, object]]:
    """Return text and values of a TOML file. Raises ConfigError, with the line of a mistake."""
    try:
        with file.open("rb") as opened:
            _refuse_others(file, os.fstat(opened.fileno()))
            data = opened.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}; {named_by} must name a readable file"
        ) from None
    if len(data) > _FILE_BYTES_MAX:
        raise ConfigError(f"{file}: longer than {_FILE_BYTES_MAX} bytes; shorten it")
    try:
        text = data.decode()
        return text, msgspec.toml.decode(data, type=dict[str, object])
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}:{line}: not valid TOML: the text is not UTF-8") from None
    except msgspec.DecodeError as error:
        from ckptfs._model.toml_lines import explained

        line, why = explained(data.decode(), str(error))
        raise ConfigError(f"{file}:{line}: not valid TOML: {why}") from None


def _refuse_others(file: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):  # e.g. /dev/null
        return
    # The group of a user often has that user as its only member, so it may write.
    if not is_this_users_alone(info, 0o022 if os.geteuid() == 0 else 0o002, or_roots=True):
        raise ConfigError(
            f"{file}: belongs to another user or is writable by others, who could then control "
            "ckptfs with your rights; chown it, or chmod go-w"
        )
