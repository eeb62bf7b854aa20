"""Blocks that one daemon gives and another takes: whole, verified, once, for root only."""

import array
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.lowlevel
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bench import PLACE, Client, Server, server_in
from support.fakes import MIB, FakeStore, pattern

from ckptfs._daemon.attachment.attachment import new_attachment
from ckptfs._model.protocol.replies import (
    Attached,
    Done,
    Failed,
    Found,
    Given,
    Reply,
    StatusReply,
    Taken,
)
from ckptfs._model.protocol.requests import (
    PIECE_BLOCKS_MAX,
    Attach,
    BorrowMemory,
    Detach,
    FindBlocks,
    GiveBlocks,
    Request,
    SaveBlocks,
    Status,
    TakeBlocks,
)
from ckptfs._model.protocol.wire import decode_reply, encode

DATA = pattern(5 * MIB + 7)
FILES = {"a/b": DATA, "small": b"abc", "empty": b"", ".metadata.json": b"{}"}


class Node:
    """A daemon, and a client of it that has attached the checkpoint."""

    def __init__(self, server: Server, client: Client, name: str) -> None:
        self.server = server
        self.client = client
        self.name = name

    async def ask(self, request: Request, *fds: int) -> Reply:
        """Send a request with descriptors, and return its reply."""
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = await self.client.stream.socket.sendmsg([encode(request)], passed)
        assert sent == len(encode(request))
        return decode_reply(await self.client.line())

    async def give(
        self, memfd: int, first: int, count: int, path: str = "a/b", at: int = 0
    ) -> Reply:
        request = GiveBlocks(name=self.name, path=path, first=first, count=count, at=at)
        return await self.ask(request, memfd)

    async def take(
        self, memfd: int, first: int, given: Reply, path: str = "a/b", at: int = 0
    ) -> Reply:
        assert isinstance(given, Given)
        etag, sums = given.etag, given.sums
        request = TakeBlocks(name=self.name, path=path, first=first, etag=etag, sums=sums, at=at)
        return await self.ask(request, memfd)

    async def borrow(self) -> int:
        """Borrow memory of the daemon. Returns its descriptor, which the daemon's end closes."""
        sock = self.client.stream.socket
        await self.client.stream.send_all(encode(BorrowMemory()))
        data, ancillary, _, _ = await sock.recvmsg(1000, socket.CMSG_SPACE(4))
        assert decode_reply(data) == Done()
        [(_, _, content)] = ancillary
        return array.array("i", content)[0]

    async def save(self, data: bytes, etag: str) -> Reply:
        """Have the daemon save the first blocks of a file, from borrowed memory."""
        other = Node(self.server, await self.server.connect(), self.name)
        lent = await other.borrow()
        try:
            os.pwrite(lent, data, 0)
            count = -(-len(data) // MIB)
            request = SaveBlocks(name=self.name, path="a/b", first=0, count=count, etag=etag)
            return await other.ask(request)
        finally:
            os.close(lent)
            await other.client.stream.aclose()

    async def quiet(self) -> None:
        """Wait until nothing is in flight."""
        with trio.fail_after(10):
            while self.server.rig.fetcher.scheduler.in_flight().bytes:  # noqa: ASYNC110 - of threads
                await trio.sleep(0.002)

    async def read(self, path: str = "a/b") -> bytes:
        """The whole content of a file, through the cache."""
        rig, attachment = self.server.rig, next(iter(self.server.service.attachments))
        index = [file.path for file in attachment.snapshot.listed].index(path)
        file = attachment.file(index)
        with rig.fetcher.opened(file):
            return await rig.read(file, 0, file.pin.size)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore(FILES)


@pytest.fixture
async def nodes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, store: FakeStore
) -> AsyncIterator[list[Node]]:
    """Two nodes that have attached the same checkpoint."""
    async with AsyncExitStack() as stack:
        nodes: list[Node] = []
        for name in "ab":
            (tmp_path / name).mkdir()
            sock = tmp_path_factory.mktemp("s") / "s"
            server = await stack.enter_async_context(server_in(tmp_path / name, sock))
            server.stores[PLACE.path] = store
            client = await server.connect()
            attached = await client.ask(Attach(location=PLACE))
            assert isinstance(attached, Attached)
            nodes.append(Node(server, client, attached.name))
        yield nodes


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("blocks")
    os.truncate(fd, 8 * MIB)
    yield fd
    os.close(fd)


async def test_exchange_between_two_nodes_reads_the_store_once(
    nodes: list[Node], store: FakeStore, memfd: int
) -> None:
    giver, taker = nodes
    given = await giver.give(memfd, 1, 5, at=100)
    assert os.pread(memfd, 5 * MIB, 100)[: len(DATA) - MIB] == DATA[MIB:]
    assert await taker.take(memfd, 1, given, at=100) == Taken(taken=4 * MIB + 7, had=0)
    assert await taker.take(memfd, 1, given, at=100) == Taken(taken=0, had=4 * MIB + 7)
    reads = len(store.reads("a/b"))
    assert await taker.read() == DATA
    fetched = store.reads("a/b")[reads:]
    assert [(call.offset, call.length) for call in fetched] == [(0, MIB)]
    status = await taker.ask(Status())
    assert isinstance(status, StatusReply)
    assert (status.fetched_bytes, status.taken_bytes, status.given_bytes) == (MIB, 4 * MIB + 7, 0)
    status = await giver.ask(Status())
    assert isinstance(status, StatusReply)
    assert (status.fetched_bytes, status.taken_bytes) == (4 * MIB + 7, 0)
    assert status.given_bytes == 4 * MIB + 7
    await taker.quiet()


async def test_exchange_saves_uploaded_blocks_without_a_read_of_the_store(
    nodes: list[Node], store: FakeStore, memfd: int
) -> None:
    giver, node = nodes
    given = await giver.give(memfd, 0, 1)
    assert isinstance(given, Given)
    reads = len(store.reads())
    assert await node.save(DATA, given.etag) == Taken(taken=len(DATA), had=0)
    assert await node.save(DATA, given.etag) == Taken(taken=0, had=len(DATA))
    await node.quiet()
    assert await node.read() == DATA
    assert len(store.reads()) == reads
    status = await node.ask(Status())
    assert isinstance(status, StatusReply)
    assert (status.fetched_bytes, status.taken_bytes) == (0, len(DATA))


async def test_exchange_saves_no_blocks_of_another_version(
    nodes: list[Node], store: FakeStore
) -> None:
    node = nodes[0]
    refused = await node.save(DATA[::-1], '"uploaded before"')
    assert isinstance(refused, Failed)
    assert refused.code == "object-changed"
    assert await node.read() == DATA
    await node.quiet()


async def test_lent_memory_keeps_its_size_and_ends_with_the_connection(nodes: list[Node]) -> None:
    node = nodes[0]
    before = len(os.listdir("/proc/self/fd"))
    lent = await node.borrow()
    assert os.fstat(lent).st_size == PIECE_BLOCKS_MAX * MIB
    for size in (0, PIECE_BLOCKS_MAX * MIB + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(lent, size)
    os.close(lent)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    await node.client.stream.aclose()
    with trio.fail_after(10):
        while len(os.listdir("/proc/self/fd")) > before - 2:  # noqa: ASYNC110 - of the server
            await trio.sleep(0.002)


async def test_a_connection_borrows_memory_once(nodes: list[Node]) -> None:
    lent = await nodes[0].borrow()
    os.close(lent)
    again = await nodes[0].ask(BorrowMemory())
    assert isinstance(again, Failed)
    assert again.code == "protocol"


async def test_exchange_saves_nothing_without_lent_memory(nodes: list[Node]) -> None:
    request = SaveBlocks(name=nodes[0].name, path="a/b", first=0, count=1, etag="x")
    refused = await nodes[0].ask(request)
    assert isinstance(refused, Failed)
    assert (refused.code, await nodes[0].client.line()) == ("protocol", b"")


async def test_exchange_taken_blocks_outlive_the_daemon(
    nodes: list[Node], store: FakeStore, memfd: int
) -> None:
    giver, taker = nodes
    await taker.take(memfd, 0, await giver.give(memfd, 0, 6))
    attachment = next(iter(taker.server.service.attachments))
    assert attachment.cached_bytes(taker.server.rig.cache) == len(DATA)


@pytest.mark.parametrize("what", ["bytes", "order", "sums", "cut"])
async def test_exchange_of_damaged_blocks_refuses_and_fetches_them(
    nodes: list[Node], store: FakeStore, memfd: int, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    giver, taker = nodes
    given = await giver.give(memfd, 0, 6)
    assert isinstance(given, Given)
    if what == "bytes":
        os.pwrite(memfd, bytes([DATA[MIB + 5] ^ 1]), MIB + 5)
    elif what == "order":
        os.pwrite(memfd, DATA[2 * MIB : 3 * MIB], MIB)
    elif what == "sums":
        given = msgspec.structs.replace(given, sums=given.sums[::-1])
    else:
        os.ftruncate(memfd, MIB)
    refused = await taker.take(memfd, 0, given)
    assert isinstance(refused, Failed)
    if what == "cut":
        assert (refused.code, await taker.client.line()) == ("protocol", b"")
    else:
        assert refused.code == "store"
        assert "damaged or of another version" in refused.message
        assert caplog.messages == [refused.message]
    caplog.clear()
    before = len(store.reads())
    assert await taker.read() == DATA
    assert sum(call.length for call in store.reads()[before:]) == len(DATA)
    attachment = next(iter(taker.server.service.attachments))
    assert attachment.error == ""
    assert attachment.activity.background.taken_bytes == 0
    await taker.quiet()


async def test_exchange_of_another_version_is_refused(
    nodes: list[Node], store: FakeStore, memfd: int, tmp_path: Path
) -> None:
    giver, taker = nodes
    given = await giver.give(memfd, 0, 6)
    # Same size and time: only the ETag tells them apart.
    store.overwrite("a/b", pattern(len(DATA), 1), mtime_ns=store.pin("a/b").mtime_ns)
    refused = await taker.take(memfd, 0, given)
    assert isinstance(refused, Failed)
    assert refused.code == "object-changed"
    assert await taker.read() == pattern(len(DATA), 1)


async def test_exchange_of_a_changed_object_is_refused(
    nodes: list[Node], store: FakeStore, memfd: int
) -> None:
    giver, taker = nodes
    given = await giver.give(memfd, 0, 2)
    await taker.take(memfd, 0, given)
    store.overwrite("a/b", pattern(len(DATA), 1))
    failed = await giver.give(memfd, 0, 6)
    assert isinstance(failed, Failed)
    assert failed.code == "object-changed"
    assert isinstance(await giver.give(memfd, 0, 2), Given)  # the cache has them


async def taken_beside_a_reader(taker: Node, memfd: int, given: Reply) -> Reply:
    """The answer to `take` during a read of these blocks, which gets the right bytes."""
    taker.server.offload.latency_s["data"] = 0.2
    read: list[bytes] = []

    async def reader() -> None:
        while not next(iter(taker.server.service.attachments)).activity.in_flight:
            await trio.lowlevel.checkpoint()
        read.append(await taker.read())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        reply = await taker.take(memfd, 0, given)
    assert read == [DATA]
    return reply


async def test_exchange_in_progress_lets_a_reader_wait(
    nodes: list[Node], store: FakeStore, memfd: int
) -> None:
    giver, taker = nodes
    given = await giver.give(memfd, 0, 6)
    before = len(store.reads())
    assert isinstance(await taken_beside_a_reader(taker, memfd, given), Taken)
    assert len(store.reads()) == before


async def test_exchange_of_damaged_blocks_lets_a_waiting_reader_fetch_them(
    nodes: list[Node], store: FakeStore, memfd: int
) -> None:
    giver, taker = nodes
    given = await giver.give(memfd, 0, 6)
    os.pwrite(memfd, bytes(MIB), 0)
    assert isinstance(await taken_beside_a_reader(taker, memfd, given), Failed)


async def test_exchange_beyond_the_cache_capacity_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, memfd: int
) -> None:
    sock = tmp_path_factory.mktemp("s") / "s"
    async with server_in(tmp_path, sock, cache_bytes_max=4 * MIB) as server:
        server.stores[PLACE.path] = FakeStore(FILES)
        client = await server.connect()
        attached = await client.ask(Attach(location=PLACE))
        assert isinstance(attached, Attached)
        node = Node(server, client, attached.name)
        given = await node.give(memfd, 0, 6)
        refused = await node.take(memfd, 0, given)
        assert isinstance(refused, Failed)
        assert refused.code == "limit"
        assert isinstance(await node.take(memfd, 0, await node.give(memfd, 0, 2)), Taken)


async def test_exchange_finds_the_blocks_that_are_there(
    nodes: list[Node], memfd: int, store: FakeStore
) -> None:
    async def found(node: Node, path: str = "a/b") -> Reply:
        return await node.ask(FindBlocks(name=node.name, path=path))

    node = nodes[0]
    assert await found(node) == Found(runs=[])
    given = await node.give(memfd, 1, 2)
    assert isinstance(given, Given)
    assert given.fetched == 2 * MIB
    await node.give(memfd, 5, 1)
    assert await found(node) == Found(runs=[(1, 2), (5, 1)])
    given = await node.give(memfd, 0, 6)
    assert isinstance(given, Given)
    assert given.fetched == 3 * MIB
    assert await found(node) == Found(runs=[(0, 6)])
    assert await found(node, "empty") == Found(runs=[])
    assert await found(nodes[1]) == Found(runs=[])
    failed = await found(node, ".metadata.json")
    assert isinstance(failed, Failed)
    assert failed.code == "not-attached"


async def test_exchange_finds_no_blocks_of_another_version(
    nodes: list[Node], memfd: int, store: FakeStore
) -> None:
    node, mtime_ns = nodes[0], time.time_ns() - 10 * 10**9

    async def attach_another_version(seed: int) -> None:
        """Same size and time: only the ETag tells them apart."""
        assert isinstance(await node.client.ask(Detach(name=node.name, force=True)), Done)
        store.overwrite("a/b", pattern(len(DATA), seed), mtime_ns=mtime_ns)
        attached = await node.client.ask(Attach(location=PLACE))
        assert isinstance(attached, Attached)
        node.name = attached.name

    await attach_another_version(1)
    await node.give(memfd, 0, 6)
    await node.quiet()
    find = FindBlocks(name=node.name, path="a/b")
    assert await node.ask(find) == Found(runs=[(0, 6)])
    await attach_another_version(2)
    assert await node.ask(find) == Found(runs=[])


async def test_exchange_by_other_users_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, memfd: int, as_other: None
) -> None:
    sock = tmp_path_factory.mktemp("s") / "s"
    async with server_in(tmp_path, sock, allow_other=True) as server:
        server.stores[PLACE.path] = FakeStore(FILES)
        client = await server.connect()
        attached = await client.ask(Attach(location=PLACE))
        assert isinstance(attached, Attached)
        node = Node(server, client, attached.name)
        before = len(os.listdir("/proc/self/fd"))
        for request in (
            FindBlocks(name=node.name, path="a/b"),
            GiveBlocks(name=node.name, path="a/b", first=0, count=1),
            TakeBlocks(name=node.name, path="a/b", first=0, etag="", sums=[1]),
        ):
            refused = await node.ask(request, memfd)
            assert isinstance(refused, Failed)
            assert refused.code == "access-denied", refused
        assert len(os.listdir("/proc/self/fd")) == before


async def test_exchange_saves_blocks_of_another_user_for_that_user_only(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    as_other: None,
) -> None:
    sock = tmp_path_factory.mktemp("s") / "s"
    async with server_in(tmp_path, sock, allow_other=True, linger_s=0.0) as server:
        store = server.stores[PLACE.path] = FakeStore(FILES)

        @asynccontextmanager
        async def attached(*, saves: bool = False) -> AsyncIterator[Node]:
            client = await server.connect()
            reply = await client.ask(Attach(location=PLACE, saves=saves))
            assert isinstance(reply, Attached)
            node = Node(server, client, reply.name)
            yield node
            await node.quiet()
            await client.stream.aclose()
            with trio.fail_after(10):
                while len(server.service.attachments):  # noqa: ASYNC110 - of the server
                    await trio.sleep(0.002)

        etag = store.etag("a/b")
        async with attached() as node:
            refused = await node.save(DATA, etag)
            assert isinstance(refused, Failed)
            assert refused.code == "access-denied", refused
            second = await (await server.connect()).ask(Attach(location=PLACE, saves=True))
            assert isinstance(second, Failed)  # it is in use with shared blocks
            assert second.code == "busy"
        async with attached(saves=True) as node:
            assert await node.save(DATA, etag) == Taken(taken=len(DATA), had=0)
        async with attached() as node:
            assert await node.read() == DATA
            assert store.reads("a/b") == []
            [attachment] = server.service.attachments
            assert attachment.cached_bytes(server.rig.cache) == len(DATA)
        shared = new_attachment(9, PLACE, store, attachment.manifest, 0, 0)
        assert shared.cached_bytes(server.rig.cache) == 0
        store.overwrite("a/b", pattern(len(DATA), 1))
        async with attached() as node:  # nothing of this version was saved
            assert await node.read() == pattern(len(DATA), 1)
            [attachment] = server.service.attachments
            assert attachment.cache_scope == ""


BAD: list[tuple[str, int, int, str]] = [
    ("a/b", 5, 2, "protocol"),
    ("a/b", 6, 1, "protocol"),
    ("empty", 0, 1, "protocol"),
    ("a", 0, 1, "not-attached"),
    ("", 0, 1, "not-attached"),
    ("../a/b", 0, 1, "not-attached"),
    ("a/b/c", 0, 1, "not-attached"),
    ("\ud800", 0, 1, "protocol"),
    (".metadata.json", 0, 1, "not-attached"),  # no version covers it
]


@pytest.mark.parametrize(("path", "first", "count", "code"), BAD)
async def test_exchange_of_missing_files_is_refused(
    nodes: list[Node], memfd: int, path: str, first: int, count: int, code: str
) -> None:
    if path == "\ud800":
        line = b'{"op":"give-blocks","name":"x","path":"\\ud800","first":0,"count":1}\n'
        failed = await nodes[0].client.ask(line)
    else:
        failed = await nodes[0].give(memfd, first, count, path)
    assert isinstance(failed, Failed)
    assert failed.code == code


async def test_exchange_with_other_descriptors_than_a_memfd_is_refused(
    nodes: list[Node], tmp_path: Path, memfd: int
) -> None:
    reading, writing = os.pipe()
    name = nodes[0].name
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(8 * MIB)
        for fds in ([reading], [file.fileno()], []):
            node = Node(nodes[0].server, await nodes[0].server.connect(), name)
            request = GiveBlocks(name=name, path="a/b", first=0, count=1)
            failed = await node.ask(request, *fds)
            assert isinstance(failed, Failed)
            assert (failed.code, await node.client.line()) == ("protocol", b"")
    for fd in (reading, writing):
        os.close(fd)


def descriptors_of(fd: int) -> int:
    """The number of this process's descriptors for the file of `fd`. Other descriptors come and go
    meanwhile, because the event loop's threads and the garbage of earlier tests have some."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing one, and those that were just closed
            found += os.path.samestat(os.fstat(int(name)), os.fstat(fd))
    return found


async def wait_closed(fd: int) -> None:
    """Wait until no other descriptor of its file is open. A thread of the daemon closes them."""
    with trio.fail_after(10):
        while descriptors_of(fd) > 1:  # noqa: ASYNC110 - no event tells
            await trio.sleep(0.002)
    assert descriptors_of(fd) == 1


async def test_exchange_closes_surplus_descriptors(nodes: list[Node], memfd: int) -> None:
    for _ in range(20):
        assert isinstance(await nodes[0].ask(Status(), memfd, memfd, memfd), StatusReply)
    await wait_closed(memfd)
    assert isinstance(await nodes[0].give(memfd, 0, 1), Given)
    await nodes[0].quiet()
    await wait_closed(memfd)


async def test_exchange_with_a_sealed_memfd_takes_but_does_not_give(nodes: list[Node]) -> None:
    import fcntl

    giver, taker = nodes
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, MIB)
        given = await giver.give(fd, 0, 1)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
        assert await taker.take(fd, 0, given) == Taken(taken=MIB, had=0)
        failed = await giver.give(fd, 1, 1)
        assert isinstance(failed, Failed)
        assert failed.code == "store"
    finally:
        os.close(fd)


async def test_exchange_with_an_unreadable_memfd_is_refused(nodes: list[Node], memfd: int) -> None:
    giver, taker = nodes
    given = await giver.give(memfd, 0, 1)
    fd = os.open(f"/proc/self/fd/{memfd}", os.O_WRONLY)
    failed = await taker.take(fd, 0, given)
    os.close(fd)
    assert isinstance(failed, Failed)
    assert (failed.code, failed.message) == (
        "store",
        "the memfd cannot be read: Bad file descriptor",
    )
    assert await taker.take(memfd, 0, given) == Taken(taken=MIB, had=0)


@settings(max_examples=40)
@given(
    path=st.sampled_from(["a/b", "small", "empty", "a", "x", ""]),
    first=st.integers(0, 7) | st.integers(0, 1 << 70),
    count=st.integers(-1, PIECE_BLOCKS_MAX + 1),
    at=st.integers(0, 9 * MIB) | st.integers(-1, 1 << 65),
    sums=st.lists(st.integers(0, (1 << 64) - 1), max_size=PIECE_BLOCKS_MAX + 1),
    gives=st.booleans(),
)
def test_exchange_with_random_requests_leaves_the_daemon_intact(
    tmp_path_factory: pytest.TempPathFactory,
    path: str,
    first: int,
    count: int,
    at: int,
    sums: list[int],
    gives: bool,
) -> None:
    async def run() -> None:
        fd = os.memfd_create("blocks")
        os.truncate(fd, 2 * MIB)
        folder = tmp_path_factory.mktemp("f")
        try:
            async with server_in(folder, tmp_path_factory.mktemp("s") / "s") as server:
                server.stores[PLACE.path] = FakeStore(FILES)
                client = await server.connect()
                attached = await client.ask(Attach(location=PLACE))
                assert isinstance(attached, Attached)
                message = {"op": "give-blocks", "name": attached.name, "path": path} | {
                    "first": first,
                    "at": at,
                }
                message |= (
                    {"count": count} if gives else {"op": "take-blocks", "etag": "", "sums": sums}
                )
                line = msgspec.json.encode(message) if first < 1 << 63 and at < 1 << 63 else b"{}"
                passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                await client.stream.socket.sendmsg([line + b"\n"], passed)
                reply = decode_reply(await client.line())
                assert isinstance(reply, Failed | Given)
                again = await server.connect()
                assert isinstance(await again.ask(Status()), StatusReply)
                assert os.fstat(fd).st_size == 2 * MIB
                assert server.rig.fetcher.scheduler.in_flight().bytes == 0
        finally:
            os.close(fd)

    trio.run(run)
