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
    if context is not None and error.format_message() == context.get_help():
        return error.format_message()  # a group without a command
    message = _mistake_in(error)
    text = f"ckptfs: error: {message[:1].lower()}{message[1:].rstrip('.')}"
    if context is None:
        return text
    usage = context.get_usage().strip()
    return f"{text}\n{usage}\nTry '{context.command_path} --help' for help."


def _mistake_in(error: typer.TyperException) -> str:
    """The mistake in a command line, in one line."""
    if not (isinstance(error, typer.BadParameter) and isinstance(error.__cause__, ValueError)):
        return error.format_message().replace("\n\t", " ")  # typer lists choices in lines
    # The text is that of pydantic, which is for programmers.
    fault: Any = error.__cause__
    parameter: Any = error.param
    value: str = fault.errors()[0]["input"]
    choices = parameter.type_descriptor.choices
    wanted = (
        f"one of {', '.join(choices)}" if choices else f"a whole number of {parameter.min} or more"
    )
    return f"invalid value for {parameter.get_error_hint()}: {value!r} is not {wanted}"
