"""Whatever the cache's disk does while uploaded blocks are saved, the bytes that are read are
right, and the blocks are saved when it works again."""

import array
import os
import socket
from pathlib import Path

import pytest
from support.bench import PLACE, server_in
from support.diskfaults import Fault, can, planned
from support.fakes import MIB, FakeStore, pattern
from unit.daemon.cache.test_disk_faults import ALL

from ckptfs._model.protocol.replies import Attached, Failed, Reply, Taken
from ckptfs._model.protocol.requests import Attach, SaveBlocks
from ckptfs._model.protocol.wire import decode_reply, encode
from ckptfs.errors import BY_CODE

DATA = pattern(5 * MIB + 7)
OPERATIONS = ("make_folder", "open_file", "set_size", "write", "persist", "rename")
KINDS = ("ENOSPC", "EIO", "EROFS", "short", "torn", "garbage")
CELLS = [
    Fault(operation, kind, moment)
    for operation in OPERATIONS
    for kind in KINDS
    for moment in ("first", "always")
    if can(operation, kind)
]


@pytest.mark.parametrize("fault", CELLS if ALL else CELLS[::3], ids=lambda fault: fault.id)
async def test_each_fault_of_the_caches_disk_while_uploaded_blocks_are_saved(
    fault: Fault, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = FakeStore({"a": DATA})
    etag = store.etag("a")
    memfd = os.memfd_create("blocks")
    try:
        os.pwrite(memfd, DATA, 0)
        sock = tmp_path_factory.mktemp("s") / "s"
        async with server_in(tmp_path, sock) as server:
            server.stores[PLACE.path] = store
            client = await server.connect()
            attached = await client.ask(Attach(location=PLACE))
            assert isinstance(attached, Attached)
            request = SaveBlocks(name=attached.name, path="a", first=0, count=6, etag=etag)

            async def save() -> Reply:
                passed = array.array("i", [memfd])
                await client.stream.socket.sendmsg(
                    [encode(request)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)]
                )
                return decode_reply(await client.line())

            async def read() -> bytes:
                attachment = next(iter(server.service.attachments))
                file = attachment.file(0)
                with server.rig.fetcher.opened(file):
                    return await server.rig.read(file, 0, file.pin.size)

            with planned(fault) as plan:
                plan.active = True
                said = await save()
                if isinstance(said, Failed):
                    assert said.code in BY_CODE
                    assert "\n" not in said.message
                else:
                    assert isinstance(said, Taken)
                assert await read() == DATA
                await server.rig.quiet()
                plan.active = False
                assert plan.hits
            assert isinstance(await save(), Taken)
            assert await read() == DATA
            await server.rig.quiet()
            assert await read() == DATA
    finally:
        os.close(memfd)
