"""The calling code: the line for a warning, and descriptors that the code has closed."""

import contextlib
import errno
import inspect
import os
import warnings
import weakref

_INSIDE = os.path.dirname(os.path.dirname(__file__)) + os.sep, contextlib.__file__, weakref.__file__
"""Frames of contextlib enter the context managers of ckptfs, and some of weakref end them."""


def level_of_caller() -> int:
    """The ``stacklevel`` with which the calling function warns about the line outside of ckptfs."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level


def is_open_yet(fd: int, opened: os.stat_result, path: str) -> bool:
    """Whether a descriptor that held `path` for the caller is still the one that was `opened`.

    The caller's code may have closed it, and its number may be that of another file now, which must
    stay open. A warning explains the consequence.
    """
    try:
        if os.path.samestat(os.fstat(fd), opened):
            return True
    except OSError as error:
        if error.errno != errno.EBADF:  # a mount that has ended, for our descriptor
            return True
    warnings.warn(
        f"{path}: something in this process closed the descriptor that held the checkpoint, for "
        "example os.closerange or a library that turns the process into a daemon. The directory "
        "may have gone before its context ended. Enter the context after that call.",
        RuntimeWarning,
        stacklevel=level_of_caller(),
    )
    return False
