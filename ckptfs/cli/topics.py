"""``help``: how to use it, and what it promises."""

from importlib.resources import files
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown


def help_(
    context: typer.Context,
    topic: Annotated[str, typer.Argument(help="'semantics', or the name of a command.")] = "",
) -> None:
    """Explain a command, or (semantics) what a mounted checkpoint promises."""
    if topic == "semantics":
        text = files("ckptfs").joinpath("SEMANTICS.md").read_text()
        Console().print(Markdown(text))
        return
    parent = context.find_root()
    if not topic:
        print(parent.get_help())
        return
    commands: dict[str, Any] = getattr(parent.command, "commands", {})
    if topic not in commands:
        raise typer.BadParameter(f"no command or topic {topic!r}")
    print(commands[topic].get_help(typer.Context(commands[topic], parent=parent, info_name=topic)))
