"""The store of a checkpoint for a program that asks it itself, without a daemon.

S3, Google and Azure are read by our own clients where the filesystem can be described. Ours end in
time by themselves, and notice answers that are cut or too short; pyarrow's S3 client takes these
for whole ones, so the rest of the buffer is whatever was in memory.
"""

from collections.abc import Callable
from contextlib import closing
from typing import Concatenate, ParamSpec, TypeVar

from ckptfs._model.config import STORE_TIMEOUT_S
from ckptfs._store import objectstore
from ckptfs._store.base import Store
from ckptfs._store.build import TIMEOUT_S, plain_store
from ckptfs._store.describe import NotDescribable, describe
from ckptfs._store.filesystems import FileSystem, built, store_name_of, unwrapped
from ckptfs._store.named import open_own
from ckptfs._store.resolve import open_store
from ckptfs._store.timed import ANSWER_S, within

P = ParamSpec("P")
T = TypeVar("T")


def store_of(filesystem: FileSystem, path: str) -> Store:
    """The store at `path` on a filesystem of this very process, of whatever type.

    Raises:
        StoreTimeout: It did not open within `ANSWER_S`.
    """
    try:
        location = describe(filesystem, path)
        name = location.uri
        if location.kind == "s3" or location.kind in objectstore.KINDS:
            return within(ANSWER_S, name, open_store, location, STORE_TIMEOUT_S)
    except NotDescribable:
        name = f"{filesystem.type_name}:{path}"
    return store_on(*unwrapped(filesystem, path), name)


def store_on(filesystem: FileSystem, path: str, name: str) -> Store:
    """The store at `path` on an unwrapped filesystem; `name` is for messages."""
    if store := store_name_of(filesystem):
        return open_own(store, path.strip("/"), TIMEOUT_S)
    return plain_store(built(filesystem), path, name)


def ask(
    filesystem: FileSystem,
    path: str,
    call: Callable[Concatenate[Store, P], T],
    *args: P.args,
    **more: P.kwargs,
) -> T:
    """What `call` makes of the store at `path`, and these arguments.

    Raises:
        StoreTimeout: There was no answer within `ANSWER_S`.
    """
    store = store_of(filesystem, path)

    def run() -> T:
        with closing(store):
            return call(store, *args, **more)

    return within(ANSWER_S, store.name, run)
