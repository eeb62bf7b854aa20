"""The package's pages on a narrow terminal: a user can copy each path and command."""

import re
from importlib.resources import files

import pytest

from ckptfs.cli.markdown import Page
from ckptfs.cli.output import Console

PAGES = sorted(path.name for path in files("ckptfs").iterdir() if path.name.endswith(".md"))


def shown(text: str, width: int = 80) -> str:
    """A page as a terminal of that width has it."""
    console = Console(width=width, force_terminal=True, no_color=True)
    with console.capture() as captured:
        console.print(Page(text), crop=False)
    return re.sub(r"\x1b\[[\d;]*m", "", captured.get())


@pytest.mark.parametrize("name", PAGES)
def test_each_line_of_code_is_whole(name: str) -> None:
    text = files("ckptfs").joinpath(name).read_text()
    lines = {line.strip() for line in shown(text).splitlines()}
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in filter(str.strip, block.splitlines()):
            assert line.strip() in lines


def test_a_table_cuts_no_word() -> None:
    path = "/run/ckptfs/" + "x" * 80 + "/control.sock"
    table = f"| key | value |\n| --- | --- |\n| `socket` | `{path}` |\n"
    found = shown(table, width=40)
    assert "…" not in found
    assert path in re.sub(r"\s", "", found)


def test_code_wider_than_the_terminal_is_one_line() -> None:
    command = "docker run " + "--option " * 20 + "image"
    assert command in shown(f"```sh\n{command}\n```\n", width=40)
