"""The configuration is strict: what is not known, or cannot be meant, is an error that names it."""

from pathlib import Path

import msgspec
import pytest

from ckptfs._config import load_config
from ckptfs.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ckptfs.toml"


def load(file: Path, text: "str | bytes" = "", **environ: str) -> object:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config({"CKPTFS_CONFIG": str(file), **environ})


def test_defaults_then_file_then_environment(file: Path) -> None:
    default = load(file)
    assert (default.linger_s, default.connections_max) == (10.0, 16)
    assert all(Path(p).is_absolute() for p in (default.socket, default.mount, default.cache_dir))
    text = 'socket = "/file/s"\nmount = "/file/m"\nlinger_s = 3\nallow_other = true\n'
    config = load(file, text, CKPTFS_MOUNT="/environ/m", CKPTFS_CACHE_DIR="/environ/c")
    assert (config.socket, config.mount, config.cache_dir) == (
        "/file/s",
        "/environ/m",
        "/environ/c",
    )
    assert (config.linger_s, config.allow_other) == (3.0, True)
    assert load(file, text, CKPTFS_MOUNT="").mount == "/file/m"  # empty: not set


def test_the_file_that_is_named_must_be_there(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"ckptfs\.toml: No such file"):
        load_config({"CKPTFS_CONFIG": str(file)})
    with pytest.raises(ConfigError, match="CKPTFS_CONFIG"):
        load_config({"CKPTFS_CONFIG": str(file.parent)})


def test_an_unknown_key_is_an_error_with_the_nearest_name(file: Path) -> None:
    with pytest.raises(ConfigError, match="'lingers_s'; did you mean 'linger_s'"):
        load(file, "lingers_s = 1")
    with pytest.raises(ConfigError, match=r"'zzz'; known keys: .*linger_s"):
        load(file, "zzz = 1")
    with pytest.raises(ConfigError, match="'cache'"):
        load(file, '[cache]\ndir = "/x"')


@pytest.mark.parametrize(
    "text",
    [
        'linger_s = "ten"',
        "linger_s = -1",
        "linger_s = 1e9",
        "linger_s = nan",
        "read_deadline_s = inf",
        "connections_max = 0",
        "connections_max = 2.5",
        "connections_max = true",
        "cache_bytes_max = -1",
        "cache_free_share_min = 1.5",
        "files_max = 0",
        "allow_other = 1",
        "socket = 5",
    ],
)
def test_a_value_that_cannot_be_meant_is_an_error(file: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"ckptfs\.toml") as caught:
        load(file, text)
    assert "\n" not in str(caught.value)
    assert text.partition(" ")[0] in str(caught.value)


@pytest.mark.parametrize("text", ["linger_s =", "= 1", b"\xff\xfe", "a = 1\na = 2"])
def test_what_is_no_toml_is_an_error(file: Path, text: "str | bytes") -> None:
    with pytest.raises(ConfigError, match=r"ckptfs\.toml: not valid TOML"):
        load(file, text)


@pytest.mark.parametrize("field", ["socket", "mount", "cache_dir"])
def test_paths_must_be_absolute(file: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}.* absolute"):
        load(file, f'{field} = "relative/path"')
    with pytest.raises(ConfigError, match=f"{field}.* absolute"):
        load(file, **{f"CKPTFS_{field.upper()}": "relative/path"})


def test_a_configuration_does_not_change(file: Path) -> None:
    config = load(file)
    with pytest.raises(AttributeError):
        config.linger_s = 5
    assert msgspec.structs.replace(config, linger_s=5.0).linger_s == 5.0
