"""A pager for long texts on a terminal, as in git and man."""

import os
import shutil
import signal
import subprocess
import sys

_NOT_FOUND = (126, 127)
"""Exit statuses of a shell that could not run the command (POSIX)."""


def show(text: str) -> None:
    """Print a text, with a pager if the terminal has fewer lines.

    The pager is $PAGER, which is a command of the shell, or less if that is not set. An empty
    $PAGER and "cat" mean no pager. A pipe, and a terminal that cannot move its cursor, get the text
    without one.
    """
    command = os.environ.get("PAGER", "less" if shutil.which("less") else "")
    if not (_is_long(text) and command.strip() not in ("", "cat") and _page(text, command)):
        print(text, end="", flush=True)


def _is_long(text: str) -> bool:
    if os.environ.get("TERM", "dumb") == "dumb":
        return False
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        return False
    return text.count("\n") >= shutil.get_terminal_size().lines


def _page(text: str, command: str) -> bool:
    """Run the pager, which gets Ctrl-C meanwhile. Return whether it could be run."""
    # As in git, the pager shows colours and leaves the text on the screen.
    environment = {"LESS": "RX", "LV": "-c", **os.environ}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = subprocess.run(
            ["sh", "-c", command],
            input=text.encode(errors="replace"),
            env=environment,
            check=False,
            preexec_fn=_interruptible,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    return done.returncode not in _NOT_FOUND


def _interruptible() -> None:
    """Undo the ignored SIGINT that the pager would inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
