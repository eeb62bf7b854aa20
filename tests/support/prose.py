"""The prose of a project: sentences of docstrings, comments, messages and Markdown pages."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_WORD = re.compile(r"[A-Za-z][A-Za-z']*")
_IMPERSONAL = re.compile(r"\b(?:whoever|nobody|somebody|anybody)\b", re.IGNORECASE)
_HEADLESS = re.compile(r"(?:What|Who|Whose|Whoever|That) ")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n|\n\s*[-*|] |\n(?=\s*\w+: )")
_DECORATION = re.compile(r"^[\s\"'#*>|`-]+")
_CODE_BLOCK = re.compile(r"```.*?```", re.DOTALL)


class Count(NamedTuple):
    """What a text has of words, of impersonal subjects and of headless sentences.

    Attributes:
        words: Number of words.
        impersonal: Occurrences of whoever, nobody, somebody and anybody, each with its text.
        headless: Sentences that open with a clause in the place of a subject.
    """

    words: int
    impersonal: list[str]
    headless: list[str]


def count(text: str) -> Count:
    """Count one text, which is a docstring, a comment, a message or a paragraph."""
    sentences = [_DECORATION.sub("", each) for each in _SENTENCE_END.split(text)]
    headless = [
        each for each in sentences if _HEADLESS.match(each) and not each.rstrip().endswith("?")
    ]
    impersonal = [each for each in sentences if _IMPERSONAL.search(each)]
    return Count(len(_WORD.findall(text)), impersonal, headless)


def texts(path: Path) -> Iterator[str]:
    """The texts of a Python file or a Markdown page."""
    source = path.read_text()
    if path.suffix == ".md":
        yield from _CODE_BLOCK.sub("", source).split("\n\n")
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value
    yield from _comments(source)


def _comments(source: str) -> Iterator[str]:
    """Comments; those on lines that follow each other are one text."""
    lines: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1 and lines:
            yield " ".join(lines)
            lines = []
        lines.append(token.string.lstrip("# "))
        last = token.start[0]
    if lines:
        yield " ".join(lines)
