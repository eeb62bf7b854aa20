"""A checkpoint's own metadata: the JSON object in its file ``.metadata.json``, as Ray has it.

S3 denies access to an object that is missing, where the credentials may not list the whole bucket.
So a denial counts as "there is none" if the checkpoint's listing does not have the file.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping
from typing import Any, cast

from ckptfs._config import runtime_dir
from ckptfs._filelock import locked
from ckptfs._model.manifest import METADATA_NAME
from ckptfs._model.uris import parse_uri
from ckptfs._store.base import Store
from ckptfs._store.deadline import left_s
from ckptfs.errors import (
    AccessDenied,
    CkptfsError,
    LocationError,
    MetadataError,
    MetadataNotDict,
    StoreTimeout,
)

_LOCK_WAIT_S = 60.0
"""Longest wait for another process that changes the metadata of the same checkpoint. Who has a
deadline waits no longer: a change must not come when nobody expects it any more."""
_LISTED_MAX = 100_000
"""Most objects that are listed to learn whether the file is there: a hundred requests to S3."""


def get(store: Store, is_listed: bool | None = None) -> bytes | None:
    """The file's bytes; None where there is none.

    Args:
        store: The checkpoint.
        is_listed: Whether the store's listing has the file; None: the store is asked if it matters.

    Raises:
        AccessDenied, StoreError: The store's answer.
    """
    try:
        return store.get(METADATA_NAME)
    except AccessDenied:
        if _is_listed(store) if is_listed is None else is_listed:
            raise
        return None


def _is_listed(store: Store) -> bool:
    """Whether the file is in the store's listing; True where that cannot be found out."""
    try:
        return any(file.path == METADATA_NAME for file in store.list(_LISTED_MAX).files)
    except CkptfsError:
        return True


_GZIP = b"\x1f\x8b"
"""What gzip's files begin with (RFC 1952, 2.3.1), and no JSON."""


def read(store: Store) -> Any:
    """The metadata, usually a dict; ``{}`` where there is none.

    Raises:
        MetadataError: The file is not JSON.
        AccessDenied, StoreError: The store's answer.
    """
    return parse(get(store), store.name)


def read_dict(store: Store, is_listed: bool | None = None) -> dict[str, Any]:
    """The metadata where it has keys; `is_listed` as of `get`.

    Raises:
        MetadataNotDict: What is stored is no dict.
        MetadataError, AccessDenied, StoreError: As of `read`.
    """
    stored: Any = parse(get(store, is_listed), store.name)
    if not isinstance(stored, dict):
        raise MetadataNotDict(
            f"{METADATA_NAME} in {store.name} holds a {type(stored).__name__} and not a dict, so "
            "it has no keys; use set_metadata to replace it"
        )
    return cast("dict[str, Any]", stored)


def parse(raw: bytes | None, name: str) -> Any:
    """The metadata in the file's bytes; `name` is the checkpoint's. Raises MetadataError."""
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
        TypeError, ValueError: It cannot be written as JSON; the store was not asked.
        CheckpointNotFound: There is no such directory (where the store has directories).
        AccessDenied, StoreError: The store's answer.
    """
    raw = json.dumps(metadata).encode()
    with _serialised(store.name):
        store.put(METADATA_NAME, raw)


def update(store: Store, changes: Mapping[str, Any]) -> None:
    """Change some keys.

    Raises:
        TypeError: `changes` is no dict, or it cannot be written as JSON.
        MetadataNotDict: What is stored is none.
        MetadataError, CheckpointNotFound, AccessDenied, StoreError: As of `read` and `write`.
    """
    if not isinstance(changes, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"metadata must be a dict, not {type(changes).__name__}")
    change(store, lambda stored: {**stored, **changes})


def change(
    store: Store,
    how: Callable[[dict[str, Any]], dict[str, Any]],
    is_listed: bool | None = None,
) -> bytes:
    """Replace the metadata by what `how` makes of it, while no other process of this user on this
    node changes it. `is_listed` as of `get`.

    Returns the new bytes. Nothing is written if `how` raises. Raises as `update`.
    """
    with _serialised(store.name):
        raw = json.dumps(how(read_dict(store, is_listed))).encode()
        store.put(METADATA_NAME, raw)
        return raw


@contextlib.contextmanager
def _serialised(name: str) -> Generator[None]:
    """Changes of the same checkpoint by processes of this user wait for each other."""
    folder = runtime_dir(os.environ)
    digest = hashlib.blake2b(_key_of(name).encode(), digest_size=8).hexdigest()
    lock = folder / f"metadata-{digest}.lock"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(locked(str(lock), min(_LOCK_WAIT_S, left_s())))
        except TimeoutError:
            raise StoreTimeout(
                f"{name}: another process has been changing its metadata all the time; try again"
            ) from None
        yield


def _key_of(name: str) -> str:
    """Text that is equal for two URIs of one place. It is equal for two servers as well, because a
    URI does not show the server that the environment names."""
    try:
        place = parse_uri(name)
    except LocationError:
        return name.partition("?")[0]
    return f"{place.kind} {place.path}"
