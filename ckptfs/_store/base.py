"""The Store protocol and its error contract.

A store gives access to the objects below one directory. All methods block, may be called from any
thread, and raise only these errors:

- `CheckpointNotFound`: `list` and `put` raise it if the directory or the bucket does not exist.
- `CheckpointIsFile`: `list` raises it if the path names an object.
- `ObjectChanged`: The object is gone or is no longer the pinned version.
- `AccessDenied`: The credentials are wrong, expired or insufficient. Another try does not help.
- `StoreTimeout`, `StoreUnavailable`: Another try can help.
- `StoreError`: The store answered with another error.
- `LocationError`: The first call opens the store (``ckptfs._workers``), and cannot open it.

**Versions.** The pin of an object starts with what the listing says (size, mtime, and the ETag
if the listing has one). `confirm` asks the store for the current version and compares. The first
`confirm` learns an ETag that the listing did not have, and the later ones compare it. If
`read_into` returns True, the store itself has said that the bytes are of the pinned version.
Otherwise callers have to know the ETag, read, and `confirm`. Stores are strongly consistent, so
equal versions before and after the read mean that the bytes are of that version.

**ETags of listings** differ from those of the objects' own answers on some servers. So the first
`confirm` corrects an ETag that only the listing has named, as long as no byte was read. If the
store refuses a read before that, the object need not have changed (see `repinned`).
"""

from typing import Literal, Protocol, runtime_checkable

import msgspec

from ckptfs._model.manifest import ListedFile, Listing, printable
from ckptfs._store.timestamps import is_same_time
from ckptfs.errors import (
    CheckpointIsFile,
    CheckpointNotFound,
    LimitExceeded,
    ObjectChanged,
    StoreError,
)

Method = Literal["list", "confirm", "read_into", "get", "put", "find"]
TagOf = Literal["listing", "answers", "checks"]
"""Which answers of the store name a pin's ETag, see `Pin.etag_of`."""


class Pin(msgspec.Struct, frozen=True):
    """The version of one object that readers see.

    Attributes:
        path: The path relative to the checkpoint.
        size: The size in bytes.
        mtime_ns: The modification time from the listing, in nanoseconds since the epoch.
        etag: The ETag; "" while it is unknown, and for stores without ETags.
        etag_of: The answers that name the ETag. "listing": only the listing so far, so the object's
            own answers may have another ETag. "answers": all answers of the object. "checks": only
            checks, because the answers to reads have another ETag or none.
    """

    path: str
    size: int
    mtime_ns: int
    etag: str = ""
    etag_of: TagOf = "answers"


def pin_of(file: ListedFile) -> Pin:
    """The version of a file that a listing names."""
    of = "listing" if file.etag else "answers"
    return Pin(file.path, file.size, file.mtime_ns, file.etag, of)


class Store(Protocol):
    """One directory of a store, hashable by identity. The module's docstring has the contract.

    `name` is the URI, for messages.
    """

    name: str

    def list(self, files_max: int) -> Listing:
        """The names, sizes and times of everything below the directory. Reads no content. Raises
        LimitExceeded if there are more than `files_max` objects."""
        ...

    def confirm(self, pin: Pin) -> Pin:
        """Check that `pin` is the store's current version; returns it with the ETag filled in."""
        ...

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the object's bytes from `offset` on. Raises ObjectChanged if the
        object ends earlier. Returns whether the store has said that the bytes are of the pinned
        version."""
        ...

    def get(self, path: str) -> bytes | None:
        """The current content of a small object; None if there is no such object."""
        ...

    def put(self, path: str, data: bytes) -> None:
        """Replace or make an object as a whole, so that readers see the old one or the new one.

        Object stores show an object when it is complete. On a local disk, a temporary file takes
        the file's place. HDFS and some protocols of fsspec write in place, so their readers may see
        a part.
        """
        ...

    def find(self, path: str) -> ListedFile | None:
        """The entry that `list` would return for one object now; None if there is no such
        object."""
        ...

    def close(self) -> None:
        """Close open handles. Calls that are still running may fail."""
        ...


@runtime_checkable
class HasWholeAnswers(Protocol):
    """A Store that learns whether all bytes of an answer of its server are of one version.

    Another object for the same directory may be told so by setting the attribute to True.
    """

    answers_are_whole: bool


def repinned(store: Store, pin: Pin) -> Pin:
    """The pin for the next read, after a read has said that the object is no longer that of `pin`.

    Blocks. A check decides, because some servers compare other ETags in reads than elsewhere.
    Raises ObjectChanged if the check says so, too, and StoreError if it does not, although the read
    named no version.
    """
    confirmed = store.confirm(pin)
    if confirmed.etag != pin.etag:
        return confirmed
    if pin.etag_of == "checks":
        raise StoreError(
            f"{printable(pin.path)} in {store.name}: the store contradicts itself: it says that "
            "the object has not changed, and answers a read as if it had; check the endpoint"
        )
    return msgspec.structs.replace(confirmed, etag_of="checks")


# The errors that all stores raise in the same words; `name` is the store's.


def changed(name: str, pin: Pin, how: str) -> ObjectChanged:
    """The error of an object that is no longer the version of `pin`; `how` says what changed."""
    return ObjectChanged(
        f"{printable(pin.path)} in {name} changed at the store since it was attached: {how}; "
        "attach the checkpoint again to see the new version"
    )


def check_version(name: str, pin: Pin, size: int | None, mtime_ns: int, etag: str) -> None:
    """Raise ObjectChanged if an object with these fields is not the version of `pin`."""
    if size != pin.size:
        raise changed(name, pin, f"{pin.size} bytes became {size}")
    if pin.etag:
        if etag != pin.etag:
            raise changed(name, pin, f"ETag {pin.etag} became {etag or 'none'}")
    elif pin.mtime_ns and mtime_ns and not is_same_time(mtime_ns, pin.mtime_ns):
        raise changed(name, pin, "it was written again")


def not_found(name: str) -> CheckpointNotFound:
    """The error of a directory that does not exist."""
    return CheckpointNotFound(f"{name} does not exist; check the path")


def is_file(name: str) -> CheckpointIsFile:
    """The error of a path that names an object instead of a directory."""
    return CheckpointIsFile(f"{name} is a file, not a directory; name the directory that holds it")


def check_count(name: str, count: int, files_max: int) -> None:
    """Raise LimitExceeded if `count` objects are too many."""
    if count > files_max:
        raise LimitExceeded(
            f"{name} holds {count} objects, more than files_max = {files_max}; "
            "name a directory below it, or raise files_max"
        )
