"""The control protocol: one JSON object per line, a request and then its reply, on a unix socket.

The socket is a trust border. Unknown fields, unknown operations and other protocol versions are
refused, and a line is at most `LINE_BYTES_MAX` long. While a connection is open it holds what it
attached, so that a client can take its own lease (an open directory) before it hangs up.
"""

from typing import TypeVar

import msgspec

from ckptfs._model.replies import (
    ActivityReply,
    Attached,
    CacheNews,
    Done,
    Failed,
    Given,
    Prefetching,
    Reloaded,
    StatusReply,
    Taken,
    Trace,
)
from ckptfs._model.requests import (
    Activity,
    Attach,
    CacheProgress,
    CacheRequest,
    Detach,
    GetTrace,
    GiveBlocks,
    MetadataChanged,
    PrefetchProgress,
    Reload,
    Restart,
    StartPrefetch,
    Status,
    Stop,
    TakeBlocks,
)
from ckptfs.errors import ProtocolError

Request = (
    Attach
    | Detach
    | Status
    | Activity
    | MetadataChanged
    | StartPrefetch
    | PrefetchProgress
    | GiveBlocks
    | TakeBlocks
    | GetTrace
    | CacheRequest
    | CacheProgress
    | Reload
    | Restart
    | Stop
)

Reply = (
    Attached
    | Done
    | Failed
    | Given
    | Prefetching
    | CacheNews
    | Reloaded
    | StatusReply
    | ActivityReply
    | Taken
    | Trace
)

_encoder = msgspec.json.Encoder()
_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
_Decoded = TypeVar("_Decoded")


def encode(message: Request | Reply) -> bytes:
    """`message` as one line, newline included."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """The request in `line`. Raises ProtocolError for everything else."""
    return _decode(_requests, line)


def decode_reply(line: bytes) -> Reply:
    """The reply in `line`. Raises ProtocolError for everything else."""
    return _decode(_replies, line)


def _decode(decoder: "msgspec.json.Decoder[_Decoded]", line: bytes) -> _Decoded:
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Of the decoder's text only: the line itself may hold credentials.
        raise ProtocolError(
            f"malformed control message: {error}; client and daemon must be of the same version"
        ) from None
