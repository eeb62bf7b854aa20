"""The effective configuration: defaults, then one TOML file, then the environment.

| variable | sets | | --- | --- | | CKPTFS_CONFIG | the TOML file (default: ``/etc/ckptfs.toml`` for
root, else in the user's config folder) | | CKPTFS_SOCKET, CKPTFS_MOUNT, CKPTFS_CACHE_DIR |
`socket`, `mount`, `cache_dir` |

What only some of that needs is imported there: each process of ckptfs begins with this module.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ckptfs._model.config import Config
from ckptfs.errors import ConfigError

_ENVIRONMENT = {
    "CKPTFS_SOCKET": "socket",
    "CKPTFS_MOUNT": "mount",
    "CKPTFS_CACHE_DIR": "cache_dir",
}

SOCKET_BYTES_MAX = 107
"""unix(7)"""


NODE_SOCKET = "/run/ckptfs/control.sock"
"""Where root's daemon listens, unless it is configured otherwise."""


def load_config(environ: Mapping[str, str] | None = None) -> Config:
    """Read the configuration of this process.

    Args:
        environ: The environment; None means ``os.environ``.

    Raises:
        ConfigError: The file named by CKPTFS_CONFIG is missing, a file cannot be parsed, a key is
            unknown, or a value is of the wrong type or out of range.
    """
    environ = os.environ if environ is None else environ
    defaults = _default_paths(environ)
    values: dict[str, object] = {**defaults}
    named = environ.get("CKPTFS_CONFIG")
    file = Path(named) if named else _default_file()
    if named or file.is_file():
        values |= _read(file)
    for variable, field in _ENVIRONMENT.items():
        if environ.get(variable):
            values[field] = environ[variable]
    if values["socket"] == defaults["socket"]:
        values["node_socket"] = NODE_SOCKET
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {error}; correct the value") from None
    for field in _ENVIRONMENT.values():
        if not os.path.isabs(getattr(config, field)):
            raise ConfigError(f"{field} must be an absolute path, not {getattr(config, field)!r}")
    if len(os.fsencode(config.socket)) > SOCKET_BYTES_MAX:
        raise ConfigError(
            f"socket: {config.socket!r} is longer than the {SOCKET_BYTES_MAX} bytes that a unix "
            "socket's path may have; set CKPTFS_SOCKET to a shorter one"
        )
    return config


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


def _read(file: Path) -> dict[str, object]:
    try:
        values = msgspec.toml.decode(file.read_bytes(), type=dict[str, object])
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}; CKPTFS_CONFIG must name a readable file"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    known = Config.__struct_fields__
    for key in values:
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{file}: unknown key {key!r}; {hint}")
    return values
