"""Globs on the paths of files: ``*`` also matches a slash, and letter case counts."""

import fnmatch
import re
from collections.abc import Callable, Sequence


def matcher(glob: str) -> Callable[[str], object]:
    """A function that returns something true for a path that `glob` matches.

    The pattern lives as long as the function. The functions of ``fnmatch`` keep the last 32,768
    patterns of the process in memory.
    """
    return re.compile(fnmatch.translate(glob)).match


def any_matcher(globs: Sequence[str]) -> Callable[[str], bool]:
    """A function that says whether at least one of `globs` matches a path."""
    matchers = [matcher(glob) for glob in globs]
    return lambda path: any(matches(path) for matches in matchers)
