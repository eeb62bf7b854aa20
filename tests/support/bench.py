"""The daemon's service with fake stores, and the same service behind a control socket."""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio
from support.fakes import FakeStore, InlineOffload
from support.rig import Rig, rig_in

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.inodes import MOUNT_ROOT
from ckptfs._daemon.control.commands import Commands
from ckptfs._daemon.control.current_config import CurrentConfig
from ckptfs._daemon.control.named_stores import Stores
from ckptfs._daemon.control.restore import restore
from ckptfs._daemon.control.server import Control
from ckptfs._daemon.control.service import Service
from ckptfs._model.location import Location
from ckptfs._model.protocol.replies import Reply
from ckptfs._model.protocol.requests import Request
from ckptfs._model.protocol.wire import decode_reply, encode
from ckptfs._model.volume import Volume
from ckptfs._mount import handoff
from ckptfs._mount.handoff import Handoff
from ckptfs.errors import LocationError

ME = os.geteuid()
SECRETS = {"access_key": "key", "secret_key": "S3CR3T"}
PLACE = Location("s3", "bucket/run/step-1", {"region": "eu"}, SECRETS)
ELSEWHERE = Location("s3", "bucket/run/step-2", {"region": "eu"})
PLACE_OF_OTHERS = msgspec.structs.replace(
    ELSEWHERE, secrets={"access_key": "theirs", "secret_key": "S3CR3T"}
)
SETTINGS = {"linger_s": 10, "idle_exit_s": 60, "attachments_max": 3, "attach_deadline_s": 60}


class Bench:
    """A service whose stores are fakes, one per path.

    Args:
        rig: The parts that read.
        fds: Memory of the daemon before this one, if there was one.

    Attributes:
        forgotten: Names that the kernel had to forget.
        stores: The fake stores, by path.
        opened: The stores that the service has opened, in order.
        refused: Path that the service cannot open.
    """

    def __init__(self, rig: Rig, fds: handoff.Fds | None = None) -> None:
        assert isinstance(rig.offload, InlineOffload)  # so that tests can delay its calls
        self.rig = rig
        self.offload = rig.offload
        self.forgotten: list[str] = []
        self.stores: dict[str, FakeStore] = {}
        self.opened: list[FakeStore] = []
        self.fds = fds or rig.new_memory()
        self.handoff = Handoff(self.fds)
        self.refused = ""
        self.service = Service(
            current=CurrentConfig(rig.config),
            cache=rig.cache,
            fetcher=rig.fetcher,
            offload=rig.offload,
            nursery=rig.nursery,
            forget_name=self.forgotten.append,
            open_store=self.open_store,
            upload_target=lambda location, *_: (location, "default"),
            handoff=self.handoff,
        )

    def store(self, location: Location) -> FakeStore:
        """The store at a place."""
        return self.stores.setdefault(location.path, FakeStore({"a/b": b"content", "c": b"x"}))

    def open_store(self, location: Location, timeout_s: float, uid: int) -> FakeStore:
        """In place of ``Stores.open``."""
        assert timeout_s == self.rig.config.store_timeout_s
        if location.path == self.refused:
            raise LocationError("no such store")
        self.opened.append(self.store(location))
        return self.opened[-1]

    async def attach(
        self,
        location: Location = PLACE,
        uid: int = ME,
        *,
        pinned: bool = False,
        saves: bool = False,
        volume: Volume | None = None,
    ) -> Attachment:
        """Attach. The caller holds the attachment until `let_go`."""
        attach = self.service.attaching.attach
        return await attach(location, uid, uid, pinned=pinned, saves=saves, volume=volume)

    def lists(self, location: Location = PLACE) -> int:
        """How often the service has listed a place."""
        return sum(call.operation == "list" for call in self.store(location).calls)

    def shown(self) -> list[str]:
        """Names in the mount point."""
        handle = self.service.vfs.opendir(MOUNT_ROOT, 1)
        found = [name.decode() for name, _, _ in self.service.vfs.readdir(handle, 0)]
        self.service.vfs.release(handle)
        return found


async def next_daemon(bench: Bench) -> Bench:
    """A service that finds the memory of `bench`, as if `bench` had been killed."""
    after = Bench(bench.rig, bench.fds)
    after.stores = bench.stores
    await restore(after.service)
    for handle, slot in after.handoff.handles.open_handles():
        after.service.vfs.restore(handle, slot)
    after.service.attachments.release_all()
    return after


class Client:
    """A connection of a client that may send any bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._pending = b""

    async def line(self) -> bytes:
        """The next line; empty at the end."""
        while b"\n" not in self._pending:
            data = await self.stream.receive_some()
            if not data:
                return b""
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    async def ask(self, request: Request[Any] | bytes) -> Reply:
        """Send a request, or any bytes, and wait for the reply."""
        await self.stream.send_all(request if isinstance(request, bytes) else encode(request))
        return decode_reply(await self.line())


class Server(Bench):
    """A service behind a control socket."""

    path: Path
    control: Control
    clients: list[Client]

    async def listen(self, path: Path) -> None:
        """Serve at a path of at most 107 bytes."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(str(path))
        listening.listen()
        self.path = path
        self.clients = []
        name = f"the ckptfs daemon at {path}"
        commands = Commands(self.service, Stores({}), None, name)
        self.control = Control(self.service, commands, name)
        self.rig.nursery.start_soon(self.control.serve, listening)

    async def connect(self) -> Client:
        """A new connection."""
        self.clients.append(Client(await trio.open_unix_socket(str(self.path))))
        return self.clients[-1]


@asynccontextmanager
async def server_in(folder: Path, socket_path: Path, **more: Any) -> AsyncIterator[Server]:
    """A server whose cache is in `folder`. `more` overrides `SETTINGS`."""
    async with rig_in(folder, InlineOffload(), **(SETTINGS | more)) as rig:
        server = Server(rig)
        await server.listen(socket_path)
        try:
            yield server
        finally:
            for client in server.clients:
                await client.stream.aclose()
