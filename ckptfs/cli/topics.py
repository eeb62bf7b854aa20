"""``help``: how to use it, what it promises, and what it tells Prometheus."""

import sys
from importlib.resources import files
from typing import Annotated, Any

import typer

_TOPICS = {
    "config": ("CONFIGURATION.md", "all settings, and named stores"),
    "semantics": ("SEMANTICS.md", "what a mounted checkpoint promises"),
    "metrics": ("METRICS.md", "what a daemon tells Prometheus"),
}
"""Documents of the package, each with what it is about."""
LIST = "Topics of ckptfs help: " + ", ".join(
    f"{name} ({about})" for name, (_, about) in _TOPICS.items()
)
_WIDTH_MAX = 100
"""Longer lines are hard to read."""


def complete_topic(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """What can be asked for."""
    found = {name: about for name, (_, about) in _TOPICS.items()}
    found |= {name: command.get_short_help_str() for name, command in _commands(context).items()}
    return [each for each in found.items() if each[0].startswith(incomplete)]


def help_(
    context: typer.Context,
    topic: Annotated[
        str,
        typer.Argument(
            metavar="COMMAND|TOPIC",
            help="A command, 'config', 'semantics' or 'metrics'.",
            autocompletion=complete_topic,
            show_default=False,
        ),
    ] = "",
) -> None:
    """Explain a command, all settings (config), what a mounted checkpoint promises (semantics), or
    the metrics."""
    parent = context.find_root()
    if topic in _TOPICS:
        _print_document(files("ckptfs").joinpath(_TOPICS[topic][0]).read_text())
    elif not topic:
        print(parent.get_help())
    elif command := _commands(context).get(topic):
        print(command.get_help(typer.Context(command, parent=parent, info_name=topic)))
    else:
        known = ", ".join([*_commands(context), *_TOPICS])
        raise typer.BadParameter(f"no command or topic {topic!r}; there are {known}")


def _commands(context: typer.Context) -> dict[str, Any]:
    return getattr(context.find_root().command, "commands", {})


def _print_document(text: str) -> None:
    """On a terminal with headings, lists and tables as such; piped, as it is."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    # Only here: it takes a fifth of the time that the command line needs to start.
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.width = min(console.width, _WIDTH_MAX)
    console.print(Markdown(text))
