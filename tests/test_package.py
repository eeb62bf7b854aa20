"""The package as installed: what importing it brings in, what it ships, what it says of itself."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import metadata, requires
from importlib.resources import files
from pathlib import Path

import pytest
import typer

import ckptfs
from ckptfs import errors
from ckptfs._config.load import load_config
from ckptfs._model.config import Config
from ckptfs.cli import app

PROJECT = Path(__file__).parents[1]
SHARE = Path(sys.prefix) / "share"
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
    assert not imported_by("import ckptfs._keeper.keeper").intersection(HEAVY)


def test_a_daemon_for_s3_needs_no_pyarrow() -> None:
    imported = imported_by("import ckptfs._daemon.app, ckptfs._store.s3.store")
    assert not imported & {"pyarrow", "numpy", "botocore", "fsspec", "google", "azure"}


def test_the_installed_package_is_tested() -> None:
    source = PROJECT / "ckptfs"
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
        "pyarrow",
        "rich",
        "tomli",
        "typer",
        "urllib3",
    }


def test_types_and_semantics_are_shipped() -> None:
    assert files("ckptfs").joinpath("py.typed").is_file()
    assert files("ckptfs").joinpath("SEMANTICS.md").is_file()


def man_pages() -> dict[str, Path]:
    return {path.name: path for path in SHARE.glob("man/man?/*") if "ckptfs" in path.name}


def test_each_command_and_page_has_a_man_page() -> None:
    commands = getattr(typer.main.get_command(app), "commands", {})
    found = man_pages()
    assert {name for name in found if name.endswith(".1")} == {
        "ckptfs.1",
        *(f"ckptfs-{name}.1" for name in commands),
    }
    for group, command in commands.items():
        text = found[f"ckptfs-{group}.1"].read_text()
        for option in (option for param in command.params for option in param.opts):
            assert option.replace("-", "\\-") in text or not option.startswith("-"), (group, option)
        assert "\n\\fB\\-h, \\-\\-help\\fR\n" in text
        assert "<str>" not in text, "Python's types are not for people"
        assert re.search(r"^\.S[HS] EXAMPLES$", text, re.MULTILINE | re.IGNORECASE)
        for sub in getattr(command, "commands", {}):
            assert f'.SH "CKPTFS {group.upper()} {sub.upper()}"' in text
    others = {f"ckptfs-{page.stem.lower()}.7" for page in Path(ckptfs.__file__).parent.glob("*.md")}
    others ^= {"ckptfs-configuration.7", "ckptfs.toml.5", "mount.ckptfs.8"}
    assert {name for name in found if not name.endswith(".1")} == others
    config = found["ckptfs.toml.5"].read_text()
    assert all(f"\n\\fB{name}\\fR\n" in config for name in Config.__struct_fields__)


def test_man_pages_are_as_man_wants_them() -> None:
    if not shutil.which("man"):
        pytest.skip("there is no man")
    pages = sorted(man_pages().values())
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", *pages],
        env={**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    # A word, e.g. a path, may be wider than the column.
    warnings = [line for line in done.stderr.splitlines() if "break line" not in line]
    assert warnings == []
    assert re.sub(".\b", "", done.stdout).count("\nNAME\n") == len(pages)
    assert "\\f" not in done.stdout


def test_the_example_configuration_is_one(tmp_path: Path) -> None:
    text = (SHARE / "ckptfs/ckptfs.toml").read_text()
    for name in Config.__struct_fields__:
        assert re.search(rf"^#(\[{name}\.\w+\]|{name} = )", text, re.MULTILINE), name
    file = tmp_path / "ckptfs.toml"
    # With all lines in effect that show a setting, and as it is.
    for content in (re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE), text):
        file.write_text(content)
        file.chmod(0o600)
        load_config({"CKPTFS_CONFIG": str(file)})


def test_what_is_built_for_the_shells_is_what_they_are_told() -> None:
    places = {
        "bash": "bash-completion/completions/ckptfs",
        "zsh": "zsh/site-functions/_ckptfs",
        "fish": "fish/vendor_completions.d/ckptfs.fish",
    }
    for shell, place in places.items():
        command = [Path(sys.executable).with_name("ckptfs"), "completion", shell]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout == (SHARE / place).read_text()


def test_units_are_shipped_as_they_are() -> None:
    units = {path.relative_to(SHARE): path for path in SHARE.glob("ckptfs/systemd/*/*")}
    assert len(units) == 4
    for inside, path in units.items():
        source = str(inside.relative_to("ckptfs/systemd")).removeprefix("system/")
        assert path.read_text() == (PROJECT / "systemd" / source).read_text()


def test_the_build_needs_what_the_command_line_imports() -> None:
    text = (PROJECT / "pyproject.toml").read_text()
    required = re.search(r"^requires = (.*)$", text, re.MULTILINE)
    assert required
    brought = {"ckptfs", "markdown_it", "click", *("annotated_doc", "shellingham")}
    brought |= {"typing_extensions", "pygments", "mdurl", "_distutils_hack"}
    allowed = brought | set(re.findall(r'"([a-z]+)', required[1]))
    code = "import ckptfs.cli, sys; sys.modules = {n: m for n, m in sys.modules.items() if "
    code += "'site-packages' in (getattr(m, '__file__', None) or '')}"
    assert {name for name in imported_by(code) if not name.startswith("_")} <= allowed


def test_the_package_says_what_it_is() -> None:
    said = metadata("ckptfs")
    pythons = [line for line in said.get_all("Classifier") or [] if "Python :: 3." in line]
    assert [line.rpartition("3.")[2] for line in pythons] == ["10", "11", "12", "13", "14"]
    assert said["Author"]
    assert said["Keywords"]
    assert said["License-Expression"] == "Apache-2.0"


def test_each_promise_names_tests_that_exist() -> None:
    text = files("ckptfs").joinpath("SEMANTICS.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    promises = text.split("\n## ")[1:]
    assert [promise for promise in promises if "\nTests: `test_" not in promise] == []
    sources = [path.read_text() for path in Path(__file__).parent.rglob("test_*.py")]
    defined = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    assert named
    assert named - defined == set()


FOLDERS = "ckptfs", "scripts", "tests"
PAGES = [PROJECT / "README.md", *(p for f in FOLDERS for p in sorted((PROJECT / f).rglob("*.md")))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_each_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", _without_code(page.read_text())):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.is_file(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", _without_code(target.read_text()), re.MULTILINE)
            assert heading in {_anchor(title) for title in titles}, link


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def _anchor(title: str) -> str:
    """As GitHub makes it: in lower case, words joined by hyphens, other characters left out."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


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
        ckptfs.nonsense  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue] - on purpose
