"""The messages between daemon and worker; see the package's docstring. Plain data."""

import os
import traceback
from typing import Literal, TypeAlias

import msgspec

from ckptfs._model.location import Location, StoreRef
from ckptfs._model.manifest import ListedFile, Skipped
from ckptfs._model.named_store import Credentials
from ckptfs._store.base import Method, Pin
from ckptfs.errors import CkptfsError, StoreError, StoreUnavailable

PROTOCOL = 2
"""The version of the messages; change it with any message. A worker may be of another version if
the package on the disk was replaced since the daemon began."""
OTHER_PROTOCOL_STATUS = 3
"""The exit status of a worker that does not know the daemon's protocol."""

BEAT_S = 0.25
"""The time between two beats, in which the worker's main thread writes the time."""
BEAT_BYTES = 8
PROGRESS_S = 0.05
"""The time between two reports of progress: half the time between the checks in
``_daemon.fetch.transfers``."""
MESSAGE_BYTES_MAX = 64 << 10
"""The longest message. A path has 8 KiB at most, a name 4 KiB, and a text is cut."""
_TEXT_CHARACTERS_MAX = 4_000
OBJECT_BYTES_MAX = 16 << 20
"""The largest object that is read as a whole, which is metadata. It is the same on S3."""
LISTED_AT_ONCE = 5_000
"""The entries of a listing that are decoded at once, which holds the interpreter's lock of the
daemon for some 5 ms."""


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """The first message to a worker.

    Attributes:
        protocol: The daemon's `PROTOCOL`.
        location: The store, with an empty path.
        timeout_s: See ``resolve.open_store``.
        pickled: The filesystem of a private daemon, or nothing.
        credentials: See ``resolve.open_store``.
    """

    protocol: int
    location: Location
    timeout_s: float
    pickled: bytes = b""
    credentials: Credentials = "default"

    def __repr__(self) -> str:
        return f"Setup({self.location!r})"


class Call(msgspec.Struct, frozen=True, array_like=True):
    """A call of a Store's method.

    Attributes:
        method: The method's name; "close" forgets the directory, and has no answer.
        store: The number of the directory while it is in use.
        path: The directory's path.
        named: The named store of the directory.
        left_s: The seconds until the caller's deadline.
        pin, offset, length, files_max, name: The arguments. The data of a `put` are the first
            `length` bytes of the memory.
        request: The id of the request to the daemon, see ``_model.request_id``.
        answers_are_whole: What the daemon's own store has learned, see `HasWholeAnswers`.
    """

    method: Method | Literal["close"]
    store: int
    path: str
    named: StoreRef | None
    left_s: float
    pin: Pin | None = None
    offset: int = 0
    length: int = 0
    files_max: int = 0
    name: str = ""
    request: str = ""
    answers_are_whole: bool = False


class Came(msgspec.Struct, frozen=True, array_like=True, tag="came"):
    """More bytes of a read's body came: `count` of them."""

    count: int


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """The call has succeeded.

    Attributes:
        pin: The result of `confirm`.
        file: The result of `find`.
        is_true: The result of `read_into`, or whether `get` found the object.
        size: The bytes in the memory that belong to the result.
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


def failed(error: Exception, doing: str) -> Failed:
    """What a process says of an exception. It names only the type and place of an unexpected one of
    a library, and what the process was `doing`, because its text may contain secrets."""
    if isinstance(error, CkptfsError):
        retry_after_s = error.retry_after_s if isinstance(error, StoreUnavailable) else 0.0
        return Failed(error.code, str(error)[:_TEXT_CHARACTERS_MAX], retry_after_s)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return Failed(StoreError.code, f"{doing}: unexpected {type(error).__name__} at {where}")


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A part of a listing, with at most `LISTED_AT_ONCE` entries of each kind. Four bytes with the
    length precede each part in the memory."""

    files: list[ListedFile]
    directories: list[str]
    skipped: list[Skipped]


LENGTH_BYTES = 4

encode = msgspec.msgpack.Encoder().encode
decode_setup = msgspec.msgpack.Decoder(Setup).decode
decode_call = msgspec.msgpack.Decoder(Call).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
decode_part = msgspec.msgpack.Decoder(Part).decode
