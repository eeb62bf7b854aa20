"""Packages whose names are loaded when they are first used (PEP 562)."""

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy(
    package: str, homes: Mapping[str, str], listed: Iterable[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and the ``__dir__`` of a package. A loaded name stays in the package.

    Args:
        package: The package's full name.
        homes: For each name the module that defines it. A submodule is its own home.
        listed: The names for ``dir()`` and tab completion, beside those that each module has.
    """
    shown = sorted(listed)

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(_unknown(package, name, shown))
        module = import_module(homes[name])
        found = module if homes[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, found)
        return found

    def names() -> list[str]:
        given = {name for name in vars(sys.modules[package]) if name.startswith("__")}
        return sorted(given.union(shown))

    return load, names


def _unknown(package: str, name: str, known: list[str]) -> str:
    from difflib import get_close_matches  # only here: most programs spell the names right

    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"module {package!r} has no attribute {name!r}{hint}"
