"""The Checkpoint API: Ray's names, with a mount instead of a download."""

import contextlib
import os
import tempfile
import uuid
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Literal

from ckptfs import _client
from ckptfs._store.base import Store
from ckptfs._store.copy import Progress, copy_directory
from ckptfs._store.resolve import (
    FileSystem,
    describe,
    filesystem_of,
    local_filesystem,
    local_path_of,
    store_of,
)
from ckptfs.errors import CannotMount, CheckpointIsFile, CheckpointNotFound, LocationError

Mode = Literal["auto", "mount", "copy"]


class Checkpoint:
    """A directory of files on local or remote storage.

    Attributes:
        path: Path on the filesystem.
        filesystem: The pyarrow filesystem that holds it.
    """

    def __init__(
        self, path: "str | os.PathLike[str]", filesystem: FileSystem | None = None
    ) -> None:
        """Refer to a checkpoint. Nothing is read, not even whether it exists.

        Args:
            path: A path on `filesystem`; without one a URI (``s3://…``, ``gs://…``, ``abfss://…``,
                ``hdfs://…``, ``file://…``) or an absolute local path, also with ``~``.
            filesystem: A ``pyarrow.fs.FileSystem``.

        Raises:
            LocationError: The URI's scheme is unknown, or the path is relative.
            StoreError: The store had to be asked for the bucket's region, and failed.
        """
        if filesystem is None:
            self.filesystem, self.path = filesystem_of(os.fspath(path))
        else:
            self.filesystem, self.path = filesystem, os.fspath(path)
        self._uuid = uuid.uuid4()

    def __repr__(self) -> str:
        return (
            f"Checkpoint(filesystem={type(self.filesystem).__name__.lstrip('_')}, path={self.path})"
        )

    def __fspath__(self) -> str:
        raise TypeError(
            "a Checkpoint is no local path; use `with checkpoint.as_directory() as path:`"
        )

    @classmethod
    def from_directory(cls, path: "str | os.PathLike[str]") -> "Checkpoint":
        """A checkpoint that is a directory on the local filesystem."""
        return cls(Path(path).expanduser().absolute(), filesystem=local_filesystem())

    @contextlib.contextmanager
    def as_directory(
        self,
        *,
        mode: Mode = "auto",
        include: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> Generator[str]:
        """The checkpoint as a local directory, for the length of the context.

        A local checkpoint is its own directory. Another one is mounted, read-only, by the node's
        daemon (which is started where there is none), and its files are fetched when they are read.

        Args:
            mode: "mount"; "copy": all of it is copied to a temporary directory, which is removed at
                the end; "auto": mount, and where this machine or this filesystem cannot be mounted,
                copy, with a warning that says why.
            include: Globs on relative paths: a copy holds these files only. A mount shows all,
                since what is not read costs nothing.
            timeout_s: Longest wait for the daemon's answer.

        Yields:
            The directory's path.

        Raises:
            CheckpointNotFound, CheckpointIsFile, AccessDenied, StoreError: The store's answer.
            LocationError: The filesystem cannot be described to the daemon (only with "mount").
            CannotMount: This machine cannot mount (only with "mount").
            DaemonError, ConfigError: The daemon's.
        """
        with contextlib.ExitStack() as stack:
            path = local_path_of(self.filesystem, self.path)
            if path is not None and not os.path.isdir(path):
                raise (
                    CheckpointIsFile(f"{path} is a file, not a directory; name its directory")
                    if os.path.exists(path)
                    else CheckpointNotFound(f"{path} does not exist; check the path")
                )
            if path is None and mode != "copy":
                path = self._mounted(stack, mode, timeout_s)
            if path is None:
                path = stack.enter_context(tempfile.TemporaryDirectory(prefix="ckptfs-copy-"))
                copy_directory(self._store(), Path(path), include=include)
            yield path

    def to_directory(
        self,
        path: "str | os.PathLike[str] | None" = None,
        *,
        include: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> str:
        """Copy the checkpoint to a local directory; other files that are in it stay.

        In parallel, verified and resumable; see ``ckptfs._store.copy``.

        Args:
            path: The directory; None: ``checkpoint_tmp_<uuid>`` in the temporary folder, the same
                one for each call on this object.
            include: Globs on relative paths; empty: everything.
            timeout_s: Longest wait for another process that copies to the same directory.
            progress: Called with the bytes that are there, and the bytes of all files.

        Returns:
            The normalised path of the directory.

        Raises:
            CheckpointNotFound, CheckpointIsFile, AccessDenied, ObjectChanged, StoreError: What
                arrived stays for another try; no file appears under its name before it is whole.
        """
        if path is None:
            path = os.path.join(tempfile.gettempdir(), f"checkpoint_tmp_{self._uuid.hex}")
        target = os.path.normpath(path)
        copy_directory(
            self._store(), Path(target), include=include, timeout_s=timeout_s, progress=progress
        )
        return target

    def _store(self) -> Store:
        return store_of(self.filesystem, self.path)

    def _mounted(
        self, stack: contextlib.ExitStack, mode: Mode, timeout_s: float | None
    ) -> str | None:
        """The mount path, held by `stack`; None: a copy has to do."""
        try:
            location = describe(self.filesystem, self.path)
            return stack.enter_context(_client.leased(location, timeout_s=timeout_s))
        except (CannotMount, LocationError) as error:
            if mode == "mount":
                raise
            warnings.warn(f"ckptfs copies the whole checkpoint: {error}", stacklevel=5)
            return None
