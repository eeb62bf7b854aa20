"""The control socket answers requests, survives all lines, and holds attachments."""

import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from support.bench import PLACE, Client, Server, server_in
from support.fakes import MIB, FakeStore
from trio.testing import MockClock

from ckptfs._daemon.control import server as control_module
from ckptfs._daemon.control.commands import COMMANDS, ConnectionState
from ckptfs._daemon.control.named_stores import Peer
from ckptfs._model.location import Location
from ckptfs._model.protocol.message import LINE_BYTES_MAX
from ckptfs._model.protocol.replies import Attached, Done, Failed, Prefetching, StatusReply
from ckptfs._model.protocol.requests import (
    Attach,
    Detach,
    PrefetchProgress,
    Request,
    StartPrefetch,
    Status,
    Stop,
)
from ckptfs._model.protocol.wire import decode_reply, encode
from ckptfs.errors import AccessDenied, CheckpointNotFound


@pytest.fixture
async def server(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with server_in(tmp_path, tmp_path_factory.mktemp("s") / "s") as server:
        yield server


def test_commands_has_a_row_for_each_request() -> None:
    assert set(COMMANDS) == set(Request.__subclasses__())


async def test_attach_tells_where_and_what(server: Server, autojump_clock: MockClock) -> None:
    server.store(PLACE).overwrite("..", b"")
    reply = await (await server.connect()).ask(Attach(location=PLACE))
    assert isinstance(reply, Attached)
    attachment = server.service.attachments.find(os.geteuid(), reply.name, None)
    assert reply.mount == server.rig.config.mount
    assert reply.uri == PLACE.uri
    assert reply.version == attachment.manifest.version
    assert (reply.files, reply.size, reply.skipped) == (2, 8, 1)
    assert attachment.uid == os.geteuid()
    assert attachment.gid == os.getegid()


async def test_an_attachment_is_held_while_the_connection_is_open(
    server: Server, autojump_clock: MockClock
) -> None:
    first, second = await server.connect(), await server.connect()
    reply = await first.ask(Attach(location=PLACE))
    assert isinstance(reply, Attached)
    assert await first.ask(Attach(location=PLACE)) == reply
    assert await second.ask(Attach(location=PLACE)) == reply
    assert server.lists() == 1
    await first.stream.aclose()
    await trio.sleep(60)
    assert server.shown() == [reply.name]
    await second.stream.aclose()
    await trio.sleep(9)
    assert server.shown() == [reply.name]
    await trio.sleep(2)
    assert server.shown() == []


async def test_a_pinned_one_outlives_the_connection(
    server: Server, autojump_clock: MockClock
) -> None:
    client = await server.connect()
    reply = await client.ask(Attach(location=PLACE, pinned=True))
    assert isinstance(reply, Attached)
    await client.stream.aclose()
    await trio.sleep(1000)
    assert server.shown() == [reply.name]
    client = await server.connect()
    assert await client.ask(Detach(location=PLACE)) == Done()
    assert server.shown() == []


async def test_errors_are_replies_and_the_connection_goes_on(
    server: Server, autojump_clock: MockClock
) -> None:
    client = await server.connect()
    server.store(PLACE).fail("list", CheckpointNotFound("there is none"))
    assert await client.ask(Attach(location=PLACE)) == Failed(
        code="not-found", message="there is none"
    )
    reply = await client.ask(Detach(name="unknown"))
    assert isinstance(reply, Failed)
    assert reply.code == "not-attached"
    assert isinstance(await client.ask(Attach(location=PLACE)), Attached)


async def test_an_unexpected_error_says_nothing_and_does_not_end_the_server(
    server: Server,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = await server.connect()
    with monkeypatch.context() as patch:
        patch.setattr(server.service.reporter, "status", lambda uid, name: 1 / 0)
        reply = await client.ask(Status())
    assert isinstance(reply, Failed)
    assert reply.code == "error"
    assert "division" not in reply.message
    assert "ZeroDivisionError" in caplog.text
    assert isinstance(await client.ask(Status()), StatusReply)


async def test_detach_of_what_is_held_needs_force(
    server: Server, autojump_clock: MockClock
) -> None:
    client = await server.connect()
    attached = await client.ask(Attach(location=PLACE))
    assert isinstance(attached, Attached)
    other = await server.connect()
    reply = await other.ask(Detach(name=attached.name))
    assert isinstance(reply, Failed)
    assert reply.code == "busy"
    assert await other.ask(Detach(name=attached.name, force=True)) == Done()
    assert server.shown() == []
    await client.stream.aclose()
    await trio.sleep(100)


async def test_requests_may_come_all_at_once_or_byte_by_byte(
    server: Server, autojump_clock: MockClock
) -> None:
    client = await server.connect()
    await client.stream.send_all(
        encode(Status()) + encode(Attach(location=PLACE)) + encode(Status())
    )
    replies = [decode_reply(await client.line()) for _ in range(3)]
    assert [type(r) for r in replies] == [StatusReply, Attached, StatusReply]
    assert [len(r.attachments) for r in replies if isinstance(r, StatusReply)] == [0, 1]
    for byte in encode(Status()):
        await client.stream.send_all(bytes([byte]))
    assert isinstance(decode_reply(await client.line()), StatusReply)


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"not json\n",
        b"[]\n",
        b'{"op":"format-disk"}\n',
        b'{"op":"status","v":2}\n',
        b'{"op":"status","extra":1}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
        b'{"op":"attach","location":{"kind":"ftp","path":"x"}}\n',
    ],
    ids=lambda line: ascii(line[:30]),
)
async def test_a_line_that_is_no_request_ends_the_connection(
    server: Server, autojump_clock: MockClock, line: bytes
) -> None:
    client, other = await server.connect(), await server.connect()
    attached = await client.ask(Attach(location=PLACE))
    reply = await client.ask(line)
    assert isinstance(reply, Failed)
    assert reply.code == "protocol"
    assert await client.line() == b""
    await trio.sleep(11)
    assert server.shown() == []  # the end of the connection has released the attachment
    assert isinstance(attached, Attached)
    assert isinstance(await other.ask(Status()), StatusReply)


@pytest.mark.parametrize("excess", [1, 100, 1 << 20])
@pytest.mark.parametrize("end", [b"", b"\n"], ids=["open", "ended"])
async def test_a_line_that_is_too_long_ends_the_connection(
    server: Server, autojump_clock: MockClock, excess: int, end: bytes
) -> None:
    client = await server.connect()
    line = encode(Status()).rstrip().ljust(LINE_BYTES_MAX + excess) + end

    async def send() -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # it may close the connection
            await client.stream.send_all(line)

    server.rig.nursery.start_soon(send)
    reply = decode_reply(await client.line())
    assert isinstance(reply, Failed)
    assert reply.code == "protocol"
    assert str(LINE_BYTES_MAX) in reply.message


async def test_the_longest_line_is_taken(server: Server, autojump_clock: MockClock) -> None:
    client = await server.connect()
    line = encode(Status()).rstrip().ljust(LINE_BYTES_MAX) + b"\n"
    assert isinstance(await client.ask(line), StatusReply)


async def test_connections_are_limited(
    server: Server, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "_CONNECTIONS_MAX", 2)
    clients = [await server.connect() for _ in range(2)]
    for client in clients:
        await client.ask(Status())
    third = await server.connect()
    reply = decode_reply(await third.line())
    assert isinstance(reply, Failed)
    assert reply.code == "limit"
    assert await third.line() == b""
    await clients[0].stream.aclose()
    await trio.sleep(1)
    assert isinstance(await (await server.connect()).ask(Status()), StatusReply)


async def test_a_silent_connection_is_closed(server: Server, autojump_clock: MockClock) -> None:
    client = await server.connect()
    await client.ask(Attach(location=PLACE))
    await trio.sleep(119)
    assert isinstance(await client.ask(Status()), StatusReply)
    await trio.sleep(119)
    assert server.shown()
    assert await client.line() == b""
    await trio.sleep(11)
    assert server.shown() == []


async def test_a_client_that_leaves_in_the_middle_harms_nobody(
    server: Server, autojump_clock: MockClock
) -> None:
    server.offload.latency_s = {"control": 5.0}
    client = await server.connect()
    await client.stream.send_all(encode(Attach(location=PLACE)))
    await trio.sleep(1)
    await client.stream.aclose()
    client = await server.connect()
    await client.stream.send_all(encode(Attach(location=PLACE))[:-10])
    await client.stream.aclose()
    await trio.sleep(100)
    assert server.shown() == []
    assert isinstance(await (await server.connect()).ask(Status()), StatusReply)


# -- prefetch


async def prefetching(server: Server, globs: list[str], rate: int = 0) -> Client:
    """A connection with a prefetch of a place that another connection has attached."""
    server.stores[PLACE.path] = FakeStore({"a": bytes(20 * MIB), "b": b"12345"})
    other, client = await server.connect(), await server.connect()
    attached = await other.ask(Attach(location=PLACE))
    assert isinstance(attached, Attached)
    reply = await client.ask(StartPrefetch(name=attached.name, globs=globs, rate=rate))
    assert isinstance(reply, Prefetching)
    assert not reply.ended
    await other.stream.aclose()
    return client


async def test_a_prefetch_says_how_far_it_is(server: Server, autojump_clock: MockClock) -> None:
    client = await prefetching(server, ["*"], 2 * MIB)
    seen: list[Prefetching] = []
    while not seen or not seen[-1].ended:
        asked_s = trio.current_time()
        reply = await client.ask(PrefetchProgress())
        assert trio.current_time() - asked_s < 0.3
        assert isinstance(reply, Prefetching)
        seen.append(reply)
    assert len(seen) >= 40  # the prefetch took ten seconds
    assert [reply.fetched for reply in seen] == sorted(reply.fetched for reply in seen)
    assert (seen[-1].files, seen[-1].bytes, seen[-1].fetched) == (2, *[20 * MIB + 5] * 2)
    assert await client.ask(PrefetchProgress()) == seen[-1]
    [name] = server.shown()
    again = await client.ask(StartPrefetch(name=name, globs=["b"]))
    assert isinstance(again, Prefetching)
    done = await client.ask(PrefetchProgress())
    assert isinstance(done, Prefetching)
    assert (done.ended, done.cached, done.fetched) == (True, 5, 0)


async def test_a_prefetch_ends_with_its_connection(
    server: Server, autojump_clock: MockClock
) -> None:
    client = await prefetching(server, ["*"], 1 * MIB)
    await trio.sleep(5)
    [name] = server.shown()  # only the prefetch's connection holds it
    [attachment] = [server.service.attachments.find(os.geteuid(), name, None)]
    assert attachment.background
    begun = len(server.store(PLACE).reads())
    await client.stream.aclose()
    await trio.sleep(1)
    assert not attachment.background
    await trio.sleep(100)
    assert len(server.store(PLACE).reads()) <= begun + 1
    assert server.shown() == []


async def test_one_prefetch_per_connection(server: Server, autojump_clock: MockClock) -> None:
    client = await prefetching(server, ["*"], 1 * MIB)
    [name] = server.shown()
    reply = await client.ask(StartPrefetch(name=name, globs=["b"]))
    assert isinstance(reply, Failed)
    assert reply.code == "busy"
    assert isinstance(await client.ask(PrefetchProgress()), Prefetching)
    other = await server.connect()
    reply = await other.ask(StartPrefetch(name="unknown", globs=["*"]))
    assert isinstance(reply, Failed)
    assert reply.code == "not-attached"
    reply = await other.ask(PrefetchProgress())
    assert isinstance(reply, Failed)
    assert reply.code == "protocol"
    assert await other.line() == b""


async def test_a_prefetch_ends_with_its_attachment(
    server: Server, autojump_clock: MockClock
) -> None:
    client = await prefetching(server, ["*"], 1 * MIB)
    [name] = server.shown()
    other = await server.connect()
    assert await other.ask(Detach(name=name, force=True)) == Done()
    reply = await client.ask(PrefetchProgress())
    assert isinstance(reply, Prefetching)
    assert (reply.ended, reply.early_code) == (True, "not-attached")


async def test_nobody_prefetches_what_another_user_attached(
    server: Server, autojump_clock: MockClock
) -> None:
    await server.service.attaching.attach(PLACE, 4242, 4242, pinned=True)
    request = encode(StartPrefetch(name=server.shown()[0], globs=["*"]))
    reply = await server.control._answer(request, ConnectionState(Peer(4243, 4243)))
    assert isinstance(reply, Failed)
    assert reply.code == "not-attached"


async def test_stop_is_answered(server: Server, autojump_clock: MockClock) -> None:
    client = await server.connect()
    reply = await client.ask(Attach(location=PLACE))
    assert isinstance(reply, Attached)
    attachment = server.service.attachments.find(os.geteuid(), reply.name, None)
    handle = server.service.vfs.opendir(attachment.snapshot.tree.root.inode, 1)
    refused = await client.ask(Stop())
    assert isinstance(refused, Failed)
    assert refused.code == "busy"
    server.service.vfs.release(handle)
    assert await client.ask(Stop()) == Done()
    assert server.service.lifetime.stopped.is_set()


async def test_other_users_are_served_only_if_configured(
    server: Server, autojump_clock: MockClock
) -> None:
    stranger = os.geteuid() + 4242
    server.control._admit(os.geteuid(), 1)
    server.control._admit(0, 1)
    with pytest.raises(AccessDenied, match="allow_other"):
        server.control._admit(stranger, 1)
    server.control._allow_other = True
    server.control._admit(stranger, 1)
    reply = await server.control._answer(
        encode(Stop(force=True)), ConnectionState(Peer(stranger, stranger))
    )
    assert isinstance(reply, Failed)
    assert reply.code == "access-denied"
    assert not server.service.lifetime.stopped.is_set()


async def test_secrets_come_back_in_no_reply(server: Server, autojump_clock: MockClock) -> None:
    client = await server.connect()
    await client.stream.send_all(encode(Attach(location=PLACE)) + encode(Status()))
    lines = [await client.line(), await client.line()]
    broken = json.loads(encode(Attach(location=PLACE)))
    broken["location"]["secrets"]["secret_key"] = ["S3CR3T"]
    await client.stream.send_all(json.dumps(broken).encode() + b"\n")
    lines.append(await client.line())
    assert not any(b"S3CR3T" in line for line in lines)
    assert isinstance(decode_reply(lines[2]), Failed)
    assert Location(PLACE.kind, PLACE.path).digest.encode() in lines[0]
