"""A reader's operations: the watch times each one, shows it to the run, and reports a failed one.

The reports go to a file, a line of JSON each, which the run follows (`verdict` judges them). A kill
of the reader at any moment leaves its reports.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from chaostest.content import SURE_BYTES
from ckptfs import CkptfsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chaostest.board import Board
    from chaostest.content import Contents, File

R = TypeVar("R")


SLOW_S = 1.0
"""The watch reports longer operations."""


class OperationFailed(Exception):
    """An operation has failed, and that has been told."""


class Lease:
    """A reader's knowledge of an attachment: `began_s`, the start of the attach; `versions`, the
    seen version of each file by index; `attached_s`, the end of the attach (on the monotonic
    clock)."""

    def __init__(self, checkpoint: str, began_s: float) -> None:
        self.checkpoint = checkpoint
        self.began_s = began_s
        self.attached_s = 0.0
        self.path = ""
        self.versions: dict[int, int] = {}


class Watch:
    """Of one reader; `slot` is its place on the board, `log` the file it tells things in."""

    def __init__(self, contents: Contents, board: Board, slot: int, log: Path) -> None:
        self._contents = contents
        self._board = board
        self._slot = slot
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._counts: Counter[str] = Counter()
        self._bytes = 0
        self._longest: dict[str, float] = {}

    def do(
        self,
        operation: str,
        call: Callable[..., R],
        *arguments: Any,
        lease: Lease | None = None,
        file: File | None = None,
        length: int = 0,
        expected: tuple[int, ...] = (),
    ) -> R | None:
        """Call it. An errno that is `expected` is told of nowhere, and gives None.

        Raises OperationFailed.
        """
        self._board.begin(self._slot, operation, length)
        start_s = time.monotonic()
        try:
            return call(*arguments)
        except (OSError, CkptfsError) as error:
            if isinstance(error, OSError) and error.errno in expected:
                return None
            self._tell_failure(operation, error, start_s, lease, file, length)
            raise OperationFailed(operation) from error
        finally:
            took_s = time.monotonic() - start_s
            self._board.end(self._slot)
            if took_s > SLOW_S:
                about = {"operation": operation, "length": length, **self._about(lease, file)}
                self.tell("slow", start_s=start_s, end_s=start_s + took_s, **about)
            self._counts[operation] += 1
            self._longest[operation] = max(self._longest.get(operation, 0.0), took_s)

    def _tell_failure(
        self,
        operation: str,
        error: Exception,
        start_s: float,
        lease: Lease | None,
        file: File | None,
        length: int,
    ) -> None:
        number = error.errno if isinstance(error, OSError) else None
        name = errno.errorcode.get(number or 0, "") or getattr(error, "code", type(error).__name__)
        self.tell(
            "failure",
            operation=operation,
            error=name,
            text=str(error),
            start_s=start_s,
            end_s=time.monotonic(),
            length=length,
            **self._about(lease, file),
        )

    def maps(self, lease: Lease, file: File) -> None:
        """A file is about to be mapped: a page that cannot be read ends the process."""
        self.tell("maps", **self._about(lease, file))

    @staticmethod
    def _about(lease: Lease | None, file: File | None) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if lease is not None:
            about["checkpoint"] = lease.checkpoint
            about["lease_s"] = lease.began_s
            about["attached_s"] = lease.attached_s
        if file is not None:
            about["file"] = file.index
            about["version"] = lease.versions.get(file.index) if lease is not None else None
        return about

    def tell(self, kind: str, **what: Any) -> None:
        """Write down an event."""
        line = json.dumps({"kind": kind, "slot": self._slot, "pid": os.getpid(), **what})
        os.write(self._log, line.encode() + b"\n")

    def tell_counts(self) -> None:
        """Write down what was done since the last time."""
        self.tell("counts", operations=self._counts, bytes=self._bytes, longest_s=self._longest)
        self._counts.clear()
        self._bytes = 0
        self._longest.clear()

    # -- bytes

    def check(self, handle: Handle, offset: int, data: bytes) -> None:
        """Compare what was read at `offset` with what has to be there, of whichever version the
        handle shows: the first bytes say which, and from then on only that one is right."""
        self._bytes += len(data)
        if not data:
            return
        file, lease = handle.file, handle.lease
        if handle.version is not None:
            if data == self._contents.expected(file, handle.version, offset, len(data)):
                return
            self._tell_wrong(handle, offset, data, "handle")
        found = self._version_of(file, offset, data, lease.versions.get(file.index))
        if found is None:
            self._tell_wrong(handle, offset, data, "none")
        # The head is the same in all versions.
        if offset + len(data) - max(offset, len(file.head)) < SURE_BYTES:
            return
        handle.version = found
        known = lease.versions.setdefault(file.index, found)
        if known != found:
            self._tell_wrong(handle, offset, data, "lease")
        if known == found and not handle.told:
            handle.told = True
            self.tell(
                "pinned",
                file=file.index,
                version=found,
                attached_s=lease.attached_s,
                checkpoint=lease.checkpoint,
                told_s=time.monotonic(),
            )

    def check_end(self, handle: Handle, size: int) -> None:
        """The file has ended at `size`, or says so."""
        version = handle.version
        sizes = [version] if version is not None else range(self._board.version(handle.file.index))
        right = {self._contents.size(handle.file, v) for v in sizes}
        right |= set() if version is not None else {self._latest_size(handle.file)}
        if size not in right:
            self.tell(
                "wrong",
                scope="size",
                offset=size,
                length=0,
                told_s=time.monotonic(),
                text=f"{handle.file.name} has {size} bytes, and not {sorted(right)[:5]}",
                **self._about(handle.lease, handle.file),
            )
            raise OperationFailed("size")

    def _latest_size(self, file: File) -> int:
        return self._contents.size(file, self._board.version(file.index))

    def _version_of(
        self, file: File, offset: int, data: bytes, likely: int | None = None
    ) -> int | None:
        versions = list(range(self._board.version(file.index), -1, -1))
        if likely is not None:
            versions.insert(0, likely)
        for version in versions:
            if data == self._contents.expected(file, version, offset, len(data)):
                return version
        return None

    def _tell_wrong(self, handle: Handle, offset: int, data: bytes, scope: str) -> NoReturn:
        """`scope`: "handle", other bytes than before through the same handle; "lease", than through
        another handle of the same lease; "none", bytes of no version."""
        version = handle.version or 0
        right = self._contents.expected(handle.file, version, offset, len(data))
        bad = [i for i in range(0, len(data), 4096) if data[i : i + 4096] != right[i : i + 4096]]
        zeros = sum(not data[i : i + 4096].strip(b"\0") for i in bad)
        other = self._version_of(handle.file, offset, data)
        self.tell(
            "wrong",
            scope=scope,
            offset=offset,
            length=len(data),
            told_s=time.monotonic(),
            text=f"{handle.file.name}: {len(data)} bytes at {offset}: against version {version} "
            f"{len(bad)} pages of 4 KiB differ (first at {offset + (bad or [0])[0]}, {zeros} are "
            f"zeros); it is version {other}",
            **self._about(handle.lease, handle.file),
        )
        raise OperationFailed("wrong")


class Handle:
    """An open file of a lease, and which version it has turned out to be."""

    def __init__(self, lease: Lease, file: File, fd: int) -> None:
        self.lease = lease
        self.file = file
        self.fd = fd
        self.version: int | None = None
        self.told = False
