"""The configuration is strict: what is not known, or cannot be meant, is an error that names it."""

import os
from importlib.resources import files
from pathlib import Path

import msgspec
import pytest

from ckptfs._config import Flags, flags_variable, load_config, parse_setting
from ckptfs._config import load as load_all
from ckptfs._model.config import Config
from ckptfs._model.settings import changes, settings_markdown, settings_of
from ckptfs._model.stores import CredentialSource, StoreTable
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


def test_where_each_setting_comes_from(file: Path) -> None:
    file.write_text('socket = "/file/s"\nmount = "/file/m"\ncache_dir = "/file/c"\nlinger_s = 3\n')
    environ = {"CKPTFS_CONFIG": str(file), "CKPTFS_MOUNT": "/e/m", "CKPTFS_CACHE_DIR": "/e/c"}
    flags = Flags("", {"cache_dir": "/f/c", "spare": False}, {"cache_dir": "--cache-dir"})
    loaded = load_all(environ, flags)
    config, sources = loaded.config, loaded.sources
    assert loaded.file == file
    assert (config.socket, sources["socket"]) == ("/file/s", f"file:{file}")
    assert (config.linger_s, sources["linger_s"]) == (3, f"file:{file}")
    assert (config.mount, sources["mount"]) == ("/e/m", "CKPTFS_MOUNT")
    assert (config.cache_dir, sources["cache_dir"]) == ("/f/c", "--cache-dir")
    assert sources["restart"] == "default"
    assert not config.spare
    # As the keeper and its daemons have them.
    assert load_all(environ | flags_variable(flags)) == loaded
    other = file.with_name("other.toml")
    other.write_text("linger_s = 4")
    loaded = load_all(environ, Flags(config=str(other)))
    assert (loaded.config.linger_s, loaded.file) == (4, other)


def test_errors_name_their_source(file: Path) -> None:
    file.write_text("")
    environ = {"CKPTFS_CONFIG": str(file)}
    with pytest.raises(ConfigError, match=r"^--set: Expected `float`.*`linger_s`"):
        load_config(environ, Flags("", {"linger_s": "x"}, {"linger_s": "--set"}))
    with pytest.raises(ConfigError, match=r"x\.toml: No such file.*--config must name"):
        load_config(environ, Flags(config=str(file.with_name("x.toml"))))


def test_settings_on_the_command_line() -> None:
    assert parse_setting("linger_s=3") == ("linger_s", 3)
    assert parse_setting("cache_bytes_max = 5G") == ("cache_bytes_max", "5G")
    assert parse_setting('mount="/a=b"') == ("mount", "/a=b")
    assert parse_setting("restart=false") == ("restart", False)
    with pytest.raises(ConfigError, match="did you mean 'linger_s'"):
        parse_setting("lingers_s=3")
    with pytest.raises(ConfigError, match="like key=value"):
        parse_setting("linger_s")


def test_bytes_can_have_units(file: Path) -> None:
    config = load(file, 'cache_bytes_max = "1.5TiB"\nin_flight_bytes_max = 5\n')
    assert (config.cache_bytes_max, config.in_flight_bytes_max) == (3 << 39, 5)
    with pytest.raises(ConfigError, match=r"ckptfs\.toml: cache_bytes_max: 'much' is no size"):
        load(file, 'cache_bytes_max = "much"')
    with pytest.raises(ConfigError, match="linger_s"):
        load(file, 'linger_s = "5G"')


def test_a_file_that_others_may_write_is_refused(file: Path) -> None:
    load(file)
    file.chmod(0o646)
    with pytest.raises(ConfigError, match="writable by others"):
        load(file)
    file.chmod(0o644)
    assert load_config({"CKPTFS_CONFIG": os.devnull})
    with pytest.raises(ConfigError, match="longer than"):
        load(file, "#" * 300_000)


def test_each_setting_says_what_it_is_and_when_it_changes() -> None:
    names = list(Config.__struct_fields__)
    assert list(changes()) == names
    fixed = [name for name, change in changes().items() if change == "mount"]
    assert fixed == [
        "socket",
        "node_socket",
        "mount",
        "cache_dir",
        "read_ahead_kb",
        "passthrough",
        "allow_other",
        "log_level",
        "log_format",
        "metrics",
    ]
    for kind in (Config, StoreTable, CredentialSource):
        assert all(setting.text.endswith((".", ";", "below.")) for setting in settings_of(kind))


def test_the_page_on_settings_says_what_the_code_says() -> None:
    page = files("ckptfs").joinpath("CONFIGURATION.md").read_text()
    _, _, rest = page.partition("<!-- of the code -->\n")
    table, _, _ = rest.partition("\n<!-- end -->")
    assert table == settings_markdown(), "put this into CONFIGURATION.md:\n" + settings_markdown()
