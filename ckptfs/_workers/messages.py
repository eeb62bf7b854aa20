"""What daemon and worker say to each other; see the package's text. Plain data."""

from typing import Literal, TypeAlias

import msgspec

from ckptfs._model.location import Location, StoreRef
from ckptfs._model.manifest import ListedFile, Skipped
from ckptfs._store.base import Pin

PROTOCOL = 1
"""To be changed with any message: a worker may be of another version, where the package on the disk
was replaced since the daemon began."""
OTHER_PROTOCOL_STATUS = 3
"""How a worker ends that does not know the daemon's protocol."""

BEAT_S = 0.25
"""How often the worker's main thread writes the time."""
BEAT_BYTES = 8
PROGRESS_S = 0.05
"""As often as anybody looks at the progress of a read (``_daemon.transfers``), twice."""
MESSAGE_BYTES_MAX = 64 << 10
"""Of one message: a path has 8 KiB at most, a name 4 KiB, and a text is cut."""
OBJECT_BYTES_MAX = 16 << 20
"""Of an object that is read as a whole, which is metadata; as for S3."""
LISTED_AT_ONCE = 5_000
"""Entries of a listing that are decoded in one go, which holds the interpreter's lock of the daemon
for some 5 ms."""

Method = Literal["list", "confirm", "read_into", "get", "put", "find", "close"]


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """What a worker is told first.

    Attributes:
        protocol: `PROTOCOL`.
        location: The store; its path is empty.
        timeout_s: See ``resolve.open_store``.
        pickled: The filesystem of a private daemon, or nothing.
    """

    protocol: int
    location: Location
    timeout_s: float
    pickled: bytes = b""

    def __repr__(self) -> str:
        return f"Setup({self.location!r})"


class Call(msgspec.Struct, frozen=True, array_like=True):
    """A call of a Store's method.

    Attributes:
        method: Its name; "close" forgets the directory, and has no answer.
        store: A number for the directory, as long as it is in use.
        path: The directory's path.
        named: The named store that it lies in.
        left_s: Seconds until the caller's deadline.
        pin, offset, length, files_max, name: Its arguments. The data of a `put` are the first
            `length` bytes of the memory.
    """

    method: Method
    store: int
    path: str
    named: StoreRef | None
    left_s: float
    pin: Pin | None = None
    offset: int = 0
    length: int = 0
    files_max: int = 0
    name: str = ""


class Came(msgspec.Struct, frozen=True, array_like=True, tag="came"):
    """So many more bytes of a read came."""

    count: int


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """The call has succeeded.

    Attributes:
        pin: Of `confirm`.
        file: Of `find`.
        is_true: Of `read_into`: the bytes are of the pinned version. Of `get`: there is an object.
        size: How many bytes in the memory belong to the result.
    """

    pin: Pin | None = None
    file: ListedFile | None = None
    is_true: bool = False
    size: int = 0


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The call has failed; `code` is one of ``ckptfs.errors.BY_CODE``."""

    code: str
    message: str
    retry_after_s: float = 0.0


Answer: TypeAlias = Came | Done | Failed


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A part of a listing: at most `LISTED_AT_ONCE` of each. In the memory there are four bytes
    before each part that say its length."""

    files: list[ListedFile]
    directories: list[str]
    skipped: list[Skipped]


LENGTH_BYTES = 4

encode = msgspec.msgpack.Encoder().encode
decode_setup = msgspec.msgpack.Decoder(Setup).decode
decode_call = msgspec.msgpack.Decoder(Call).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
decode_part = msgspec.msgpack.Decoder(Part).decode
