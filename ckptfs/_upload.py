"""`upload`: a local directory becomes a checkpoint in a store."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, NamedTuple, cast, overload

from ckptfs import errors
from ckptfs._background_upload import BackgroundUpload
from ckptfs._client import background
from ckptfs._client.uploading import Done, upload_and_save
from ckptfs._local_directory import filesystem_behind, shown
from ckptfs._model.location import Location
from ckptfs._model.manifest import METADATA_NAME, printable
from ckptfs._model.uploads import UploadOptions
from ckptfs._store.copy import Progress
from ckptfs._store.describe import NotDescribable, describe
from ckptfs._store.directory_upload import Told, Wanted
from ckptfs._store.filesystems import FileSystem, local_path_of
from ckptfs._store.in_process import uploads_to
from ckptfs._store.source import file_in
from ckptfs.checkpoint import Checkpoint


class Options(NamedTuple):
    """The options of an upload: see `upload`. `rate` is the most bytes per second; 0 for no
    limit."""

    metadata: Mapping[str, Any] | None = None
    include: Sequence[str] = ()
    overwrite: bool = False
    rate: int = 0
    cache: bool = True
    merge: bool = False


@overload
def upload(
    directory: "str | os.PathLike[str]",
    uri_or_checkpoint: "str | os.PathLike[str] | Checkpoint",
    *,
    filesystem: object = None,
    metadata: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    overwrite: bool = False,
    merge: bool = False,
    cache: bool = True,
    progress: Progress | bool = False,
    wait: Literal[True] = True,
) -> Checkpoint: ...


@overload
def upload(
    directory: "str | os.PathLike[str]",
    uri_or_checkpoint: "str | os.PathLike[str] | Checkpoint",
    *,
    filesystem: object = None,
    metadata: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    overwrite: bool = False,
    merge: bool = False,
    cache: bool = True,
    progress: Progress | bool = False,
    wait: Literal[False],
) -> BackgroundUpload: ...


@overload
def upload(
    directory: "str | os.PathLike[str]",
    uri_or_checkpoint: "str | os.PathLike[str] | Checkpoint",
    *,
    filesystem: object = None,
    metadata: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    overwrite: bool = False,
    merge: bool = False,
    cache: bool = True,
    progress: Progress | bool = False,
    wait: bool,
) -> Checkpoint | BackgroundUpload: ...


def upload(
    directory: "str | os.PathLike[str]",
    uri_or_checkpoint: "str | os.PathLike[str] | Checkpoint",
    *,
    filesystem: object = None,
    metadata: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    overwrite: bool = False,
    merge: bool = False,
    cache: bool = True,
    progress: Progress | bool = False,
    wait: bool = True,
) -> Checkpoint | BackgroundUpload:
    """Upload a local directory as a checkpoint, and return that checkpoint.

        >>> ckptfs.upload("./checkpoint_000100", "s3://bucket/run7/checkpoint_000100")
        Checkpoint(filesystem=s3, path=bucket/run7/checkpoint_000100)

    Files and their parts are uploaded in parallel, and verified by checksums. A second call uploads
    only the files that the store does not have yet. ``.metadata.json`` comes last, so a program
    that waits for it sees a complete checkpoint.

    Then the cache of this node gets the files, too, so that a restore here reads none of them from
    the store. If it cannot have them, the logger ``ckptfs`` says why (at INFO), and the upload has
    succeeded all the same.

    With ``wait=False`` the node's daemon uploads in the background. The call returns when the
    daemon has the files on its disk, where the file system shares the blocks or copies them. From
    then on the program may change or delete the directory, or end.

    Args:
        directory: The directory. No program may write to its files meanwhile.
        uri_or_checkpoint: The target: a `Checkpoint`, one of Ray's, or what `Checkpoint` takes.
        filesystem: The ``pyarrow.fs.FileSystem`` or fsspec filesystem of the target, if
            `uri_or_checkpoint` is a path on it.
        metadata: Keys of the checkpoint's own metadata, besides those in the directory's
            ``.metadata.json``.
        include: Globs on relative paths (``*`` also matches ``/``); empty for all files.
        overwrite: Whether to replace other content at the target. Files of other names stay.
        merge: Whether the target may have files of other names, for several programs that upload
            parts of one checkpoint, also at the same time. Other content in a file of the same name
            is refused as always. ``.metadata.json`` is replaced as a whole if this upload brings
            one, and comes after the files of this upload only.
        cache: Whether the cache of this node gets the files.
        progress: True for a bar on the terminal or in the notebook, or a function that gets the
            bytes at the store and the bytes of all files. With ``wait=False``, the bytes that the
            daemon has.
        wait: Whether to return when the store has the checkpoint. Otherwise the upload goes on in
            the background.

    Returns:
        The checkpoint at the target, or a `BackgroundUpload` with ``wait=False``.

    Raises:
        CheckpointNotFound, CheckpointIsFile: The directory, or the bucket, does not exist. The
            directory, or the target, is a file.
        CannotUpload: The directory has no files, or a file changed meanwhile, cannot be read, is a
            link that leads out of the directory, or has a name that the store cannot hold.
        TargetExists: The target has other content, and `overwrite` is False. With `merge`, also if
            another program has replaced a file by other content meanwhile.
        AccessDenied, StoreError: The store's answer. Finished files stay for another try.
        MetadataError: The directory's ``.metadata.json`` is not a JSON object (with `metadata`).
        TypeError, ValueError: `metadata` cannot be written as JSON, or `include` is a string.
        LocationError: The URI is invalid, or with ``wait=False`` the daemon cannot get this type of
            filesystem.
        LimitExceeded, CacheError, CannotMount, DaemonError, ConfigError: With ``wait=False``, the
            files exceed the setting ``upload_bytes_max``, the cache's disk fails, no daemon can
            run here, or its error.
    """
    # A checkpoint of Ray has another class.
    target: Any = uri_or_checkpoint
    if not hasattr(target, "as_directory"):
        target = Checkpoint(target, cast("Any", filesystem))
    elif filesystem is not None:
        raise TypeError("a checkpoint has its own filesystem; leave filesystem out")
    verb = "uploading" if wait else "taking over"
    with shown(progress, f"{verb} {os.path.basename(os.path.abspath(directory))}") as told:
        options = Options(metadata, include, overwrite, cache=cache, merge=merge)
        if not wait:
            return begin_upload(directory, target, options, told)
        run_upload(directory, target, options, told)
    return target


def run_upload(
    directory: "str | os.PathLike[str]", target: Checkpoint, options: Options, told: Told | None
) -> Done:
    """Upload a directory to a checkpoint, and return what was uploaded. Raises as `upload`."""
    top = _top_of(directory, target, options)
    filesystem = filesystem_behind(target)
    metadata = None if options.metadata is None else _metadata(top, options.metadata)
    include = list(options.include)
    wanted = Wanted(include, metadata, options.overwrite, options.rate, options.merge)
    store, uploads = uploads_to(filesystem, target.path)

    def locate() -> Location:
        return describe(filesystem, target.path)

    with closing(store):
        return upload_and_save(top, store, uploads, wanted, locate, told, cache=options.cache)


def begin_upload(
    directory: "str | os.PathLike[str]", target: Checkpoint, options: Options, told: Told | None
) -> BackgroundUpload:
    """Have the daemon upload a directory to a checkpoint. Raises as `upload`."""
    top = _top_of(directory, target, options)
    filesystem = filesystem_behind(target)
    try:
        location = describe(filesystem, target.path)
    except NotDescribable as error:
        raise NotDescribable(f"{error}; upload with wait=True") from None
    metadata = None if options.metadata is None else _metadata(top, options.metadata)
    store, uploads = uploads_to(filesystem, target.path)
    with closing(store):
        found = background.Directory(top, list(options.include), uploads.fault_of, metadata)
    kept = UploadOptions(
        options.overwrite, options.merge, options.cache, options.rate, found.left_out()
    )
    return BackgroundUpload(background.hand_over(found, location, kept, told), target)


def _top_of(directory: "str | os.PathLike[str]", target: Checkpoint, options: Options) -> str:
    """The absolute path of a directory to upload. Raises TypeError for wrong options, LocationError
    for a target in the directory."""
    if isinstance(options.include, str):  # would be a Sequence[str] of characters
        raise TypeError(f"include must be a list of globs, not the string {options.include!r}")
    top = os.path.abspath(os.path.expanduser(directory))
    _refuse_itself(top, filesystem_behind(target), target.path)
    return top


def _refuse_itself(top: str, filesystem: FileSystem, path: str) -> None:
    """Raise LocationError for a target in the directory itself."""
    local = local_path_of(filesystem, path)
    if local is None:
        return
    real, above = os.path.realpath(local), os.path.realpath(top)
    if real == above or real.startswith(f"{above.rstrip('/')}/"):
        raise errors.LocationError(f"{local} is in the directory to upload; choose another target")


def _metadata(top: str, given: Mapping[str, Any]) -> bytes:
    """The bytes of the metadata file: the directory's keys, and those that are given."""
    if not isinstance(given, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"metadata must be a dict, not {type(given).__name__}")
    path = printable(os.path.join(top, METADATA_NAME))
    file = file_in(top, METADATA_NAME)
    stored: Any = {}
    try:
        if file is not None:
            stored = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise errors.MetadataError(
            f"{path} is not JSON ({error}); correct the file, or remove it"
        ) from None
    if not isinstance(stored, dict):
        raise errors.MetadataNotDict(
            f"{path} holds a {type(stored).__name__} and not a dict, so it takes no keys; correct "
            "the file, or leave metadata out"
        )
    return json.dumps({**cast("dict[str, Any]", stored), **given}).encode()
