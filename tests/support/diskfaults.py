"""Faults of the cache's disk, planned by the names of `ckptfs._daemon.cache.disk_ops`."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from ckptfs._daemon.cache import disk_ops

OPERATIONS = (
    "make_folder",
    "make_folders",
    "list_folder",
    "status_of",
    "status_behind",
    "keep_private",
    "rename",
    "remove",
    "remove_empty",
    "touch",
    "free_space",
    "open_folder",
    "open_file",
    "lock",
    "status",
    "expect_random",
    "will_need",
    "set_size",
    "read",
    "read_cached",
    "read_direct",
    "write",
    "write_direct",
    "persist",
    "punch",
)
"""All that can fail: every function of `disk` but `close`, whose errors say nothing new."""

ERRORS = {
    "ENOSPC": errno.ENOSPC,
    "EIO": errno.EIO,
    "EROFS": errno.EROFS,
    "ENOENT": errno.ENOENT,
    "EDQUOT": errno.EDQUOT,
    "EMFILE": errno.EMFILE,
    "EACCES": errno.EACCES,
    "EOPNOTSUPP": errno.EOPNOTSUPP,
}
FAULTS = (*ERRORS, "short", "torn", "garbage")
"""`short` does half of what was asked for and says so; `torn` does half and fails with EIO;
`garbage` (of reads and writes) passes other bytes on and says that all is well."""
MOMENTS = ("first", "third", "odd", "always")


class Fault(NamedTuple):
    """A kind of fault, the operation that it hits, and the call at which it does."""

    operation: str
    kind: str
    moment: str

    @property
    def id(self) -> str:
        """For the test's name."""
        return "-".join(self)


def can(operation: str, kind: str) -> bool:
    """Whether that kind of fault exists for an operation."""
    transfers = operation in ("read", "read_cached", "read_direct", "write", "write_direct")
    if kind == "short":
        return transfers
    if kind == "torn":
        return operation in ("write", "write_direct", "remove", "punch")
    if kind == "garbage":
        return operation in ("read", "write", "write_direct")
    return True


class Plan:
    """Lets one operation fail while `active`. `hits`: how often it did."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.active = False
        self.hits = 0
        self._calls = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The operation, with its faults."""

        def call(*args: Any) -> Any:
            if not self.active:
                return function(*args)
            self._calls += 1
            due = {
                "first": self._calls == 1,
                "third": self._calls == 3,
                "odd": self._calls % 2 == 1,
                "always": True,
            }[self.fault.moment]
            if not due:
                return function(*args)
            self.hits += 1
            return self._fail(function, *args)

        return call

    def _fail(self, function: Callable[..., Any], *args: Any) -> Any:
        operation, kind = self.fault.operation, self.fault.kind
        if kind in ERRORS:
            raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]))
        if operation == "remove":  # some of the folder
            for path in sorted(args[0].glob("*"))[:1]:
                function(path)
        elif operation == "punch":
            function(args[0], args[1], args[2] // 2)
        elif operation == "read":
            fd, length, offset = args
            data = function(fd, (length + 1) // 2 if kind == "short" else length, offset)
            return bytes(len(data)) if kind == "garbage" else data
        elif operation in ("read_cached", "read_direct"):
            fd, view, *place = args
            return function(fd, view[: (len(view) + 1) // 2], *place)
        else:
            fd, data, offset = args
            half = len(data) // 2 // 4096 * 4096 or (len(data) + 1) // 2
            if operation == "write" and kind == "garbage":  # the disk has others than the memory
                done = function(fd, bytes(len(data)), offset)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                return done
            done = function(fd, data[:half], offset)
            if kind == "short":
                return done
            if kind == "garbage":  # half of it is lost without an error
                return len(data)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@contextmanager
def planned(fault: Fault) -> Iterator[Plan]:
    """A plan that is put in the place of the operation while the context lasts."""
    plan = Plan(fault)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_ops, fault.operation, plan.wrap(getattr(disk_ops, fault.operation)))
        yield plan
