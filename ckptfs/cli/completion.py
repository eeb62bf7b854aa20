"""Completion in bash, zsh and fish: the scripts, and the candidates for a checkpoint.

A shell runs ``ckptfs`` for each press of the Tab key, and passes the typed words in variables of
typer. If anything fails then, ckptfs prints nothing, and the shell completes file names instead.
"""

import contextlib
import io
import os
import re
from typing import Annotated, Literal

import typer

from ckptfs._client import client
from ckptfs._model.protocol.replies import AttachmentStatus
from ckptfs.errors import CkptfsError

_ANSWER_S = 0.5
"""Longest wait for the daemon, because the user who presses Tab waits for it."""
_UNQUOTED = re.compile(r"[A-Za-z0-9_:/.,=+@%-]+")
_VARIABLE = "_CKPTFS_COMPLETE"


def completion(
    context: typer.Context,
    shell: Annotated[
        Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL", help="bash, zsh or fish.")
    ],
) -> None:
    """Print a script with which a shell completes commands, options and checkpoints.

    Put it into the folder of the shell; see the examples.
    """
    os.environ[_VARIABLE] = f"source_{shell}"
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        context.find_root().command.main([], prog_name="ckptfs", complete_var=_VARIABLE)
    del os.environ[_VARIABLE]
    print(script.getvalue().strip())  # zsh reads its first line
    if shell == "zsh":
        # zsh takes a file of its fpath as the body of the function, and runs it at the first Tab.
        print('if [ "$funcstack[1]" = _ckptfs ]; then _ckptfs_completion "$@"; fi')


def checkpoints(incomplete: str) -> list[tuple[str, str]]:
    """The paths of the attached checkpoints, each with a help text. If the word does not begin like
    a path, their URIs, except for those that need quotes, which bash would not add."""
    if incomplete and not incomplete.startswith("/"):
        plain = [a for a in _attachments() if _UNQUOTED.fullmatch(a.uri)]
        found = [(a.uri, f"attached at {a.path}") for a in plain]
    else:
        found = [(a.path, a.uri.partition("?")[0]) for a in _attachments()]
    return [each for each in found if each[0].startswith(incomplete)]


def _attachments() -> list[AttachmentStatus]:
    with contextlib.suppress(CkptfsError, OSError), client.connect(None, _ANSWER_S) as connection:
        return connection.status().attachments
    return []
