"""Copy a checkpoint, or some of its files, to a local directory: in parallel, verified, resumable.

A file appears under its name only when it is complete and its version was confirmed after its last
byte was read. Until then it is ``.<name>.ckptfs-partial`` beside it, with ``.<name>.ckptfs-parts``,
which holds the version that is being copied and a byte for each part that is written. A later run
goes on from there, if the version is still the same. A file that is there already with the right
size and modification time is not copied again.

One process at a time copies to a directory (lock file); another one waits, and then finds the
files there, or goes on where the first one failed.

The main thread decides (what is next, what is complete); the workers only read and write.

Every request ends in time (``timed``), and none is tried again later than `_TRIES_WITHIN_S` after
its first failure. So a copy from a store that stays silent ends with StoreTimeout.

A store that gives no first byte in time is asked by fewer requests at once (`_Places`): it may do
much for each of them.
"""

import contextlib
import contextvars
import fnmatch
import math
import os
import random
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from ckptfs._filelock import locked
from ckptfs._model.manifest import ListedFile, Manifest, build_manifest
from ckptfs._store.base import Store, pin_of, repinned
from ckptfs._store.buffers import leave_thread_buffer, thread_buffer
from ckptfs._store.deadline import left_s
from ckptfs._store.timed import TimedStore
from ckptfs.errors import CkptfsError, ObjectChanged, StoreError, StoreTimeout, StoreUnavailable

PART_BYTES = 8 << 20
"""Bytes of one request: the round trip is small beside the transfer, and a large file still spreads
over all connections."""
_THREADS = 16
_FILES_MAX = 10_000_000
_PAUSES_S = 0.2, 0.4, 0.8, 1.6
"""Before a request whose error can pass is tried again (jittered)."""
_TRIES_WITHIN_S = 60.0
"""No try begins later than that after the first failure."""
_PLACES_MIN = 2
"""Fewest requests at once: with one, a request that hangs would hold up the whole copy."""

Progress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes of all files, from the calling thread."""


def copy_directory(
    store: Store,
    target: Path,
    *,
    include: Sequence[str] = (),
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> None:
    """Copy what `store` holds to `target`, which may exist; other files in it stay.

    Args:
        store: The checkpoint.
        target: A directory; made with its parents if it is missing.
        include: Globs on relative paths (``*`` also matches ``/``); empty: everything.
        timeout_s: Longest wait for another process that copies to `target`; None: no limit.
        progress: Told about each part that arrived.

    Raises:
        CheckpointNotFound, CheckpointIsFile, AccessDenied, ObjectChanged, StoreError: The store's
            answer, or StoreTimeout that there was none. What is complete stays, also the parts,
            for another try.
        StoreError: The local disk refused, or `timeout_s` is over.
    """
    target = target.absolute()
    lock = target.parent / f".{target.name}.ckptfs-lock"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(str(lock), float("inf") if timeout_s is None else timeout_s):
            timed = TimedStore(store)
            manifest = build_manifest(timed.list(_FILES_MAX))
            _check_whole(manifest, include, store.name)
            target.mkdir(exist_ok=True)
            if not include:
                for directory in manifest.directories:  # also the empty ones
                    (target / directory).mkdir(exist_ok=True)
            _Copy(timed, target, _chosen(manifest, include), progress).run()
    except CkptfsError:
        raise
    except TimeoutError:
        raise StoreError(
            f"{target}: another process has been copying to it for {timeout_s:g} s; wait for it, "
            "or choose another directory"
        ) from None
    except OSError as error:
        raise StoreError(f"cannot copy to {target}: {error.strerror or error}") from error


def _chosen(manifest: Manifest, include: Sequence[str]) -> list[ListedFile]:
    if not include:
        return list(manifest.files)
    return [file for file in manifest.files if _is_in(include, file.path)]


def _check_whole(manifest: Manifest, include: Sequence[str], name: str) -> None:
    """Raise StoreError where the store lists a file that is to be copied and cannot be read."""
    for skipped in manifest.skipped:
        if skipped.is_lacking and (not include or _is_in(include, skipped.name)):
            raise StoreError(
                f"{skipped.name} in {name} cannot be copied: {skipped.reason}, or leave it out "
                "with include"
            )


def _is_in(include: Sequence[str], path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, glob) for glob in include)


class _File:
    """A file that is being copied."""

    def __init__(self, target: Path, listed: ListedFile) -> None:
        self.pin = pin_of(listed)
        self.path = target / listed.path
        self.partial = self.path.parent / f".{self.path.name}.ckptfs-partial"
        self.parts_file = self.path.parent / f".{self.path.name}.ckptfs-parts"
        self.parts = -(-listed.size // PART_BYTES)
        self.missing: set[int] = set()

    def is_complete(self) -> bool:
        """Whether it is there already, from an earlier run."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        return found.st_size == self.pin.size and found.st_mtime_ns == self.pin.mtime_ns != 0

    def length(self, part: int) -> int:
        """Bytes of a part."""
        return min(PART_BYTES, self.pin.size - part * PART_BYTES)

    @property
    def version(self) -> bytes:
        """The first line of the parts file."""
        pin = self.pin
        return f"{PART_BYTES} {pin.size} {pin.mtime_ns} {pin.etag}\n".encode()


class _Copy:
    """One run. `_after_*` run in the main thread, what they submit in the workers."""

    def __init__(
        self, store: Store, target: Path, chosen: list[ListedFile], progress: Progress | None
    ) -> None:
        self._store = store
        self._files = [_File(target, listed) for listed in chosen]
        self._progress = progress
        self._total_bytes = sum(listed.size for listed in chosen)
        self._done_bytes = 0
        self._running = 0
        self._outcomes: SimpleQueue[tuple[Future[None], Callable[[], None]]] = SimpleQueue()
        self._pool = ThreadPoolExecutor(_THREADS, "ckptfs-copy")
        self._places = _Places(_THREADS)

    def run(self) -> None:
        """Copy; returns when everything is there. The first error ends the rest."""
        try:
            for file in self._files:
                if file.is_complete():
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
        future = self._pool.submit(context.run, _retry, attempt, self._places)
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
    """Make the partial file, or go on with one of the same version; returns the missing parts."""
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
    """A finished file needs nothing more."""


class _Places:
    """How many requests run at once: half as many after a timeout, and one more after as many
    answers as there are places. May be used from any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._running = 0
        self._cut_s = 0.0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def one(self) -> Generator[None]:
        """Wait for a place, and keep it for the request that runs in this context."""
        with self._changed:
            self._changed.wait_for(lambda: self._running < int(self._limit))
            self._running += 1
        begun_s = time.monotonic()
        try:
            yield
            with self._changed:
                self._limit = min(self._most, self._limit + 1 / self._limit)
        except StoreTimeout:
            with self._changed:
                if begun_s >= self._cut_s:  # the requests of one burst are cut once
                    self._cut_s = time.monotonic()
                    self._limit = max(_PLACES_MIN, self._limit / 2)
            raise
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()


def _retry(attempt: Callable[[], None], places: _Places) -> None:
    end_s = math.inf
    for pause_s in _PAUSES_S:
        try:
            with places.one():
                return attempt()
        except StoreUnavailable as error:
            now_s = time.monotonic()
            end_s = min(end_s, now_s + min(_TRIES_WITHIN_S, left_s()))
            wait_s = max(pause_s * random.uniform(0.5, 1), error.retry_after_s)
            if now_s + wait_s > end_s:
                raise
            time.sleep(wait_s)
    with places.one():
        return attempt()
