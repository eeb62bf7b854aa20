"""The spool: the directory ``uploads`` in the cache's directory, with the files that wait for an
upload.

``<id>/files`` is a staged tree, and ``<id>/upload.json`` its record. The record appears when all
files are on the disk, so a directory without one is unfinished or being removed. The next daemon
removes it. Names that are no ids are left alone. The cache neither counts nor evicts the spool.

All functions block.
"""

import contextlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from ckptfs._model.uploads import ID_BYTES, Record

log = logging.getLogger(__name__)

_NAME = "uploads"
_ID = re.compile(f"[0-9a-f]{{{2 * ID_BYTES}}}")
_RECORD = "upload.json"
_FILES = "files"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Found(NamedTuple):
    """What an earlier daemon left: the records, the oldest first, and the ids without a record."""

    records: list[Record]
    unfinished: list[str]


class Spool:
    """The spool in the cache's directory `root`, which the daemon reaches by that path. `shown` is
    the directory's own path, for other processes and for messages."""

    def __init__(self, root: Path, shown: Path) -> None:
        self._top = root / _NAME
        self._shown = shown / _NAME

    def path_of(self, upload: str) -> str:
        """The directory with the staged files of an upload."""
        return str(self._shown / upload / _FILES)

    def make(self) -> tuple[str, int]:
        """Make the directory of a new upload. Returns the upload's id, and a descriptor of the
        directory for its files. Raises OSError."""
        with contextlib.suppress(FileExistsError):
            self._top.mkdir(mode=0o700)
        while True:
            upload = secrets.token_hex(ID_BYTES)
            folder = self._top / upload
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                continue
            try:
                (folder / _FILES).mkdir(mode=0o700)
                return upload, os.open(folder / _FILES, _DIRECTORY)
            except OSError:
                with contextlib.suppress(OSError):  # the next daemon removes it otherwise
                    _remove(folder)
                raise

    def persist(self, upload: str) -> None:
        """Have the disk keep the staged files, also after a loss of power. Raises OSError."""
        for folder, _, names in os.walk(self._top / upload, topdown=False, onerror=_raise):
            for name in names:
                _sync(Path(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            _sync(Path(folder), _DIRECTORY)
        _sync(self._top, _DIRECTORY)
        _sync(self._top.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def save(self, record: Record) -> None:
        """Write a record, in place of the one before. Raises OSError."""
        folder = self._top / record.id
        temporary = folder / f"{_RECORD}.new"
        with contextlib.suppress(FileNotFoundError):  # of a killed daemon
            temporary.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / _RECORD)
        _sync(folder, _DIRECTORY)

    def remove_files(self, upload: str) -> None:
        """Remove the staged files of an upload, and keep its record. Raises OSError."""
        _remove(self._top / upload / _FILES)

    def remove_record(self, upload: str) -> None:
        """Remove the record of an upload, so that no daemon continues it. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            (self._top / upload / _RECORD).unlink()
            _sync(self._top / upload, _DIRECTORY)

    def remove(self, upload: str) -> None:
        """Remove all of an upload, its record first. Raises OSError."""
        self.remove_record(upload)
        _remove(self._top / upload)

    def recover(self) -> Found:
        """Read the records. One that cannot be read stays on the disk with its files, and the log
        names it. Raises OSError."""
        records: list[Record] = []
        unfinished: list[str] = []
        for name in self._ids():
            try:
                raw = (self._top / name / _RECORD).read_bytes()
                record = msgspec.json.decode(raw, type=Record)
                if record.id != name:
                    raise ValueError("it is the record of another upload")
                records.append(record)
            except FileNotFoundError:
                unfinished.append(name)
            except (OSError, ValueError) as error:
                log.error("uploads: cannot read %s: %s", self._shown / name / _RECORD, error)
        records.sort(key=lambda record: record.order)
        return Found(records, unfinished)

    def has(self, upload: str) -> bool:
        """Whether the directory of an upload is there, or may be."""
        try:
            os.stat(self._top / upload)
        except FileNotFoundError:
            return False
        except OSError:
            pass
        return True

    def _ids(self) -> Iterator[str]:
        try:
            names = sorted(os.listdir(self._top))
        except FileNotFoundError:
            return
        for name in names:
            if _ID.fullmatch(name) and not (self._top / name).is_symlink():
                yield name
            else:
                log.info("uploads: %s is not ours: left alone", self._shown / name)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _raise(error: OSError) -> None:
    raise error


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
