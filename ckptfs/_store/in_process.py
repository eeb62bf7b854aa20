"""The store of a checkpoint for a program that reads it without a daemon.

Our own clients read S3, Google, Azure and HTTP if ckptfs can describe the filesystem. They end in
time by themselves, and notice answers that are cut or too short. pyarrow's S3 client takes a cut
answer for a whole one, and leaves stale memory in the rest of the buffer.
"""

from collections.abc import Callable
from contextlib import closing
from typing import Concatenate, ParamSpec, TypeVar

from ckptfs._model.config import STORE_TIMEOUT_S
from ckptfs._model.named_store import named_location
from ckptfs._store.arrow_uploads import ArrowUploads
from ckptfs._store.base import Store
from ckptfs._store.build import TIMEOUT_S, plain_store
from ckptfs._store.describe import NotDescribable, describe
from ckptfs._store.filesystems import FileSystem, built, store_name_of, unwrapped
from ckptfs._store.kinds import KINDS
from ckptfs._store.named import open_place
from ckptfs._store.resolve import open_store
from ckptfs._store.target import own_uploads
from ckptfs._store.uploads import Uploads
from ckptfs._store.wrappers import ANSWER_S, within

P = ParamSpec("P")
T = TypeVar("T")


def store_of(filesystem: FileSystem, path: str) -> Store:
    """The store at `path` on a filesystem of this process, of any type. Raises StoreTimeout if it
    did not open within `ANSWER_S`."""
    try:
        location = describe(filesystem, path)
        name = location.uri
        if location.kind in KINDS and KINDS[location.kind].has_own_client:
            return within(ANSWER_S, name, open_store, location, STORE_TIMEOUT_S)
    except NotDescribable:
        name = f"{filesystem.type_name}:{path}"
    inner, path = unwrapped(filesystem, path)
    return store_on(inner, path, name)


def uploads_to(filesystem: FileSystem, path: str) -> tuple[Store, Uploads]:
    """The store at `path`, and the uploads to it. Raises AccessDenied for a kind of store to which
    ckptfs cannot upload, and as `store_of`."""
    store = store_of(filesystem, path)
    uploads = own_uploads(store)
    if uploads is not None:
        return store, uploads
    inner, path = unwrapped(filesystem, path)
    if store_name_of(inner):
        inner, path = unwrapped(inner.handler.filesystem, path)
    return store, ArrowUploads(built(inner), path, store.name)


def store_on(filesystem: FileSystem, path: str, name: str) -> Store:
    """The store at `path` on an unwrapped filesystem; `name` is for messages."""
    if store := store_name_of(filesystem):
        return open_place(named_location(store, path.strip("/"), None), TIMEOUT_S)[1]
    return plain_store(built(filesystem), path, name)


def ask(
    filesystem: FileSystem,
    path: str,
    call: Callable[Concatenate[Store, P], T],
    *args: P.args,
    **more: P.kwargs,
) -> T:
    """The result of `call` with the store at `path` and these arguments. Raises StoreTimeout if
    there was no answer within `ANSWER_S`."""
    store = store_of(filesystem, path)

    def run() -> T:
        with closing(store):
            return call(store, *args, **more)

    return within(ANSWER_S, store.name, run)
