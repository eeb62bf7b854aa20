"""Each fault of a disk × each operation of an upload: an error that names the place, nothing half
visible, and nothing that the next upload does not end.

The disk is that of the directory, or that of a local target.
"""

from __future__ import annotations

import errno
import os
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from pyarrow import fs as pafs
from unit.daemon.cache.test_disk_faults import ALL

from ckptfs._model.manifest import METADATA_NAME
from ckptfs._store import arrow_uploads, local, source
from ckptfs._store.arrow_uploads import ArrowUploads
from ckptfs._store.directory_upload import Wanted, upload_directory
from ckptfs._store.local import LocalStore
from ckptfs.errors import AccessDenied, CannotUpload, CheckpointNotFound, CkptfsError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MIB = 1 << 20
NEW = {
    "a/small.bin": b"small",
    "empty": b"",
    "large.bin": random.Random(1).randbytes(2 * MIB + 5),
    METADATA_NAME: b'{"step": 2}',
}
OLD = NEW | {"large.bin": bytes(2 * MIB + 5), METADATA_NAME: b'{"step": 1}'}
URI = "file:target"
MOMENTS = ("first", "third", "always")
"""The calls that fail. A run of the suite takes every fourth cell, another moment for each kind.
CKPTFS_FAULTS=all takes all of them."""


class Fault(NamedTuple):
    """A kind of fault (a name of `errno`, "short", or "ended"), the operation, and the call."""

    operation: str
    kind: str
    moment: str

    def __str__(self) -> str:
        return "-".join(self)


def some(cells: list[Fault]) -> list[Fault]:
    """The cells of this run."""
    return cells if ALL else cells[::4]


class Plan:
    """Lets one operation fail. `hits` says how often it did."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.hits = 0
        self._calls = 0

    def of(self, operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The operation with its faults."""
        return lambda *args, **more: (
            self._call(function, *args, **more)
            if (operation == self.fault.operation)
            else function(*args, **more)
        )

    def _call(self, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        self._calls += 1
        if self._calls < {"first": 1, "third": 3, "always": 1}[self.fault.moment] or (
            self.fault.moment != "always" and self.hits
        ):
            return function(*args, **more)
        self.hits += 1
        if self.fault.kind == "short":  # half of what was asked for
            file, (buffer,), offset = args
            return function(file, [buffer[: (len(buffer) + 1) // 2]], offset)
        if self.fault.kind == "ended":
            return 0
        code: int = getattr(errno, self.fault.kind)
        raise OSError(code, os.strerror(code))


class Module:
    """The module `os` for one module, with the faults of a plan."""

    def __init__(self, operations: Mapping[str, Callable[..., Any]]) -> None:
        self._operations = operations

    def __getattr__(self, name: str) -> Any:
        return self._operations.get(name) or getattr(os, name)


def files_in(top: Path) -> dict[str, bytes]:
    return {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()}


def write(top: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(data)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    write(tmp_path / "checkpoint", NEW)
    return tmp_path / "checkpoint"


def upload(top: Path, target: Path, filesystem: Any = None, *, overwrite: bool = False) -> None:
    ways = ArrowUploads(filesystem or pafs.LocalFileSystem(), str(target), URI)
    upload_directory(str(top), LocalStore(str(target), URI), ways, Wanted(overwrite=overwrite))


def check_target(target: Path) -> None:
    """Nothing is half visible."""
    found = {name: data for name, data in files_in(target).items() if not is_temporary(name)}
    for name, data in found.items():
        assert data in (NEW[name], OLD[name]), f"{name} has other content"
    assert METADATA_NAME not in found or found in (NEW, OLD)


def is_temporary(name: str) -> bool:
    return name.endswith(".ckptfs-upload") or name.startswith(f"{METADATA_NAME}.")


def check_error(error: CkptfsError, place: str) -> None:
    assert "\n" not in str(error)
    assert place in str(error)


# -- the disk of the directory

SOURCE_CELLS = [
    Fault(operation, kind, moment)
    for operation, kinds in {
        "scandir": ("EIO", "EACCES", "ENOENT", "EMFILE"),
        "stat": ("EIO", "EACCES", "ENOENT", "ESTALE"),
        "open": ("EIO", "EACCES", "ENOENT", "EMFILE"),
        "fstat": ("EIO", "ESTALE"),
        "preadv": ("EIO", "ESTALE", "ended", "short"),
    }.items()
    for kind in kinds
    for moment in MOMENTS
]


@pytest.mark.parametrize("fault", some(SOURCE_CELLS), ids=str)
def test_each_fault_of_the_directorys_disk_in_each_operation_of_an_upload(
    fault: Fault, top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, target = Plan(fault), tmp_path / "target"
    names = ("scandir", "stat", "open", "fstat", "preadv")
    operations = {name: plan.of(name, getattr(os, name)) for name in names}
    with monkeypatch.context() as patched:
        patched.setattr(source, "os", Module(operations))
        error: Exception | None = None
        try:
            upload(top, target)
        except CkptfsError as caught:
            error = caught
    assert plan.hits or fault.operation == "scandir"  # there are two directories
    if fault.kind == "short" or not plan.hits:
        assert error is None
    else:
        assert isinstance(error, (CannotUpload, AccessDenied, CheckpointNotFound)), error
        check_error(error, str(top))
    check_target(target)
    assert not [name for name in files_in(target) if is_temporary(name)]
    upload(top, target)
    assert files_in(target) == NEW


# -- the disk of the target

WRITE_KINDS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "EACCES")
TARGET_CELLS = [
    Fault(operation, kind, moment)
    for operation, kinds in {
        "create_dir": WRITE_KINDS,
        "create": WRITE_KINDS,
        "write": WRITE_KINDS,
        "fsync": ("EIO", "ENOSPC"),
        "close": ("EIO", "EDQUOT"),
        "get_file_info": ("EIO", "EACCES"),
        "move": WRITE_KINDS,
        "delete_file": ("EIO", "EROFS", "EACCES"),
        "list names": ("EIO", "EACCES"),
        "create metadata": WRITE_KINDS,
        "fsync metadata": ("EIO", "ENOSPC"),
        "replace metadata": WRITE_KINDS,
        "list": ("EIO", "EACCES"),
    }.items()
    for kind in kinds
    for moment in MOMENTS
]


def failing_filesystem(plan: Plan) -> pafs.FileSystem:
    class Failing(pafs.LocalFileSystem):
        def _planned(self, name: str, *args: Any, **more: Any) -> Any:
            call = getattr(super(), name)
            return plan.of(name, call)(*args, **more)

        def create_dir(self, *args: Any, **more: Any) -> Any:
            return self._planned("create_dir", *args, **more)

        def get_file_info(self, *args: Any, **more: Any) -> Any:
            return self._planned("get_file_info", *args, **more)

        def move(self, *args: Any, **more: Any) -> Any:
            return self._planned("move", *args, **more)

        def delete_file(self, *args: Any, **more: Any) -> Any:
            return self._planned("delete_file", *args, **more)

    return Failing()


class Stream:
    """A file whose operations may fail."""

    def __init__(self, plan: Plan, path: str, mode: str, **more: Any) -> None:
        self._file = open(path, mode, **more)  # noqa: SIM115
        self.write = plan.of("write", self._file.write)
        self.fileno = self._file.fileno
        self._close = plan.of("close", lambda: None)

    def close(self) -> None:
        self._file.close()
        self._close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def break_target(plan: Plan, patched: pytest.MonkeyPatch) -> None:
    """Put the faults of a plan in the place of the operations on the target."""
    create = plan.of("create", lambda path, mode, **more: Stream(plan, path, mode, **more))
    patched.setattr(arrow_uploads, "open", create, raising=False)
    operations = {
        "fsync": plan.of("fsync", os.fsync),
        "scandir": plan.of("list names", os.scandir),
    }
    patched.setattr(arrow_uploads, "os", Module(operations))
    patched.setattr(local, "open", plan.of("create metadata", open), raising=False)
    operations = {
        "fsync": plan.of("fsync metadata", os.fsync),
        "replace": plan.of("replace metadata", os.replace),
        "scandir": plan.of("list", os.scandir),
    }
    patched.setattr(local, "os", Module(operations))


@pytest.mark.parametrize("fault", some(TARGET_CELLS), ids=str)
def test_each_fault_of_the_targets_disk_in_each_operation_of_an_upload(
    fault: Fault, top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, target = Plan(fault), tmp_path / "target"
    write(target, OLD)
    with monkeypatch.context() as patched:
        break_target(plan, patched)
        error: CkptfsError | None = None
        try:
            upload(top, target, failing_filesystem(plan), overwrite=True)
        except CkptfsError as caught:
            error = caught
    if fault.moment != "third":
        assert plan.hits
    if plan.hits:
        assert isinstance(error, (StoreError, AccessDenied)), error
        check_error(error, URI)
        if fault.kind in ("ENOSPC", "EDQUOT"):
            assert "space" in str(error) or "quota" in str(error).lower()
    else:
        assert error is None
    check_target(target)
    if fault.operation not in ("delete_file",):
        assert not [name for name in files_in(target) if is_temporary(name)]
    upload(top, target, overwrite=True)
    assert files_in(target) == NEW
