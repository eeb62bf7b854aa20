"""The package as installed: what importing it brings in, what it ships, what it says of itself."""

import re
import subprocess
import sys
from importlib.metadata import requires
from importlib.resources import files
from pathlib import Path

import pytest

import ckptfs
from ckptfs import errors

HEAVY = ("trio", "pyfuse3", "ray", "typer", "rich", "fsspec", "pyarrow")


def imported_by(code: str) -> set[str]:
    """Top-level modules that are loaded after `code`."""
    show = "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code + show], check=True, stdout=subprocess.PIPE, text=True, cwd="/"
    )
    return set(done.stdout.split())


def test_importing_ckptfs_is_light() -> None:
    assert not imported_by("import ckptfs").intersection(HEAVY)
    assert not imported_by("import ckptfs; ckptfs.Checkpoint").intersection(HEAVY) - {"pyarrow"}


def test_the_keeper_is_small() -> None:
    assert not imported_by("import ckptfs._daemon.keeper").intersection(HEAVY)


def test_a_daemon_for_s3_needs_no_pyarrow() -> None:
    imported = imported_by("import ckptfs._daemon.app, ckptfs._store.s3")
    assert not imported & {"pyarrow", "numpy", "botocore", "fsspec"}


def test_the_installed_package_is_tested() -> None:
    source = Path(__file__).parents[1] / "ckptfs"
    installed = Path(ckptfs.__file__).parent
    assert installed != source, "the tests must run against the installed package: scripts/setup"


def test_a_client_needs_no_compiler() -> None:
    plain = {
        re.split(r"[^\w-]", line)[0] for line in requires("ckptfs") or [] if "extra" not in line
    }
    assert plain == {
        "azure-identity",
        "botocore",
        "google-auth",
        "msgspec",
        "platformdirs",
        "pyarrow",
        "rich",
        "tomli",
        "typer",
        "urllib3",
    }


def test_types_and_semantics_are_shipped() -> None:
    assert files("ckptfs").joinpath("py.typed").is_file()
    assert files("ckptfs").joinpath("SEMANTICS.md").is_file()


def test_each_promise_names_tests_that_exist() -> None:
    text = files("ckptfs").joinpath("SEMANTICS.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    promises = text.split("\n## ")[1:]
    assert [promise for promise in promises if "\nTests: `test_" not in promise] == []
    sources = [path.read_text() for path in Path(__file__).parent.rglob("test_*.py")]
    defined = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    assert named
    assert named - defined == set()


def test_all_errors_can_be_imported_from_the_root() -> None:
    assert all(getattr(ckptfs, cls.__name__) is cls for cls in errors.BY_CODE.values())


def test_error_codes_are_unique() -> None:
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.CkptfsError)
    ]
    assert len(errors.BY_CODE) == len(classes)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ckptfs.nonsense  # noqa: B018
