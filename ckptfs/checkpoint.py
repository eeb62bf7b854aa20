"""The Checkpoint API: Ray's names, with a mount instead of a download."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

from ckptfs import _client
from ckptfs._store.resolve import (
    FileSystem,
    describe,
    filesystem_of,
    local_filesystem,
    local_path_of,
)
from ckptfs.errors import CheckpointIsFile, CheckpointNotFound


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
    def as_directory(self) -> Generator[str]:
        """The checkpoint as a local, read-only directory, for the length of the context.

        A local checkpoint is its own directory. Another one is mounted by the node's daemon (which
        is started where there is none), and its files are fetched when they are read.

        Yields:
            The directory's path.

        Raises:
            CheckpointNotFound, CheckpointIsFile, AccessDenied, StoreError: The store's answer.
            LocationError: The filesystem cannot be described to the daemon.
            CannotMount, DaemonError, ConfigError: The daemon's.
        """
        local = local_path_of(self.filesystem, self.path)
        if local is not None:
            if not os.path.isdir(local):
                raise (
                    CheckpointIsFile(f"{local} is a file, not a directory; name its directory")
                    if os.path.exists(local)
                    else CheckpointNotFound(f"{local} does not exist; check the path")
                )
            yield local
            return
        location = describe(self.filesystem, self.path)
        with _client.attached(location) as (path, _):
            # From here on the open directory is the lease: the kernel gives it back for us, however
            # this process ends.
            lease = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield path
        finally:
            os.close(lease)
            # The kernel tells the daemon of a close and does not wait. This question comes after it,
            # so when it is answered the lease is gone, and who attaches next sees the store anew.
            with contextlib.suppress(OSError):
                os.stat(os.path.dirname(path))
