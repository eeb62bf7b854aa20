"""The image's recipe: its checker finds nothing, and ``./scripts/image-proof`` knows each step."""

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from recipe import (
    Copy,
    RecipeError,
    Step,
    base_and_name,
    context_names,
    copy_of,
    steps,
    variables,
)
from support.manifests import FOLDER

CONTAINERFILE = FOLDER / "Containerfile"
STEPS = list(steps(CONTAINERFILE.read_text()))


def hadolint(file: Path) -> str:
    """What the checker says of a recipe."""
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [program, "--no-color", file], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_the_checker_finds_nothing(tmp_path: Path) -> None:
    assert hadolint(CONTAINERFILE) == ""
    mistaken = tmp_path / "Containerfile"
    mistaken.write_text(CONTAINERFILE.read_text().replace("debian:12.12-slim", "debian"))
    assert "DL3006" in hadolint(mistaken)


def test_the_stages_have_one_pinned_base_and_the_last_is_started() -> None:
    bases = [base_and_name(step.text) for step in STEPS if step.instruction == "FROM"]
    assert [name for _, name in bases] == ["build", ""]
    assert len({base for base, _ in bases}) == 1
    assert all(re.fullmatch(r"debian:\d+\.\d+-slim", base) for base, _ in bases)
    assert STEPS[-1] == Step("ENTRYPOINT", '["ckptfs"]')
    copies = [copy_of(step.text) for step in STEPS if step.instruction == "COPY"]
    assert copies == [Copy("", ".", "."), Copy("build", "/opt/ckptfs", "/opt/ckptfs")]


def test_the_build_sees_all_that_the_package_is_built_of() -> None:
    names = context_names(FOLDER / "Containerfile.dockerignore")
    root = FOLDER.parents[1]
    assert all((root / name).exists() for name in names)
    assert {"ckptfs", "scripts", "systemd", "pyproject.toml", "README.md", "LICENSE"} == set(names)


def test_the_constraints_pin_what_the_image_needs() -> None:
    lines = (FOLDER / "constraints.txt").read_text().splitlines()
    pinned = {canonical(name): text for name, _, text in (line.partition("==") for line in lines)}
    assert all(pinned.values())
    needed = [Requirement(line) for line in requires("ckptfs") or []]
    for each in needed:
        environment = {"python_version": "3.11", "extra": ""}
        extras = [environment | {"extra": extra} for extra in ("", "daemon", "csi")]
        if each.marker is None or any(each.marker.evaluate(extra) for extra in extras):
            assert each.specifier.contains(pinned[canonical(each.name)]), each


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_steps_are_read_as_a_build_reads_them() -> None:
    text = (
        "# a comment\nFROM debian:1.0 AS build\nRUN one \\\n && two \\\n    three\n\nENV A=1 B=2\n"
    )
    assert list(steps(text)) == [
        Step("FROM", "debian:1.0 AS build"),
        Step("RUN", "one && two three"),
        Step("ENV", "A=1 B=2"),
    ]
    assert variables("PATH=/opt/bin:$PATH B='x y'", {"PATH": "/bin"}) == {
        "PATH": "/opt/bin:/bin",
        "B": "x y",
    }


@pytest.mark.parametrize("line", ["USER 0", "ADD a b", "run x", "HEALTHCHECK NONE"])
def test_an_unknown_step_is_refused(line: str) -> None:
    with pytest.raises(RecipeError, match="unknown"):
        list(steps(f"FROM debian:1.0\n{line}\n"))


@pytest.mark.parametrize("text", ["a", "--chown=1 a b", "a b c", "--from=x a b c"])
def test_an_unknown_copy_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="COPY"):
        copy_of(text)
    with pytest.raises(RecipeError, match="FROM"):
        base_and_name(f"{text} as b")


def test_an_ignore_file_that_names_too_much_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ignore"
    for text in ("ckptfs\n", "*\n!scripts/*\n", "*\ntests\n"):
        file.write_text(text)
        with pytest.raises(RecipeError, match="ignore"):
            context_names(file)
