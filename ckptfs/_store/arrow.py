# pyarrow has no usable type stubs; nothing of it leaves this folder.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""A Store over any pyarrow filesystem.

pyarrow has no conditional reads. Opening a file costs one HEAD, and its handle then knows the ETag.
So `confirm` opens a handle, and the store keeps the handle for the reads that follow. The first
access to an object therefore costs HEAD, GET and HEAD. A handle on S3 holds no connection.

If a handle has no ETag (HDFS, filesystems written in Python), size and time are the version. Each
read then opens a handle of its own, because an older handle may still read bytes of a version that
looks the same. The read begins when a later version would have another time (see `timestamps`).
"""

import contextlib
import re
import threading
import uuid
from collections import OrderedDict
from typing import Any

import msgspec
import pyarrow as pa
from pyarrow import fs as pafs

from ckptfs._model.manifest import ListedFile, Listing, Skipped, printable
from ckptfs._store.base import Pin, changed, check_count, check_version, is_file, not_found
from ckptfs._store.timestamps import wait_until_settled
from ckptfs._store.versions import time_ns_in
from ckptfs.errors import (
    AccessDenied,
    CheckpointNotFound,
    CkptfsError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

_HANDLES_MAX = 128
"""The open handles that a store keeps: enough for every connection of several files, and few
descriptors."""

# Names of aws::S3Errors as Arrow prints them ("AWS Error NAME during ...") and what they mean.
_DENIED = frozenset(
    [
        "ACCESS_DENIED",
        "INVALID_ACCESS_KEY_ID",
        "SIGNATURE_DOES_NOT_MATCH",
        "INVALID_CLIENT_TOKEN_ID",
        "MISSING_AUTHENTICATION_TOKEN",
        "EXPIRED_TOKEN",
        "UNRECOGNIZED_CLIENT",
        "ACCOUNT_PROBLEM",
        "INVALID_SIGNATURE",
        "OPT_IN_REQUIRED",
        "REQUEST_EXPIRED",
        "REQUEST_TIME_TOO_SKEWED",
    ]
)
_TRANSIENT = frozenset(
    [
        "NETWORK_CONNECTION",
        "SLOW_DOWN",
        "SERVICE_UNAVAILABLE",
        "THROTTLING",
        "INTERNAL_FAILURE",
        "REQUEST_TIMEOUT",
    ]
)


class ArrowStore:
    """The directory `root` of `filesystem`. `name` is the checkpoint's URI, for messages."""

    def __init__(self, filesystem: "pafs.FileSystem", root: str, name: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        self.name = name
        self._lock = threading.Lock()  # guards _idle; never held during IO
        self._idle: OrderedDict[str, list[Any]] = OrderedDict()  # path -> open handles, LRU first
        self._idle_count = 0

    def list(self, files_max: int) -> Listing:
        try:
            infos = self._fs.get_file_info(pafs.FileSelector(self._root, recursive=True))
        except (FileNotFoundError, NotADirectoryError):
            raise self._why_not_found() from None
        except (OSError, pa.ArrowException) as error:
            raise translate_error(error, self.name) from error
        check_count(self.name, len(infos), files_max)
        files: list[ListedFile] = []
        directories: list[str] = []
        skipped: list[Skipped] = []
        prefix = len(self._root) + 1 if self._root else 0
        for info in infos:
            try:
                path: str = info.path[prefix:]
            except UnicodeDecodeError as error:
                raw = bytes(error.object)[prefix:]
                name = printable(raw.decode("utf-8", "backslashreplace"))
                skipped.append(Skipped(name, "the name is not valid UTF-8"))
                continue
            if info.type == pafs.FileType.File:
                files.append(ListedFile(path, info.size, info.mtime_ns or 0))
            elif info.type == pafs.FileType.Directory:
                directories.append(path)
            else:
                skipped.append(Skipped(printable(path), "it is neither a file nor a directory"))
        return Listing(files, directories, skipped)

    def confirm(self, pin: Pin) -> Pin:
        try:
            handle = self._fs.open_input_file(self._path(pin))
            current = self._version_of(handle, pin)
        except (OSError, pa.ArrowException) as error:
            raise self._of_object(error, pin) from error
        check_version(self.name, pin, current.size, current.mtime_ns, current.etag)
        if current.etag:
            self._give_back(pin.path, handle)  # not one of another version: its size is fixed
        return msgspec.structs.replace(pin, etag=current.etag)

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        if not pin.etag:
            wait_until_settled(pin.mtime_ns)
        handle = self._take(pin.path)
        try:
            if handle is None:
                handle = self._fs.open_input_file(self._path(pin))
            if (size := handle.size()) != pin.size:
                raise changed(self.name, pin, f"{pin.size} bytes became {size}")
            done = 0
            while done < len(buffer):
                # readinto would ask Google for all that follows the offset.
                data: bytes = handle.read_at(len(buffer) - done, offset + done)
                if not data:
                    raise changed(self.name, pin, f"it ends at byte {offset + done} of {pin.size}")
                buffer[done : done + len(data)] = data
                done += len(data)
        except (OSError, pa.ArrowException) as error:
            raise self._of_object(error, pin) from error
        if pin.etag:
            self._give_back(pin.path, handle)
        return False

    def get(self, path: str) -> bytes | None:
        try:
            with self._fs.open_input_file(f"{self._root}/{path}") as stream:
                return bytes(stream.read())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, pa.ArrowException) as error:
            raise translate_error(error, f"{printable(path)} in {self.name}") from error

    def put(self, path: str, data: bytes) -> None:
        full = f"{self._root}/{path}"
        try:
            if isinstance(self._fs, pafs.PyFileSystem):
                self._write_beside(full, data)
            else:
                self._write(full, data)
        except FileNotFoundError:
            raise not_found(self.name) from None
        except (OSError, pa.ArrowException) as error:
            raise translate_error(error, f"{printable(path)} in {self.name}") from error

    def _write(self, full: str, data: bytes) -> None:
        with self._fs.open_output_stream(full) as stream:
            stream.write(data)

    def _write_beside(self, full: str, data: bytes) -> None:
        temporary = f"{full}.{uuid.uuid4().hex}"
        try:
            self._write(temporary, data)
            self._fs.move(temporary, full)
        except BaseException:
            with contextlib.suppress(OSError):
                self._fs.delete_file(temporary)
            raise

    def find(self, path: str) -> ListedFile | None:
        try:
            info = self._fs.get_file_info(f"{self._root}/{path}")
        except (OSError, pa.ArrowException) as error:
            raise translate_error(error, f"{printable(path)} in {self.name}") from error
        if info.type != pafs.FileType.File:
            return None
        return ListedFile(path, info.size, info.mtime_ns or 0)

    def close(self) -> None:
        with self._lock:
            self._idle.clear()  # a handle closes when it is collected
            self._idle_count = 0

    # -- handles

    def _take(self, path: str) -> Any:
        with self._lock:
            handles = self._idle.get(path)
            if not handles:
                return None
            self._idle_count -= 1
            handle = handles.pop()
            if not handles:
                del self._idle[path]
            return handle

    def _give_back(self, path: str, handle: Any) -> None:
        dropped: list[Any] = []  # closed outside the lock
        with self._lock:
            self._idle.setdefault(path, []).append(handle)
            self._idle.move_to_end(path)
            self._idle_count += 1
            while self._idle_count > _HANDLES_MAX:
                dropped += self._idle.popitem(last=False)[1]
                self._idle_count -= len(dropped)

    # -- versions and errors

    def _path(self, pin: Pin) -> str:
        return f"{self._root}/{pin.path}"

    def _version_of(self, handle: Any, pin: Pin) -> Pin:
        """The version that `handle` was opened on. Object stores tell it with the handle."""
        metadata: dict[bytes | str, bytes] = handle.metadata() or {}
        known = {
            (k.decode() if isinstance(k, bytes) else k).lower(): v for k, v in metadata.items()
        }
        # Google's ETag also changes with the metadata of an object; its generation does not.
        etag = next((known[n].decode() for n in ("generation", "etag") if known.get(n)), "")
        if etag.strip('"'):
            modified = known.get("last-modified") or known.get("updated") or b""
            return Pin(pin.path, handle.size(), time_ns_in(modified.decode()), etag)
        info = self._fs.get_file_info(self._path(pin))
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(pin.path)
        return Pin(pin.path, info.size, info.mtime_ns or 0)

    def _of_object(self, error: Exception, pin: Pin) -> CkptfsError:
        if isinstance(error, CkptfsError):
            return error
        cause = _cause(str(error))
        # Arrow has no name for the error of a range behind the end of a truncated object.
        if re.search(r"HTTP status 416|InvalidRange|INVALID_RANGE", cause):
            return changed(self.name, pin, "it became shorter")
        gone = re.match("AWS Error (NO_SUCH_KEY|RESOURCE_NOT_FOUND)", cause)
        if gone or isinstance(error, FileNotFoundError):
            return changed(self.name, pin, "it was deleted")
        return translate_error(error, f"{printable(pin.path)} in {self.name}")

    def _why_not_found(self) -> CkptfsError:
        try:
            info = self._fs.get_file_info(self._root)
        except (OSError, pa.ArrowException) as error:
            return translate_error(error, self.name)
        if info.type == pafs.FileType.File:
            return is_file(self.name)
        return not_found(self.name)


def advice_for(cause: str, otherwise: str) -> str:
    """The advice for a filesystem of pyarrow that cannot be made."""
    if "libjvm" in cause or "libhdfs" in cause:
        return (
            "install Java and Hadoop's client, and set JAVA_HOME, HADOOP_HOME and CLASSPATH "
            "(`hadoop classpath --glob`)"
        )
    return otherwise


def _cause(text: str) -> str:
    """The part of an error's text that the store or SDK wrote. Arrow puts bucket and key before it,
    which can contain any word that the caller searches for."""
    text = text.partition("\n")[0]
    start = text.rfind("AWS Error ")
    return text[start:] if start >= 0 else text


def translate_error(error: Exception, what: str) -> CkptfsError:
    """The exception of ours that says what pyarrow's `error` means for `what`."""
    text = _cause(str(error))
    match = re.match(r"AWS Error ([A-Z_]+)", text)
    name = match[1] if match else ""
    cause = printable(text)
    if name == "NO_SUCH_BUCKET" or re.match("Bucket '.*' not found", text):
        return CheckpointNotFound(f"{what}: there is no such bucket; check its name")
    if name in _DENIED or isinstance(error, PermissionError):
        return AccessDenied(f"{what}: access denied ({cause}); check credentials and permissions")
    if "imeout was reached" in text or "timed out" in text:
        return StoreTimeout(f"{what}: the store did not answer ({cause}); check the endpoint")
    if name in _TRANSIENT or re.search(r"HTTP status (5\d\d|429)|\(UNAVAILABLE", text):
        return StoreUnavailable(f"{what}: cannot reach the store ({cause}); check the endpoint")
    if "XML_ERROR" in text:
        return StoreError(
            f"{what}: the store's listing is not valid XML ({cause}); an object name with a "
            "control character does this: rename or remove that object"
        )
    return StoreError(f"{what}: {cause or type(error).__name__}")
