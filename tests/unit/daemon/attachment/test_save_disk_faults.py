"""Whatever the cache's disk does while uploaded blocks are saved, the bytes that are read are
right, and the blocks are saved when it works again."""

from pathlib import Path

import pytest
from support.bench import PLACE, server_in
from support.diskfaults import Fault, can, planned
from support.fakes import MIB, FakeStore, pattern
from unit.daemon.attachment.test_block_exchange import Node
from unit.daemon.cache.test_disk_faults import ALL

from ckptfs._model.protocol.replies import Attached, Failed, Taken
from ckptfs._model.protocol.requests import Attach
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
    store = FakeStore({"a/b": DATA})
    etag = store.etag("a/b")
    async with server_in(tmp_path, tmp_path_factory.mktemp("s") / "s") as server:
        server.stores[PLACE.path] = store
        client = await server.connect()
        attached = await client.ask(Attach(location=PLACE))
        assert isinstance(attached, Attached)
        node = Node(server, client, attached.name)
        with planned(fault) as plan:
            plan.active = True
            said = await node.save(DATA, etag)
            if isinstance(said, Failed):
                assert said.code in BY_CODE
                assert "\n" not in said.message
            else:
                assert isinstance(said, Taken)
            assert await node.read() == DATA
            await server.rig.quiet()
            plan.active = False
            assert plan.hits
        assert isinstance(await node.save(DATA, etag), Taken)
        assert await node.read() == DATA
        await server.rig.quiet()
        assert await node.read() == DATA
