"""A checkpoint's own metadata: the JSON object in its file ``.metadata.json``, as Ray has it.

If the credentials may not list the whole bucket, S3 denies access to a missing object. So a denial
means that the file is missing if the checkpoint's listing does not have it.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, cast

from ckptfs._config.load import runtime_dir
from ckptfs._model.manifest import METADATA_NAME
from ckptfs._model.uris import parse_uri
from ckptfs._os.filelock import locked
from ckptfs._os.scratch import open_own
from ckptfs._store.base import Store
from ckptfs._store.request_context import left_s
from ckptfs.errors import (
    AccessDenied,
    CkptfsError,
    LocationError,
    MetadataError,
    MetadataNotDict,
    StoreTimeout,
)

_log = logging.getLogger(__name__)

_LOCK_WAIT_S = 60.0
"""The longest wait for another process that changes the metadata of the same checkpoint. A caller's
deadline ends the wait earlier, because a change must not happen after the caller has given up."""
_LISTED_MAX = 100_000
"""The most objects to list for the question whether the file exists: a hundred requests to S3."""


def get(store: Store, is_listed: bool | None = None) -> bytes | None:
    """The file's bytes; None if it does not exist. Raises AccessDenied, StoreError.

    `is_listed` says whether the store's listing has the file; None to ask the store if it matters.
    """
    try:
        return store.get(METADATA_NAME)
    except AccessDenied:
        if _is_listed(store) if is_listed is None else is_listed:
            raise
        return None


def _is_listed(store: Store) -> bool:
    """Whether the file is in the store's listing; True if the listing cannot be read."""
    try:
        return any(file.path == METADATA_NAME for file in store.list(_LISTED_MAX).files)
    except CkptfsError:
        return True


_GZIP = b"\x1f\x8b"
"""The beginning of files of gzip (RFC 1952, 2.3.1), with which JSON cannot begin."""


def read(store: Store) -> Any:
    """The metadata, usually a dict; ``{}`` if the file does not exist. Raises MetadataError if it
    is not JSON, and as `get`."""
    return parse(get(store), store.name)


def read_dict(store: Store, is_listed: bool | None = None) -> dict[str, Any]:
    """The metadata as a dict; see `get` for `is_listed`. Raises MetadataNotDict, and as `read`."""
    stored: Any = parse(get(store, is_listed), store.name)
    if not isinstance(stored, dict):
        raise MetadataNotDict(
            f"{METADATA_NAME} in {store.name} holds a {type(stored).__name__} and not a dict, so "
            "it has no keys; use set_metadata to replace it"
        )
    return cast("dict[str, Any]", stored)


def parse(raw: bytes | None, name: str) -> Any:
    """The metadata in the file's bytes; `name` is the checkpoint, for messages. Raises
    MetadataError."""
    if raw is None:
        return {}
    if raw.startswith(_GZIP):
        raise MetadataError(
            f"{METADATA_NAME} in {name} is compressed with gzip; store it as plain JSON, or "
            "replace it with set_metadata"
        )
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise MetadataError(
            f"{METADATA_NAME} in {name} is not JSON ({error}); correct the file, or replace it "
            "with set_metadata"
        ) from None


def write(store: Store, metadata: Any) -> None:
    """Replace the metadata as a whole.

    Raises:
        TypeError, ValueError: The metadata cannot be written as JSON. No request was sent.
        CheckpointNotFound: The directory does not exist, in a store that has directories.
        AccessDenied, StoreError: The store answered with an error.
    """
    raw = json.dumps(metadata).encode()
    with _serialised(store.name):
        store.put(METADATA_NAME, raw)


def update(store: Store, changes: Mapping[str, Any]) -> None:
    """Change some keys. Raises TypeError if `changes` is not a dict or cannot be written as JSON,
    and as `read_dict` and `write`."""
    if not isinstance(changes, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"metadata must be a dict, not {type(changes).__name__}")
    change(store, lambda stored: {**stored, **changes})


def change(
    store: Store, how: Callable[[dict[str, Any]], dict[str, Any]], is_listed: bool | None = None
) -> bytes:
    """Replace the metadata by the result of `how`, while no other process of this user on this node
    changes it. See `get` for `is_listed`.

    Returns the new bytes. If `how` raises, nothing is written. Raises as `update`.
    """
    with _serialised(store.name):
        raw = json.dumps(how(read_dict(store, is_listed))).encode()
        store.put(METADATA_NAME, raw)
        return raw


@contextlib.contextmanager
def _serialised(name: str) -> Generator[None]:
    """Let the processes of this user change the metadata of a checkpoint one after the other.

    The lock is in the first of `_folders` that can have it. If none can, the change is made without
    a lock. After the change, no error of the lock is raised.
    """
    digest = hashlib.blake2b(_key_of(name).encode(), digest_size=8).hexdigest()
    with contextlib.ExitStack() as stack:
        refusals: list[str] = []
        for folder in _folders():
            try:
                stack.enter_context(_locked_in(folder, f"metadata-{digest}.lock"))
                break
            except TimeoutError:
                raise StoreTimeout(
                    f"{name}: other processes have been changing its metadata for "
                    f"{_LOCK_WAIT_S:g} s; try again"
                ) from None
            except OSError as error:
                refusals.append(f"{folder}: {error.strerror or error}")
        else:
            _log.warning(
                "%s: its metadata is changed without a lock, so another process's change at the "
                "same moment may be lost (%s); set TMPDIR to a directory that this user can write",
                name,
                "; ".join(refusals) or "there is no temporary folder",
            )
        yield


def _folders() -> list[Path]:
    """The folders that may have the lock of this user."""
    found: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # there is no temporary folder
        found.append(runtime_dir(os.environ))
        found.append(Path(tempfile.gettempdir(), f"ckptfs-{os.geteuid()}"))
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def _locked_in(folder: Path, lock: str) -> Generator[None]:
    """Take the lock in a folder. Raises TimeoutError, or OSError if the folder is not this user's
    or cannot have the lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.close(open_own(str(folder)))
    with locked(str(folder / lock), min(_LOCK_WAIT_S, left_s())):
        yield


def _key_of(name: str) -> str:
    """Text that is equal for two URIs of one location. It is equal for two servers as well, because
    a URI does not show the server that the environment names."""
    try:
        place = parse_uri(name)
    except LocationError:
        return name.partition("?")[0]
    return f"{place.kind} {place.path}"
