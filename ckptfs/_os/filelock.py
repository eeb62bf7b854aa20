"""Lock files (flock(2)) whose holder removes them.

A process that waits may get the lock of a file that its holder has just removed, while a third
process has made and locked a new one. So a lock counts only if the path still leads to the locked
file.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Generator

_PAUSE_S = 0.01


@contextlib.contextmanager
def locked(path: str, timeout_s: float) -> Generator[int]:
    """Hold the lock `path`, and remove the file at the end. Yields its descriptor.

    Raises:
        TimeoutError: Another process held the lock all the time.
        OSError: The file cannot be made.
    """
    fd = acquire(path, timeout_s)
    try:
        yield fd
    finally:
        release(path, fd)


def wait_unlocked(path: str, timeout_s: float) -> bool:
    """Wait until no process holds the lock `path`. Returns whether that is so."""
    try:
        with locked(path, timeout_s):
            return True
    except TimeoutError:
        return False


def acquire(path: str, timeout_s: float) -> int:
    """Take the lock `path` as `locked` does, until `release`. Returns its descriptor."""
    deadline = time.monotonic() + timeout_s
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if leads_to(path, fd):
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
    """Remove the lock `path`, which the descriptor `fd` holds. A file that cannot be removed any
    more, for example on a read-only file system, locks nothing."""
    with contextlib.suppress(OSError):
        if leads_to(path, fd):
            os.unlink(path)  # before the lock is given back
    os.close(fd)


def leads_to(path: "str | os.PathLike[str]", fd: int) -> bool:
    """Whether `path` is still the file or directory that `fd` has open."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False
