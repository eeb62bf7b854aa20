"""The control socket against hostile clients: slow, deaf, many, greedy, and random ones.

The clients run in the test's process. Some tests treat them as one of the other users.
"""

import array
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bench import ELSEWHERE, PLACE, SETTINGS, Client, Server, server_in
from support.fakes import MIB, FakeStore, InlineOffload
from support.rig import rig_in
from trio.testing import MockClock

from ckptfs._daemon import quotas as users_module
from ckptfs._daemon.control import commands as commands_module
from ckptfs._daemon.control import permissions as limits_module
from ckptfs._daemon.control import server as control_module
from ckptfs._model.location import Location
from ckptfs._model.plans.plan import Wanted
from ckptfs._model.protocol.message import LINE_BYTES_MAX
from ckptfs._model.protocol.replies import Attached, Failed, StatusReply
from ckptfs._model.protocol.requests import (
    Attach,
    Detach,
    MetadataChanged,
    PrefetchProgress,
    Request,
    StartPrefetch,
    Status,
)
from ckptfs._model.protocol.wire import decode_reply, encode
from ckptfs.errors import LimitExceeded

OTHER = os.geteuid() + 4242


@pytest.fixture
async def server(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with server_in(tmp_path, tmp_path_factory.mktemp("s") / "s") as server:
        yield server


async def refusal(client: Client) -> Failed:
    """The error with which the daemon closes the connection."""
    reply = decode_reply(await client.line())
    assert isinstance(reply, Failed)
    assert await client.line() == b""
    return reply


async def is_well(server: Server) -> StatusReply:
    """Check that the daemon serves a new client."""
    client = await server.connect()
    reply = await client.ask(Status())
    assert isinstance(reply, StatusReply)
    await client.stream.aclose()
    return reply


# -- time


async def test_a_message_that_comes_byte_by_byte_is_not_waited_for(
    server: Server, autojump_clock: MockClock
) -> None:
    client = await server.connect()
    with suppress(trio.BrokenResourceError):
        for byte in encode(Status()):
            await client.stream.send_all(bytes([byte]))
            await trio.sleep(9.9)
    reply = await refusal(client)
    assert (reply.code, "10 s" in reply.message) == ("protocol", True)
    await is_well(server)


async def test_who_takes_no_replies_is_hung_up_on(
    server: Server, autojump_clock: MockClock
) -> None:
    client = await server.connect()
    attached = await client.ask(Attach(location=PLACE))
    assert isinstance(attached, Attached)

    async def ask_on() -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                await client.stream.send_all(encode(Status()) * 100)

    server.rig.nursery.start_soon(ask_on)
    await trio.sleep(29)
    assert server.shown() == [attached.name]
    await trio.sleep(120)
    assert server.shown() == []  # the end of the connection has released the attachment
    await is_well(server)


async def test_who_only_writes_no_more_gets_the_replies(
    server: Server, autojump_clock: MockClock
) -> None:
    client = await server.connect()
    await client.stream.send_all(encode(Attach(location=PLACE)) + encode(Status()))
    client.stream.socket.shutdown(socket.SHUT_WR)
    assert isinstance(decode_reply(await client.line()), Attached)
    assert isinstance(decode_reply(await client.line()), StatusReply)
    assert await client.line() == b""


async def test_descriptors_that_are_passed_along_are_not_taken(
    server: Server, autojump_clock: MockClock
) -> None:
    client = await server.connect()
    await client.ask(Status())
    ours, theirs = os.pipe()
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs] * 100))]
    await client.stream.socket.sendmsg([encode(Status())], passed)
    os.close(theirs)
    assert isinstance(decode_reply(await client.line()), StatusReply)
    assert os.read(ours, 1) == b""  # no process has the other end
    os.close(ours)


# -- limits


async def test_one_user_has_a_quarter_of_the_connections(
    server: Server,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    as_other: None,
) -> None:
    monkeypatch.setattr(control_module, "_CONNECTIONS_MAX", 8)
    server.control._allow_other = True
    for client in [await server.connect() for _ in range(2)]:
        assert isinstance(await client.ask(Status()), StatusReply)
    reply = await refusal(await server.connect())
    assert (reply.code, "2 control connections" in reply.message) == ("limit", True)
    server.control._admit(OTHER, 1)  # other users may still connect
    await server.clients[0].stream.aclose()
    await trio.sleep(1)
    await is_well(server)


async def test_requests_of_one_of_the_other_users_are_paced(
    server: Server, autojump_clock: MockClock, as_other: None
) -> None:
    server.control._allow_other = True
    begun_s = trio.current_time()
    request = encode(Detach(name="x"))

    async def ask(client: Client) -> None:
        for _ in range(500):
            await client.ask(request)

    async with trio.open_nursery() as nursery:
        for _ in range(6):  # the limit holds for all connections of a user
            nursery.start_soon(ask, await server.connect())
    assert 1.9 < trio.current_time() - begun_s < 2.1  # 3,000 requests, of which 1,000 at once


async def test_requests_of_ours_are_not_paced(server: Server, autojump_clock: MockClock) -> None:
    begun_s = trio.current_time()
    client = await server.connect()
    for _ in range(3000):
        await client.ask(b'{"op":"detach","name":"x"}\n')
    assert trio.current_time() == begun_s


async def test_one_user_attaches_a_quarter(tmp_path: Path, autojump_clock: MockClock) -> None:
    places = [Location("s3", f"bucket/{i}", {"anonymous": True}) for i in range(9)]
    async with server_in(tmp_path, tmp_path / "s", attachments_max=8) as server:
        for place in places[:2]:
            await server.attach(place, OTHER)
        with pytest.raises(LimitExceeded, match=r"2 checkpoints.*attachments_max allows for one"):
            await server.attach(places[2], OTHER)
        assert await server.attach(places[0], OTHER)  # the place is attached already
        for place in places[:6]:
            await server.attach(place)
        with pytest.raises(LimitExceeded, match=r"8 checkpoints.*attachments_max allows;"):
            await server.attach(places[6])


async def test_files_of_all_attachments_are_limited(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    places = [Location("s3", f"bucket/{i}", {"anonymous": True}) for i in range(9)]
    more = {"attached_files_max": 8, "attachments_max": 100}  # each checkpoint has two files
    async with server_in(tmp_path, tmp_path / "s", **more) as server:
        await server.attach(places[0], OTHER)
        with pytest.raises(LimitExceeded, match="attached_files_max allows for one user"):
            await server.attach(places[1], OTHER)
        for place in places[:3]:
            await server.attach(place)
        with pytest.raises(LimitExceeded, match="attached_files_max allows;"):
            await server.attach(places[3])
        assert len(server.shown()) == 4


async def test_one_user_has_a_quarter_of_the_prefetches(
    server: Server, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.service.prefetches._quota, "_running_max", 4)
    server.stores[PLACE.path] = FakeStore({"a": bytes(20 * MIB)})
    theirs, ours = await server.attach(uid=OTHER), await server.attach()
    running = server.service.prefetches.begin(theirs, Wanted(["*"], MIB))
    with pytest.raises(LimitExceeded, match="1 prefetches"):
        server.service.prefetches.begin(theirs, Wanted(["*"]))
    for _ in range(3):
        server.service.prefetches.begin(ours, Wanted(["*"], MIB))
    with pytest.raises(LimitExceeded, match="4 prefetches"):
        server.service.prefetches.begin(ours, Wanted(["*"]))
    running.cancel()
    await running.ended.wait()
    await trio.sleep(0.1)
    assert server.service.prefetches.begin(theirs, Wanted(["*"]))


async def test_too_many_globs_are_said_to_be_too_many(
    server: Server, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptfs._daemon.attachment.prefetch._COMPARISONS_MAX", 4)
    attachment = await server.attach()
    prefetch = server.service.prefetches.begin(attachment, Wanted(["*a", "*b", "*c"]))
    await prefetch.ended.wait()
    assert (prefetch.state().early_code, prefetch.state().files) == ("limit", 0)
    prefetch = server.service.prefetches.begin(attachment, Wanted(["a/b", "*c", "none"] * 2))
    await prefetch.ended.wait()
    assert (prefetch.state().early_code, prefetch.state().files) == ("", 2)


class Threads(InlineOffload):
    """Counts simultaneous calls to stores, each of which takes a second."""

    under_way = most = 0

    async def run(self, kind: str, call: Callable[[], Any]) -> Any:
        if kind != "control":
            return await super().run(kind, call)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await trio.sleep(1)
        self.under_way -= 1
        return call()


async def test_one_users_dark_stores_leave_threads_to_others(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    places = [Location("s3", f"bucket/{i}", {"anonymous": True}) for i in range(40)]
    threads = Threads()
    async with rig_in(tmp_path, threads, **(SETTINGS | {"attachments_max": 1000})) as rig:
        server = Server(rig)
        async with trio.open_nursery() as nursery:
            for place in places:
                nursery.start_soon(server.attach, place, OTHER)
        assert threads.most == 8
        with trio.move_on_after(0.5):  # cancelled before the call begins
            await server.attach(Location("s3", "bucket/x", {"anonymous": True}), OTHER)
        assert not server.service.attaching.store_calls._under_way


# -- single messages


@pytest.mark.parametrize(
    "change",
    [
        {"location": {"kind": "s3", "path": "x" * 8193}},
        {"location": {"kind": "s3", "path": "x", "options": {str(i): 1 for i in range(33)}}},
        {"location": {"kind": "s3", "path": "x", "options": {"x" * 65: 1}}},
        {"location": {"kind": "s3", "path": "x", "options": {"region": "x" * 16_385}}},
        {"location": {"kind": "s3", "path": "x", "secrets": {"access_key": "x" * 16_385}}},
        {"location": {"kind": "s3", "path": "x", "options": {"region": [1]}}},
        {"location": {"kind": "s3", "path": "x", "options": {"region": {}}}},
        {"prefetch": ["x"] * 10_001},
        {"prefetch": ["x" * 4097]},
        {"prefetch": None},
        {"pinned": 1},
        {"v": 0},
        {"v": 10**400},
        {"uid": 0},
    ],
    ids=lambda change: ascii(change)[:50],
)
async def test_what_is_too_large_or_unknown_is_refused(
    server: Server, autojump_clock: MockClock, change: dict[str, Any]
) -> None:
    line = json.loads(encode(Attach(location=PLACE))) | change
    client = await server.connect()
    await client.stream.send_all(json.dumps(line).encode() + b"\n")
    assert (await refusal(client)).code == "protocol"
    assert not server.opened


@pytest.mark.parametrize(
    "line",
    [
        b'{"op":"attach","location":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b'{"op":"status","x":' + b"[" * 500_000,
        b'{"op":"prefetch","name":"x","globs":["*"],"rate":' + b"9" * 100_000 + b"}",
        b'{"op":"prefetch","name":"x","globs":["*"],"rate":1e999}',
        b'{"op":"prefetch","name":"x","globs":["*"],"rate":-1}',
        b'{"op":"prefetch","name":"x","globs":["*"],"rate":NaN}',
        b'{"op":"detach","name":"\xff\xfe"}',
        b'{"op":"detach","name":"\\ud800"}',
        b'{"op":"status"}{"op":"status"}',
        b'{"op":"status","op":"stop","force":tru}',
        b"\0" * 1000,
        b"\xef\xbb\xbf" + b'{"op":"status"}',
    ],
    ids=lambda line: ascii(line[:50]),
)
async def test_hostile_json_is_refused(
    server: Server, autojump_clock: MockClock, line: bytes
) -> None:
    client = await server.connect()
    await client.stream.send_all(line + b"\n")
    assert (await refusal(client)).code == "protocol"
    assert not server.service.lifetime.stopped.is_set()
    await is_well(server)


# -- at random

REQUESTS: list[Request] = [
    Attach(location=PLACE, prefetch=["*"]),
    Attach(location=PLACE, pinned=True),
    Attach(location=ELSEWHERE),
    Detach(name=f"{PLACE.name}-{PLACE.digest}"),
    Detach(location=PLACE, force=True),
    Detach(location=ELSEWHERE),
    Status(),
    MetadataChanged(location=PLACE),
    StartPrefetch(name=f"{PLACE.name}-{PLACE.digest}", globs=["*", "["], rate=1000),
    PrefetchProgress(),
]
JUNK: list[Any] = [
    None,
    True,
    -1,
    2**63,
    10**30,
    1e300,
    "",
    "\0",
    "x" * 5000,
    [],
    [[[]]],
    {},
    {"": 0},
]
FIELDS = ["op", "v", "location", "name", "force", "globs", "rate", "prefetch", "pinned", "new"]
VALID = st.sampled_from(REQUESTS).map(encode)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid message with one change in its JSON or in its bytes."""
    line = draw(VALID)
    how = draw(st.sampled_from(["field", "drop", "twice", "location", "bytes", "cut", "spaces"]))
    fields = json.loads(line)
    if how == "field":
        fields[draw(st.sampled_from(FIELDS))] = draw(st.sampled_from(JUNK))
    elif how == "drop":
        fields.pop(draw(st.sampled_from(sorted(fields))))
    elif how == "location" and fields.get("location"):
        part = draw(st.sampled_from(["kind", "path", "options", "secrets", "new"]))
        fields["location"][part] = draw(st.sampled_from([*JUNK, "gcs", "local", "private", "../x"]))
    elif how == "twice":
        return line.replace(b'"v":1', b'"v":1,"v":1,"force":false,"force":true')
    elif how == "bytes":
        at = draw(st.integers(0, len(line) - 1))
        return line[:at] + draw(st.binary(max_size=3)) + line[at + 1 :]
    elif how == "cut":
        return line[: draw(st.integers(0, len(line)))]
    elif how == "spaces":
        return b" " * draw(st.sampled_from([1, 70_000, LINE_BYTES_MAX])) + line
    return json.dumps(fields).encode() + b"\n"


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),  # which connection
        st.sampled_from(["send", "send", "send", "shut", "close", "wait"]),
        st.one_of(VALID, mutated()),
        st.sampled_from([0.0, 0.1, 5.0, 30.0]),
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(STEPS, st.booleans())
def test_whatever_clients_do_the_daemon_goes_on(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[int, str, bytes, float]],
    is_other: bool,
) -> None:
    folder = tmp_path_factory.mktemp("f")

    async def drain(client: Client) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while line := await client.line():
                decode_reply(line)

    async def main() -> None:
        async with server_in(folder, folder / "s") as server:
            server.control._allow_other = True
            clients: dict[int, Client] = {}
            for which, action, message, pause_s in steps:
                if which not in clients:
                    clients[which] = await server.connect()
                    server.rig.nursery.start_soon(drain, clients[which])
                client = clients[which]
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                    if action == "send":
                        with trio.move_on_after(100):
                            await client.stream.send_all(message)
                    elif action == "shut":
                        client.stream.socket.shutdown(socket.SHUT_WR)
                    elif action == "close":
                        await clients.pop(which).stream.aclose()
                await trio.sleep(pause_s)
            await is_well(server)
            attachments = server.service.reporter.status(0).attachments
            assert {a.name for a in attachments} == set(server.shown())
            for client in server.clients:
                await client.stream.aclose()
            await trio.sleep(1000)
            left = (await is_well(server)).attachments
            assert all(a.pinned and not a.holders for a in left)
            await trio.sleep(1000)
            service, control = server.service, server.control
            assert (service.lifetime._clients, control._connections, control._users) == (0, 0, {})
            assert not service.attaching._locks
            assert not service.attaching.store_calls._under_way
            assert not service.attaching._outages
            assert not service.prefetches._quota._running
            assert all(not a.leases.clients for a in service.attachments)
            assert not service.lifetime.stopped.is_set()

    with pytest.MonkeyPatch.context() as patch:
        if is_other:
            for module in (control_module, commands_module, limits_module, users_module):
                patch.setattr(module, "is_ours", lambda uid: False)
        clock = MockClock(autojump_threshold=0)
        trio.run(main, clock=clock)
