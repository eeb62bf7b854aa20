"""The daemon's uploads in the background, with processes that a test plays."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import msgspec
import trio
from support.fakes import InlineOffload

from ckptfs._daemon.uploads.handing_over import HandingOver
from ckptfs._daemon.uploads.queue import Queue
from ckptfs._daemon.uploads.spool import Spool
from ckptfs._model.location import Location
from ckptfs._model.upload_messages import NotSent, Setup
from ckptfs._model.uploads import Record, Sent, UploadOptions
from ckptfs._mount import handoff
from ckptfs.errors import DaemonError

UID, GID = 1000, 100
SECRETS = {"access_key": "key", "secret_key": "S3CR3T"}
TARGET = Location("s3", "bucket/run/step-1", {"region": "eu"}, SECRETS)
ELSEWHERE = Location("s3", "bucket/run/step-2", {"region": "eu"})
THIRD = Location("s3", "bucket/run/step-3", {"region": "eu"})
SENT = Sent("s3://bucket/run/step-1", 1, 4, 0, 0, 4, "")


class Process:
    """A process that sends. A test says how it ends. `running` has those that run now."""

    running: ClassVar["list[Process]"] = []

    def __init__(self) -> None:
        self.setup: Setup | None = None
        self.progressed: Callable[[int], None] = lambda _: None
        self._result: Sent | NotSent | None = None
        self._ended = trio.Event()

    async def run(self, setup: Setup, progressed: Callable[[int], None]) -> Sent | NotSent:
        self.setup, self.progressed = setup, progressed
        self.running.append(self)
        await self._ended.wait()
        self.running.remove(self)
        assert self._result is not None
        return self._result

    def finish(self, result: Sent | NotSent = SENT) -> None:
        self._result = result
        self._ended.set()

    def end(self) -> None:
        self.finish(NotSent(DaemonError.code, "was killed by SIGTERM"))


class World:
    """The disk and the memory that outlive a daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fds = handoff.create()
        self.offload = InlineOffload()
        self.shown: set[str] = set()
        self.limit = 0
        self.room = True
        self.has_disk = True

    def queue(self) -> Queue:
        """The queue of the next daemon."""
        return Queue(
            spool=Spool(self.folder, self.folder),
            offload=self.offload,
            journal=handoff.Handoff(self.fds).journal,
            resolve=lambda location, *_: (location, "default"),
            shows=self.shown.__contains__,
            keeps=self.shown.__contains__,
            store_timeout_s=lambda: 3.0,
            socket="/socket",
            has_disk=lambda: self.has_disk,
        )

    def handing_over(self, queue: Queue, nursery: trio.Nursery) -> HandingOver:
        """The part of that daemon that takes files over."""

        async def free_disk(_: int) -> bool:
            return self.room

        return HandingOver(
            queue=queue,
            offload=self.offload,
            nursery=nursery,
            limit_bytes=lambda: self.limit,
            has_disk=lambda: self.has_disk,
            free_disk=free_disk,
        )

    def staged(self, queue: Queue, data: bytes = b"data") -> str:
        """Stage a file, and return the id."""
        upload, top = queue.spool.make()
        os.close(top)
        Path(queue.spool.path_of(upload), "file").write_bytes(data)
        return upload

    async def accepted(self, queue: Queue, target: Location = TARGET, data: bytes = b"data") -> str:
        """Have an upload accepted, and return its id."""
        record = record_of(self.staged(queue, data), target, len(data))
        await queue.accept(record, target)
        return record.id

    def files(self) -> list[str]:
        """All files in the spool."""
        top = self.folder / "uploads"
        return sorted(str(p.relative_to(top)) for p in top.rglob("*") if p.is_file())


def record_of(upload: str, target: Location = TARGET, size: int = 4) -> Record:
    return Record(
        id=upload,
        uid=UID,
        gid=GID,
        location=msgspec.structs.replace(target, secrets={}),
        place=target.identity,
        had_secrets=bool(target.secrets),
        options=UploadOptions(),
        files=1,
        bytes=size,
        order=0,
        accepted=1.0,
    )
