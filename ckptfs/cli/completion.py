"""Completion in bash, zsh and fish: the scripts, and what stands where a checkpoint is named.

A shell runs ``ckptfs`` for each press of the Tab key, with what was typed so far in variables of
typer's. Whatever goes wrong then, nothing is printed: the shell completes file names instead.
"""

import contextlib
import io
import os
import re
from typing import Annotated, Literal

import typer

from ckptfs import _client
from ckptfs._model.replies import AttachmentStatus
from ckptfs.errors import CkptfsError

_ANSWER_S = 0.5
"""Longest wait for the daemon: who presses Tab waits for it, too."""
_UNQUOTED = re.compile(r"[A-Za-z0-9_:/.,=+@%-]+")
_VARIABLE = "_CKPTFS_COMPLETE"


def completion(
    context: typer.Context,
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL")],
) -> None:
    """Print the script by which a shell completes commands, options and checkpoints.

    \b
    bash: ckptfs completion bash > /usr/share/bash-completion/completions/ckptfs
    zsh:  ckptfs completion zsh > /usr/share/zsh/vendor-completions/_ckptfs
    fish: ckptfs completion fish > /usr/share/fish/vendor_completions.d/ckptfs.fish
    """
    os.environ[_VARIABLE] = f"source_{shell}"
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        context.find_root().command.main([], prog_name="ckptfs", complete_var=_VARIABLE)
    del os.environ[_VARIABLE]
    print(script.getvalue().strip())  # zsh looks at the first line
    if shell == "zsh":
        # In a directory of its fpath the file is the function's body, and is first run for a Tab.
        print('if [ "$funcstack[1]" = _ckptfs ]; then _ckptfs_completion "$@"; fi')


def checkpoints(incomplete: str) -> list[tuple[str, str]]:
    """Paths of the attached checkpoints, each with a help text; where something else than a path
    was begun, URIs, but none that has to be quoted, which bash would not do."""
    if incomplete and not incomplete.startswith("/"):
        plain = [a for a in _attachments() if _UNQUOTED.fullmatch(a.uri)]
        found = [(a.uri, f"attached at {a.path}") for a in plain]
    else:
        found = [(a.path, a.uri.partition("?")[0]) for a in _attachments()]
    return [each for each in found if each[0].startswith(incomplete)]


def _attachments() -> list[AttachmentStatus]:
    with contextlib.suppress(CkptfsError, OSError), _client.connect(None, _ANSWER_S) as connection:
        return connection.status().attachments
    return []
