"""Reads the recipe of an image: the instructions of a Containerfile, and what its build sees.

It knows the instructions that scripts/kubernetes/Containerfile has, and refuses others, so that no
step of the recipe goes unnoticed.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KNOWN = frozenset(["FROM", "RUN", "COPY", "ENV", "WORKDIR", "ENTRYPOINT"])
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class Step(NamedTuple):
    """One instruction, such as ``RUN``, and the text after it, in one line."""

    instruction: str
    text: str

    def __str__(self) -> str:
        return f"{self.instruction} {self.text}"


class Copy(NamedTuple):
    """A ``COPY``: the stage that it copies from ("" for the build's context), and two paths."""

    stage: str
    source: str
    target: str


class RecipeError(Exception):
    """The recipe has something that this module does not know."""


def steps(text: str) -> Iterator[Step]:
    """The instructions of a recipe, in order. Raises RecipeError."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    for line in filter(None, map(str.strip, joined.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction not in KNOWN:
            raise RecipeError(
                f"{line}: unknown instruction; known ones: {', '.join(sorted(KNOWN))}"
            )
        yield Step(instruction, rest.strip())


def base_and_name(text: str) -> tuple[str, str]:
    """The image and the name of a stage, of the text of a ``FROM``. Raises RecipeError."""
    match text.split():
        case [base]:
            return base, ""
        case [base, "AS", name]:
            return base, name
        case _:
            raise RecipeError(f"FROM {text}: not an image, or an image AS a name")


def copy_of(text: str) -> Copy:
    """The text of a ``COPY``. Raises RecipeError."""
    match text.split():
        case [source, target] if not source.startswith("--"):
            return Copy("", source, target)
        case [flag, source, target] if flag.startswith("--from="):
            return Copy(flag.removeprefix("--from="), source, target)
        case _:
            raise RecipeError(f"COPY {text}: not a source and a target")


def variables(text: str, known: dict[str, str]) -> dict[str, str]:
    """The variables that an ``ENV`` sets, beside the `known` ones."""
    found = dict(known)
    for word in shlex.split(text):
        name, _, value = word.partition("=")
        found[name] = _VARIABLE.sub(lambda m: known.get(m[1] or m[2], ""), value)
    return found


def context_names(ignore_file: Path) -> list[str]:
    """The names at the top of the checkout that a build sees. Raises RecipeError, unless the file
    first ignores everything and then names what it does not ignore."""
    first, *others = ignore_file.read_text().split()
    if first != "*" or not all(re.fullmatch(r"![\w.]+", each) for each in others):
        raise RecipeError(f"{ignore_file}: not * and then names after an exclamation mark")
    return [each[1:] for each in others]
