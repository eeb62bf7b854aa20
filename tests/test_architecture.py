"""The pages for contributors name paths that exist, and leave out no package, script or folder."""

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "ckptfs"
ARCHITECTURE = PACKAGE / "ARCHITECTURE.md"
PAGES = [ARCHITECTURE, PROJECT / "tests" / "README.md", PROJECT / "scripts" / "README.md"]


def paths_in(text: str) -> set[str]:
    """The names between backticks that are paths inside the repository."""
    names = re.findall(r"`([\w./-]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    inside = [name for name in names if not name.startswith(("/", ".", "user."))]
    return {name for name in inside if re.search(r"/|^_\w+$|\.(py|md|toml|json)$", name)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_page_for_contributors_names_paths_that_exist(page: Path) -> None:
    named = paths_in(page.read_text())
    assert len(named) > 10
    folders = page.parent, PROJECT
    assert [name for name in named if not any((top / name).exists() for top in folders)] == []


def test_architecture_map_has_each_package() -> None:
    section = ARCHITECTURE.read_text().split("\n## Packages\n")[1].split("\n## ")[0]
    mapped = re.findall(r"^\| `([\w/]+)` \|", section, re.M)
    packages = {str(p.parent.relative_to(PACKAGE)) for p in PACKAGE.rglob("__init__.py")} - {"."}
    assert sorted(mapped) == sorted(packages)


def test_architecture_glossary_is_short() -> None:
    section = ARCHITECTURE.read_text().split("\n## Glossary\n")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| ", section, re.M)) <= 2 + 15


def test_readme_of_scripts_has_each_entry() -> None:
    text = (PROJECT / "scripts" / "README.md").read_text()
    ignored = {"README.md", "results", "__pycache__"}
    entries = {path.name for path in (PROJECT / "scripts").iterdir()} - ignored
    assert [name for name in sorted(entries) if f"`{name}`" not in text] == []


def test_readme_of_tests_has_each_folder() -> None:
    text = (PROJECT / "tests" / "README.md").read_text()
    folders = {path.name for path in (PROJECT / "tests").iterdir() if path.is_dir()}
    assert [name for name in sorted(folders - {"__pycache__"}) if f"`{name}`" not in text] == []


def test_readme_of_the_project_is_short() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 200
