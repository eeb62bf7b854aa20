"""The pages of the package on a terminal."""

from collections.abc import Iterator
from typing import ClassVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markdown import CodeBlock, Markdown, MarkdownElement, TableElement
from rich.table import Table
from rich.text import Text


class _Table(TableElement):
    """A table that folds a word which is wider than its column. rich would cut it, and so lose a
    path or a variable."""

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        for made in super().__rich_console__(console, options):
            if isinstance(made, Table):
                for column in made.columns:
                    column.overflow = "fold"
                yield made


class _Code(CodeBlock):
    """Code as in the page. rich would pad and break its lines, also for a user who copies them."""

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield Text(str(self.text).rstrip(), style="cyan", no_wrap=True, overflow="ignore")


class Page(Markdown):
    """Markdown that keeps texts whole which a user may copy. Print it with ``crop=False``."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "table_open": _Table,
        "fence": _Code,
        "code_block": _Code,
    }
