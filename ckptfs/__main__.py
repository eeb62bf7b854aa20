"""The entry point of the ``ckptfs`` command, which determines its exit status.

| status | meaning |
| --- | --- |
| 0 | The command succeeded. |
| 1 | The command failed, with the reason on one line of standard error. |
| 2 | The command line was wrong. |
| 130 | Ctrl-C (128 + SIGINT, as in shells). |
| 141 | The reader of the output closed its pipe (128 + SIGPIPE). There is no message. |

As usual in Python, the process ignores SIGPIPE, so that the client can handle a failed write to a
daemon that dies. So a closed pipe of the output also raises an error.
"""

import contextlib
import io
import os
import sys
from typing import Any, NoReturn

FAILED, INTERRUPTED, PIPE_CLOSED = 1, 130, 141
_OF_OUTPUT = "of_output"
"""An attribute of errors from writes to standard output, unlike those to a daemon's socket."""


class _Output(io.FileIO):
    """Standard output that marks its errors."""

    def write(self, data: Any, /) -> int:
        """As FileIO."""
        try:
            return super().write(data)
        except OSError as error:
            setattr(error, _OF_OUTPUT, True)
            raise


def main() -> NoReturn:
    """Run the command line. Only bugs of ckptfs show a traceback."""
    _open_missing_streams()
    _mark_output()
    status = _run()
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        status = _after_failed_write(error)
    sys.exit(status)


def _run() -> int:
    """Run the command, and print an error. Return the exit status."""
    try:
        _leave_lost_directory()
        # Not at the top, so that Ctrl-C during the imports also prints one line.
        from ckptfs.cli import app

        app()
    except SystemExit as ended:  # typer's completion ends the process
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return _say("ckptfs: interrupted", INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and getattr(error, _OF_OUTPUT, False):
            return _after_failed_write(error)
        from ckptfs.cli import ending

        ended = ending.of(error)
        if ended is None:
            raise
        return _say(ended.text, ended.status) if ended.text else ended.status
    return 0


def _leave_lost_directory() -> None:
    """Change to the root if the working directory was in a mount that has ended, because libraries
    look it up on import."""
    try:
        os.getcwd()
    except OSError:
        os.chdir("/")


def _open_missing_streams() -> None:
    """Open a descriptor for each standard stream that the caller has closed.

    Otherwise the next file or socket would get its number, and the output would go there. A write
    to a closed standard output fails, as in other programs.
    """
    for fd, name, flags in (
        (0, "stdin", os.O_RDONLY),
        (1, "stdout", os.O_RDONLY),
        (2, "stderr", os.O_WRONLY),
    ):
        if getattr(sys, name) is None:
            found = os.open(os.devnull, flags)
            if found != fd:
                os.dup2(found, fd)
                os.close(found)
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", encoding="utf-8", closefd=False))


def _mark_output() -> None:
    """Let `sys.stdout` write through `_Output`, unless it was replaced."""
    if sys.stdout is sys.__stdout__ or sys.__stdout__ is None:
        old = sys.stdout
        raw = io.BufferedWriter(_Output(old.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(
            raw, old.encoding, getattr(old, "errors", None), line_buffering=old.isatty()
        )


def _after_failed_write(error: OSError | ValueError) -> int:
    """Report a failed write to standard output, except for a closed pipe. Return the status."""
    # The rest of the buffer would fail again when the interpreter ends.
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return _say(f"ckptfs: error: cannot write to standard output: {reason}", FAILED)


def _say(text: str, status: int) -> int:
    """Print a line on standard error if possible. Return `status`."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    main()
