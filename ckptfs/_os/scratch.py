"""Temporary directories that a later process removes if their own process was killed.

A process locks its directory (flock(2) on the directory) as long as it uses it. Forked children
hold the lock, too. The process that makes the next directory removes those that are not locked.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

from ckptfs._os.filelock import leads_to
from ckptfs._os.ownership import is_this_users_alone

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def scratch_directory(
    prefix: str,
    before_removal: Callable[[Path], None] | None = None,
    *,
    child_goes_on: bool = False,
) -> Generator[str]:
    """A new directory in the temporary folder, removed at the end.

    Args:
        prefix: The beginning of its name, and of its abandoned siblings' names.
        before_removal: Called with the path of each abandoned sibling.
        child_goes_on: Whether a forked child replaces this process. Otherwise a child that leaves
            the context leaves the directory to its parent.

    Raises:
        OSError: The directory cannot be made, or its file system has no locks.
    """

    def remove(path: Path) -> None:
        if before_removal is not None:
            before_removal(path)
        shutil.rmtree(path, ignore_errors=True)

    sweep(prefix, remove)
    path, lock = _make(prefix)
    made_by = os.getpid()
    try:
        yield path
    finally:
        if child_goes_on or os.getpid() == made_by:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def sweep(prefix: str, remove: Callable[[Path], None], *, but: Path | None = None) -> None:
    """Call `remove` for each directory of this user in the temporary folder that begins with
    `prefix` and that no process locks, except `but`. The directory is locked meanwhile."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        lock = None
        with contextlib.suppress(OSError):  # a file system without locks
            lock = None if path == but else _try_lock(str(path))
        if lock is None:
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                remove(path)
        finally:
            os.close(lock)


def open_own(path: str) -> int:
    """Make the directory `path` if it is missing, and return a descriptor of it.

    Raises:
        OSError: The directory cannot be made, or `path` is a link or a file.
        PermissionError: It belongs to another user, or others may write to it. In a folder of all
            users, another user may have made it so that its files are taken for ours.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        try:
            fd = os.open(path, _FLAGS)
            break
        except FileNotFoundError:  # another process has removed it in between
            continue
    info = os.fstat(fd)
    if is_this_users_alone(info):
        return fd
    os.close(fd)
    raise PermissionError(
        errno.EPERM, "the directory belongs to another user, or others may write to it", path
    )


def remove_tree(path: Path) -> None:
    """Remove a directory of this user and its content, as far as the file system allows it.

    Programs may have made directories in it read-only, so there is a second try with other modes.
    No other process may make a directory of that name meanwhile, because the second try would
    remove it.
    """
    shutil.rmtree(path, ignore_errors=True)
    if not path.is_dir() or path.is_symlink():
        return
    with contextlib.suppress(OSError):
        path.chmod(0o700)
        for top, below, _ in os.walk(path):
            for name in below:
                if not os.path.islink(inner := os.path.join(top, name)):
                    os.chmod(inner, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def _make(prefix: str) -> tuple[str, int]:
    while True:
        path = tempfile.mkdtemp(prefix=prefix)
        try:
            lock = _try_lock(path)
        except OSError:
            os.rmdir(path)
            raise
        if lock is not None:
            return path, lock
        # Another process has removed it as abandoned, in the moment before the lock.


def _try_lock(path: str) -> int | None:
    """A descriptor that holds the lock; None if the directory is in use, gone, or not ours. Raises
    OSError if the file system has no locks."""
    try:
        fd = os.open(path, _FLAGS)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if leads_to(path, fd):
            return fd
    except BlockingIOError:
        pass
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None
