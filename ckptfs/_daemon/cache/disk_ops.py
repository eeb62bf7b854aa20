"""The disk operations of the cache, each with a name.

All that the cache does to its disk goes through these functions. Other modules call them by their
names in this module, so that a test can let any of them fail, write half, or be lost when the power
goes. Each is one system call or little more, blocks, and raises OSError.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01  # linux/falloc.h
_WRITE_AND_WAIT = 1 | 2 | 4  # SYNC_FILE_RANGE_WRITE_AND_WAIT, linux/fs.h
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own are: stat(2)


# -- names


def make_folder(path: Path) -> None:
    """Make a directory for this user alone, in a directory that exists."""
    path.mkdir(mode=0o700)


def make_folders(path: Path) -> None:
    """Make a directory for this user alone, with its parents, unless it exists."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


list_folder = os.listdir
status_of = Path.lstat  # of a link itself
status_behind = Path.stat
touch = os.utime
remove_empty = Path.rmdir
free_space = os.statvfs
rename = Path.rename  # puts a file in the place of another one, or a folder where there is none


def keep_private(path: Path) -> None:
    """Take all rights from others than the owner."""
    path.chmod(0o700)


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with its contents, if it exists."""
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink()
            return
        folders = _clear(path, path)
        while folders:
            folder = folders.pop()
            folders += _clear(folder, path)
            folder.rmdir()
        path.rmdir()
    except FileNotFoundError:
        return


def _clear(folder: Path, top: Path) -> list[Path]:
    """Remove the files in a folder, and move its folders up to `top`, so that no path gets too
    long. Returns these folders."""
    found: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found.append(top / (entry.name if folder == top else f".{entry.inode()}"))
                if folder != top:
                    os.rename(entry.path, found[-1])
            else:
                os.unlink(entry.path)
    return found


# -- open files

status = os.fstat
set_size = os.truncate  # cuts, or extends by a hole
read = os.pread  # by descriptor, length and offset
write = os.pwrite  # by descriptor, data and offset; returns how much was written
write_direct = os.pwrite  # past the page cache, by a descriptor with O_DIRECT


def open_folder(path: Path) -> int:
    """Descriptor of a directory. Follows links."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def open_file(path: Path, flags: int) -> int:
    """Descriptor of a file. Does not follow a link, nor wait for the other end of a FIFO."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def close(fd: int) -> None:
    """Close a descriptor. An error says that a write was lost, which the checksums will find. The
    descriptor is gone anyway (close(2))."""
    with contextlib.suppress(OSError):
        os.close(fd)


def lock(fd: int) -> None:
    """Lock a file against other daemons, or raise BlockingIOError at once."""
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def expect_random(fd: int) -> None:
    """Let the kernel read nothing ahead (see `object_dir.open_existing`)."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def will_need(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to read a range into memory, without a wait."""
    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)


def read_cached(fd: int, view: memoryview, offset: int, flags: int) -> int:
    """Fill the beginning of `view` from `offset` on, with `flags` of preadv2(2). Returns how much.

    Reads nothing if the kernel says that a page is not in memory. RWF_NOWAIT alone is not enough:
    with it the kernel begins to read missing pages, and a fast disk may be done before the call
    ends. Of 3,000 reads of 64 KiB with one page missing, 3 to 9 succeeded at once, and 160 to 900
    when the rest of a short read was asked for again.
    """
    return os.preadv(fd, [view], offset, flags) if is_cached(fd, offset, len(view)) else 0


def read_direct(fd: int, view: memoryview, offset: int) -> int:
    """Fill the beginning of `view` by a descriptor with O_DIRECT. Returns how much."""
    return os.preadv(fd, [view], offset)


def persist(fd: int, offset: int, length: int) -> None:
    """Wait until the disk has taken, or refused, a range that was written through the page cache.
    It may still be lost with the power (sync_file_range(2))."""
    arguments = (ctypes.c_int64(offset), ctypes.c_int64(length))
    _check(_libc.sync_file_range(fd, *arguments, _WRITE_AND_WAIT))


def punch(fd: int, offset: int, length: int) -> None:
    """Free the space of a range, which reads as zeros from then on."""
    arguments = (ctypes.c_int64(offset), ctypes.c_int64(length))
    _check(_libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, *arguments))


# -- not operations


def _check(result: int) -> None:
    """Raise the error of a call of the C library."""
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def knows_cached() -> bool:
    """Whether the kernel can say which pages are in memory (Linux >= 6.5)."""
    return bool(_cachestat)


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Whether the kernel has all pages of a range in memory; True if it cannot say. Several threads
    may ask at once."""
    global _cachestat
    if not _cachestat:
        return True
    first, stop = offset // _PAGE_BYTES, -(-(offset + length) // _PAGE_BYTES)
    counts = _Counts()
    if _libc.syscall(_cachestat, fd, ctypes.byref(_Range(offset, length)), ctypes.byref(counts), 0):
        if ctypes.get_errno() == errno.ENOSYS:  # Linux < 6.5
            _cachestat = 0
        return True
    return counts[0] >= stop - first


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_cachestat = 451  # cachestat(2) has this number on all processors
_Range = ctypes.c_uint64 * 2  # struct cachestat_range
_Counts = ctypes.c_uint64 * 5  # struct cachestat, which begins with the pages in memory


def taken_bytes(info: os.stat_result) -> int:
    """Bytes that a file takes on the disk."""
    return info.st_blocks * _BLOCK_BYTES
