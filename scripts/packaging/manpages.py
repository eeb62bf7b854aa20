"""Man pages of the commands (section 1) and of the package's pages (5, 7 and 8), as man(7) source.

``ckptfs`` has a page for each of its commands, as git has; the commands of a group are in the
group's page. A page of the package is Markdown, which `markdown_it` reads and ``_Roff`` writes.
"""

import contextlib
import io
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token

from ckptfs.cli import app, help_text, mount_helper

_SECTIONS = {"CONFIGURATION": "ckptfs.toml.5"}
"""Pages whose name is not ckptfs-PAGE.7."""
_MARKDOWN = MarkdownIt().enable("table")
_FILES = """\
.TP
.I /etc/ckptfs.toml
Settings of root's daemon; of another user's daemon, ~/.config/ckptfs/ckptfs.toml.
.TP
.I PREFIX/share/ckptfs/ckptfs.toml
An example of that file, where ckptfs is installed: all settings with their defaults.
.TP
.I /run/ckptfs/mnt
The mount of root's daemon; of another user's daemon, /tmp/ckptfs-UID/mnt.
.TP
.I /var/cache/ckptfs
The cache of root's daemon, with its log; of another user's daemon, ~/.cache/ckptfs.
"""


def pages(package: Path, version: str) -> dict[str, str]:
    """All man pages, each by its path below ``share/``."""
    root = typer.main.get_command(app)
    context = typer.Context(root, info_name="ckptfs", **root.context_settings)
    commands: dict[str, Any] = getattr(root, "commands", {})
    markdown = {
        _SECTIONS.get(page.stem, f"ckptfs-{page.stem.lower()}.7"): page.read_text()
        for page in package.glob("*.md")
    }
    helper = f"# what mount(8) runs for the types ckptfs and fuse.ckptfs\n\n{mount_helper.__doc__}"
    markdown["mount.ckptfs.8"] = helper
    titles = {name: _title(text) for name, text in markdown.items()}
    others = {f"ckptfs-{name}.1": _summary(command) for name, command in commands.items()}
    made = {"ckptfs.1": _main_page(context, others, titles)}
    for name, command in commands.items():
        made[f"ckptfs-{name}.1"] = _command_page(command, context, f"ckptfs-{name}")
    for name, text in markdown.items():
        made[name] = _name(name.rpartition(".")[0], titles[name]) + _Roff(text).source()
    return {f"man/man{name[-1]}/{name}": _head(name, version) + made[name] for name in made}


def completion(shell: str) -> str:
    """The script by which a shell completes the command line."""
    with contextlib.redirect_stdout(io.StringIO()) as script:
        typer.main.get_command(app).main(["completion", shell], "ckptfs", standalone_mode=False)
    return script.getvalue()


def _head(name: str, version: str) -> str:
    title, _, section = name.rpartition(".")
    # Words of commands and paths are neither split nor spread over the line.
    return f'.TH {title.upper()} {section} "" "ckptfs {version}"\n.nh\n.ad l\n'


def _name(name: str, about: str) -> str:
    return f".SH NAME\n{_text(name)} \\- {_text(about)}\n"


def _title(text: str) -> str:
    title = text.partition("\n")[0].strip("# ")
    return title[:1].lower() + title[1:]


def _summary(command: Any) -> str:
    """The first sentence of a command's help, as a line."""
    first: str = command.get_short_help_str()
    return first[:1].lower() + first[1:]


def _main_page(context: Any, others: dict[str, str], titles: dict[str, str]) -> str:
    root = context.command
    parts = [_name("ckptfs", _summary(root)), _synopsis(root, context)]
    parts += [".SH DESCRIPTION\n", _paragraphs(root.help)]
    parts += [_parameters(root, context, ".SH"), ".SH COMMANDS\n"]
    parts += [_tagged(_link(name), _text(about)) for name, about in others.items()]
    parts += [_epilog(root, ".SH"), ".SH FILES\n", _FILES, ".SH SEE ALSO\n"]
    parts += [_tagged(_link(name), _text(about)) for name, about in sorted(titles.items())]
    return "".join(parts)


def _command_page(command: Any, parent: Any, name: str) -> str:
    context = typer.Context(command, parent=parent, info_name=command.name)
    parts = [_name(name, _summary(command)), _synopsis(command, context)]
    parts += [".SH DESCRIPTION\n", _paragraphs(command.help)]
    parts += [_parameters(command, context, ".SH"), _epilog(command, ".SH")]
    for sub in getattr(command, "commands", {}).values():
        below = typer.Context(sub, parent=context, info_name=sub.name)
        parts += [f'.SH "{_text(below.command_path).upper()}"\n', _usage(sub, below)]
        parts += [".PP\n", _paragraphs(sub.help), _parameters(sub, below, ".SS")]
        parts += [_epilog(sub, ".SS")]
    see = "ckptfs.1", "ckptfs.toml.5", "ckptfs-semantics.7"
    return "".join([*parts, ".SH SEE ALSO\n", ",\n".join(_link(name) for name in see), "\n"])


def _synopsis(command: Any, context: Any) -> str:
    return ".SH SYNOPSIS\n" + _usage(command, context)


def _usage(command: Any, context: Any) -> str:
    pieces = " ".join(command.collect_usage_pieces(context)).replace("{", "").replace("}", "")
    return f".B {_text(context.command_path)}\n{_text(pieces)}\n"


def _parameters(command: Any, context: Any, macro: str) -> str:
    """Arguments and options as --help has them, each below a heading of its own."""
    parts: list[str] = []
    for heading, rows in help_text.parameters(command.get_params(context), context):
        parts.append(f"{macro} {heading.upper() if macro == '.SH' else heading}\n")
        parts += [_tagged(f"\\fB{_text(name)}\\fR", _text(about)) for name, about in rows]
    return "".join(parts)


def _epilog(command: Any, macro: str) -> str:
    """The paragraphs below --help, whose first lines are their headings. Topics are left out: each
    has a page."""
    parts: list[str] = []
    for paragraph in (command.epilog or "").split("\n\n"):
        heading, _, lines = paragraph.lstrip("\b\n").partition("\n")
        title = heading.rstrip(":")
        if lines and not title.startswith("Topics"):
            parts.append(f"{macro} {title.upper() if macro == '.SH' else title}\n")
            parts.append(_verbatim(textwrap.dedent(lines)))
    return "".join(parts)


def _paragraphs(text: str | None) -> str:
    """A command's help; a paragraph behind a line with \\b alone stays as it is."""
    parts: list[str] = []
    for paragraph in textwrap.dedent(text or "").strip().split("\n\n"):
        if paragraph.startswith("\b"):
            parts.append(_verbatim(paragraph.lstrip("\b\n")))
        else:
            parts.append(_text(" ".join(paragraph.split())) + "\n")
    return ".PP\n".join(parts)


def _tagged(tag: str, text: str) -> str:
    return f".TP\n{tag}\n{text or '.br'}\n"


def _link(name: str) -> str:
    title, _, section = name.rpartition(".")
    return f"\\fB{_text(title)}\\fR({section})"


def _verbatim(text: str) -> str:
    return f".RS 4\n.nf\n{_text(text.rstrip())}\n.fi\n.RE\n"


def _text(text: str) -> str:
    """Text in which nothing is a request or an escape, with hyphens that can be copied."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.MULTILINE)


class _Roff:
    """One Markdown page. Its title is left out; a heading of the second level is a section."""

    def __init__(self, text: str) -> None:
        without_tests = re.sub(r"\n\nTests: `test_.*?(?=\n\n|\Z)", "", text, flags=re.DOTALL)
        self._tokens = iter(_MARKDOWN.parse(without_tests))
        self._columns: list[str] = []
        self._row: list[str] = []

    def source(self) -> str:
        text = ".SH DESCRIPTION\n" + "".join(self._blocks())
        return re.sub(r"^(\.S[HS] .*\n)\.PP\n", r"\1", text, flags=re.MULTILINE)

    def _blocks(self) -> Iterator[str]:
        for token in self._tokens:
            if token.type == "heading_open":
                title = _text(next(self._tokens).content.replace("`", ""))
                if token.tag != "h1":
                    yield f'.SH "{title}"\n' if token.tag == "h2" else f'.SS "{title}"\n'
            elif token.type in ("fence", "code_block"):
                yield ".PP\n" + _verbatim(token.content)
            elif token.type == "paragraph_open":
                # In a list the item's mark stands in front already.
                yield "" if token.hidden else ".PP\n" * (token.level == 0)
            elif token.type == "list_item_open":
                mark = f"{token.info}." if token.info else "\\(bu"
                yield f".IP {mark} 3\n"
            elif token.type in ("bullet_list_open", "ordered_list_open") and token.level:
                yield ".RS 3\n"
            elif token.type in ("bullet_list_close", "ordered_list_close") and token.level:
                yield ".RE\n"
            elif token.type == "tr_open":
                self._row = []
            elif token.type == "thead_close":
                self._columns = self._row
            elif token.type == "tr_close" and token.level > 1 and self._columns:
                yield self._row_of_table()
            elif token.type == "table_close":
                self._columns = []
            elif token.type in ("td_open", "th_open"):
                self._row.append(_inline(next(self._tokens)))
            elif token.type == "inline":
                yield _inline(token) + "\n"

    def _row_of_table(self) -> str:
        """The first column is the tag; of the others the columns without a title come first."""
        tag, *cells = self._row
        named = list(zip(self._columns[1:], cells, strict=True))
        texts = [cell for title, cell in named if cell and not title]
        texts += [f"({title}: {cell})" for title, cell in named if cell and title]
        return _tagged(tag or "\\ ", "\n".join(texts))


def _inline(token: Token) -> str:
    marks = {"strong_open": "\\fB", "strong_close": "\\fR", "em_open": "\\fI", "em_close": "\\fR"}
    parts: list[str] = []
    for child in token.children or []:
        if child.type == "text":
            parts.append(_text(child.content))
        elif child.type == "code_inline":
            parts.append(f"\\fB{_text(child.content)}\\fR")
        elif child.type in ("softbreak", "hardbreak"):
            parts.append("\n")
        else:
            # Of a picture its description is left, in italics.
            is_picture = child.type == "image"
            parts.append(
                f"\\fI{_text(child.content)}\\fR" if is_picture else marks.get(child.type, "")
            )
    # A line must not begin as a request does, also behind a mark.
    return re.sub(r"^([.'])", r"\\&\1", "".join(parts), flags=re.MULTILINE)
