"""Copies of checkpoints, or some of their files, to a local directory: parallel and resumable.

A file appears under its name only when it is complete, and its version was confirmed after the last
byte was read. Until then the copy is ``.<name>.ckptfs-partial`` beside it. The file
``.<name>.ckptfs-parts`` has the version that is being copied, and a byte for each part that is
written. A later run resumes from there if the version is still the same. `_aside` chooses other
names if these are too long, or belong to files of the checkpoint. A file that is already there with
the right size and modification time is not copied again.

One process at a time copies to a directory (lock file). Another process waits, and then finds the
files, or resumes where the first one failed.

The main thread decides which work is next and which files are complete. The worker threads only
read and write.

Every request ends in time (see ``wrappers.TimedStore``), and so do its tries (see ``retrying``).
So a copy from a silent store ends with StoreTimeout.

The copy is refused before the first request for content if the free space is too small.

If the store sends no first byte in time, fewer requests run at once (`Places`), because each
request may cost the store much.
"""

import contextlib
import contextvars
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from ckptfs._model.globs import any_matcher
from ckptfs._model.manifest import NAME_BYTES_MAX, ListedFile, Manifest, build_manifest
from ckptfs._model.units import size_text
from ckptfs._os.filelock import locked
from ckptfs._store.base import Store, pin_of, repinned
from ckptfs._store.buffers import leave_thread_buffer, thread_buffer
from ckptfs._store.retrying import Places, retry
from ckptfs._store.wrappers import TimedStore
from ckptfs.errors import (
    CannotCopy,
    CkptfsError,
    ObjectChanged,
    StoreError,
    StoreTimeout,
)

PART_BYTES = 8 << 20
"""The bytes of one request: the round trip is small beside the transfer, and a large file still
spreads over all connections."""
_THREADS = 16
_FILES_MAX = 10_000_000

_PARTIAL, _PARTS = ".ckptfs-partial", ".ckptfs-parts"
_BLOCK_BYTES = 4096
"""The least space that a file's last bytes take on most file systems."""

Progress = Callable[[int, int], None]
"""A function that the calling thread calls with the bytes that arrived and the bytes of all
files."""


def listed(store: Store) -> Manifest:
    """The files that a copy can have. Raises the errors of the store, as `copy_directory`."""
    return build_manifest(TimedStore(store).list(_FILES_MAX))


def bytes_chosen(manifest: Manifest, include: Sequence[str]) -> int:
    """The bytes of the files that `include` matches."""
    return sum(file.size for file in _chosen(manifest, include))


def copy_directory(
    store: Store,
    target: Path,
    *,
    include: Sequence[str] = (),
    timeout_s: float | None = None,
    progress: Progress | None = None,
    manifest: Manifest | None = None,
) -> None:
    """Copy the files of `store` to `target`. Other files in `target` stay.

    Args:
        store: The checkpoint.
        target: A directory. It is made with its parents if it is missing.
        include: Globs on relative paths (``*`` also matches ``/``); empty for all files.
        timeout_s: The longest wait for another process that copies to `target`; None for no limit.
        progress: A function that is called for each part that arrived.
        manifest: The result of `listed`; None to list the store now.

    Raises:
        CheckpointNotFound, CheckpointIsFile, AccessDenied, ObjectChanged, StoreError: The store
            answered with an error, or (StoreTimeout) not at all. Complete files and parts stay for
            another try.
        CannotCopy: The free space is too small, and nothing was fetched; or the local disk refused.
        StoreError: `timeout_s` is over.
    """
    target = target.absolute()
    lock = target.parent / f".{target.name}.ckptfs-lock"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(str(lock), float("inf") if timeout_s is None else timeout_s):
            manifest = listed(store) if manifest is None else manifest
            _check_whole(manifest, include, store.name)
            taken = {file.path for file in manifest.files}.union(manifest.directories)
            files = [_File(target, file, taken) for file in _chosen(manifest, include)]
            _require_room(target, files, store.name)
            target.mkdir(exist_ok=True)
            if not include:
                for directory in manifest.directories:  # also the empty ones
                    (target / directory).mkdir(exist_ok=True)
            _Copy(TimedStore(store), files, progress).run()
    except CkptfsError:
        raise
    except TimeoutError:
        raise StoreError(
            f"{target}: another process has been copying to it for {timeout_s:g} s; wait for it, "
            "or choose another directory"
        ) from None
    except OSError as error:
        raise CannotCopy(
            f"cannot copy to {target}: {error.strerror or error}; {_ADVICE}"
        ) from error


_ADVICE = (
    "free space there, or choose another directory (TMPDIR, for copies that as_directory makes)"
)


def _require_room(target: Path, files: "Sequence[_File]", name: str) -> None:
    """Raise CannotCopy if the files that are still missing do not fit into the free space.

    While a file is copied, a second file notes its parts. Other processes may take the space
    meanwhile, and the copy then ends when the disk is full.
    """
    lacking = [file for file in files if not file.is_complete()]
    there = os.statvfs(target if target.is_dir() else target.parent)
    if not lacking or not there.f_blocks:  # some file systems say nothing
        return
    needed = sum(file.bytes_needed() for file in lacking)
    free = there.f_bavail * there.f_frsize
    if needed > free:
        raise CannotCopy(
            f"{name}: a copy takes {size_text(needed)}, and {target} has only {size_text(free)} "
            f"free; {_ADVICE}"
        )
    if there.f_files and 2 * len(lacking) > there.f_favail:
        raise CannotCopy(
            f"{name}: a copy takes {2 * len(lacking)} inodes, and {target} has only "
            f"{there.f_favail} free; {_ADVICE}"
        )


def _chosen(manifest: Manifest, include: Sequence[str]) -> list[ListedFile]:
    is_in = any_matcher(include or ["*"])
    return [file for file in manifest.files if is_in(file.path)]


def _check_whole(manifest: Manifest, include: Sequence[str], name: str) -> None:
    """Raise StoreError if a file that is to be copied is listed, but cannot be read."""
    is_in = any_matcher(include or ["*"])
    for skipped in manifest.skipped:
        if skipped.is_lacking and is_in(skipped.name):
            raise StoreError(
                f"{skipped.name} in {name} cannot be copied: {skipped.reason}, or leave it out "
                "with include"
            )


def _aside(path: str, taken: Set[str]) -> str:
    """The beginning of the names of the two files beside the one at `path`.

    It is the same in each run, short enough, and not the name of a file of the checkpoint. `taken`
    has all paths in the checkpoint, and our names if a user has uploaded an interrupted copy.
    """
    parent, slash, name = path.rpartition("/")
    above = parent + slash
    for count in itertools.count():
        stem = f"{above}.{name}"
        is_free = taken.isdisjoint((stem + _PARTIAL, stem + _PARTS))
        # A file of the checkpoint may have a digest as its name. The names beside it are its own.
        is_own = above + name == path or above + name not in taken
        if is_free and is_own and len(f".{name}{_PARTIAL}".encode()) <= NAME_BYTES_MAX:
            return stem
        name = hashlib.blake2b(f"{count} {path}".encode(), digest_size=16).hexdigest()
    raise AssertionError


class _File:
    """The state of a file that is being copied."""

    def __init__(self, target: Path, listed: ListedFile, taken: Set[str]) -> None:
        self.pin = pin_of(listed)
        self.path = target / listed.path
        aside = _aside(listed.path, taken)
        self.partial = target / f"{aside}{_PARTIAL}"
        self.parts_file = target / f"{aside}{_PARTS}"
        self.parts = -(-listed.size // PART_BYTES)
        self.missing: set[int] = set()

    def is_complete(self) -> bool:
        """Whether an earlier run has copied the file."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        return found.st_size == self.pin.size and found.st_mtime_ns == self.pin.mtime_ns != 0

    def bytes_needed(self) -> int:
        """The disk space that the file and its parts file still take. Bytes of an earlier run count
        as written even if they are of another version, because their space becomes free again."""
        taken = 0
        with contextlib.suppress(OSError):
            taken = self.partial.stat().st_blocks * 512  # its unit, stat(2); there are holes in it
        whole = -(-self.pin.size // _BLOCK_BYTES) * _BLOCK_BYTES
        return max(0, whole - taken) + _BLOCK_BYTES

    def length(self, part: int) -> int:
        """The bytes of a part."""
        return min(PART_BYTES, self.pin.size - part * PART_BYTES)

    @property
    def version(self) -> bytes:
        """The first line of the parts file."""
        pin = self.pin
        return f"{PART_BYTES} {pin.size} {pin.mtime_ns} {pin.etag}\n".encode()


class _Copy:
    """One run. The methods `_after_*` run in the main thread, and submit work to the threads."""

    def __init__(self, store: Store, files: list[_File], progress: Progress | None) -> None:
        self._store = store
        self._files = files
        self._progress = progress
        self._total_bytes = sum(file.pin.size for file in files)
        self._done_bytes = 0
        self._running = 0
        self._outcomes: SimpleQueue[tuple[Future[None], Callable[[], None]]] = SimpleQueue()
        self._pool = ThreadPoolExecutor(_THREADS, "ckptfs-copy")
        self._places = Places(_THREADS)

    def run(self) -> None:
        """Copy all files. The first error ends the run."""
        try:
            for file in self._files:
                if file.is_complete():
                    if file.parts_file.exists():  # a process was killed just before its end
                        _remove_partial(file)
                    self._count(file.pin.size)
                else:
                    file.path.parent.mkdir(parents=True, exist_ok=True)
                    self._submit(self._begin, file, then=self._after_begin)
            while self._running:
                future, then = self._outcomes.get()
                self._running -= 1
                future.result()
                then()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _submit(
        self, work: Callable[..., None], file: _File, *part: int, then: Callable[..., None]
    ) -> None:
        self._running += 1
        context = contextvars.copy_context()  # has the deadline, if there is one
        attempt = partial(work, file, *part)
        future = self._pool.submit(context.run, retry, attempt, self._places)
        future.add_done_callback(lambda f: self._outcomes.put((f, partial(then, file, *part))))

    def _count(self, length: int) -> None:
        self._done_bytes += length
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)

    # -- a file's life

    def _begin(self, file: _File) -> None:
        file.pin = self._store.confirm(file.pin)
        file.missing = _open_partial(file)

    def _after_begin(self, file: _File) -> None:
        self._count(sum(file.length(p) for p in range(file.parts) if p not in file.missing))
        for part in sorted(file.missing):
            self._submit(self._fetch, file, part, then=self._after_fetch)
        if not file.missing:
            self._submit(self._finish, file, then=_nothing)

    def _fetch(self, file: _File, part: int) -> None:
        buffer = thread_buffer(file.length(part))
        try:
            self._read(file, part * PART_BYTES, buffer)
        except StoreTimeout:
            leave_thread_buffer()
            raise
        _write_at(file.partial, part * PART_BYTES, buffer)
        _write_at(file.parts_file, len(file.version) + part, memoryview(b"+"))

    def _read(self, file: _File, offset: int, buffer: memoryview) -> None:
        while True:
            pin = file.pin
            try:
                self._store.read_into(pin, offset, buffer)
                return
            except ObjectChanged:
                file.pin = repinned(self._store, pin)  # no more than twice: see there

    def _after_fetch(self, file: _File, part: int) -> None:
        self._count(file.length(part))
        file.missing.discard(part)
        if not file.missing:
            self._submit(self._finish, file, then=_nothing)

    def _finish(self, file: _File) -> None:
        try:
            self._store.confirm(file.pin)
        except ObjectChanged:
            _remove_partial(file)
            raise
        if file.pin.mtime_ns:
            os.utime(file.partial, ns=(file.pin.mtime_ns, file.pin.mtime_ns))
        file.partial.replace(file.path)
        file.parts_file.unlink()


def _open_partial(file: _File) -> set[int]:
    """Make the partial file, or resume one of the same version. Returns the missing parts."""
    header = file.version
    try:
        known = file.parts_file.read_bytes()
        if known.startswith(header) and file.partial.stat().st_size == file.pin.size:
            done = known[len(header) :].ljust(file.parts, b"-")
            return {part for part in range(file.parts) if done[part : part + 1] != b"+"}
    except FileNotFoundError:
        pass
    _remove_partial(file)
    with file.partial.open("xb") as out:
        out.truncate(file.pin.size)
    file.parts_file.write_bytes(header)
    return set(range(file.parts))


def _write_at(path: Path, offset: int, data: memoryview) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _remove_partial(file: _File) -> None:
    file.partial.unlink(missing_ok=True)
    file.parts_file.unlink(missing_ok=True)


def _nothing(_: _File) -> None:
    """Do nothing more for a finished file."""
