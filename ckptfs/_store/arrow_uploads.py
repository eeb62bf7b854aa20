# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""Uploads by the streams of a pyarrow filesystem, also of one that wraps an fsspec filesystem.

Object stores show an object when its stream is closed. pyarrow cannot drop a stream, so a failed
upload closes it and removes the object. Other filesystems write in place. There the stream writes a
temporary file beside the object, which is renamed when it is complete. The name of the temporary
file depends on that of the object only, so the next upload replaces it.

Such a filesystem says nothing of the content that ckptfs could compare. Only a local file is read
again for that.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Set
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from ckptfs._model.manifest import ListedFile, printable
from ckptfs._store.arrow import translate_error
from ckptfs._store.source import SourceFile
from ckptfs._store.uploads import Digests
from ckptfs.errors import AccessDenied, CkptfsError

PART_BYTES = 8 << 20
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
            with self.translated(folder):
                self._fs.create_dir(f"{self._root}/{folder}".rstrip("/"), recursive=True)

    def is_same(self, listed: ListedFile, digests: Digests) -> bool | None:
        if not self._is_local:
            return None
        with self.translated(listed.path):
            full = os.path.join(self._root, listed.path)
            there = SourceFile(self._root, listed.path, os.stat(full))
        whole = max(1, listed.size)
        return there.size == listed.size and there.md5s(whole) == digests(whole)

    def begin(self, path: str, size: int) -> "ArrowUpload":
        return ArrowUpload(self, self._fs, f"{self._root}/{path}", path, self._renames)

    def remove(self, path: str) -> None:
        with self.translated(path):
            self._fs.delete_file(f"{self._root}/{path}")

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
            raise translate_error(error, what) from error


class ArrowUpload:
    """The upload of one object, in order. `full` is its path on the filesystem."""

    def __init__(
        self, uploads: ArrowUploads, filesystem: Any, full: str, path: str, renames: bool
    ) -> None:
        self._uploads = uploads
        self._fs = filesystem
        self._full = full
        self._path = path
        self._written = _aside(full) if renames else full
        self._stream: Any = None

    def send(self, number: int, data: memoryview) -> None:
        with self._uploads.translated(self._path):
            if self._stream is None:
                self._stream = self._fs.open_output_stream(self._written, compression=None)
            self._stream.write(data)

    def finish(self) -> str:
        with self._uploads.translated(self._path):
            self._stream.close()
            if self._written == self._full:
                return ""
            if isinstance(self._fs, pafs.LocalFileSystem):
                _flush(self._written)
            elif self._fs.get_file_info(self._full).type == pafs.FileType.File:
                self._fs.delete_file(self._full)  # HDFS replaces no file
            self._fs.move(self._written, self._full)
        return ""

    def abort(self) -> None:
        if self._stream is None:
            return
        with contextlib.suppress(OSError, pa.ArrowException):
            self._stream.close()
        with self._uploads.translated(self._path), contextlib.suppress(FileNotFoundError):
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
