"""Lock files that do not stay behind: flock(2) on a file that its holder removes.

Whoever waits for the lock may get it on a file that is gone from the directory by then, while a
third process has made and locked a new one. So a lock counts only if the path still leads to the
locked file.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Generator

_PAUSE_S = 0.01


@contextlib.contextmanager
def locked(path: str, timeout_s: float) -> Generator[int]:
    """Hold the lock `path`, made if it is missing, and remove it at the end. Yields its descriptor.

    Raises:
        TimeoutError: Somebody else held it all the time.
        OSError: The file cannot be made.
    """
    fd = acquire(path, timeout_s)
    try:
        yield fd
    finally:
        release(path, fd)


def wait_unlocked(path: str, timeout_s: float) -> bool:
    """Wait until nobody holds the lock `path`; returns whether that is so."""
    try:
        with locked(path, timeout_s):
            return True
    except TimeoutError:
        return False


def acquire(path: str, timeout_s: float) -> int:
    """Take the lock `path`, for longer than a context; see `locked`. Returns its descriptor."""
    deadline = time.monotonic() + timeout_s
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _leads_to(path, fd):
                return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise TimeoutError(path) from None
            time.sleep(_PAUSE_S)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def release(path: str, fd: int) -> None:
    """Remove the lock `path`, which the descriptor `fd` holds."""
    if _leads_to(path, fd):
        os.unlink(path)  # before the lock is given back
    os.close(fd)


def _leads_to(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False
