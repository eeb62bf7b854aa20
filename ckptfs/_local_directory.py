"""The local directory of a checkpoint: a mount, a copy, the files of an upload, or itself."""

import contextlib
import os
import warnings
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ckptfs import errors
from ckptfs._client import background, client, plans, private_daemon, shared_copies
from ckptfs._client.failures import noting
from ckptfs._client.waiting import wait_fetched
from ckptfs._model.units import size_text
from ckptfs._os.callers import level_of_caller
from ckptfs._store.base import Store
from ckptfs._store.copy import Progress, bytes_chosen, copy_directory, listed
from ckptfs._store.describe import NotDescribable, describe
from ckptfs._store.filesystems import FileSystem, is_daemon_only, local_filesystem
from ckptfs._store.in_process import store_of
from ckptfs._store.private import dump

_ANSWER_S = 60.0
"""Longest silence of the daemon, which reports its progress several times a second."""


def filesystem_behind(checkpoint: Any) -> FileSystem:
    """The filesystem of a checkpoint, or the description of a URI. Checkpoints of Ray always have
    filesystems."""
    return getattr(checkpoint, "_filesystem", None) or checkpoint.filesystem


def pending(checkpoint: Any, stack: contextlib.ExitStack, timeout_s: float | None) -> str:
    """The directory of an upload that is not done, as long as `stack` lasts; "" if there is none,
    or if no daemon can have one."""
    try:
        location = describe(filesystem_behind(checkpoint), checkpoint.path)
        return stack.enter_context(background.pending(location, timeout_s))
    except (errors.CannotMount, NotDescribable):
        return ""


def globs_of(name: str, globs: Sequence[str]) -> list[str]:
    """The globs of the argument `name`. Raises TypeError for a string."""
    if isinstance(globs, str):  # would be a Sequence[str] of characters
        raise TypeError(f"{name} must be a list of globs, not the string {globs!r}")
    return list(globs)


def existing(path: str) -> str:
    """The path of a directory of this machine. Raises CheckpointIsFile, CheckpointNotFound."""
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise errors.CheckpointIsFile(f"{path} is a file, not a directory; name its directory")
    raise errors.CheckpointNotFound(f"{path} does not exist; check the path")


def copied(
    checkpoint: Any,
    stack: contextlib.ExitStack,
    include: Sequence[str],
    timeout_s: float | None,
    because: Exception | None = None,
) -> str:
    """The path of a copy that lasts as long as `stack`. `because` is the reason for a copy instead
    of a mount, for a warning."""
    filesystem = filesystem_behind(checkpoint)
    with readable(filesystem, checkpoint.path) as store:
        manifest = listed(store)

        def fill(target: Path) -> None:
            copy_directory(store, target, include=include, manifest=manifest)

        try:
            which = _identity(filesystem, checkpoint)
            folder = shared_copies.folder_of(which, manifest.version, sorted(set(include)))
            if because is not None:
                size = size_text(bytes_chosen(manifest, include))
                place = shared_copies.path_in(folder)
                warnings.warn(
                    f"ckptfs copies the checkpoint ({size}) to {place}: {because}",
                    stacklevel=level_of_caller(),
                )
            copy = shared_copies.shared_copy(folder, fill, timeout_s, store.name)
            return str(stack.enter_context(copy))
        except errors.CannotCopy as error:
            if because is None:
                raise
            raise errors.CannotMount(f"{because}; and there can be no copy: {error}") from error


def expanded(path: "str | os.PathLike[str]") -> str:
    """Replace ``~`` in a path. Raises LocationError if this user has no home, because a directory
    called ``~`` would be made."""
    found = os.path.expanduser(path)
    if found.partition("/")[0] == "~":
        raise errors.LocationError(
            f"{path}: uid {os.geteuid()} has no home directory; give an absolute path, or set HOME"
        )
    return found


def _identity(filesystem: FileSystem, checkpoint: Any) -> str:
    """A text by which processes find the same copy. It depends on the place. If no text describes
    that, it depends on the object and its pickled copies, as in Ray."""
    try:
        return describe(filesystem, checkpoint.path).identity
    except NotDescribable:
        return checkpoint._uuid.hex


@contextlib.contextmanager
def readable(filesystem: FileSystem, path: str) -> Generator[Store]:
    """The store of a checkpoint. If only the daemon knows the store, the files of a mount."""
    with contextlib.ExitStack() as stack:
        if is_daemon_only(filesystem):
            path = stack.enter_context(client.leased(describe(filesystem, path)))
            filesystem = local_filesystem()
        yield stack.enter_context(contextlib.closing(store_of(filesystem, path)))


@contextlib.contextmanager
def shown(progress: Progress | bool, title: str) -> Generator[Progress | None]:
    """The function to call with the progress: the caller's, that of a bar, or None."""
    if progress is not True:
        yield progress or None
        return
    from ckptfs._os.progress_bar import progress_bar  # rich is slow to import

    with progress_bar(title) as told:
        yield told


@contextlib.contextmanager
def mounted(
    filesystem: FileSystem,
    path: str,
    prefetch: Sequence[str],
    awaited: Progress | bool | None,
    timeout_s: float | None,
    plan: "bool | str | os.PathLike[str]",
) -> Generator[str]:
    """Mount by the node's or user's daemon, or by a private one, and yield the path. `awaited` is
    the progress of a wait for `prefetch`, or None not to wait. Raises NotDescribable if no daemon
    can get the filesystem."""
    begun = prefetch if awaited is None else ()
    location = found = None
    try:
        location = describe(filesystem, path)
    except NotDescribable as error:
        if plan is not False:
            raise errors.PlanError(
                f"{path}: a filesystem that needs a private daemon has no plans; leave plan out"
            ) from None
        pickled = dump(filesystem, error)
        connect = partial(private_daemon.connect, pickled)
        lease = private_daemon.leased(pickled, path, begun, timeout_s)
    else:
        if plan is not False:
            found = plans.kept(location) if plan is True else plans.read(plan)
        connect = partial(client.connect, None)
        lease = client.leased(location, prefetch=begun, plan=found, timeout_s=timeout_s)
    with lease as mounted:
        if awaited is not None:
            with (
                shown(awaited, f"fetching {os.path.basename(mounted)}") as told,
                connect(_ANSWER_S) as connection,
            ):
                wait_fetched(connection, mounted, prefetch, timeout_s, told)
        with noting(mounted):
            yield mounted
        if location is not None and plan is True and found is None:
            plans.remember(location)
