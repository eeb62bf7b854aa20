# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""Uploads by the streams of a pyarrow filesystem, also of one that wraps an fsspec filesystem.

Object stores show an object when its stream is closed. pyarrow cannot drop a stream, so a failed
upload closes it and removes the object. Other filesystems write in place. There the stream writes a
temporary file beside the object, which is renamed when it is complete. The name of the temporary
file depends on that of the object only, so the next upload replaces it.

Such a filesystem says nothing of the content that ckptfs could compare. Only a local file is read
again for that.

A library decides what it does with a silent store. So each of its calls runs in a thread of its
own, and ends in time for the upload (see ``wrappers.within``).
"""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Set
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from ckptfs._model.manifest import ListedFile, printable
from ckptfs._store.arrow import translate_error
from ckptfs._store.buffers import leave_thread_buffer
from ckptfs._store.request_context import current_progress
from ckptfs._store.source import SourceFile
from ckptfs._store.uploads import Digests
from ckptfs._store.wrappers import ANSWER_S, LISTING_S, within
from ckptfs.errors import AccessDenied, CkptfsError, StoreError, StoreTimeout

PART_BYTES = 1 << 20
"""The bytes that the library gets at once. It writes them within `ANSWER_S`."""
_FINISHED_BYTES_PER_S = 1 << 20
"""The least speed with which a file comes to the disk when it is complete."""
_NO_SPACE = frozenset([errno.ENOSPC, errno.EDQUOT])
_IN_PLACE = re.compile(r"\b((web)?hdfs|local|mock|s?ftp|smb|ssh)\b")
"""The types of filesystems that have directories, write in place, and can rename."""
_BEGIN, _END = ".", ".ckptfs-upload"


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

    def part_bytes(self, size: int) -> int:
        return PART_BYTES

    def fault_of(self, path: str) -> str | None:
        return None

    def prepare(self, paths: Set[str]) -> None:
        if not self._renames:
            return
        for folder in {"", *(path.rpartition("/")[0] for path in paths)}:
            full = f"{self._root}/{folder}".rstrip("/")
            with self.translated(folder):
                within(ANSWER_S, self.name, self._fs.create_dir, full, recursive=True)
        asides = [_aside(f"{self._root}/{path}") for path in paths]
        with self.translated(""):
            for info in within(ANSWER_S, self.name, self._fs.get_file_info, asides):
                if info.type == pafs.FileType.File:
                    self._fs.delete_file(info.path)

    def is_same(self, listed: ListedFile, digests: Digests) -> bool | None:
        if not self._is_local:
            return None
        with self.translated(listed.path):
            full = os.path.join(self._root, listed.path)
            there = SourceFile(self._root, listed.path, os.stat(full))
        whole = max(1, listed.size)
        return there.size == listed.size and there.md5s(whole) == digests(whole)

    def begin(self, path: str, size: int) -> "ArrowUpload":
        return ArrowUpload(self, self._fs, f"{self._root}/{path}", path, size, self._renames)

    def remove(self, path: str) -> None:
        with self.translated(path):
            within(ANSWER_S, self.name, self._fs.delete_file, f"{self._root}/{path}")

    def is_own(self, path: str) -> bool:
        name = path.rpartition("/")[2]
        return self._renames and name.startswith(_BEGIN) and name.endswith(_END)

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
        self._finish_s = LISTING_S + size / _FINISHED_BYTES_PER_S
        self._written = _aside(full) if renames else full
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
        if self._stream is None:
            self._stream = self._fs.open_output_stream(self._written, compression=None)
        self._stream.write(data)

    def _finish(self) -> None:
        self._stream.close()
        if self._written == self._full:
            return
        if isinstance(self._fs, pafs.LocalFileSystem):
            _flush(self._written)
        elif self._fs.get_file_info(self._full).type == pafs.FileType.File:
            self._fs.delete_file(self._full)  # HDFS replaces no file
        self._fs.move(self._written, self._full)

    def _abort(self) -> None:
        with contextlib.suppress(OSError, pa.ArrowException):
            self._stream.close()
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._written)


def _aside(full: str) -> str:
    folder, slash, name = full.rpartition("/")
    digest = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return f"{folder}{slash}{_BEGIN}{digest}{_END}"


def _flush(path: str) -> None:
    """Have the kernel write a file to the disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
