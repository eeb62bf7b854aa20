"""The layout of help: subclasses of typer's commands and groups.

typer cuts summaries at the terminal's width, lists commands in one column and shows Python's types.
Here a summary is a whole sentence, commands are grouped by their ``rich_help_panel``, and an
argument looks as users write it. The texts state the defaults.
"""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

Function = TypeVar("Function", bound=Callable[..., Any])

HELP_OPTIONS = {"help_option_names": ["--help", "-h"]}
"""Settings of the whole command line, which each command inherits."""


class Command(TyperCommand):
    """A command with this layout."""

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first sentence of the help, of any length."""
        return _summary(self.help or "")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """``[OPTIONS] URI [GLOB]...``."""
        return ["[OPTIONS]", *map(_usage_of, _arguments(self.get_params(ctx)))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, without types and defaults."""
        _write_parameters(self.get_params(ctx), ctx, formatter)


class Group(TyperGroup):
    """A group of commands below their headings."""

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first sentence of the help, of any length."""
        return _summary(self.help or "")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, then the few options."""
        self.format_commands(ctx, formatter)
        _write_parameters(self.get_params(ctx), ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands with their summaries, below their headings."""
        panels: dict[str, list[tuple[str, str]]] = {}
        commands: dict[str, Any] = {name: self.commands[name] for name in self.list_commands(ctx)}
        for name, command in commands.items():
            if not command.hidden:
                panel = command.rich_help_panel
                heading = panel if isinstance(panel, str) else "Commands"
                panels.setdefault(heading, []).append((name, command.get_short_help_str()))
        width = max(map(len, commands))
        for heading, rows in panels.items():
            with formatter.section(heading):
                # One column for all headings.
                formatter.write_dl([(name.ljust(width), text) for name, text in rows])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> None:
        """Run the command line of this process. Unlike typer's method, it raises all exceptions,
        and the entry point of the process reports them."""
        prog_name = prog_name or "ckptfs"
        self._main_shell_completion({}, prog_name, complete_var)
        words = list(sys.argv[1:] if args is None else args)
        with self.make_context(prog_name, words) as context:
            self.invoke(context)


def _summary(text: str) -> str:
    paragraph = " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())
    return re.split(r"(?<!\be\.g)\. ", paragraph)[0].rstrip(".")


def _arguments(parameters: Sequence[Any]) -> list[TyperArgument]:
    return [each for each in parameters if isinstance(each, TyperArgument) and not each.hidden]


def _usage_of(argument: TyperArgument) -> str:
    name = argument.display_name_raw
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs != 1 else "")


def _write_parameters(given: Sequence[Any], ctx: Any, formatter: Any) -> None:
    for heading, rows in parameters(given, ctx):
        with formatter.section(heading):
            formatter.write_dl(rows)


def parameters(given: Sequence[Any], ctx: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """The headings, each with the names and texts of its arguments or options."""
    arguments = [(each.display_name_raw, each.help or "") for each in _arguments(given)]
    options: list[tuple[str, str]] = []
    for each in given:
        record = None if isinstance(each, TyperArgument) else each.get_help_record(ctx)
        if record is not None:
            options.append((record[0], each.help or ""))
    found = [("Arguments", arguments), ("Options", options)]
    return [(heading, rows) for heading, rows in found if rows]


def group(summary: str) -> typer.Typer:
    """A group of commands with this help."""
    return typer.Typer(cls=Group, help=summary, no_args_is_help=True, rich_markup_mode=None)


def examples(*lines: str) -> str:
    """The end of a command's help: examples as typed in a shell."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def command(
    app: typer.Typer, name: str, *lines: str, panel: str | None = None
) -> Callable[[Function], Function]:
    """Decorate a function to make it a command of `app`, with these lines as examples. The list of
    commands shows it below the heading `panel`."""
    return app.command(name, cls=Command, epilog=examples(*lines), rich_help_panel=panel)
