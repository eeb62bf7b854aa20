"""The driver's records: one file for each publication, in the driver's state directory.

The driver writes a record before each step of a call, so a later driver can finish or undo the call
of one that was killed. A record has no secrets. A write replaces the file as a whole, and is on the
disk before the step begins.
"""

import contextlib
import logging
import os
from collections.abc import Generator
from pathlib import Path
from typing import Literal

import msgspec

from ckptfs._csi.publication import Publication
from ckptfs._os import filelock
from ckptfs._os.ownership import is_this_users_alone
from ckptfs._os.write_all import write_all
from ckptfs.errors import PlaceUnusable

log = logging.getLogger(__name__)

State = Literal["publishing", "published", "unpublishing"]
_SUFFIX = ".json"
_LOCK_WAIT_S = 30.0
"""Longest wait for the driver before this one, which may be ending."""


class Record(msgspec.Struct, frozen=True):
    """One publication, and how far it is.

    Attributes:
        publication: The publication.
        state: "publishing" until the first call has succeeded, "unpublishing" from the beginning
            of an unpublish on.
        files, size: Number of the checkpoint's files and their bytes, once it is published.
    """

    publication: Publication
    state: State
    files: int = 0
    size: int = 0


class Records:
    """The records in `directory`, which no other driver uses. Any thread may use it, but only one
    for each record."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, key: str) -> Record | None:
        """The record with that `Publication.key`. Raises OSError."""
        try:
            data = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        return self._decoded(key, data)

    def all(self) -> list[Record]:
        """All records. Raises OSError."""
        keys = [path.stem for path in sorted(self._directory.glob(f"*{_SUFFIX}"))]
        found = [self.get(key) for key in keys]
        return [record for record in found if record is not None]

    def put(self, record: Record) -> None:
        """Write a record. Raises OSError."""
        path = self._path(record.publication.key)
        temporary = path.with_suffix(".new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, msgspec.json.encode(record))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        self._flush()

    def remove(self, key: str) -> None:
        """Forget a record, if there is one. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            self._path(key).unlink()
            self._flush()

    def _flush(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}{_SUFFIX}"

    def _decoded(self, key: str, data: bytes) -> Record | None:
        try:
            record = msgspec.json.decode(data, type=Record)
        except msgspec.DecodeError as error:
            log.error("%s is damaged, so it counts as missing: %s", self._path(key), error)
            return None
        if record.publication.key != key:
            log.error("%s is of another volume, so it counts as missing", self._path(key))
            return None
        return record


def lock_path(directory: Path) -> Path:
    """The lock of the records in `directory`."""
    return directory / "lock"


def check_directory(directory: Path) -> None:
    """Make the directory if it is missing. Raises PlaceUnusable if other users could write to
    it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_ours = is_this_users_alone(directory.stat())
    except OSError as error:
        raise PlaceUnusable(f"{directory}: {error.strerror or error}; set --state-dir") from None
    if not is_ours:
        raise PlaceUnusable(
            f"{directory} belongs to another user, or others may write to it; give --state-dir "
            "a directory of root's own"
        )


@contextlib.contextmanager
def opened(directory: Path) -> Generator[Records]:
    """The records in `directory`, which is made if it is missing. No other driver has them
    meanwhile. Raises PlaceUnusable."""
    check_directory(directory)
    try:
        with filelock.locked(str(lock_path(directory)), _LOCK_WAIT_S):
            yield Records(directory)
    except TimeoutError:
        raise PlaceUnusable(
            f"{directory} is in use by another ckptfs csi; end that, or give another --state-dir"
        ) from None
    except OSError as error:
        raise PlaceUnusable(f"{directory}: {error.strerror or error}; set --state-dir") from None
