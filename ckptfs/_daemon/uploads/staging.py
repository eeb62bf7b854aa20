"""Staging: from the descriptors of a client's files to files in the spool.

Where the file system can, the two files share their blocks (FICLONERANGE of ioctl_ficlone(2)).
Otherwise the kernel copies (copy_file_range(2)), or else this process. A hard link would be
cheaper, but a program that writes to its file in place would change the linked one, too.

The client may only name paths below the directory of its upload. Each directory on the way is
opened relative to the one above it, and no link is followed.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Generator

from ckptfs._model.manifest import fault_of_name, printable
from ckptfs._os.write_all import pwrite_all
from ckptfs.errors import CannotUpload, ProtocolError

_FICLONERANGE = 0x4020940D  # linux/fs.h
_CLONE_RANGE = struct.Struct("=qQQQ")
"""`struct file_clone_range`: source descriptor, its offset and length, and the offset here."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_SPACE = frozenset([errno.ENOSPC, errno.EDQUOT])
_BUFFER_BYTES = 1 << 20


class StagedTree:
    """The files of one upload while they arrive.

    Args:
        top: A descriptor of the directory for the files, which `close` closes.
        where: The directory's path, for messages.
        files, bytes_: The number and the bytes of the files that the client has announced.
    """

    def __init__(self, top: int, where: str, files: int, bytes_: int) -> None:
        self._top = top
        self._where = where
        self._files_left = files
        self._bytes_left = bytes_
        self._path = ""  # the file whose pieces arrive
        self._size = self._end = 0
        self._arriving = 0  # bytes of pieces that have not arrived, or never will

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._top)

    def begin(self, path: str, size: int, offset: int, length: int) -> None:
        """Count a piece. Raises ProtocolError unless it is the next one of what was announced."""
        if offset == 0 and self._end == self._size:
            if fault := fault_of_name(path):
                raise ProtocolError(f"{printable(path)}: {fault}")
            if not self._files_left or size > self._bytes_left:
                raise ProtocolError(f"{printable(path)}: more files than the upload has announced")
            self._files_left -= 1
            self._bytes_left -= size
            self._path, self._size, self._end = path, size, 0
        is_next = (path, size, offset) == (self._path, self._size, self._end)
        if not is_next or offset + length > size or (not length and size):
            raise ProtocolError(f"{printable(path)}: not the next piece of the upload")
        self._end += length
        self._arriving += length

    def arrived(self, length: int) -> None:
        """Count a piece whose bytes the file has."""
        self._arriving -= length

    def is_complete(self) -> bool:
        """Whether all files have arrived that were announced."""
        is_all_announced = not self._files_left and not self._bytes_left
        return is_all_announced and self._end == self._size and not self._arriving

    def clone(self, source: int, offset: int, length: int) -> bool:
        """Blocking. Make the file if this is its first piece, and share the blocks of the piece if
        the file system can. Returns whether the file has the piece. Raises CannotUpload."""
        with self._translated():
            if not stat.S_ISREG(os.fstat(source).st_mode):
                raise ProtocolError(f"{printable(self._path)}: the descriptor is not of a file")
            with self._opened(offset) as target:
                if not length:
                    return True
                piece = _CLONE_RANGE.pack(source, offset, length, offset)
                try:
                    fcntl.ioctl(target, _FICLONERANGE, piece)
                except OSError:  # another disk, another file system, or no whole blocks
                    return False
                return True

    def copy(self, source: int, offset: int, length: int) -> None:
        """Blocking. Copy the piece after `clone` could not share it. Raises CannotUpload."""
        with self._translated(), self._opened(offset, is_there=True) as target:
            done = self._copy_in_kernel(source, target, offset, length)
            while done < length:
                data = os.pread(source, min(_BUFFER_BYTES, length - done), offset + done)
                if not data:
                    raise self._too_short()
                pwrite_all(target, data, offset + done)
                done += len(data)

    def _copy_in_kernel(self, source: int, target: int, offset: int, length: int) -> int:
        """The bytes that the kernel has copied before it could not go on."""
        done = 0
        while done < length:
            at = offset + done
            try:
                count = os.copy_file_range(source, target, length - done, at, at)
            except OSError as error:
                if error.errno in _NO_SPACE:
                    raise
                break
            if not count:
                break
            done += count
        return done

    @contextlib.contextmanager
    def _opened(self, offset: int, *, is_there: bool = False) -> Generator[int]:
        """A descriptor of the file whose piece arrives. The first piece makes it."""
        *folders, name = self._path.split("/")
        makes = not offset and not is_there
        folder = os.dup(self._top)
        try:
            for each in folders:
                if makes:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(each, 0o700, dir_fd=folder)
                below = os.open(each, _DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = below
            file = os.open(name, _NEW if makes else _OLD, 0o600, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            yield file
        finally:
            os.close(file)

    def _too_short(self) -> CannotUpload:
        return CannotUpload(
            f"{printable(self._path)}: the file became shorter while it was taken over; upload a "
            "directory that no program writes to any more"
        )

    @contextlib.contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except (CannotUpload, ProtocolError):
            raise
        except OSError as error:
            advice = "check the disk"
            if error.errno in _NO_SPACE:
                advice = "free space, set cache_dir to a larger disk, or upload with wait=True"
            raise CannotUpload(
                f"{printable(self._path)} cannot be taken over to {self._where}: {error.strerror}; "
                f"{advice}"
            ) from None
