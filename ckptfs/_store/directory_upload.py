"""Uploads of local directories: parallel, verified, and repeatable.

1. `files_in` chooses the files. The listing of the target says which names are there.
2. Files that are there with the same size are compared with what the store says of them. A target
   with other content is refused before anything is written.
3. The missing files are uploaded, in parts. What an earlier, killed upload of these files has left
   behind is removed first.
4. The target is listed again. Each file has to be there with its size, and with the checksum that
   the store gave it.
5. ``.metadata.json`` is written last. A program that waits for it sees a complete checkpoint.

An upload that fails or is interrupted removes its unfinished objects. The next one finds the
finished ones, and continues.

The calling thread only waits and reports the progress. Others read and send (``worker_threads``).
Their memory is bounded, because each has one part.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec

from ckptfs._model.manifest import METADATA_NAME, ListedFile, printable
from ckptfs._model.wording import counted
from ckptfs._store.base import Store, pin_of
from ckptfs._store.buffers import thread_buffer
from ckptfs._store.request_context import Progress, ends_in
from ckptfs._store.retrying import Places, retry
from ckptfs._store.source import SourceFile, check_unchanged, files_in
from ckptfs._store.uploads import ObjectUpload, Uploads, contradicts, other_bytes, parts_of
from ckptfs._store.worker_threads import Pace, WorkerThreads
from ckptfs._store.wrappers import TimedStore
from ckptfs.errors import (
    CheckpointNotFound,
    CkptfsError,
    ObjectChanged,
    StoreError,
    StoreUnavailable,
    TargetExists,
)

T = TypeVar("T")

_log = logging.getLogger(__name__)

_THREADS = 16
_MEMORY_BYTES = 256 << 20
"""The most memory for parts. Parts are larger than 8 MiB only in files above 80 GB."""
_BYTES_PER_S_EACH = 1 << 20
"""The least rate of a connection if the rate is limited, because servers close connections that
are silent for long."""
_ABORT_S = 10.0
"""The longest time for the removal of unfinished objects, because the caller waits for its
error."""
_FILES_MAX = 10_000_000
_COMPARED_BYTES = 8 << 20
_SHOWN_MAX = 3
_OTHER_CONTENT = "other content in {}"

Told = Callable[[int, int], None]
"""A function that the calling thread calls with the bytes that are at the store, and all bytes."""


class Uploaded(msgspec.Struct):
    """The result of an upload: the URI without credentials, all files, and those among them that
    were at the store already."""

    uri: str
    files: int
    bytes: int
    skipped_files: int
    skipped_bytes: int


class Content(NamedTuple):
    """A file, and the ETag that the store shows for the object with its bytes; "" if it is not
    known."""

    source: SourceFile
    etag: str


class Wanted(msgspec.Struct, frozen=True):
    """The wishes of the caller.

    Attributes:
        include: Globs on relative paths; empty for all files.
        metadata: The content of ``.metadata.json``; None for that of the directory's file.
        overwrite: Whether other content at the target is replaced, and other files stay.
        rate: The most bytes per second; 0 for no limit.
        merge: Whether other files stay, which other uploads may write at the same time.
        left_out: Further paths that may be at the target, as those of the directory may.
    """

    include: Sequence[str] = ()
    metadata: bytes | None = None
    overwrite: bool = False
    rate: int = 0
    merge: bool = False
    left_out: frozenset[str] = frozenset()


def upload_directory(
    top: str, store: Store, uploads: Uploads, wanted: Wanted, told: Told | None = None
) -> tuple[Uploaded, list[Content]]:
    """Upload the files of the directory `top` to `store`, by `uploads`. Returns also what is at the
    store now, except the metadata.

    Raises:
        CheckpointNotFound, CheckpointIsFile: `top` or the bucket does not exist; or `top`, or the
            target, is a file.
        CannotUpload: A file changed meanwhile, cannot be read, or has a name that the store cannot
            hold.
        TargetExists: The target has other content.
        AccessDenied, StoreError: The store's answer, or the local directory's.
    """
    run = _Run(top, TimedStore(store), uploads, wanted, told)
    return run.run(), run.contents


class _File:
    """The upload of one file. Several threads may use it."""

    def __init__(self, source: SourceFile, part_bytes: int) -> None:
        self.source = source
        self.part_bytes = part_bytes
        self.parts = parts_of(source.size, part_bytes)
        self.etag = ""
        self.is_finished = False
        self._left = self.parts
        self._lock = threading.Lock()  # guards _left and _upload; held while the upload begins
        self._upload: ObjectUpload | None = None

    def length(self, number: int) -> int:
        """The bytes of a part."""
        return min(self.part_bytes, self.source.size - (number - 1) * self.part_bytes)

    def upload(self, begin: Callable[[], ObjectUpload]) -> ObjectUpload:
        """The upload, which the first thread begins."""
        with self._lock:
            if self._upload is None:
                self._upload = begin()
            return self._upload

    def is_last(self) -> bool:
        """Count a part that was sent. Returns whether it is the last one."""
        with self._lock:
            self._left -= 1
            return not self._left

    def shown_etag(self) -> str | None:
        """See ObjectUpload.shown_etag."""
        return self._upload.shown_etag() if self._upload is not None else None

    def abort(self) -> None:
        """Remove the parts if the upload is not finished."""
        if self._upload is not None and not self.is_finished:
            self._upload.abort()


class _Run:
    """One upload.

    Attributes:
        contents: What is at the store in the end, except the metadata.
    """

    def __init__(
        self,
        top: str,
        store: Store,
        uploads: Uploads,
        wanted: Wanted,
        told: Told | None,
    ) -> None:
        self._top = top
        self._files = {file.path: file for file in files_in(top, wanted.include, uploads.fault_of)}
        self._metadata_file = self._files.pop(METADATA_NAME, None)
        self._metadata: bytes | None = None
        self._old_metadata: bytes | None = None
        self._store = store
        self._uploads = uploads
        self._wanted = wanted
        self._told = told
        self._places = Places(_THREADS)
        self._etags: dict[str, str] = {}  # as the store has answered, by path
        self._sent: dict[str, _File] = {}
        self._new: set[str] = set()  # paths at which no object may be replaced
        self.contents: list[Content] = []
        self._done_bytes = 0
        self._total_bytes = 0

    def run(self) -> Uploaded:
        metadata = self._metadata = self._new_metadata()
        sizes = [file.size for file in self._files.values()]
        sizes += [] if metadata is None else [len(metadata)]
        self._total_bytes = sum(sizes)
        there = self._listed()
        if METADATA_NAME in there and metadata is not None:
            self._old_metadata = self._store.get(METADATA_NAME)
        same, others = self._compared(there)
        if not self._wanted.overwrite:
            self._refuse(there, others)
        missing = [file for path, file in self._files.items() if path not in same]
        self._ask(lambda: self._uploads.prepare(set(self._files), merge=self._wanted.merge))
        if missing and self._old_metadata is not None and not self._wanted.merge:
            self._ask(lambda: self._uploads.remove(METADATA_NAME))  # it says: complete
            self._old_metadata = None
        if self._wanted.merge and not self._wanted.overwrite:
            self._new = self._files.keys() - there.keys()
        self._etags = {path: there[path].etag for path in same}
        self._send_files(missing)
        self._verify()
        check_unchanged(self._files, self._top, self._wanted.include, self._uploads.fault_of)
        if metadata is not None and metadata == self._old_metadata:
            same.add(METADATA_NAME)
            self._count(len(metadata))
        elif metadata is not None:
            self._write_metadata(metadata)
        known = [self._files[path].size if path in self._files else sizes[-1] for path in same]
        name = self._store.name
        return Uploaded(name, len(sizes), self._total_bytes, len(same), sum(known))

    def _ask(self, call: Callable[[], T]) -> T:
        return retry(call, self._places) if self._uploads.repeats else call()

    # -- the target

    def _listed(self) -> dict[str, ListedFile]:
        """The objects below the target by their paths. A bucket that does not exist fails later."""
        try:
            return {file.path: file for file in self._store.list(_FILES_MAX).files}
        except CheckpointNotFound:
            return {}

    def _compared(self, there: dict[str, ListedFile]) -> tuple[set[str], list[str]]:
        """The paths of the files that the store has already, and those with other content. If the
        store says nothing of a file, its object is read, unless it will be overwritten anyway."""
        candidates: list[SourceFile] = []
        others: list[str] = []
        for path, file in self._files.items():
            if path in there and there[path].size != file.size:
                others.append(path)
            elif path in there:
                candidates.append(file)
        same: set[str] = set()
        threads = WorkerThreads(_THREADS)

        def compare(file: SourceFile) -> int:
            listed = there[file.path]
            is_same = self._is_same(file, listed, threads.check)
            if is_same is None and not self._wanted.overwrite:
                is_same = self._reads_same(file, listed, threads.check)
            if is_same:
                same.add(file.path)
            elif is_same is not None:
                others.append(file.path)
            return file.size if is_same else 0

        threads.work((partial(compare, file) for file in candidates), self._count)
        return same, sorted(others)

    def _is_same(
        self, file: SourceFile, listed: ListedFile, check: Callable[[], None] = lambda: None
    ) -> bool | None:
        """See Uploads.is_same."""
        digests = partial(file.md5s, check=check)
        return self._ask(lambda: self._uploads.is_same(listed, digests))

    def _reads_same(
        self, file: SourceFile, listed: ListedFile, check: Callable[[], None] = lambda: None
    ) -> bool:
        """Whether an object of the same size has the bytes of the file."""
        pin = pin_of(listed)
        for offset in range(0, file.size, _COMPARED_BYTES):
            check()
            length = min(_COMPARED_BYTES, file.size - offset)
            ours = memoryview(bytearray(length))
            theirs = memoryview(bytearray(length))
            file.read_into(offset, ours)
            try:
                retry(partial(self._store.read_into, pin, offset, theirs), self._places)
            except ObjectChanged as error:
                raise self._written_meanwhile(file.path) from error
            if ours != theirs:
                return False
        return True

    def _refuse(self, there: dict[str, ListedFile], others: list[str]) -> None:
        """Raise TargetExists if the target has other content."""
        is_merge = self._wanted.merge
        if self._old_metadata not in (None, self._metadata) and not is_merge:
            others = [*others, METADATA_NAME]
        foreign = [path for path in sorted(there) if self._is_foreign(path)]
        if others:
            raise self._exists(others, _OTHER_CONTENT)
        if foreign and not is_merge:
            raise self._exists(foreign, "{} that the directory lacks")

    def _exists(self, paths: Sequence[str], text: str) -> TargetExists:
        more = len(paths) - _SHOWN_MAX
        shown = ", ".join(printable(path) for path in paths[:_SHOWN_MAX])
        shown += f" and {more} more" if more > 0 else ""
        what = text.format(counted(len(paths), "file"))
        return TargetExists(
            f"{self._store.name} exists, and has {what} ({shown}); choose another target, or "
            "overwrite it (overwrite=True, --overwrite)"
        )

    def _is_foreign(self, path: str) -> bool:
        """Whether an object of the target belongs to no file of the directory."""
        if path in self._files or path == METADATA_NAME or self._uploads.is_own(path):
            return False
        if path in self._wanted.left_out:
            return False
        return not os.path.lexists(os.path.join(self._top, path))

    def _verify(self) -> None:
        """Raise StoreError unless the store lists each file with its size and checksum. A merge
        accepts the same bytes of another program, and raises TargetExists for others."""
        there = self._listed()
        for path, file in self._files.items():
            what = f"{printable(path)} in {self._store.name}"
            found = there.get(path)
            if found is None:
                raise StoreError(f"{what}: the store does not list it after its upload; try again")
            etag = self._shown_etag(file, found, what)
            if isinstance(etag, StoreError):
                if not self._wanted.merge:
                    raise etag
                if not self._has_bytes_of(file, found):
                    raise etag if self._wanted.overwrite else self._exists([path], _OTHER_CONTENT)
                etag = found.etag
            self.contents.append(Content(file, etag))

    def _shown_etag(self, file: SourceFile, found: ListedFile, what: str) -> str | StoreError:
        """The ETag that the store shows for the uploaded object; "" if it is not known. An error if
        the store has another object."""
        ours = self._etags[file.path]
        if found.size != file.size:
            return other_bytes(what, f"{file.size} bytes", f"{found.size}")
        if contradicts(ours, found.etag):
            return other_bytes(what, ours, found.etag)
        if ours == found.etag:
            return ours
        sent = self._sent.get(file.path)
        shown = None if sent is None else self._ask(sent.shown_etag)
        if shown == "":
            return self._written_meanwhile(file.path)
        return shown or ""

    def _written_meanwhile(self, path: str) -> StoreError:
        return StoreError(
            f"{printable(path)} in {self._store.name}: another program has written it "
            "meanwhile; choose another target, or end that program"
        )

    def _has_bytes_of(self, file: SourceFile, found: ListedFile) -> bool:
        """Whether an object has the bytes of the file."""
        if found.size != file.size:
            return False
        is_same = self._is_same(file, found)
        return self._reads_same(file, found) if is_same is None else is_same

    # -- metadata

    def _new_metadata(self) -> bytes | None:
        if self._wanted.metadata is not None or self._metadata_file is None:
            return self._wanted.metadata
        return self._metadata_file.read()

    def _write_metadata(self, metadata: bytes) -> None:
        if self._metadata_file is not None:
            self._metadata_file.check()
        self._ask(lambda: self._store.put(METADATA_NAME, metadata))
        self._count(len(metadata))

    # -- sending

    def _send_files(self, missing: list[SourceFile]) -> None:
        """Upload files, and note the ETags of the objects."""
        part_bytes = [self._uploads.part_bytes(file.size) for file in missing]
        files = [_File(file, part) for file, part in zip(missing, part_bytes, strict=True)]
        most = max((file.length(1) for file in files), default=1)
        count = max(2, min(_THREADS, _MEMORY_BYTES // max(1, most)))
        rate = self._wanted.rate
        if rate:
            count = max(1, min(count, rate // _BYTES_PER_S_EACH))
        threads = WorkerThreads(count, Pace(rate) if rate else None)
        try:
            threads.work(self._works(files, threads), self._count)
        except BaseException:
            self._abort(files)
            raise
        self._sent = {file.source.path: file for file in files}
        self._etags |= {path: file.etag for path, file in self._sent.items()}

    def _works(self, files: list[_File], threads: WorkerThreads) -> Iterator[Callable[[], int]]:
        for file in files:
            if self._uploads.is_parallel:
                for number in range(1, file.parts + 1):
                    yield partial(self._send, threads, file, number)
            else:
                yield partial(self._send_all, threads, file)

    def _send_all(self, threads: WorkerThreads, file: _File) -> int:
        for number in range(1, file.parts):
            threads.report(self._send(threads, file, number))
        return self._send(threads, file, file.parts)

    def _send(self, threads: WorkerThreads, file: _File, number: int) -> int:
        """Upload a part, and finish the object after its last part. Returns the bytes."""

        def ask(call: Callable[[], T]) -> T:
            def attempt() -> T:
                threads.check()
                return call()

            return self._ask(attempt)

        def begin() -> ObjectUpload:
            # Nothing cuts this request, or no thread would know of the upload.
            is_new = source.path in self._new
            begun = partial(self._uploads.begin, source.path, source.size, is_new=is_new)
            return Progress().run(begun)

        source = file.source
        upload = file.upload(lambda: ask(begin))
        buffer = thread_buffer(max(1, file.length(number)))[: file.length(number)]
        source.read_into((number - 1) * file.part_bytes, buffer)
        ask(lambda: upload.send(number, buffer))
        if file.is_last():
            source.check()
            file.etag = ask(upload.finish)
            file.is_finished = True
        return len(buffer)

    def _abort(self, files: list[_File]) -> None:
        """Remove the unfinished objects as far as the store answers. The next upload removes the
        others."""
        with ends_in(_ABORT_S):
            for file in files:
                try:
                    self._ask(file.abort)
                except CkptfsError as error:
                    _log.info("the parts of an unfinished upload stay: %s", error)
                    if isinstance(error, StoreUnavailable):
                        break

    def _count(self, length: int) -> None:
        self._done_bytes += length
        if self._told is not None:
            self._told(self._done_bytes, self._total_bytes)
