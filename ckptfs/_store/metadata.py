"""A checkpoint's own metadata: the JSON object in its file ``.metadata.json``, as Ray has it."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping
from typing import Any, cast
from urllib.parse import parse_qsl

from ckptfs._config import runtime_dir
from ckptfs._filelock import locked
from ckptfs._model.manifest import METADATA_NAME
from ckptfs._store.base import Store
from ckptfs._store.deadline import left_s
from ckptfs.errors import MetadataError, MetadataNotDict, StoreTimeout

_LOCK_WAIT_S = 60.0
"""Longest wait for another process that changes the metadata of the same checkpoint. Who has a
deadline waits no longer: a change must not come when nobody expects it any more."""

_GZIP = b"\x1f\x8b"
"""What gzip's files begin with (RFC 1952, 2.3.1), and no JSON."""


def read(store: Store) -> Any:
    """The metadata, usually a dict; ``{}`` where there is none.

    Raises:
        MetadataError: The file is not JSON.
        AccessDenied, StoreError: The store's answer.
    """
    return parse(store.get(METADATA_NAME), store.name)


def read_dict(store: Store) -> dict[str, Any]:
    """The metadata where it has keys.

    Raises:
        MetadataNotDict: What is stored is no dict.
        MetadataError, AccessDenied, StoreError: As of `read`.
    """
    stored: Any = read(store)
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


def change(store: Store, how: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """Replace the metadata by what `how` makes of it, while nobody else on this node changes it.

    Returns the new bytes. Nothing is written if `how` raises. Raises as `update`.
    """
    with _serialised(store.name):
        raw = json.dumps(how(read_dict(store))).encode()
        store.put(METADATA_NAME, raw)
        return raw


@contextlib.contextmanager
def _serialised(name: str) -> Generator[None]:
    """Changes of the same checkpoint by processes of this user wait for each other."""
    folder = runtime_dir(os.environ)
    path, _, query = name.partition("?")
    # Whoever gives another region means the same place.
    place = [path, *sorted(item for item in parse_qsl(query) if item[0] != "region")]
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).hexdigest()
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
