"""The exit status and the message for an exception of a command."""

from typing import Any, NamedTuple

import typer

from ckptfs._os.mountinfo import why_hidden
from ckptfs.errors import CkptfsError


class Ending(NamedTuple):
    """The exit status, and the text for standard error, which may be ""."""

    status: int
    text: str = ""


def of(error: Exception) -> Ending | None:
    """The ending after an exception; None for a bug, whose traceback is shown."""
    match error:
        case typer.Exit(exit_code=status):
            return Ending(status)
        case typer.Abort():
            return Ending(1, "ckptfs: error: aborted")
        case typer.TyperException():
            return Ending(error.exit_code, _of_usage(error))
        case CkptfsError():
            return Ending(1, f"ckptfs: error: {error}")
        case OSError():
            return Ending(1, f"ckptfs: error: {_text_of(error)}")
        case _:
            return None


def _text_of(error: OSError) -> str:
    """The kernel's message with the file, without the errno."""
    named = isinstance(error, PermissionError) and isinstance(error.filename, str)
    if named and (hidden := why_hidden(error.filename)):
        return hidden
    if error.errno is None or not error.strerror:
        return str(error) or type(error).__name__
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def _of_usage(error: typer.TyperException) -> str:
    """The mistake in a command line, and the usage of the command."""
    context: Any = getattr(error, "ctx", None)
    message = error.format_message()
    if context is None:
        return f"ckptfs: error: {message}"
    if message == context.get_help():  # a group without a command
        return message
    text = f"ckptfs: error: {message[:1].lower()}{message[1:].rstrip('.')}"
    usage = context.get_usage().strip()
    return f"{text}\n{usage}\nTry '{context.command_path} --help' for help."
