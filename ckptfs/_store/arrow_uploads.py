# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""Uploads by the streams of a pyarrow filesystem, also of one that wraps an fsspec filesystem.

Object stores show an object when its stream is closed. pyarrow cannot drop a stream, so a failed
upload closes it and removes the object. Other filesystems write in place. There the stream writes a
temporary file beside the object, which is renamed when it is complete.

The name of the temporary file has a digest of the object's name and a random part, so two uploads
never write to one file. An upload first removes the temporary files with the digests of its
objects, which killed uploads have left. A local file has a lock (flock(2)) while a program writes
it, and stays then. Elsewhere the other program finds its file missing when it would rename it, and
its upload fails. The same holds for the temporary files of ``.metadata.json``, which `Store.put`
writes in the target's directory. An upload that merges therefore leaves all files without a lock.

Such a filesystem says nothing of the content that ckptfs could compare. Only a local file is read
again for that.

A library decides what it does with a silent store. So each of its calls runs in a thread of its
own, and ends in time for the upload (see ``wrappers.within``).
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Set
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from ckptfs._model.manifest import METADATA_NAME, ListedFile, printable
from ckptfs._os.filelock import leads_to
from ckptfs._store.arrow import translate_error
from ckptfs._store.buffers import leave_thread_buffer
from ckptfs._store.request_context import current_progress
from ckptfs._store.source import SourceFile
from ckptfs._store.uploads import Digests, other_bytes
from ckptfs._store.wrappers import ANSWER_S, LISTING_S, within
from ckptfs.errors import AccessDenied, CkptfsError, StoreError, StoreTimeout

PART_BYTES = 1 << 20
"""The bytes that the library gets at once. It writes them within `ANSWER_S`."""
_FINISHED_BYTES_PER_S = 1 << 20
"""The least speed with which a file comes to the disk when it is complete."""
_NO_SPACE = frozenset([errno.ENOSPC, errno.EDQUOT])
_IN_PLACE = re.compile(r"\b((web)?hdfs|local|mock|s?ftp|smb|ssh)\b")
"""The types of filesystems that have directories, write in place, and can rename."""
_TEMPORARY = re.compile(r"\.([0-9a-f]{32})\.[0-9a-f]{16}\.ckptfs-upload")
"""The names of temporary files. The group is the digest, and the random part comes after it."""
_TEMPORARY_METADATA = re.compile(re.escape(METADATA_NAME) + r"\.[0-9a-f]{32}")
"""The names of the temporary files of `LocalStore.put` and `ArrowStore.put`."""


class ArrowUploads:
    """Uploads to the directory `root` of a filesystem. `name` is the URI, for messages."""

    is_parallel = False
    repeats = False

    def __init__(self, filesystem: "pafs.FileSystem", root: str, name: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        self.name = name
        self._renames = bool(_IN_PLACE.search(filesystem.type_name))
        self._is_local = isinstance(filesystem, pafs.LocalFileSystem)
        self._leaves_metadata = self._is_local or isinstance(filesystem, pafs.PyFileSystem)

    def part_bytes(self, size: int) -> int:
        return PART_BYTES

    def fault_of(self, path: str) -> str | None:
        return None

    def prepare(self, paths: Set[str], *, merge: bool = False) -> None:
        if not self._renames:
            if self._leaves_metadata:
                self._remove_left(self._root, "", paths, merge)
            return
        for folder in {"", *(path.rpartition("/")[0] for path in paths)}:
            full = f"{self._root}/{folder}".rstrip("/")
            with self.translated(folder):
                within(ANSWER_S, self.name, self._fs.create_dir, full, recursive=True)
            self._remove_left(full, folder, paths, merge)

    def _remove_left(self, full: str, folder: str, paths: Set[str], merge: bool) -> None:
        """Remove the temporary files of objects of one directory, except those of running
        uploads."""
        wanted = {_digest(path) for path in paths if path.rpartition("/")[0] == folder}
        with self.translated(folder):
            names = within(LISTING_S, self.name, self._names_in, full)
        for name in names:
            match = _TEMPORARY.fullmatch(name)
            path = f"{folder}/{name}" if folder else name
            is_of_object = bool(match and match[1] in wanted)
            if path in paths or not (is_of_object or self._is_metadata(path)):
                continue
            with self.translated(path), contextlib.suppress(FileNotFoundError):
                if is_of_object and self._is_local:
                    _remove_unlocked(f"{full}/{name}")
                elif not merge:
                    within(ANSWER_S, self.name, self._fs.delete_file, f"{full}/{name}")

    def _names_in(self, full: str) -> list[str]:
        """The names of the files of a directory that are valid UTF-8."""
        if self._is_local:
            with os.scandir(full or "/") as entries:
                return [each.name for each in entries if not each.is_dir(follow_symlinks=False)]
        names: list[str] = []
        for info in self._fs.get_file_info(pafs.FileSelector(full, allow_not_found=True)):
            with contextlib.suppress(UnicodeDecodeError):
                if info.type == pafs.FileType.File:
                    names.append(info.base_name)
        return names

    def is_same(self, listed: ListedFile, digests: Digests) -> bool | None:
        if not self._is_local:
            return None
        with self.translated(listed.path):
            full = os.path.join(self._root, listed.path)
            there = SourceFile(self._root, listed.path, os.stat(full))
        whole = max(1, listed.size)
        return there.size == listed.size and there.md5s(whole) == digests(whole)

    def begin(self, path: str, size: int, *, is_new: bool = False) -> "ArrowUpload":
        return ArrowUpload(self, self._fs, f"{self._root}/{path}", path, size, self._renames)

    def remove(self, path: str) -> None:
        with self.translated(path):
            within(ANSWER_S, self.name, self._fs.delete_file, f"{self._root}/{path}")

    def is_own(self, path: str) -> bool:
        is_temporary = self._renames and _TEMPORARY.fullmatch(path.rpartition("/")[2])
        return bool(is_temporary) or self._is_metadata(path)

    def _is_metadata(self, path: str) -> bool:
        return self._leaves_metadata and bool(_TEMPORARY_METADATA.fullmatch(path))

    @contextlib.contextmanager
    def translated(self, path: str) -> Any:
        """Turn the errors of pyarrow and fsspec in this context into those of a Store."""
        what = f"{printable(path)} in {self.name}" if path else self.name
        try:
            yield
        except CkptfsError:
            raise
        except NotImplementedError:
            raise AccessDenied(
                f"{self.name}: this filesystem cannot write; choose another target"
            ) from None
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno in _NO_SPACE:
                text = f"{what}: the target has no space left; free some, and upload again"
                raise StoreError(text) from error
            raise translate_error(error, what) from error


class ArrowUpload:
    """The upload of one object, in order. `full` is its path on the filesystem."""

    def __init__(
        self,
        uploads: ArrowUploads,
        filesystem: Any,
        full: str,
        path: str,
        size: int,
        renames: bool,
    ) -> None:
        self._uploads = uploads
        self._fs = filesystem
        self._full = full
        self._path = path
        self._size = size
        self._finish_s = LISTING_S + size / _FINISHED_BYTES_PER_S
        self._written = _temporary(full) if renames else full
        self._is_local = isinstance(filesystem, pafs.LocalFileSystem)
        self._stream: Any = None

    def send(self, number: int, data: memoryview) -> None:
        current_progress().goes(len(data))
        try:
            with self._uploads.translated(self._path):
                within(ANSWER_S, self._uploads.name, self._write, data)
        except StoreTimeout:
            leave_thread_buffer()
            raise

    def finish(self) -> str:
        with self._uploads.translated(self._path):
            within(self._finish_s, self._uploads.name, self._finish)
        return ""

    def shown_etag(self) -> None:
        return None

    def abort(self) -> None:
        if self._stream is not None:
            with self._uploads.translated(self._path):
                within(ANSWER_S, self._uploads.name, self._abort)

    def _write(self, data: memoryview) -> None:
        if not self._is_local:
            if self._stream is None:
                self._stream = self._fs.open_output_stream(self._written, compression=None)
            self._stream.write(data)
            return
        if self._stream is None:
            # A buffer has a lock. If a thread hangs with it, Python aborts at its exit.
            self._stream = _locked_file(self._written)
        done = 0
        while done < len(data):
            done += self._stream.write(data[done:])

    def _finish(self) -> None:
        if self._is_local:
            with self._stream:  # whose lock guards the file until it has its name
                os.fsync(self._stream.fileno())
                self._check_written()
                self._rename()
            return
        self._stream.close()
        if self._written == self._full:
            return
        self._check_written()
        if self._fs.get_file_info(self._full).type == pafs.FileType.File:
            self._fs.delete_file(self._full)  # HDFS replaces no file
        self._rename()

    def _rename(self) -> None:
        try:
            self._fs.move(self._written, self._full)
        except FileNotFoundError:
            raise self._removed() from None

    def _check_written(self) -> None:
        """Raise StoreError unless the temporary file has all bytes."""
        info = self._fs.get_file_info(self._written)
        if info.type != pafs.FileType.File:
            raise self._removed()
        if info.size is not None and info.size != self._size:
            what = f"{printable(self._path)} in {self._uploads.name}"
            raise other_bytes(what, f"{self._size} bytes", f"{info.size}")

    def _removed(self) -> StoreError:
        return StoreError(
            f"{printable(self._path)} in {self._uploads.name}: another program has removed the "
            "temporary file, probably an upload to the same target; end that one, and upload again"
        )

    def _abort(self) -> None:
        with contextlib.suppress(OSError, pa.ArrowException):
            self._stream.close()
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._written)


def _locked_file(path: str) -> Any:
    """A new file, with a lock that other programs see until it is closed."""
    while True:
        # A buffer has a lock of its own. If a thread hangs with it, Python aborts at its exit.
        stream = open(path, "xb", buffering=0)  # noqa: SIM115
        try:
            with contextlib.suppress(OSError):  # a filesystem without locks
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if leads_to(path, stream.fileno()):  # it was not removed before it had its lock
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()


def _remove_unlocked(path: str) -> None:
    """Remove a temporary file that no program is writing. Raises OSError."""
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it is being written, or nothing says whether it is
            return
        os.unlink(path)


def _digest(path: str) -> str:
    """The digest of an object's name in that of its temporary file."""
    name = path.rpartition("/")[2]
    return hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()


def _temporary(full: str) -> str:
    """A new name for the temporary file of an object."""
    folder, slash, _ = full.rpartition("/")
    return f"{folder}{slash}.{_digest(full)}.{secrets.token_hex(8)}.ckptfs-upload"
