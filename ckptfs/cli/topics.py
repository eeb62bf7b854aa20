"""``help``: the help of commands, and the pages of the package."""

import shutil
import sys
from importlib.resources import files
from typing import Annotated, Any

import typer

from ckptfs.cli import pager

_TOPICS = {
    "install": ("INSTALL.md", "for one user, on a node, in /etc/fstab"),
    "python": ("PYTHON.md", "as_directory, mount, copies, errors"),
    "shell": ("SHELL.md", "plans, reports, searches, the cache"),
    "attributes": ("ATTRIBUTES.md", "user.ckptfs.*: state and metadata"),
    "stores": ("STORES.md", "URIs, credentials, tested servers"),
    "config": ("CONFIGURATION.md", "all settings, and named stores"),
    "semantics": ("SEMANTICS.md", "the guarantees of a mounted checkpoint"),
    "ray": ("RAY.md", "checkpoints of Ray, and many nodes"),
    "jobs": ("JOBS.md", "Slurm, PBS, LSF and SSH clusters"),
    "containers": ("CONTAINERS.md", "places, users without a home, Docker"),
    "kubernetes": ("KUBERNETES.md", "volumes of pods, by a driver on each node of a cluster"),
    "operators": ("OPERATORS.md", "a node's figures, alerts and log"),
    "metrics": ("METRICS.md", "the metrics of a daemon for Prometheus"),
    "troubleshooting": ("TROUBLESHOOTING.md", "failed reads, SIGBUS, the doctor"),
    "architecture": ("ARCHITECTURE.md", "how ckptfs works, for contributors"),
    "changelog": ("CHANGELOG.md", "the changes of each version"),
}
"""The pages of the package, each with its subject."""
EPILOG = "\n\n".join(
    [
        "\b\nTopics of ckptfs help:\n"
        + "\n".join(f"  {name:15}  {about}" for name, (_, about) in _TOPICS.items()),
        "\b\nExit status:\n"
        "  0 success   1 failure, with the reason on one line   2 wrong command line\n"
        "  130 interrupted (Ctrl-C)   141 the reader of the output has closed it",
        "\b\nFirst steps:\n"
        '  cd "$(ckptfs attach s3://bucket/run7/checkpoint_000100)"\n'
        "  ckptfs status\n"
        "  ckptfs doctor s3://bucket/run7                  # if something is wrong",
    ]
)
_WIDTH_MAX = 100
"""Longer lines are hard to read."""


def complete_topic(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Topics and commands, for a shell's completion."""
    found = {name: about for name, (_, about) in _TOPICS.items()}
    found |= {name: command.get_short_help_str() for name, command in _commands(context).items()}
    return [each for each in found.items() if each[0].startswith(incomplete)]


def help_(
    context: typer.Context,
    topic: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND|TOPIC",
            help=f"A command, or one of {', '.join(_TOPICS)}. Default: all commands.",
            autocompletion=complete_topic,
        ),
    ] = None,
) -> None:
    """Explain a command, or show a page.

    On a terminal, $PAGER (or less) shows long texts.
    """
    words = topic or []
    if len(words) == 1 and words[0] in _TOPICS:
        pager.show(_document(files("ckptfs").joinpath(_TOPICS[words[0]][0]).read_text()))
    else:
        pager.show(_help_of(context.find_root(), words) + "\n")


def _help_of(context: Any, words: list[str]) -> str:
    """The help of a command, e.g. of ``cache gc``. Raises typer.BadParameter."""
    command, inner = context.command, context
    for number, word in enumerate(words):
        commands: dict[str, Any] = getattr(command, "commands", {})
        command = commands.get(word)
        if command is None:
            known = ", ".join([*commands, *(() if number else _TOPICS)])
            asked = " ".join(words[: number + 1])
            raise typer.BadParameter(
                f"no command or topic {asked!r}" + (f"; there are {known}" if known else "")
            )
        inner = type(context)(command, parent=inner, info_name=word)
    return inner.get_help()


def _commands(context: typer.Context) -> dict[str, Any]:
    return getattr(context.find_root().command, "commands", {})


def _document(text: str) -> str:
    """Format a page for a terminal. A pipe gets it as it is."""
    if not sys.stdout.isatty():
        return text
    # Not at the top, because this import takes a fifth of the start-up time of the command line.
    from ckptfs.cli.markdown import Page
    from ckptfs.cli.output import Console

    width = min(shutil.get_terminal_size().columns, _WIDTH_MAX)
    console = Console(width=width)
    with console.capture() as captured:
        console.print(Page(text), crop=False)
    return captured.get()
