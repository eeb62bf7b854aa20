"""The lines of a TOML file on which its keys stand, for messages. Pure.

The parser of the standard library tells no positions. This scanner finds them in text that the
parser has accepted; of other text it finds what comes before the mistake.
"""

import re
from collections.abc import Iterator

Path = tuple[str, ...]
"""A dotted key, with its table: ``("store", "prod", "uri")``."""

_TOKEN = re.compile(
    r"""
    "{3} (?: \\. | (?!"{3}) . )* "{3,5}   # strings of several lines
    | '{3} (?: (?!'{3}) . )* '{3,5}
    | " (?: \\. | [^"\\\n] )* "
    | ' [^'\n]* '
    | \#[^\n]*
    | [ \t\r]+
    | [^\s\[\]{}",'#=.]+
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
_PLACE = re.compile(r" ?\(at (?:line (\d+), column (\d+)|end of document)\)")


def lines_of(text: str) -> dict[Path, int]:
    """The first line of each key and table, from 1 on. Of a table in braces the line of its key."""
    found: dict[Path, int] = {}
    for path, line, _ in _statements(text):
        for length in range(1, len(path) + 1):
            found.setdefault(path[:length], line)
    return found


def line_of(lines: dict[Path, int], *path: str) -> int:
    """The line of a key, or of the nearest table around it; 0: it is not in the file."""
    return next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 0)


def explained(text: str, error: str) -> tuple[int, str]:
    """Line and text of what the parser said."""
    place = _PLACE.search(error)
    message = _PLACE.sub("", error)
    seen: set[Path] = set()
    for path, line, is_key in _statements(text):
        if is_key and path in seen and "overwrite" in message:
            return line, f"{'.'.join(path)} is set twice"
        if is_key:
            seen.add(path)
    if place and place[1]:
        return int(place[1]), f"{message} at column {place[2]}"
    return max(1, len(text.splitlines())), message


def _statements(text: str) -> Iterator[tuple[Path, int, bool]]:
    """Each table's heading and each key, with its line, and whether it is a key."""
    table: Path = ()
    words: list[str] = []
    line = start = 1
    depth = 0
    part = "key"  # of a statement: key, heading or value
    for token in _TOKEN.findall(text):
        if token == "\n" and not (part == "value" and depth):
            if part == "heading":
                table = tuple(words)
                yield table, start, False
            words, part, depth, start = [], "key", 0, line + 1
        elif part == "value":
            depth += (token in "[{") - (token in "]}")
        elif token == "[" and not words:
            part = "heading"
        elif token == "=":
            yield (*table, *words), start, True
            part = "value"
        elif token not in ".[]" and not token.isspace() and token[0] != "#":
            words.append(token[1:-1] if token[0] in "\"'" else token)
        line += token.count("\n")
    if part == "heading":
        yield tuple(words), start, False
