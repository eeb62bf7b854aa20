"""`Checkpoint`: the API of Ray's checkpoints, with a mount instead of a download."""

# The methods use only an object's `path`, filesystem (by `filesystem_behind`) and `_uuid`. Ray's
# checkpoints have these, too, so `ckptfs.ray.install` can replace Ray's methods by these.

import contextlib
import functools
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ckptfs import _local_directory as local_directory
from ckptfs import errors, xattrs
from ckptfs._client import client
from ckptfs._local_directory import expanded, filesystem_behind, globs_of, readable, shown
from ckptfs._store import metadata as _metadata
from ckptfs._store.copy import Progress, copy_directory
from ckptfs._store.describe import NotDescribable, describe
from ckptfs._store.filesystems import (
    FileSystem,
    built,
    filesystem_of,
    is_daemon_only,
    local_filesystem,
    local_path_of,
    type_name_of,
    wrapped,
)
from ckptfs._store.in_process import ask

if TYPE_CHECKING:
    # pyarrow has no type stubs. A user who has installed some gets the full type.
    from ckptfs._store.filesystems import (
        ArrowFileSystem,  # pyright: ignore[reportUnknownVariableType]
        GivenFileSystem,  # pyright: ignore[reportUnknownVariableType]
    )

_log = logging.getLogger(__name__)

Mode = Literal["auto", "mount", "copy"]
Self = TypeVar("Self", bound="Checkpoint")


class Checkpoint:
    """A directory of files in a store or on a disk, with the API of ``ray.train.Checkpoint``.

    Attributes:
        path: The path on `filesystem`.
        filesystem: The ``pyarrow.fs.FileSystem`` that holds the checkpoint.

    A URI is enough. Nothing is read until a method needs it:

        >>> checkpoint = Checkpoint("s3://bucket/run7/checkpoint_000100")
        >>> checkpoint
        Checkpoint(filesystem=s3, path=bucket/run7/checkpoint_000100)

    The files appear in a local directory, and each byte is fetched when a program reads it:

        >>> with checkpoint.as_directory() as path:
        ...     sorted(os.listdir(path))
        ['.metadata.json', 'config.json', 'model.safetensors']

    The checkpoint's own metadata is a dictionary:

        >>> checkpoint.get_metadata()
        {'val_loss': 0.25}

    Checkpoints can be pickled. The pickle contains that of the filesystem, possibly with its
    credentials.
    """

    path: str

    def __init__(
        self,
        path: "str | os.PathLike[str]",
        filesystem: "GivenFileSystem | None" = None,  # pyright: ignore[reportUnknownParameterType]
    ) -> None:
        """Refer to a checkpoint. Nothing is read, so it need not exist yet.

        Args:
            path: A path on `filesystem`. Without one, a URI (``s3://…``, ``gs://…``, ``abfss://…``,
                ``hdfs://…``, ``file://…``; through fsspec ``hf://…``, ``az://…``, ``https://…``), a
                path in a named store (``store:…``), or an absolute local path, also with ``~``.
            filesystem: A ``pyarrow.fs.FileSystem`` or an fsspec filesystem.

        Raises:
            LocationError: The URI's scheme is unknown, its package is missing, or the path is
                relative.
            TypeError: `filesystem` has another type.
        """
        if filesystem is None:
            self._filesystem, self.path = filesystem_of(os.fspath(path))
        else:
            self._filesystem, self.path = wrapped(filesystem), os.fspath(path)
        self._uuid = uuid.uuid4()

    @functools.cached_property
    def filesystem(self) -> "ArrowFileSystem":  # pyright: ignore[reportUnknownParameterType]
        """The ``pyarrow.fs.FileSystem`` that holds the checkpoint.

        The filesystem of a URI is made at its first use. The methods do not need it.

        Raises:
            LocationError: pyarrow has no filesystem for this URI.
            StoreError: Neither the URI nor AWS_REGION has the region of the bucket, and Amazon did
                not answer the question for it.
        """
        return built(self._filesystem)

    def __repr__(self) -> str:
        return f"Checkpoint(filesystem={type_name_of(filesystem_behind(self))}, path={self.path})"

    def __fspath__(self) -> str:
        """Raise TypeError, because only a mount or a copy has a local path."""
        raise TypeError(
            "a Checkpoint is not a local path; use `with checkpoint.as_directory() as path:`"
        )

    @classmethod
    def from_directory(cls: type[Self], path: "str | os.PathLike[str]") -> Self:
        """Make a checkpoint of a local directory.

        Args:
            path: The directory. ``~`` is the home directory. A relative path becomes absolute at
                once, so that the checkpoint means the same directory in other processes.
        """
        return cls(Path(expanded(path)).absolute(), filesystem=local_filesystem())

    # -- content

    @contextlib.contextmanager
    def as_directory(
        self,
        *,
        prefetch: 'Sequence[str] | Literal["all"]' = (),
        wait: bool = False,
        progress: Progress | bool = False,
        timeout_s: float | None = None,
        mode: Mode = "auto",
        include: Sequence[str] = (),
        plan: "bool | str | os.PathLike[str]" = False,
        pending: bool = False,
    ) -> Generator[str]:
        """Make the checkpoint a local directory for the length of the context.

            >>> with checkpoint.as_directory(prefetch=["*.json", "model-*"]) as path:
            ...     config = json.loads(Path(path, "config.json").read_text())
            ...     model = load_file(f"{path}/model-00001.safetensors")

        The node's daemon mounts the checkpoint read-only, and fetches the bytes of a file when a
        program reads them. If no daemon is running, this method starts one. A local checkpoint is
        its own directory, except with mode "copy".

        A copy is writable. As with Ray, the processes of one user on one node share it: the first
        process copies and the others wait, all see each other's changes, and the last process to
        leave removes it. After ``kill -9`` the next copy removes it. Processes share a copy if they
        use the same version of the same place with the same `include`. If ckptfs cannot describe
        the filesystem, they share it if they use the same object or its pickled copies.

        Args:
            prefetch: Globs on relative paths (``*`` also matches ``/``), or "all". The daemon
                fetches these files in the background, in the order of the globs. It has no effect
                on a copy.
            wait: Whether to wait until the files of `prefetch` are in the node's cache and match
                their checksums. They stay there while a process uses the checkpoint, so a later
                failure of the store does not affect them. A mapping of them is safe from SIGBUS
                (safetensors and ``torch.load(mmap=True)`` map files).
            progress: The progress of `wait`: True for a bar on the terminal, or a function that
                gets the bytes in the cache and the bytes of all these files.
            timeout_s: Longest wait for the daemon's answer, for another process that copies, and
                with `wait` for the files.
            mode: "mount" only mounts. "copy" copies the whole checkpoint, also a local one, to the
                temporary folder (TMPDIR). "auto" mounts if possible. If this machine or filesystem
                cannot be mounted, it copies, with a warning that has the reason, size and path.
            include: Globs of the files in a copy. A mount shows all files, because unread files
                cost nothing.
            plan: A plan of an earlier restore (``ckptfs plan save``). The daemon fetches its reads
                ahead, in the same order, only for this process's rank if RANK is set. Either a
                file, or the URI of a checkpoint with a plan. True takes the plan in this user's
                cache for the checkpoints beside this one. If there is none, this restore becomes
                the plan at the end of the context. It has no effect on a copy.
            pending: Whether to show the files of an upload in the background to this place that
                this node has begun last and that is not done (``ckptfs.upload(wait=False)``). If
                there is none, the directory shows what the store has. These files are on the
                node's disk, so `prefetch`, `wait` and `plan` have no effect on them.

        Yields:
            The path of the directory.

        Raises:
            CheckpointNotFound, CheckpointIsFile, AccessDenied, StoreError: The store's answer.
            LocationError: A filesystem of this type cannot be mounted (only with "mount").
            CannotMount: This machine cannot mount, and with "auto" cannot copy either.
            CannotCopy: The temporary folder is full or read-only, or the copy's directory belongs
                to another user (only with "copy"; also a StoreError). In a full folder, nothing is
                fetched.
            PlanError: `plan` does not exist or is not a plan.
            DaemonError, ConfigError: The daemon's error.
            ValueError: `wait` without `prefetch`, or `pending` with mode "copy".
            PrefetchFailed: With `wait`, no file matches, some files could not be fetched (the
                message has their names and causes), or `timeout_s` was over.
            StoreTimeout, CacheError, LimitExceeded: With `wait`, the store does not answer, the
                cache's disk fails, or the cache is too small for all files.

        If a read of the checkpoint has failed, exceptions that leave the context get a note with
        the reason (PEP 678): see ``ckptfs.explain``.
        """
        if mode not in ("auto", "mount", "copy"):
            raise ValueError(f"mode must be 'auto', 'mount' or 'copy', not {mode!r}")
        globs = ["*"] if prefetch == "all" else globs_of("prefetch", prefetch)
        if wait and not globs:
            raise ValueError(
                "wait=True waits for the files that prefetch names; give prefetch='all' for all"
            )
        if pending and mode == "copy":
            raise ValueError("pending=True mounts files of the daemon; leave mode='copy' out")
        awaited = progress if wait else None
        included = globs_of("include", include)
        local = local_path_of(filesystem_behind(self), self.path)
        began_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            path = local_directory.pending(self, stack, timeout_s) if pending else ""
            if path:
                how = "the files of an upload that is not done"
            elif mode == "copy":
                path, how = (
                    local_directory.copied(self, stack, included, timeout_s),
                    "copied, as mode='copy' asks",
                )
            elif local is not None:
                path, how = local_directory.existing(local), "a local directory"
            else:
                how = "mounted"
                try:
                    mounted = local_directory.mounted(
                        filesystem_behind(self), self.path, globs, awaited, timeout_s, plan
                    )
                    path = stack.enter_context(mounted)
                except (errors.CannotMount, NotDescribable) as error:
                    if mode == "mount":
                        raise
                    path = local_directory.copied(self, stack, included, timeout_s, because=error)
                    how = f"copied: {error}"
            _log.debug("%s: %s after %.3f s: %s", self, path, time.monotonic() - began_s, how)
            yield path

    def to_directory(
        self,
        path: "str | os.PathLike[str] | None" = None,
        *,
        include: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: Progress | bool = False,
    ) -> str:
        """Copy the checkpoint to a local directory, and keep other files there.

        Files are copied in parallel and verified. Each appears under its name when it is complete.
        A second call continues where the first one ended.

        Args:
            path: The directory; None for ``checkpoint_tmp_<uuid>`` in the temporary folder, which
                is the same for each call on this object and its pickled copies.
            include: Globs on relative paths; empty for all files.
            timeout_s: Longest wait for another process that copies to the same directory.
            progress: True for a bar on the terminal or in the notebook, or a function that gets the
                bytes in the directory and the bytes of all files.

        Returns:
            The normalised path of the directory.

        Raises:
            CheckpointNotFound, CheckpointIsFile, AccessDenied, ObjectChanged, StoreError: The
                store's answer. Incomplete files stay under other names for another try.
            CannotCopy: The disk has no room, and nothing was fetched, or the disk failed.
        """
        if path is None:
            path = os.path.join(tempfile.gettempdir(), f"checkpoint_tmp_{self._uuid.hex}")
        target = os.path.normpath(expanded(path))
        included = globs_of("include", include)
        with (
            shown(progress, f"copying {self.path}") as told,
            readable(filesystem_behind(self), self.path) as store,
        ):
            copy_directory(
                store, Path(target), include=included, timeout_s=timeout_s, progress=told
            )
        return target

    # -- metadata

    def get_metadata(self) -> dict[str, Any]:
        """Read the metadata of the checkpoint, from ``.metadata.json`` as in Ray.

        Returns:
            The metadata; ``{}`` if the checkpoint has none.

        Raises:
            MetadataError: The stored metadata is not JSON.
            AccessDenied, StoreError: The store's answer.
        """
        if is_daemon_only(filesystem_behind(self)):
            with readable(filesystem_behind(self), self.path) as store:
                return _metadata.read(store)
        return ask(filesystem_behind(self), self.path, _metadata.read)

    def set_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Replace the metadata of the checkpoint.

        The replacement is atomic. In a store that only the daemon knows, it goes key by key.

        Args:
            metadata: A dictionary with values of JSON: numbers, texts, lists, dictionaries and so
                on.

        Raises:
            TypeError, ValueError: It cannot be written as JSON. The stored metadata stays.
            AccessDenied, StoreError: The store's answer.
        """
        if is_daemon_only(filesystem_behind(self)):
            with client.leased(describe(filesystem_behind(self), self.path)) as top:
                shown = xattrs.metadata(top)
                shown.update(metadata)
                for key in shown.keys() - metadata.keys():
                    del shown[key]
            return
        ask(filesystem_behind(self), self.path, _metadata.write, metadata)
        _tell_changed(filesystem_behind(self), self.path)

    def update_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Change some keys of the metadata, and keep the others.

        If several processes of this node do so at the same time, they wait for each other.

            >>> checkpoint.update_metadata({"reviewed": True})

        Args:
            metadata: The changed keys with their new values.

        Raises:
            TypeError: `metadata` is not a dictionary, or cannot be written as JSON.
            MetadataNotDict: The stored metadata is not a dictionary (also a TypeError).
            MetadataError, AccessDenied, StoreError: As in `get_metadata` and `set_metadata`.
        """
        if is_daemon_only(filesystem_behind(self)):
            with client.leased(describe(filesystem_behind(self), self.path)) as top:
                xattrs.metadata(top).update(metadata)
            return
        ask(filesystem_behind(self), self.path, _metadata.update, metadata)
        _tell_changed(filesystem_behind(self), self.path)


def _tell_changed(filesystem: FileSystem, path: str) -> None:
    # The store has the change already, so an error here must not look like one of the change.
    with contextlib.suppress(errors.CkptfsError, OSError):
        client.tell_metadata_changed(describe(filesystem, path))
