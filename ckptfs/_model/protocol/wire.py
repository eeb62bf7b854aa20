"""The control protocol: one JSON object per line, a request and then its reply, on a unix socket.

The socket is a trust border. Decoding rejects unknown fields of requests, unknown operations, other
protocol versions, and lines longer than `LINE_BYTES_MAX`. An open connection holds the attachments
that it has made, so a client can open a directory as its own lease before it closes the connection.
"""

from typing import Any, TypeVar, Union

import msgspec

from ckptfs._model.protocol import uploads as uploads  # its messages belong to the unions
from ckptfs._model.protocol.message import Message
from ckptfs._model.protocol.replies import Reply
from ckptfs._model.protocol.requests import Request
from ckptfs.errors import ProtocolError

M = TypeVar("M", bound=Message)


def _messages(base: type[M]) -> list[type[M]]:
    below = base.__subclasses__()
    return [message for each in below for message in _messages(each)] if below else [base]


def _decoder(base: type[M]) -> msgspec.json.Decoder[M]:
    return msgspec.json.Decoder(Union[tuple(_messages(base))])  # noqa: UP007 - of a tuple


_encoder = msgspec.json.Encoder()
_requests: msgspec.json.Decoder[Request[Any]] = _decoder(Request)
_replies = _decoder(Reply)


def encode(message: Message) -> bytes:
    """`message` as one line, newline included."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> Request[Any]:
    """The request in `line`. Raises ProtocolError for everything else."""
    return _decode(_requests, line)


def decode_reply(line: bytes) -> Reply:
    """The reply in `line`. Raises ProtocolError for everything else."""
    return _decode(_replies, line)


def _decode(decoder: msgspec.json.Decoder[M], line: bytes) -> M:
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # The decoder's text only, because the line itself may hold credentials.
        raise ProtocolError(
            f"malformed control message: {error}; client and daemon must be of the same version"
        ) from None
