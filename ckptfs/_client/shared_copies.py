"""Copies of checkpoints in the temporary folder, which the processes of a node share.

A copy is a directory whose name depends on the user, the machine and the contents (`folder_of`), so
all processes that need these contents find the same one. It has these entries:

- ``filling``, while a process copies. If that process is killed, the next one continues there.
- ``checkpoint``, from the moment when all files are complete (one rename). Processes use this one.
- ``ended``, while a process removes a used copy.

A lock is a flock(2) on the directory itself, so the kernel releases it however a process ends, and
systemd-tmpfiles(8) leaves a locked directory alone. A process that copies or removes has an
exclusive lock, and a process that uses the copy has a shared one. So:

- If several processes come at once, one copies and the others wait.
- If a process gets the exclusive lock, no other process uses the copy. If ``checkpoint`` exists
  then, its users ended without removing it and may have changed it, so the process copies again.
- A process that leaves tries the exclusive lock, and removes the copy if it gets the lock.
- ``checkpoint`` is renamed before its first file is removed, so no process uses a part of it.

A lock counts only if the path still leads to the locked directory, because other processes may have
removed that directory and made it again.

A forked child shares the lock of its parent. The copy exists until both have ended, or until the
parent leaves the context.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

from ckptfs._os.callers import is_open_yet
from ckptfs._os.filelock import leads_to
from ckptfs._os.scratch import open_own, remove_tree, sweep
from ckptfs.errors import CannotCopy, CkptfsError, StoreTimeout

_FILLING, _WHOLE, _ENDED = "filling", "checkpoint", "ended"
_PAUSE_S = 0.05
"""Pause between two looks at a copy that another process makes, which takes far longer. It is
jittered, because processes that look at the same moment disturb each other."""
_NO_LOCKS = frozenset([errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL])
"""Errors of flock(2) on network file systems that are mounted without locks."""


def folder_of(*holds: object) -> Path:
    """The directory of this user's copy on this machine, by its contents in JSON values.

    Raises:
        CannotCopy: No temporary folder is usable.
    """
    digest = hashlib.blake2b(json.dumps(holds).encode(), digest_size=10).hexdigest()
    try:
        return Path(tempfile.gettempdir(), _prefix() + digest)
    except FileNotFoundError as error:
        raise CannotCopy(
            f"cannot copy: {error.strerror}; set TMPDIR to a directory that can be written"
        ) from None


def path_in(folder: Path) -> Path:
    """The path of a copy's files, for the processes that use it."""
    return folder / _WHOLE


@contextlib.contextmanager
def shared_copy(
    folder: Path, fill: Callable[[Path], None], timeout_s: float | None, name: str
) -> Generator[Path]:
    """A copy that exists until the last process has left this context or was killed.

    Args:
        folder: See `folder_of`.
        fill: Function that copies to the given directory, or continues an earlier copy there. It is
            not called if the copy exists.
        timeout_s: Longest wait for another process that copies; None for no limit.
        name: The checkpoint's name in messages.

    Yields:
        `path_in(folder)`.

    Raises:
        CannotCopy: The temporary folder does not allow it, or has no room.
        StoreTimeout: `timeout_s` is over.
        CkptfsError: `fill` raised it. The incomplete copy is removed.
    """
    sweep(_prefix(), _remove, but=folder)
    lock = _joined(folder, fill, timeout_s, name)
    opened, entered_by = os.fstat(lock), os.getpid()
    try:
        yield path_in(folder)
    finally:
        if not is_open_yet(lock, opened, str(path_in(folder))):
            sweep(_prefix(), _remove)  # removes the copy, unless another process has a lock
        else:
            if os.getpid() == entered_by:  # a forked child leaves it to its parent
                _leave(folder, lock)
            os.close(lock)


def _joined(folder: Path, fill: Callable[[Path], None], timeout_s: float | None, name: str) -> int:
    """Make the copy, or wait until another process has. Return a descriptor with a shared lock."""
    end_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
    lock = _opened(folder)
    try:
        while not _has_taken(folder, lock, fill):
            if time.monotonic() > end_s:
                raise StoreTimeout(
                    f"{name}: another process has been copying it to {folder} for {timeout_s:g} s; "
                    "allow more time (timeout_s), or end that process"
                )
            if leads_to(folder, lock):
                time.sleep(_PAUSE_S * random.uniform(0.5, 1.5))
            else:
                os.close(lock)
                lock = -1
                lock = _opened(folder)
    except BaseException:
        if lock >= 0:
            fcntl.flock(lock, fcntl.LOCK_UN)  # forked children have the descriptor, too
            os.close(lock)
        raise
    return lock


def _has_taken(folder: Path, lock: int, fill: Callable[[Path], None]) -> bool:
    """Make the copy if possible. Return whether it exists, and this process shares its lock."""
    if _take(lock, fcntl.LOCK_EX) and leads_to(folder, lock):
        _fill(folder, fill)
    # The process that had the lock before may have ended too early.
    if _take(lock, fcntl.LOCK_SH) and leads_to(folder, lock) and path_in(folder).is_dir():
        return True
    fcntl.flock(lock, fcntl.LOCK_UN)
    return False


def _opened(folder: Path) -> int:
    try:
        return open_own(str(folder))
    except PermissionError as error:
        if error.errno != errno.EPERM:
            raise _cannot_write(folder, error) from None
        raise CannotCopy(
            f"cannot copy to {folder}: {error.strerror}; remove it, or set TMPDIR to a directory "
            "of your own"
        ) from None
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _cannot_write(folder: Path, error: OSError) -> CannotCopy:
    return CannotCopy(
        f"cannot copy to {folder}: {error.strerror}; set TMPDIR to a directory that can be written"
    )


def _take(lock: int, how: int) -> bool:
    """Take or change the lock without waiting. On failure, return False without a lock.

    flock(2) can release a lock before it takes the other kind. In between, another process can
    remove the copy or make it again, so the callers check the directory.
    """
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise CannotCopy(
                f"cannot copy to {tempfile.gettempdir()}: its file system has no locks "
                f"({error.strerror}); set TMPDIR to a directory on a local disk"
            ) from None
        raise
    return True


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make the copy, under the exclusive lock."""
    try:
        _end(folder)
        fill(folder / _FILLING)
        (folder / _FILLING).rename(path_in(folder))
    except BaseException as error:
        _remove(folder)
        if isinstance(error, OSError) and not isinstance(error, CkptfsError):
            raise _cannot_write(folder, error) from error
        raise


def _leave(folder: Path, lock: int) -> None:
    if _take(lock, fcntl.LOCK_EX) and leads_to(folder, lock):
        _remove(folder)
    fcntl.flock(lock, fcntl.LOCK_UN)


def _remove(folder: Path) -> None:
    """Remove a copy, under the exclusive lock, as far as the file system allows it."""
    with contextlib.suppress(OSError):
        _end(folder)
        for left in os.listdir(folder):
            remove_tree(folder / left)
            (folder / left).unlink(missing_ok=True)  # a lock file
        folder.rmdir()  # last: from then on another process may make it anew


def _end(folder: Path) -> None:
    """Remove a used copy, but not an incomplete one. Raises OSError."""
    ended = folder / _ENDED
    remove_tree(ended)
    with contextlib.suppress(FileNotFoundError):
        path_in(folder).rename(ended)
    remove_tree(ended)


def _prefix() -> str:
    """The beginning of the names of this user's copies with locks of this kernel."""
    return f"ckptfs-copy-{os.geteuid()}-{_machine()}-"


@functools.cache
def _machine() -> str:
    """Digits for this boot of this machine, because a network file system's locks on directories
    are local to a machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = os.uname().nodename
    return hashlib.blake2b(boot.encode(), digest_size=4).hexdigest()
