"""The lines of keys in TOML files, for messages."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs._model.toml_lines import explained, line_of, lines_of

TEXT = '''# a comment = 1
socket = "/a # not a comment"   # one
 "quoted key" = 1

list = [
  "store.x = 1",   # inside
  [1, 2],
]
long = """
key = 1
[table]
\\"""
"""
raw = \'\'\'
other = 2\'\'\'
inline = { file = "x", profile = "y" }
a.b . "c d" = 1
date = 1979-05-27T07:32:00Z

[store.prod]   # prod
uri = "s3://b"
credentials.file = "k"

[ store . "t e" ]
users = ["a",
  "b"]
last = \'\'
[[array.of]]
x = 1'''


def test_lines_of_keys() -> None:
    msgspec.toml.decode(TEXT.encode())
    lines = lines_of(TEXT)
    found = {".".join(path): line for path, line in lines.items() if len(path) < 4}
    assert found == {
        "socket": 2,
        "quoted key": 3,
        "list": 5,
        "long": 9,
        "raw": 14,
        "inline": 16,
        "a": 17,
        "a.b": 17,
        "a.b.c d": 17,
        "date": 18,
        "store": 20,
        "store.prod": 20,
        "store.prod.uri": 21,
        "store.prod.credentials": 22,
        "store.t e": 24,
        "store.t e.users": 25,
        "store.t e.last": 27,
        "array": 28,
        "array.of": 28,
        "array.of.x": 29,
    }
    assert line_of(lines, "store", "prod", "credentials", "file") == 22
    assert line_of(lines, "inline", "profile") == 16
    assert line_of(lines, "store", "prod", "nothing") == 20
    assert line_of(lines, "nothing") == 0


_KEYS = st.text("abcdefghij_", min_size=1, max_size=8)
_VALUES = st.one_of(
    st.integers(-5, 5).map(str),
    st.booleans().map(lambda value: str(value).lower()),
    st.sampled_from(
        ['"a"', '"a # b"', '"[x]"', "'='", '"\\""', "[1, 2]", '[\n 1,\n "]",\n]', "{ x = 1 }"]
    ),
    st.sampled_from(['"""\nx = 1\n"""', "'''\n[y]\n'''", '"""a\n""b"""', '""']),
)


@given(st.dictionaries(_KEYS, _VALUES, max_size=8), st.booleans())
def test_any_file(values: dict[str, str], in_table: bool) -> None:
    text, expected = ("[top]\n", {"top": 1}) if in_table and values else ("", {})
    for key, value in values.items():
        text += "# a = 1\n"
        expected[f"top.{key}" if in_table else key] = text.count("\n") + 1
        text += f"{key} = {value}  # b\n"
    msgspec.toml.decode(text.encode())
    assert {".".join(path): line for path, line in lines_of(text).items()} == expected


@given(st.text(max_size=200))
def test_any_text_has_an_answer(text: str) -> None:
    lines_of(text)
    line, _ = explained(text, "Invalid value (at end of document)")
    assert 1 <= line <= text.count("\n") + len(text.splitlines()) + 1


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a = 1\nlinger_s =\n", 2, "Invalid value"),
        ("a = 1\n\n= 1\n", 3, "Invalid statement"),
        ("a = 1\nb = 2\na = 2\n", 3, "a is set twice"),
        ("[t]\na = 1\n[s]\na = 1\nb = 1\nb = 2\n", 6, "s.b is set twice"),
        ("a = 1\nb = [1,\n2", 3, ""),
    ],
)
def test_mistakes_are_placed(text: str, line: int, words: str) -> None:
    with pytest.raises(msgspec.DecodeError) as caught:
        msgspec.toml.decode(text.encode())
    found, message = explained(text, str(caught.value))
    assert found == line
    assert message.startswith(words)
    assert "at line" not in message
