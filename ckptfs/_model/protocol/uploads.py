"""The requests and replies of uploads in the background (``wire``)."""

from typing import Annotated, ClassVar

import msgspec

from ckptfs._model.location import Location
from ckptfs._model.protocol.replies import Done, Reply
from ckptfs._model.protocol.requests import Request
from ckptfs._model.units import RATE_MAX
from ckptfs._model.uploads import UploadOptions, UploadStatus

_Path = Annotated[str, msgspec.Meta(max_length=4096)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=RATE_MAX)]


class UploadBegun(Reply, frozen=True, tag="upload-begun"):
    """Reply to `BeginUpload`. `id` is "" as long as other uploads take the space (the setting
    `upload_bytes_max`). The client then asks again."""

    id: str


class UploadReply(Reply, frozen=True, tag="upload-reply"):
    """Reply to `CommitUpload` and `AwaitUpload`."""

    upload: UploadStatus


class UploadsReply(Reply, frozen=True, tag="uploads-reply"):
    """Reply to `ListUploads`. `left_out` uploads had no space in the message."""

    uploads: list[UploadStatus]
    left_out: int = 0


class PendingUpload(Reply, frozen=True, tag="upload-found"):
    """Reply to `FindUpload`: the directory with its files; "" if there is no such upload."""

    path: str


STAGED_BYTES_MAX = 64 << 20
"""Most bytes of a file in one message of `StageFile`, so that the reply does not take long."""
UploadId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{12}\Z")]


class BeginUpload(Request[UploadBegun], frozen=True, tag="upload-begin"):
    """Begin to hand a directory over, for an upload in the background. The upload ends with the
    connection unless `CommitUpload` follows on it.

    Attributes:
        location: The target, with credentials.
        files, bytes: The number and the bytes of the files that will follow.
        options: The options that count when it is sent.
        namespace: The client's mount namespace if the target is a local directory.
    """

    needs_secrets: ClassVar[bool] = True
    location: Location
    files: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
    bytes: _Size
    options: UploadOptions
    namespace: Annotated[str, msgspec.Meta(max_length=64)] = ""


class StageFile(Request[Done], frozen=True, tag="upload-stage"):
    """Take over a piece of a file from the descriptor that the client passes along (SCM_RIGHTS).
    The pieces of a file come in their order, and an empty file is one empty piece.

    Attributes:
        id: The upload.
        path: The file's path in the checkpoint.
        size: Bytes of the file.
        offset, length: The piece, in bytes.
    """

    id: UploadId
    path: _Path
    size: _Size
    offset: _Size
    length: Annotated[int, msgspec.Meta(ge=0, le=STAGED_BYTES_MAX)]


class CommitUpload(Request[UploadReply], frozen=True, tag="upload-commit"):
    """Accept an upload whose files are all there. The reply comes when they are on the disk, or
    after some seconds. Its state is then `staging`, and the client asks again."""

    id: UploadId


class AwaitUpload(Request[UploadReply], frozen=True, tag="upload-wait"):
    """Return the state of an upload. The reply comes when the upload has ended, or after
    `seconds`."""

    id: UploadId
    seconds: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0


class ListUploads(Request[UploadsReply], frozen=True, tag="uploads"):
    """Return the state of all uploads of this user. Root sees those of all users."""


class DropUpload(Request[Done], frozen=True, tag="upload-drop"):
    """End an upload, and remove its files from the disk. It has no effect on one that is done."""

    id: UploadId


class RetryUpload(Request[Done], frozen=True, tag="upload-retry"):
    """Begin a failed upload again. `location` is its target, with credentials."""

    needs_secrets: ClassVar[bool] = True
    id: UploadId
    location: Location


class FindUpload(Request[PendingUpload], frozen=True, tag="upload-find"):
    """Return the newest upload to `location` that is not done. Its files stay until the connection
    closes, or longer if an attachment shows them."""

    location: Location
