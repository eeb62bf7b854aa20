"""The Uploads protocol: how objects are written below one directory of a store.

All methods block, and any thread may call them. They raise the errors that the docstring of
``base`` explains.

**Nothing half visible.** An object appears under its name when `finish` has returned, and as a
whole. Until then its parts are at the store under no name, or under that of a temporary file.

**Checksums.** `send` gives the store a checksum of the part, so the store refuses bytes that
changed on the way. `finish` compares what the store says of the object with what was sent.
"""

import re
from collections.abc import Callable, Set
from typing import Protocol, runtime_checkable

from ckptfs._model.manifest import ListedFile
from ckptfs.errors import StoreError

Digests = Callable[[int], list[bytes]]
"""A function that returns the MD5 of each part of a local file, for parts of so many bytes. An
empty file has one part."""

_MIB = 1 << 20
_CHECKSUM = re.compile(r'"((?:0x)?[0-9A-Fa-f]+)(-[0-9]+)?"')
"""The ETags that a store may have computed from the content."""


class ObjectUpload(Protocol):
    """The upload of one object, in parts that have the numbers from 1 on."""

    def send(self, number: int, data: memoryview) -> None:
        """Upload a part. It may be called again for the same part after an error if
        `Uploads.repeats`."""
        ...

    def finish(self) -> str:
        """Make the object of the parts. Returns its ETag; "" if the store names none. Raises
        StoreError if the store has other bytes than were sent."""
        ...

    def shown_etag(self) -> str | None:
        """The ETag that the store shows for the finished object; "" if the store has another
        program's object there; None if the store cannot tell."""
        ...

    def abort(self) -> None:
        """Remove the parts of an object that is not finished."""
        ...


class Uploads(Protocol):
    """Uploads to one directory of a store. `name` is the URI, for messages.

    Attributes:
        is_parallel: Whether several threads may send the parts of one object. Otherwise one thread
            sends them in order.
        repeats: Whether a part or a request can be sent again after an error.
    """

    name: str
    is_parallel: bool
    repeats: bool

    def part_bytes(self, size: int) -> int:
        """The bytes of each part, except the last one, of an object of that size."""
        ...

    def fault_of(self, path: str) -> str | None:
        """The reason why the store cannot hold an object of that name, or None if it can."""
        ...

    def prepare(self, paths: Set[str], *, merge: bool = False) -> None:
        """Make the directory if the store has directories, and remove what killed uploads of these
        objects left behind. With `merge`, leave what a running upload may still need."""
        ...

    def is_same(self, listed: ListedFile, digests: Digests) -> bool | None:
        """Whether an object has the content of the local file of the same size. None if the store
        says nothing of the content that ckptfs can compare."""
        ...

    def begin(self, path: str, size: int, *, is_new: bool = False) -> ObjectUpload:
        """Begin an upload. With `is_new`, a store that can refuses to replace an object of another
        program. `finish` then returns "", and the object stays as it is."""
        ...

    def remove(self, path: str) -> None:
        """Remove an object."""
        ...

    def is_own(self, path: str) -> bool:
        """Whether a name is that of a temporary file of uploads."""
        ...


@runtime_checkable
class HasUploads(Protocol):
    """A Store that may have an own way to upload."""

    def uploads(self) -> Uploads | None:
        """The uploads to the store's directory; None if it has no own way."""
        ...


def part_bytes_for(size: int, least: int, parts_max: int) -> int:
    """The bytes of a part: `least`, or whole MiB if there would be more than `parts_max` parts."""
    needed = -(-size // parts_max)
    return max(least, -(-needed // _MIB) * _MIB)


def parts_of(size: int, part_bytes: int) -> int:
    """The number of parts. An empty object has one."""
    return max(1, -(-size // part_bytes))


def contradicts(one: str, other: str) -> bool:
    """Whether two ETags of one object are checksums of the same kind and differ. Stores may have
    ETags of different kinds in different answers."""
    first, second = _CHECKSUM.fullmatch(one), _CHECKSUM.fullmatch(other)
    if first is None or second is None or first[2] != second[2]:
        return False
    return len(first[1]) == len(second[1]) and first[1].lower() != second[1].lower()


def other_bytes(what: str, expected: str, found: str) -> StoreError:
    """The error of an object that differs from what was sent. `what` is the object, and the other
    texts are checksums or sizes."""
    return StoreError(
        f"{what}: the store has other bytes than were sent ({found} instead "
        f"of {expected}); upload it again with overwrite, and check the store if that fails, too"
    )
