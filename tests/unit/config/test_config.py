"""The configuration is strict: what is not known, or cannot be meant, is an error that names it."""

import os
from importlib.resources import files
from pathlib import Path

import msgspec
import pytest
from support.pages import settings_markdown

from ckptfs._config.load import Flags, flags_variable, load_config, parse_setting
from ckptfs._config.load import load as load_all
from ckptfs._model.config import Config, changes, descriptions
from ckptfs._model.named_store import CredentialSource, StoreTable
from ckptfs.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ckptfs.toml"


def load(file: Path, text: "str | bytes" = "", **environ: str) -> Config:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config({"CKPTFS_CONFIG": str(file), **environ})


def test_config_is_read_from_defaults_then_file_then_environment(file: Path) -> None:
    default = load(file)
    assert (default.linger_s, default.span_bytes_max) == (10.0, 8 << 20)
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


def test_config_with_a_missing_named_file_is_an_error(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"ckptfs\.toml: No such file"):
        load_config({"CKPTFS_CONFIG": str(file)})
    with pytest.raises(ConfigError, match="CKPTFS_CONFIG"):
        load_config({"CKPTFS_CONFIG": str(file.parent)})


def test_an_unknown_key_is_an_error_with_the_nearest_name(file: Path) -> None:
    with pytest.raises(ConfigError, match="'lingers_s'; did you mean 'linger_s'"):
        load(file, "lingers_s = 1")
    with pytest.raises(ConfigError, match="'zzz'; ckptfs help config lists all"):
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
def test_config_with_an_invalid_value_is_an_error(file: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"ckptfs\.toml") as caught:
        load(file, text)
    assert "\n" not in str(caught.value)
    assert text.partition(" ")[0] in str(caught.value)


@pytest.mark.parametrize("text", ["linger_s =", "= 1", b"\xff\xfe", "a = 1\na = 2"])
def test_config_with_invalid_toml_is_an_error(file: Path, text: "str | bytes") -> None:
    with pytest.raises(ConfigError, match=r"ckptfs\.toml:[12]: not valid TOML"):
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
        config.linger_s = 5  # pyright: ignore[reportAttributeAccessIssue] - it is frozen
    assert msgspec.structs.replace(config, linger_s=5.0).linger_s == 5.0


def test_config_names_the_source_of_each_setting(file: Path) -> None:
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
    with pytest.raises(ConfigError, match=r"^--set: linger_s must be a number of seconds from 0"):
        load_config(environ, Flags("", {"linger_s": "x"}, {"linger_s": "--set"}))
    with pytest.raises(ConfigError, match=r"x\.toml: No such file.*--config must name"):
        load_config(environ, Flags(config=str(file.with_name("x.toml"))))


def test_parse_setting_returns_key_and_value() -> None:
    assert parse_setting("linger_s=3") == ("linger_s", 3)
    assert parse_setting("cache_bytes_max = 5G") == ("cache_bytes_max", "5G")
    assert parse_setting('mount="/a=b"') == ("mount", "/a=b")
    assert parse_setting("restart=false") == ("restart", False)
    with pytest.raises(ConfigError, match="did you mean 'linger_s'"):
        parse_setting("lingers_s=3")
    with pytest.raises(ConfigError, match="--set linger_s: has no value; write --set KEY=VALUE"):
        parse_setting("linger_s")


def test_bytes_can_have_units(file: Path) -> None:
    config = load(file, 'cache_bytes_max = "1.5TiB"\nin_flight_bytes_max = 5\n')
    assert (config.cache_bytes_max, config.in_flight_bytes_max) == (3 << 39, 5)
    with pytest.raises(
        ConfigError, match=r"ckptfs\.toml:1: cache_bytes_max must be a number of bytes"
    ):
        load(file, 'cache_bytes_max = "much"')
    with pytest.raises(ConfigError, match="linger_s"):
        load(file, 'linger_s = "5G"')


@pytest.mark.parametrize("name", Config.__struct_fields__)
def test_each_error_has_a_line_and_says_what_is_wanted(file: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, f"# one\n\n{name} = 1979-05-27\n")
    line = str(caught.value)
    assert line.startswith(f"{file}:3: {name} must be ")
    assert "Expected" not in line
    assert "$" not in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            'read_deadline_s = "abc"',
            "read_deadline_s must be a number of seconds from 0 to 1,000,000, or text such as "
            '"30s" or "5min", not "abc"',
        ),
        ("linger_s = -1", "linger_s must be a number of seconds from 0 to 1,000,000"),
        ("linger_s = inf", "not inf"),
        ('idle_exit_s = "20d"', 'not "20d"'),
        (
            'cache_bytes_max = "much"',
            "cache_bytes_max must be a number of bytes of at least 0, or text such as "
            '"500G" or "64MiB", not "much"',
        ),
        ("connections_max = 2.5", "connections_max must be a whole number from 1 to 100,000"),
        ("connections_max = true", "not true"),
        ("reply_threads = 65", 'reply_threads must be a whole number from 0 to 64, or "auto"'),
        ('idle_memory_bytes = "much"', 'or text such as "500G" or "64MiB", or "auto", not "much"'),
        ("fetch_processes = 33", 'fetch_processes must be a whole number from 0 to 32, or "auto"'),
        ("cache_free_share_min = 2", "cache_free_share_min must be a number from 0 to 0.95, not 2"),
        ("allow_other = 1", "allow_other must be true or false, not 1"),
        ("socket = 5", "socket must be text in quotes, not 5"),
        ("socket = [5]", "socket must be text in quotes, not a list"),
        (
            'log_level = "loud"',
            'log_level must be one of "debug", "error", "info", "warning", not "loud"',
        ),
        ('metrics = "0.0.0.0:1"', 'metrics must be an address such as "127.0.0.1:9467"'),
        (f'mount = "{"x" * 50}"', "mount must be an absolute path, not 'xxx"),
        (f'socket = "/{"x" * 200}"', "which is longer than the 107 bytes"),
        ("lingers_s = 1", "unknown key 'lingers_s'; did you mean 'linger_s'?"),
        ("store = 5", "store must be tables, such as [store.prod]"),
    ],
)
def test_config_errors_have_line_and_words(file: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, f"spare = true\n{text}\nrestart = true\n")
    assert str(caught.value).startswith(f"{file}:2: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("table", "line", "words"),
    [
        ('uri = "s3://b"\nregoin = "x"', 5, "unknown key 'regoin' in [store.prod]; did you mean"),
        ('uri = "s3://b"\nrequester_pays = "x"', 5, "store.prod.requester_pays must be true or"),
        ('uri = "s3://b"\ncredentials = "SECRET"', 5, 'credentials must be "default", "anonymous"'),
        (
            'uri = "s3://b"\n\ncredentials = { fiel = "SECRET" }',
            6,
            "unknown key 'fiel' in [store.prod.credentials]; did you mean 'file'?",
        ),
        ('uri = "s3://b"\n[store.prod.credentials]\nfile = 7', 6, "must be text in quotes"),
        ('uri = "s3://b"\nusers = 5', 5, "store.prod.users must be a list of names or numbers, or"),
        ('region = "x"', 3, "[store.prod] has no uri; give e.g."),
        ('uri = "ftp://b"', 4, "store.prod.uri: must begin with one of s3://"),
        ('uri = "gs://b"\nregion = "x"', 5, "store.prod.region: a store at gs:// has no such key"),
    ],
)
def test_config_errors_in_tables_of_stores_have_line_and_words(
    file: Path, table: str, line: int, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, f"spare = true\n\n[store.prod]\n{table}\n")
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert words in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_errors_of_variables_name_them(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^CKPTFS_MOUNT: mount must be an absolute path"):
        load(file, CKPTFS_MOUNT="relative")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("500ms", 0.5), ("5min", 300), ("1.5 h", 5400), ("7d", 604800)],
)
def test_durations_can_have_units(file: Path, text: str, seconds: float) -> None:
    keys = [name for name in Config.__struct_fields__ if name.endswith("_s")]
    assert len(keys) >= 5
    config = load(file, "".join(f'{key} = "{text}"\n' for key in keys))
    assert {getattr(config, key) for key in keys} == {seconds}
    key, value = parse_setting(f"linger_s={text}")
    set_ = load_config({"CKPTFS_CONFIG": str(file)}, Flags("", {key: value}, {key: "--set"}))
    assert set_.linger_s == seconds


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
        "idle_memory_bytes",
        "read_ahead_kb",
        "reply_threads",
        "passthrough",
        "allow_other",
        "leave_job",
        "log_level",
        "log_format",
        "metrics",
    ]
    for kind in (Config, StoreTable, CredentialSource):
        assert all(str(meta.description).endswith(".") for meta in descriptions(kind).values())


def test_the_page_on_settings_says_what_the_code_says() -> None:
    page = files("ckptfs").joinpath("CONFIGURATION.md").read_text()
    _, _, rest = page.partition("<!-- of the code -->\n")
    table, _, _ = rest.partition("\n<!-- end -->")
    assert table == settings_markdown(), "put this into CONFIGURATION.md:\n" + settings_markdown()
