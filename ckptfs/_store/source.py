"""The files of a local directory that is uploaded.

A file may not change while it is read. Its inode, size and modification time are compared before
the first byte, around each part, and after the last byte. Times change in ticks, so the reads begin
when the ticks of all times are over (see ``timestamps``).

The walk follows links that lead to a place in the same directory. Other links are refused if
``include`` matches them or a file below them, so a checkpoint never lacks a file that the caller
named.
"""

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TypeVar

from ckptfs._model.globs import any_matcher
from ckptfs._model.manifest import METADATA_NAME, fault_of_name, printable
from ckptfs._os.mountinfo import why_hidden
from ckptfs._store.timestamps import wait_until_settled
from ckptfs._store.uploads import parts_of
from ckptfs.errors import (
    AccessDenied,
    CannotUpload,
    CheckpointIsFile,
    CheckpointNotFound,
    CkptfsError,
)

T = TypeVar("T")

_PIECE_BYTES = 1 << 20
"""The bytes that are read at once for a checksum. They stay in the processor's cache."""
_DIRECTORIES_OUTSIDE_MAX = 50_000
"""The most directories that are searched below a link that leads out of the directory. A search
takes about a second."""
_GONE = frozenset([errno.ENOENT, errno.ENOTDIR])
_DENIED = frozenset([errno.EACCES, errno.EPERM])


class SourceFile:
    """A file of the directory `top`, as `status` describes it. `path` is relative to `top`."""

    def __init__(self, top: str, path: str, status: os.stat_result) -> None:
        self.path = path
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns
        self._full = os.path.join(top, path)
        self._stamp = _stamp_of(status)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on. Raises CannotUpload, AccessDenied."""
        with self.opened() as file:
            self._read(file, offset, buffer)

    def read(self) -> bytes:
        """All bytes. Raises as `read_into`."""
        buffer = bytearray(self.size)
        self.read_into(0, memoryview(buffer))
        return bytes(buffer)

    def md5s(self, part_bytes: int, check: Callable[[], None] = lambda: None) -> list[bytes]:
        """The MD5 of each part. `check` is called often, and may raise. Raises as `read_into`."""
        with self.opened() as file:
            return [
                self._md5(file, part * part_bytes, part_bytes, check)
                for part in range(parts_of(self.size, part_bytes))
            ]

    def check(self) -> None:
        """Raise CannotUpload if another file has the name now, or the file has changed."""
        with self._translated():
            self._check(os.stat(self._full))

    def _md5(self, file: int, begin: int, length: int, check: Callable[[], None]) -> bytes:
        digest = hashlib.md5(usedforsecurity=False)
        end = min(begin + length, self.size)
        buffer = memoryview(bytearray(min(_PIECE_BYTES, end - begin)))
        for start in range(begin, end, _PIECE_BYTES):
            check()
            piece = buffer[: end - start]
            self._read(file, start, piece)
            digest.update(piece)
        return digest.digest()

    def _read(self, file: int, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(file, [buffer[done:]], offset + done)
            if not count:
                raise self._changed()
            done += count

    @contextlib.contextmanager
    def opened(self) -> Generator[int]:
        """A descriptor of the file, which is the same before and after the context. Raises as
        `read_into`."""
        with self._translated():
            file = os.open(self._full, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                self._check(os.fstat(file))
                yield file
                self._check(os.fstat(file))
            finally:
                os.close(file)

    def _check(self, status: os.stat_result) -> None:
        if _stamp_of(status) != self._stamp:
            raise self._changed()

    def _changed(self) -> CannotUpload:
        return CannotUpload(
            f"{printable(self._full)}: the file changed while it was uploaded; upload a directory "
            "that no program writes to any more"
        )

    @contextlib.contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except CkptfsError:
            raise
        except OSError as error:
            if error.errno in _GONE:
                raise self._changed() from error
            raise translated(error, self._full) from error


def _stamp_of(status: os.stat_result) -> tuple[int, int, int, int, bool]:
    is_file = stat.S_ISREG(status.st_mode)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, is_file


def translated(error: OSError, path: str) -> CkptfsError:
    """The exception of ckptfs for an error of the operating system about a path."""
    cause = error.strerror or type(error).__name__
    if error.errno in _DENIED:
        if hidden := why_hidden(path):
            return AccessDenied(f"{printable(path)}: access denied: {hidden}")
        return AccessDenied(f"{printable(path)}: access denied ({cause}); check owner and mode")
    return CannotUpload(f"{printable(path)}: {cause}; check the disk or the mount that holds it")


def files_in(
    top: str, include: Sequence[str], fault_of: Callable[[str], str | None]
) -> list[SourceFile]:
    """The files below `top` that `include` matches, sorted by path; empty `include` for all.

    `fault_of` says why the store cannot hold a name. Waits until a write to a file would leave
    another time. Raises CheckpointNotFound, CheckpointIsFile, AccessDenied; CannotUpload for a file
    that cannot be uploaded.
    """
    walk = _Walk(top, include or ["*"], fault_of)
    try:
        if not stat.S_ISDIR(os.stat(top).st_mode):
            raise CheckpointIsFile(f"{printable(top)} is a file, not a directory; name a directory")
    except OSError as error:
        if isinstance(error, CkptfsError):
            raise
        if error.errno in _GONE:
            raise CheckpointNotFound(f"{printable(top)} does not exist; check the path") from None
        raise translated(error, top) from error
    walk.run()
    if not walk.files:
        what = "has no file that include matches" if include else "has no files"
        raise CannotUpload(f"{printable(top)} {what}; name the directory of a checkpoint")
    wait_until_settled(*(file.mtime_ns for file in walk.files))
    return sorted(walk.files, key=lambda file: file.path)


def names_below(top: str) -> Iterator[str]:
    """The paths below `top` of all entries but directories. As `files_in`, it follows links to
    directories below `top`, but no link to a directory around it. It skips directories that cannot
    be read."""
    real_top = os.path.realpath(top)
    left: list[tuple[str, frozenset[str]]] = [("", frozenset())]
    while left:
        below, inside = left.pop()
        real = os.path.realpath(os.path.join(top, below))
        if real in inside or (below and not real.startswith(f"{real_top.rstrip('/')}/")):
            continue
        with contextlib.suppress(OSError), os.scandir(os.path.join(top, below)) as entries:
            for entry in entries:
                path = f"{below}/{entry.name}" if below else entry.name
                if _is_directory(entry):
                    left.append((path, inside | {real}))
                else:
                    yield path


def check_unchanged(
    before: Mapping[str, SourceFile],
    top: str,
    include: Sequence[str],
    fault_of: Callable[[str], str | None],
) -> None:
    """Raise CannotUpload if a file of `before` is another one now, or if `files_in` finds a new
    one. ``.metadata.json`` may be new, because the caller of an upload can give its content."""
    for file in before.values():
        file.check()
    known = {*before, METADATA_NAME}
    now = files_in(top, include, fault_of)
    if new := [file.path for file in now if file.path not in known]:
        raise CannotUpload(
            f"{printable(os.path.join(top, new[0]))}: the file is new since the upload began; "
            "upload a directory that no program writes to any more"
        )


def file_in(top: str, path: str) -> SourceFile | None:
    """The file `path` below `top`; None if it does not exist.

    Waits as `files_in`. Raises AccessDenied; CannotUpload if it is not a file.
    """
    full = os.path.join(top, path)
    try:
        status = os.stat(full)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise translated(error, full) from error
    if not stat.S_ISREG(status.st_mode):
        raise CannotUpload(f"{printable(full)} is not a file; remove it")
    wait_until_settled(status.st_mtime_ns)
    return SourceFile(top, path, status)


class _Walk:
    """One walk of a directory."""

    def __init__(
        self, top: str, globs: Sequence[str], fault_of: Callable[[str], str | None]
    ) -> None:
        self.files: list[SourceFile] = []
        self._top = top
        self._real_top = os.path.realpath(top)
        self._is_in = any_matcher(globs)
        self._globs = globs
        # Directories that are still to be added: the path below the top, and the devices and inodes
        # of the directories around it. Recursion would end at some hundred levels.
        self._left: list[tuple[str, frozenset[tuple[int, int]]]] = []
        self._fault_of = fault_of

    def run(self) -> None:
        """Add the files of all directories."""
        self._left.append(("", frozenset()))
        while self._left:
            self._add(*self._left.pop())

    def _add(self, below: str, inside: frozenset[tuple[int, int]]) -> None:
        """Add the files of the directory `below`. `inside` identifies the directories around it."""
        full = os.path.join(self._top, below)
        try:
            status = os.stat(full)
            identity = status.st_dev, status.st_ino
            if identity in inside:
                raise self._refused(below, "the link leads to a directory above it")
            with os.scandir(full) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            if isinstance(error, CkptfsError):
                raise
            raise self._translated(error, below) from error
        inner = inside | {identity}
        for name in names:
            self._take(f"{below}/{name}" if below else name, inner)

    def _take(self, path: str, inside: frozenset[tuple[int, int]]) -> None:
        full = os.path.join(self._top, path)
        is_in = self._is_in(path)
        is_link = os.path.islink(full)
        try:
            status = os.stat(full)
        except OSError as error:
            is_gone = error.errno in _GONE
            may_be_removed = is_gone and not is_link
            if not is_in and (may_be_removed or not self._may_match_below(path)):
                return
            if is_link and (is_gone or error.errno == errno.ELOOP):
                raise self._refused(path, "the link leads nowhere") from None
            raise self._translated(error, path) from error
        if is_link and not self._is_below(full):
            if is_in or (stat.S_ISDIR(status.st_mode) and self._matches_outside(path)):
                raise self._refused(path, "the link leads out of the directory")
            return
        if stat.S_ISDIR(status.st_mode):
            self._left.append((path, inside))
        elif is_in:
            if not stat.S_ISREG(status.st_mode):
                raise self._refused(path, "it is neither a file nor a directory")
            if fault := fault_of_name(path) or self._fault_of(path):
                raise self._refused(path, fault)
            self.files.append(SourceFile(self._top, path, status))

    def _may_match_below(self, path: str) -> bool:
        """Whether a glob may match a file below `path`, if `path` were a directory."""
        below = f"{path}/"
        for glob in self._globs:
            literal = re.split(r"[*?[]", glob, maxsplit=1)[0]
            if len(literal) < len(glob) and below.startswith(literal):
                return True
            if literal.startswith(below):
                return True
        return False

    def _matches_outside(self, path: str) -> bool:
        """Whether `include` matches a file below a link to a directory outside, or there are too
        many directories to tell."""
        left: list[tuple[str, frozenset[tuple[int, int]]]] = [(path, frozenset())]
        count = 0
        while left:
            below, inside = left.pop()
            if not self._may_match_below(below):
                continue
            full = os.path.join(self._top, below)
            try:
                status = os.stat(full)
                identity = status.st_dev, status.st_ino
                if identity in inside:
                    continue
                count += 1
                if count > _DIRECTORIES_OUTSIDE_MAX:
                    return True
                with os.scandir(full) as entries:
                    for entry in entries:
                        name = f"{below}/{entry.name}"
                        if _is_directory(entry):
                            left.append((name, inside | {identity}))
                        elif self._is_in(name):
                            return True
            except OSError as error:
                raise self._translated(error, below) from error
        return False

    def _is_below(self, full: str) -> bool:
        return os.path.realpath(full).startswith(f"{self._real_top.rstrip('/')}/")

    def _translated(self, error: OSError, path: str) -> CkptfsError:
        if error.errno == errno.ENAMETOOLONG:
            return self._refused(path, "the path is longer than the system allows")
        return translated(error, os.path.join(self._top, path))

    def _refused(self, path: str, why: str) -> CannotUpload:
        shown = printable(os.path.join(self._top, path))
        return CannotUpload(f"{shown}: {why}; remove it, or leave it out with include")


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
