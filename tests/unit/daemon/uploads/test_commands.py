"""Uploads on the control socket: for root and the daemon's own user, each for its connection."""

import array
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.bench import PLACE, Client, Server, server_in
from trio.testing import MockClock

from ckptfs._model.location import Location
from ckptfs._model.protocol.replies import Done, Failed, Reply
from ckptfs._model.protocol.requests import Request, Stop
from ckptfs._model.protocol.uploads import (
    AwaitUpload,
    BeginUpload,
    CommitUpload,
    DropUpload,
    FindUpload,
    ListUploads,
    PendingUpload,
    RetryUpload,
    StageFile,
    UploadBegun,
    UploadReply,
    UploadsReply,
)
from ckptfs._model.protocol.wire import decode_reply, encode
from ckptfs._model.uploads import UploadOptions
from ckptfs.errors import AccessDenied, Busy, LocationError, NoUpload, ProtocolError

NONE = "0" * 12
BEGIN = BeginUpload(location=PLACE, files=1, bytes=4, options=UploadOptions())
REQUESTS: list[Request] = [
    BEGIN,
    StageFile(id=NONE, path="file", size=4, offset=0, length=4),
    CommitUpload(id=NONE),
    AwaitUpload(id=NONE),
    ListUploads(),
    DropUpload(id=NONE),
    RetryUpload(id=NONE, location=PLACE),
    FindUpload(location=PLACE),
]


@pytest.fixture
async def server(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with server_in(tmp_path, tmp_path_factory.mktemp("s") / "s") as server:
        yield server


async def ask(client: Client, request: Request, data: bytes) -> Reply:
    """Send a request with the descriptor of a file that has `data`."""
    memfd = os.memfd_create("test")
    try:
        os.write(memfd, data)
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memfd]))]
        await client.stream.socket.sendmsg([encode(request)], passed)
        return decode_reply(await client.line())
    finally:
        os.close(memfd)


@pytest.mark.usefixtures("as_other")
async def test_other_users_have_no_uploads(server: Server, autojump_clock: MockClock) -> None:
    object.__setattr__(server.control, "_allow_other", True)
    client = await server.connect()
    for request in REQUESTS:
        reply = await client.ask(request)
        assert isinstance(reply, Failed), request
        assert reply.code == AccessDenied.code


async def test_a_connection_begins_stages_and_commits_its_own_uploads(server: Server) -> None:
    await server.service.uploads.restore()
    first, second = await server.connect(), await server.connect()
    begun = await first.ask(BEGIN)
    assert isinstance(begun, UploadBegun)
    piece = StageFile(id=begun.id, path="file", size=4, offset=0, length=4)
    for request in (piece, CommitUpload(id=begun.id)):  # the server closes such a connection
        refused = await ask(await server.connect(), request, b"data")
        assert isinstance(refused, Failed)
        assert refused.code == ProtocolError.code
    assert isinstance(await ask(first, piece, b"data"), Done)
    with pytest.raises(Busy, match="1 upload is not"):
        server.service.lifetime.stop(force=False)
    assert isinstance(await first.ask(CommitUpload(id=begun.id)), UploadReply)
    await first.stream.aclose()
    found = await second.ask(AwaitUpload(id=begun.id))
    assert isinstance(found, UploadReply)
    assert (found.upload.state, found.upload.uri) == ("waiting", PLACE.uri)
    listed = await second.ask(ListUploads())
    assert isinstance(listed, UploadsReply)
    assert listed.uploads == [found.upload]
    status = server.service.reporter.status(os.geteuid())
    assert (status.uploads, status.uploads_left_out) == ([found.upload], 0)
    pending = await second.ask(FindUpload(location=PLACE))
    assert isinstance(pending, PendingUpload)
    assert pending == PendingUpload(server.service.uploads.spool.path_of(begun.id))
    assert Path(pending.path, "file").read_bytes() == b"data"
    stopped = await second.ask(Stop())
    assert isinstance(stopped, Failed)
    assert isinstance(await second.ask(DropUpload(id=begun.id)), Done)
    gone = await second.ask(AwaitUpload(id=begun.id))
    assert isinstance(gone, Failed)
    assert gone.code == NoUpload.code


async def test_a_local_target_of_another_container_is_refused(server: Server) -> None:
    client = await server.connect()
    request = BeginUpload(
        location=Location("local", "/mnt/run"),
        files=1,
        bytes=4,
        options=UploadOptions(),
        namespace="mnt:[1]",
    )
    reply = await client.ask(request)
    assert isinstance(reply, Failed)
    assert (reply.code, "wait=True" in reply.message) == (LocationError.code, True)
