"""`upload`: a local directory becomes a checkpoint in a store."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple, cast

from ckptfs import errors
from ckptfs._client import client, save
from ckptfs._model.manifest import METADATA_NAME, printable
from ckptfs._store.copy import Progress
from ckptfs._store.describe import describe
from ckptfs._store.directory_upload import Told, Uploaded, Wanted, upload_directory
from ckptfs._store.filesystems import FileSystem, local_path_of
from ckptfs._store.in_process import uploads_to
from ckptfs._store.source import file_in
from ckptfs.checkpoint import Checkpoint, filesystem_behind, shown

_log = logging.getLogger(__name__)


class Options(NamedTuple):
    """The options of an upload: see `upload`. `rate` is the most bytes per second; 0 for no
    limit."""

    metadata: Mapping[str, Any] | None = None
    include: Sequence[str] = ()
    overwrite: bool = False
    rate: int = 0
    cache: bool = True
    merge: bool = False


class Done(NamedTuple):
    """What was uploaded, the bytes of it in the cache of this node, and the error that has kept the
    cache from having all of them; "" without an error."""

    uploaded: Uploaded
    cached_bytes: int
    cache_error: str


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
) -> Checkpoint:
    """Upload a local directory as a checkpoint, and return that checkpoint.

        >>> ckptfs.upload("./checkpoint_000100", "s3://bucket/run7/checkpoint_000100")
        Checkpoint(filesystem=s3, path=bucket/run7/checkpoint_000100)

    Files and their parts are uploaded in parallel, and verified by checksums. A second call uploads
    only the files that the store does not have yet. ``.metadata.json`` comes last, so a program
    that waits for it sees a complete checkpoint.

    Then the cache of this node gets the files, too, so that a restore here reads none of them from
    the store. If it cannot have them, the logger ``ckptfs`` says why (at INFO), and the upload has
    succeeded all the same.

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
            bytes at the store and the bytes of all files.

    Returns:
        The checkpoint at the target.

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
        LocationError: The URI is invalid.
    """
    # A checkpoint of Ray has another class.
    target: Any = uri_or_checkpoint
    if not hasattr(target, "as_directory"):
        target = Checkpoint(target, cast("Any", filesystem))
    elif filesystem is not None:
        raise TypeError("a checkpoint has its own filesystem; leave filesystem out")
    with shown(progress, f"uploading {os.path.basename(os.path.abspath(directory))}") as told:
        options = Options(metadata, include, overwrite, cache=cache, merge=merge)
        run_upload(directory, target, options, told)
    return target


def run_upload(
    directory: "str | os.PathLike[str]", target: Checkpoint, options: Options, told: Told | None
) -> Done:
    """Upload a directory to a checkpoint, and return what was uploaded. Raises as `upload`."""
    if isinstance(options.include, str):  # would be a Sequence[str] of characters
        raise TypeError(f"include must be a list of globs, not the string {options.include!r}")
    top = os.path.abspath(os.path.expanduser(directory))
    filesystem = filesystem_behind(target)
    _refuse_itself(top, filesystem, target.path)
    metadata = None if options.metadata is None else _metadata(top, options.metadata)
    include = list(options.include)
    wanted = Wanted(include, metadata, options.overwrite, options.rate, options.merge)
    store, uploads = uploads_to(filesystem, target.path)
    with closing(store):
        uploaded, contents = upload_directory(top, store, uploads, wanted, told)
    # The store has all of it, so an error from here on must not look like one of the upload.
    saved = save.Saved(0, None)
    try:
        location = describe(filesystem, target.path)
        client.tell_metadata_changed(location)
        if options.cache:
            saved = save.save(location, contents)
    except (errors.CkptfsError, OSError) as error:  # it cannot be described
        saved = save.Saved(0, error if options.cache else None)
    if saved.error is not None:
        text = "the cache of this node does not have all of %s: %s"
        _log.info(text, uploaded.uri, saved.error)
    return Done(uploaded, saved.bytes, str(saved.error or ""))


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
