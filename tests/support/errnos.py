"""The errnos of failed system calls, by name."""

import errno
from collections.abc import Callable


def code_of(action: Callable[[], object]) -> str:
    """The name of the errno that it fails with; "" if it does not."""
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""
