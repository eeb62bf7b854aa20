"""The Store protocol and its error contract.

A store gives access to the objects below one directory. All methods block, may be called from any
thread, and raise nothing but these:

- `CheckpointNotFound`: from `list` and `put`; `CheckpointIsFile`: from `list` only;
- `ObjectChanged`: the object is gone or is no longer the pinned version;
- `AccessDenied`: the credentials are wrong, expired or insufficient; trying again does not help;
- `StoreTimeout`, `StoreUnavailable`: trying again can help;
- `StoreError`: anything else the store answered;
- `LocationError`: the store is opened by its first call (``ckptfs._workers``), and cannot be.

**Versions.** The pin of an object starts with what the listing says (size, mtime, and the ETag
where that is in it). `confirm` asks the store for the current version and compares; an ETag that
the listing did not have is learned by the first `confirm`, and compared by the later ones. Where
`read_into` returns True, the store itself has said that the bytes are of the pinned version. Else
the rule that makes it safe is: know the ETag, read, `confirm`. Stores are strongly consistent, so
equal versions before and after mean that the bytes in between are of that version.

**ETags of listings** are not those of the objects' own answers on every server. So an ETag that
only the listing has said is corrected by the first `confirm`, as long as no byte was read; a read
that is refused before that is no proof of a change (see `repinned`).
"""

from typing import Literal, Protocol

import msgspec

from ckptfs._model.manifest import ListedFile, Listing, printable
from ckptfs.errors import (
    CheckpointIsFile,
    CheckpointNotFound,
    LimitExceeded,
    ObjectChanged,
    StoreError,
)

TagOf = Literal["listing", "answers", "checks"]
"""Which answers of the store name a pin's ETag, see `Pin.etag_of`."""


class Pin(msgspec.Struct, frozen=True):
    """The version of one object that readers see.

    Attributes:
        path: Path relative to the checkpoint.
        size: Bytes.
        mtime_ns: Modification time from the listing, nanoseconds since the epoch.
        etag: The ETag; "" while it is not known, and for stores that have none.
        etag_of: What names the ETag: only the "listing" so far, so that the object's own answers
            may have another one; all "answers" of the object; "checks" only, because the answers to
            reads have another ETag or none.
    """

    path: str
    size: int
    mtime_ns: int
    etag: str = ""
    etag_of: TagOf = "answers"

    @property
    def identifies(self) -> bool:
        """Whether the ETag alone identifies the bytes: a weak one does not (RFC 9110, 8.8.1)."""
        return bool(self.etag) and not self.etag.startswith("W/")


def pin_of(file: ListedFile) -> Pin:
    """The version of a file that a listing says."""
    of = "listing" if file.etag else "answers"
    return Pin(file.path, file.size, file.mtime_ns, file.etag, of)


class Store(Protocol):
    """One directory of a store, hashable by identity. See the module's text for the contract.

    Attributes:
        name: Its URI, for messages.
        gives_up: Whether a read ends at once when it is given up (see `progress`).
    """

    name: str
    gives_up: bool

    def list(self, files_max: int) -> Listing:
        """Names, sizes and times of everything below the directory; reads no content.

        Raises LimitExceeded where there are more than `files_max` objects.
        """
        ...

    def confirm(self, pin: Pin) -> Pin:
        """Check that `pin` is the store's current version; returns it with the ETag filled in."""
        ...

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the object's bytes from `offset` on. A short object is
        ObjectChanged. Returns whether the bytes are known to be of the pinned version."""
        ...

    def get(self, path: str) -> bytes | None:
        """All of a small object, as it is now; None where there is none."""
        ...

    def put(self, path: str, data: bytes) -> None:
        """Replace, or make, an object as a whole: others see the old one or the new one.

        Object stores show an object when it is complete; on a local disk a temporary file takes
        the file's place. On HDFS, and where fsspec's protocol writes in place, it is not so.
        """
        ...

    def find(self, path: str) -> ListedFile | None:
        """What `list` would say of one object now; None where there is none."""
        ...

    def close(self) -> None:
        """Let go of open handles. Calls that are still running may fail."""
        ...


def repinned(store: Store, pin: Pin) -> Pin:
    """The pin to go on with after a read has said that the object is no longer that of `pin`.

    Blocking. A check decides, because some servers look at other ETags in reads than elsewhere.

    Raises:
        ObjectChanged: The check says so, too.
        StoreError: It does not, and reads need not even name the version any more.
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


# What all stores say in the same words; `name` is the store's.


def changed(name: str, pin: Pin, how: str) -> ObjectChanged:
    """The object is no longer the version of `pin`; `how` says what became of it."""
    return ObjectChanged(
        f"{printable(pin.path)} in {name} changed at the store since it was attached: {how}; "
        "attach the checkpoint again to see the new version"
    )


def not_found(name: str) -> CheckpointNotFound:
    """There is no such directory."""
    return CheckpointNotFound(f"{name} does not exist; check the path")


def is_file(name: str) -> CheckpointIsFile:
    """It is an object and no directory."""
    return CheckpointIsFile(f"{name} is a file, not a directory; name the directory that holds it")


def check_count(name: str, count: int, files_max: int) -> None:
    """Raise LimitExceeded where `count` objects are too many."""
    if count > files_max:
        raise LimitExceeded(
            f"{name} holds {count} objects, more than files_max = {files_max}; "
            "name a directory below it, or raise files_max"
        )
