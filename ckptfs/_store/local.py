"""A Store over a directory of this machine, which may lie on NFS or another network.

**Versions.** A file's version is its inode, size, modification time and change time, with all the
nanoseconds that the filesystem keeps. The listing has the version, so the first access costs no
check. A read compares the version before its first and after its last byte. The second check opens
the path again, so it sees a file that has replaced the first one, and an NFS client asks the server
(close-to-open consistency, nfs(5)).

Times change in ticks. If a file was written some milliseconds ago, a read waits until the tick of
its times is over (see `timestamps`).

**Limits.** Linux sets the times of a file when a write begins. The times do not show changes while
one call of write is still copying, or while a program changes a file through a memory mapping. A
rename that replaces a file has no such moment.
"""

import contextlib
import errno
import functools
import os
import stat
import uuid
from collections.abc import Generator
from contextlib import contextmanager

import msgspec

from ckptfs._model.manifest import ListedFile, Listing, Skipped, printable
from ckptfs._os.mountinfo import mount_table, why_hidden
from ckptfs._store.base import Pin, changed, check_count, is_file, not_found
from ckptfs._store.timestamps import is_same_time, wait_until_settled
from ckptfs.errors import AccessDenied, CkptfsError, StoreError, StoreTimeout, StoreUnavailable

_VANISHED = frozenset([errno.ENOENT, errno.ENOTDIR])
_GONE = _VANISHED | {errno.ELOOP, errno.ENAMETOOLONG}
"""The errors of a path that does not lead to a file."""
_DENIED = frozenset([errno.EACCES, errno.EPERM, errno.EROFS])
_PASSING = frozenset(
    [
        errno.EAGAIN,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ESTALE,  # an NFS server removed the open file; the next check opens the path's file
        # The errors of network mounts while they are down.
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOTCONN,
    ]
)
_NOT_A_FILE = "it is neither a file nor a directory"


class LocalStore:
    """The directory `root`, an absolute path. `name` is the checkpoint's URI, for messages."""

    def __init__(self, root: str, name: str) -> None:
        self._root = os.fsencode(root).rstrip(b"/")
        self.name = name

    def list(self, files_max: int) -> Listing:
        """List the tree. The walk follows links, except those to a directory above them."""
        return _Walk(self, self._root or b"/", files_max).listing()

    def confirm(self, pin: Pin) -> Pin:
        with self._opened(pin) as (_, etag):
            return msgspec.structs.replace(pin, etag=etag)

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        with self._opened(pin) as (file, etag):
            wait_until_settled(os.fstat(file).st_ctime_ns)
            done = 0
            while done < len(buffer):
                count = os.preadv(file, [buffer[done:]], offset + done)
                if count == 0:
                    raise changed(self.name, pin, f"it ends at byte {offset + done} of {pin.size}")
                done += count
        with self._opened(msgspec.structs.replace(pin, etag=etag)):
            return True

    def get(self, path: str) -> bytes | None:
        try:
            file = os.open(self._path(path), os.O_RDONLY | os.O_NONBLOCK)
            try:
                status = os.fstat(file)
                if not stat.S_ISREG(status.st_mode):
                    raise StoreError(f"{printable(path)} in {self.name} is not a file; remove it")
                return os.pread(file, status.st_size, 0)
            finally:
                os.close(file)
        except StoreError:
            raise
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise self.translated(error, path) from error

    def put(self, path: str, data: bytes) -> None:
        full = self._path(path)
        temporary = full + b"." + uuid.uuid4().hex.encode()
        try:
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, full)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except FileNotFoundError:
            raise not_found(self.name) from None
        except OSError as error:
            raise self.translated(error, path) from error

    def find(self, path: str) -> ListedFile | None:
        try:
            status = os.stat(self._path(path))
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise self.translated(error, path) from error
        return _listed(path, status) if stat.S_ISREG(status.st_mode) else None

    def close(self) -> None:
        """Do nothing, because the store keeps nothing open."""

    def _path(self, path: str) -> bytes:
        return self._root + b"/" + os.fsencode(path)

    @contextmanager
    def _opened(self, pin: Pin) -> Generator[tuple[int, str]]:
        """A descriptor of the file, whose version is the pinned one, and that version's ETag."""
        try:
            file = os.open(self._path(pin.path), os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise self._of_object(error, pin) from error
        try:
            status = os.fstat(file)
            self._check(pin, status)
            yield file, _etag_of(status)
        except OSError as error:
            raise self._of_object(error, pin) from error
        finally:
            os.close(file)

    def _check(self, pin: Pin, status: os.stat_result) -> None:
        """Raise ObjectChanged if the version of a file is not the pinned one."""
        if not stat.S_ISREG(status.st_mode):
            raise changed(self.name, pin, "it is not a file any more")
        if status.st_size != pin.size:
            raise changed(self.name, pin, f"{pin.size} bytes became {status.st_size}")
        if pin.etag:
            is_same = _etag_of(status) == pin.etag
        else:  # an attachment of an earlier release
            is_same = is_same_time(status.st_mtime_ns, pin.mtime_ns)
        if not is_same:
            how = "it was written again, or its owner, mode or links changed"
            raise changed(self.name, pin, how)

    def _of_object(self, error: OSError, pin: Pin) -> CkptfsError:
        if isinstance(error, CkptfsError):
            return error
        if error.errno in _GONE:
            return changed(self.name, pin, "it was deleted")
        return self.translated(error, pin.path)

    def translated(self, error: OSError, path: str) -> CkptfsError:
        """The exception of ckptfs for an `error` of the operating system about a path below the
        root."""
        what = f"{printable(path)} in {self.name}" if path else self.name
        cause = error.strerror or type(error).__name__
        if error.errno in _DENIED:
            if hidden := why_hidden(os.fsdecode(self._root or b"/")):
                return AccessDenied(f"{what}: access denied: {hidden}")
            return AccessDenied(f"{what}: access denied ({cause}); check owner and mode")
        if error.errno == errno.ETIMEDOUT:
            return StoreTimeout(f"{what}: the filesystem did not answer ({cause}); check its mount")
        if error.errno in _PASSING:
            return StoreUnavailable(f"{what}: cannot be read now ({cause}); check its filesystem")
        return StoreError(f"{what}: {cause}; check the disk or the mount that holds it")


class _Walk:
    """One listing of a directory."""

    def __init__(self, store: LocalStore, root: bytes, files_max: int) -> None:
        self._store = store
        self._root = root
        self._files_max = files_max
        self._listing = Listing([], [], [])
        # Directories that are still to be listed: the path below the root, and its parents.
        self._left: list[tuple[bytes, frozenset[tuple[int, int]]]] = []

    def listing(self) -> Listing:
        """Raises what `Store.list` raises."""
        self._left.append((b"", frozenset([self._identity_of_root()])))
        while self._left:
            below, inside = self._left.pop()
            try:
                with os.scandir(self._root + b"/" + below) as entries:
                    for entry in entries:
                        self._take(entry, below, inside)
            except OSError as error:
                if isinstance(error, CkptfsError):
                    raise
                if error.errno not in _VANISHED or not below:  # else it was deleted meanwhile
                    raise self._translated(error, below) from error
        return self._listing

    def _identity_of_root(self) -> tuple[int, int]:
        try:
            status = os.stat(self._root)
        except OSError as error:
            raise self._translated(error, b"") from error
        if not stat.S_ISDIR(status.st_mode):
            raise is_file(self._store.name)
        return status.st_dev, status.st_ino

    def _take(
        self, entry: os.DirEntry[bytes], below: bytes, inside: frozenset[tuple[int, int]]
    ) -> None:
        raw = below + b"/" + entry.name if below else entry.name
        try:
            path = raw.decode()
        except UnicodeDecodeError:
            name = printable(raw.decode("utf-8", "backslashreplace"))
            self._skip(name, "the name is not valid UTF-8")
            return
        try:
            status = entry.stat()
        except OSError as error:
            if error.errno not in _VANISHED and error.errno != errno.ELOOP:
                raise self._translated(error, raw) from error
            if entry.is_symlink():
                self._skip(printable(path), "the link leads nowhere")
            return
        identity = status.st_dev, status.st_ino
        if stat.S_ISREG(status.st_mode):
            self._listing.files.append(_listed(path, status))
        elif not stat.S_ISDIR(status.st_mode):
            self._skip(printable(path), _NOT_A_FILE)
        elif identity in inside:
            self._skip(printable(path), "the link leads to a directory above it")
        else:
            self._listing.directories.append(path)
            self._left.append((raw, inside | {identity}))
        check_count(self._store.name, self._listing.count, self._files_max)

    def _skip(self, name: str, why: str) -> None:
        self._listing.skipped.append(Skipped(name, why))

    def _translated(self, error: OSError, below: bytes) -> CkptfsError:
        if not below and error.errno in _GONE:
            return not_found(self._store.name)
        return self._store.translated(error, below.decode("utf-8", "backslashreplace"))


def _listed(path: str, status: os.stat_result) -> ListedFile:
    return ListedFile(path, status.st_size, status.st_mtime_ns, _etag_of(status))


def _etag_of(status: os.stat_result) -> str:
    """The version of a file as text."""
    inode = status.st_ino if _has_lasting_inodes(status.st_dev) else 0
    return f"{inode:x}-{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"


@functools.lru_cache(maxsize=256)
def _has_lasting_inodes(device: int) -> bool:
    """Whether the number of a file's inode is stable. Filesystems of FUSE and SMB may invent a new
    number when the kernel has forgotten the file (mount.fuse3(8), noforget; mount.cifs(8),
    noserverino).
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mount_table():
        if line.device == number:
            return line.kind.partition(".")[0] not in ("fuse", "fuseblk", "cifs", "smb3")
    return True
