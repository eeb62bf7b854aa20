"""Temporary directories that do not stay behind, also when their process was killed.

A directory is locked (flock(2) on itself) for as long as it is used; forked children hold the lock,
too. Whoever makes the next one removes those that nobody locks any more.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path


@contextlib.contextmanager
def scratch_directory(
    prefix: str,
    before_removal: Callable[[Path], None] | None = None,
    *,
    child_goes_on: bool = False,
) -> Generator[str]:
    """A new directory in the temporary folder, removed at the end.

    Args:
        prefix: Of its name, and of the names of its abandoned siblings.
        before_removal: Called with an abandoned sibling's path.
        child_goes_on: A forked child takes the place of this process. Otherwise one that leaves the
            context leaves the directory to its parent.

    Raises:
        OSError: The directory cannot be made.
    """
    _sweep(prefix, before_removal)
    path, lock = _make(prefix)
    made_by = os.getpid()
    try:
        yield path
    finally:
        if child_goes_on or os.getpid() == made_by:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make(prefix: str) -> tuple[str, int]:
    while True:
        path = tempfile.mkdtemp(prefix=prefix)
        if (lock := _try_lock(path)) is not None:
            return path, lock
        # Somebody else took it for an abandoned one in the moment before it was locked.


def _sweep(prefix: str, before_removal: Callable[[Path], None] | None) -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        lock = _try_lock(str(path))
        if lock is None:
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                if before_removal is not None:
                    before_removal(path)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _try_lock(path: str) -> int | None:
    """A descriptor that holds the lock; None: it is in use, gone, or not for us."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd)):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None
