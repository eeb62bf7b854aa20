"""The Checkpoint API: Ray's names, with a mount instead of a download.

The methods use nothing of an object but `path`, its filesystem (by `filesystem_behind`) and
`_uuid`, which Ray's checkpoints have, too: ``ckptfs.ray.install`` puts them in the place of Ray's.
"""

import contextlib
import functools
import os
import tempfile
import uuid
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ckptfs import _client, _plans, _private, xattrs
from ckptfs._scratch import scratch_directory
from ckptfs._store import metadata as _metadata
from ckptfs._store.base import Store
from ckptfs._store.caller import ask, store_of
from ckptfs._store.copy import Progress, copy_directory
from ckptfs._store.describe import NotDescribable, describe
from ckptfs._store.filesystems import (
    FileSystem,
    built,
    filesystem_of,
    is_lent,
    local_filesystem,
    local_path_of,
    type_name_of,
    wrapped,
)
from ckptfs._store.private import dump
from ckptfs.errors import (
    CannotMount,
    CheckpointIsFile,
    CheckpointNotFound,
    LocationError,
    PlanError,
)

Mode = Literal["auto", "mount", "copy"]
Self = TypeVar("Self", bound="Checkpoint")


class Checkpoint:
    """A directory of files on local or remote storage.

    Attributes:
        path: Path on the filesystem.
        filesystem: The pyarrow filesystem that holds it. One of a URI is made when it is first
            asked for; the methods do without. Amazon is asked for the region of a bucket then, if
            neither the URI nor AWS_REGION names it.

    >>> checkpoint = Checkpoint.from_directory("/tmp/example_checkpoint_dir")
    >>> checkpoint.filesystem
    <pyarrow._fs.LocalFileSystem object...
    >>> checkpoint.path
    '/tmp/example_checkpoint_dir'
    """

    path: str

    def __init__(
        self, path: "str | os.PathLike[str]", filesystem: FileSystem | None = None
    ) -> None:
        """Refer to a checkpoint. Nothing is read, not even whether it exists.

        Args:
            path: A path on `filesystem`; without one a URI (``s3://…``, ``gs://…``, ``abfss://…``,
                ``hdfs://…``, ``file://…``; through fsspec ``hf://…``, ``az://…``, ``https://…``), a
                path in a named store (``store:…``), or an absolute local path, also with ``~``.
            filesystem: A ``pyarrow.fs.FileSystem`` or an fsspec filesystem, which is wrapped.

        Raises:
            LocationError: The URI's scheme is unknown, a package for it is missing, or the path is
                relative.
            TypeError: `filesystem` is no filesystem.
        """
        if filesystem is None:
            self._filesystem, self.path = filesystem_of(os.fspath(path))
        else:
            self._filesystem, self.path = wrapped(filesystem), os.fspath(path)
        self._uuid = uuid.uuid4()

    @functools.cached_property
    def filesystem(self) -> FileSystem:
        """See the class."""
        return built(self._filesystem)

    def __repr__(self) -> str:
        return f"Checkpoint(filesystem={type_name_of(filesystem_behind(self))}, path={self.path})"

    def __fspath__(self) -> str:
        raise TypeError(
            "a Checkpoint is no local path; use `with checkpoint.as_directory() as path:`"
        )

    @classmethod
    def from_directory(cls: type[Self], path: "str | os.PathLike[str]") -> Self:
        """A checkpoint that is a directory on the local filesystem."""
        return cls(Path(os.path.expanduser(path)).absolute(), filesystem=local_filesystem())

    # -- content

    @contextlib.contextmanager
    def as_directory(
        self,
        *,
        prefetch: 'Sequence[str] | Literal["all"]' = (),
        timeout_s: float | None = None,
        mode: Mode = "auto",
        include: Sequence[str] = (),
        plan: "bool | str | os.PathLike[str]" = False,
    ) -> Generator[str]:
        """The checkpoint as a local directory, for the length of the context.

        A local checkpoint is its own directory. Another one is mounted, read-only, by the node's
        daemon (which is started where there is none), and its files are fetched when they are read.

        Args:
            prefetch: Globs on relative paths (``*`` also matches ``/``), or "all": these files are
                fetched in the background, in the order of the globs. Not in copy mode, where they
                are there.
            timeout_s: Longest wait for the daemon's answer.
            mode: "mount"; "copy": all of it is copied to a temporary directory, which is removed at
                the end; "auto": mount, and where this machine or this filesystem cannot be mounted,
                copy, with a warning that says why.
            include: Globs: a copy holds these files only. A mount shows all, since what is not read
                costs nothing.
            plan: What a restore of an earlier checkpoint has read, to be fetched ahead of the
                readers, in that order: for the rank of this process, if RANK says which it is. A
                file, or the URI of a checkpoint that has one (``ckptfs plan save``). True: the one
                that this user's cache has for the checkpoints beside this one; where it has none,
                it is made of this restore, when the context ends. Not in copy mode.

        Yields:
            The directory's path.

        Raises:
            CheckpointNotFound, CheckpointIsFile, AccessDenied, StoreError: The store's answer.
            LocationError: No filesystem of that type can be mounted (only with "mount").
            CannotMount: This machine cannot mount (only with "mount").
            PlanError: What `plan` names is none.
            DaemonError, ConfigError: The daemon's.
        """
        if mode not in ("auto", "mount", "copy"):
            raise ValueError(f"mode must be 'auto', 'mount' or 'copy', not {mode!r}")
        globs = ["*"] if prefetch == "all" else _globs("prefetch", prefetch)
        included = _globs("include", include)
        local = local_path_of(filesystem_behind(self), self.path)
        with contextlib.ExitStack() as stack:
            if local is not None:
                path = _existing(local)
            elif mode == "copy":
                path = _copied(self, stack, included)
            else:
                try:
                    path = stack.enter_context(
                        _mounted(filesystem_behind(self), self.path, globs, timeout_s, plan)
                    )
                except (CannotMount, NotDescribable) as error:
                    if mode == "mount":
                        raise
                    # The caller's line, behind the context manager's two.
                    warnings.warn(f"ckptfs copies the checkpoint: {error}", stacklevel=3)
                    path = _copied(self, stack, included)
            yield path

    def to_directory(
        self,
        path: "str | os.PathLike[str] | None" = None,
        *,
        include: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: Progress | bool = False,
    ) -> str:
        """Copy the checkpoint to a local directory; other files that are in it stay.

        In parallel, verified and resumable; see ``ckptfs._store.copy``.

        Args:
            path: The directory; None: ``checkpoint_tmp_<uuid>`` in the temporary folder, the same
                one for each call on this object and its pickled copies.
            include: Globs on relative paths; empty: everything.
            timeout_s: Longest wait for another process that copies to the same directory.
            progress: True: a bar on the terminal. Or a function, called with the bytes that are
                there, and the bytes of all files.

        Returns:
            The normalised path of the directory.

        Raises:
            CheckpointNotFound, CheckpointIsFile, AccessDenied, ObjectChanged, StoreError: What
                arrived stays for another try; no file appears under its name before it is whole.
        """
        if path is None:
            path = os.path.join(tempfile.gettempdir(), f"checkpoint_tmp_{self._uuid.hex}")
        target = os.path.normpath(os.path.expanduser(path))
        included = _globs("include", include)
        with contextlib.ExitStack() as stack:
            if progress is True:
                from ckptfs._progress import progress_bar  # rich is slow to import

                progress = stack.enter_context(progress_bar(f"copying {self.path}"))
            copy_directory(
                stack.enter_context(_readable(filesystem_behind(self), self.path)),
                Path(target),
                include=included,
                timeout_s=timeout_s,
                progress=progress or None,
            )
        return target

    # -- metadata

    def get_metadata(self) -> dict[str, Any]:
        """The metadata that is stored with the checkpoint, ``{}`` where there is none.

        Raises:
            MetadataError: What is stored is not JSON.
            AccessDenied, StoreError: The store's answer.
        """
        if is_lent(filesystem_behind(self)):
            with _readable(filesystem_behind(self), self.path) as store:
                return _metadata.read(store)
        return ask(filesystem_behind(self), self.path, _metadata.read)

    def set_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Replace the metadata that is stored with the checkpoint, as a whole; in a store that only
        the daemon knows key by key.

        Raises:
            TypeError, ValueError: It cannot be written as JSON; what is stored stays.
            AccessDenied, StoreError: The store's answer.
        """
        if is_lent(filesystem_behind(self)):
            with _client.leased(describe(filesystem_behind(self), self.path)) as top:
                shown = xattrs.metadata(top)
                shown.update(metadata)
                for key in shown.keys() - metadata.keys():
                    del shown[key]
            return
        ask(filesystem_behind(self), self.path, _metadata.write, metadata)
        _tell_changed(filesystem_behind(self), self.path)

    def update_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Change some keys of the metadata. Processes of this node that do so wait for each other.

        Raises:
            TypeError: `metadata` is no dict, or it cannot be written as JSON.
            MetadataNotDict: What is stored is no dict (also a TypeError).
            MetadataError, AccessDenied, StoreError: As of `get_metadata` and `set_metadata`.
        """
        if is_lent(filesystem_behind(self)):
            with _client.leased(describe(filesystem_behind(self), self.path)) as top:
                xattrs.metadata(top).update(metadata)
            return
        ask(filesystem_behind(self), self.path, _metadata.update, metadata)
        _tell_changed(filesystem_behind(self), self.path)


def filesystem_behind(checkpoint: Any) -> FileSystem:
    """The filesystem of a checkpoint, or what stands for that of a URI. Checkpoints of Ray have
    filesystems only."""
    return getattr(checkpoint, "_filesystem", None) or checkpoint.filesystem


def _tell_changed(filesystem: FileSystem, path: str) -> None:
    with contextlib.suppress(LocationError):
        _client.tell_metadata_changed(describe(filesystem, path))


def _globs(name: str, globs: Sequence[str]) -> list[str]:
    if isinstance(globs, str):  # a Sequence[str], but of characters
        raise TypeError(f"{name} must be a list of globs, not the string {globs!r}")
    return list(globs)


def _existing(path: str) -> str:
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise CheckpointIsFile(f"{path} is a file, not a directory; name its directory")
    raise CheckpointNotFound(f"{path} does not exist; check the path")


def _copied(checkpoint: Checkpoint, stack: contextlib.ExitStack, include: Sequence[str]) -> str:
    # The copy's lock file is beside it: in the scratch directory, and not left if we are killed.
    path = Path(stack.enter_context(scratch_directory("ckptfs-copy-")), "checkpoint")
    with _readable(filesystem_behind(checkpoint), checkpoint.path) as store:
        copy_directory(store, path, include=include)
    return str(path)


@contextlib.contextmanager
def _readable(filesystem: FileSystem, path: str) -> Generator[Store]:
    """The store to read from: of this process, or through the mount where only the daemon knows
    it."""
    with contextlib.ExitStack() as stack:
        if is_lent(filesystem):
            path = stack.enter_context(_client.leased(describe(filesystem, path)))
            filesystem = local_filesystem()
        yield stack.enter_context(contextlib.closing(store_of(filesystem, path)))


@contextlib.contextmanager
def _mounted(
    filesystem: FileSystem,
    path: str,
    prefetch: Sequence[str],
    timeout_s: float | None,
    plan: "bool | str | os.PathLike[str]",
) -> Generator[str]:
    """The mount path, by the node's or user's daemon, or by one of our own. Raises NotDescribable
    where the filesystem cannot be handed to any."""
    try:
        location = describe(filesystem, path)
    except NotDescribable as error:
        if plan is not False:
            raise PlanError(
                f"{path}: a filesystem that needs a private daemon has no plans; leave plan out"
            ) from None
        with _private.leased(dump(filesystem, error), path, prefetch, timeout_s) as mounted:
            yield mounted
        return
    found = None if plan is False else _plans.kept(location) if plan is True else _plans.read(plan)
    with _client.leased(location, prefetch=prefetch, plan=found, timeout_s=timeout_s) as mounted:
        yield mounted
        if plan is True and found is None:
            _plans.remember(location)
