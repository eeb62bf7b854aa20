"""The part of the daemon below FUSE, put together for a test.

`Rig` is what reads: cache, offload and fetcher. `View` is what a program sees: names, attributes,
metadata and bytes of attachments of fake stores.
"""

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import trio
from support.fakes import MIB, FakeStore, InlineOffload, config_of, pattern

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.format_detection import FormatDetector
from ckptfs._daemon.attachment.inodes import MOUNT_ROOT
from ckptfs._daemon.attachment.journal import Made
from ckptfs._daemon.attachment.metadata import MetadataKeeper
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._daemon.cache.object_dir import ObjectKey
from ckptfs._daemon.fetch.fetcher import Fetcher
from ckptfs._daemon.fetch.limits import limits_of
from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.fs.stats import Stat
from ckptfs._daemon.fs.vfs import Vfs
from ckptfs._daemon.fs.xattrs import Xattrs
from ckptfs._daemon.offload import Offload
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.manifest import build_manifest
from ckptfs._mount import handoff

T = TypeVar("T")

if TYPE_CHECKING:
    from ckptfs._model.plans.plan import Wanted

UID, GID = 1234, 5678
LOCATION = Location("s3", "bucket/run/step-5", {"region": "eu", "scheme": "http"})
CONTENT = {
    "config.json": b"{}",
    "empty": b"",
    "shards/00.bin": pattern(3 * MIB + 5),
    "shards/01.bin": pattern(MIB),
    "shards/deep/x": b"x",
}
"""Files of the checkpoint in the fixture `store`."""


class Rig:
    """A fetcher with everything that it needs. `ends`: closed with it."""

    def __init__(
        self,
        config: Config,
        cache: Cache,
        offload: Offload,
        nursery: trio.Nursery,
        ends: ExitStack,
    ) -> None:
        self.ends = ends
        self.config = config
        self.cache = cache
        self.offload = offload
        self.nursery = nursery
        self.fetcher = Fetcher(config, cache, offload, nursery)
        self.files: list[RemoteFile] = []

    def open(self, store: FakeStore, path: str, user: int | None = None) -> RemoteFile:
        """A newly attached file, as the store lists it now, opened once."""
        pin = store.pin(path)
        file = RemoteFile(store, ObjectKey("store", path, pin.size, pin.mtime_ns), pin, None, user)
        self.files.append(file)
        self.fetcher.open(file)
        return file

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """Read as `vfs` does, without the readahead."""
        views = self.fetcher.read_now(file, offset, length)
        if views is None:
            views = await self.fetcher.read(file, offset, length)
        return b"".join(views)

    def new_memory(self) -> handoff.Fds:
        """Memory for a daemon and those after it, which ends with the rig."""
        fds = handoff.create()
        for fd in fds.all():
            self.ends.callback(os.close, fd)
        return fds

    async def quiet(self) -> None:
        """Return when no span is under way."""
        while any(file.flights for file in self.files):  # noqa: ASYNC110 - threads end them
            await trio.sleep(0.002)


class _Now(InlineOffload):
    """Runs the calls without an event loop. `meanwhile` is called before each of them."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self._meanwhile = meanwhile

    async def run(self, kind: str, call: Callable[[], T]) -> T:
        self._meanwhile()
        return call()


def make_room(
    cache: Cache, entry: CachedObject, length: int, meanwhile: Callable[[], None] = lambda: None
) -> bool:
    """Make room as `writer` does, without an event loop."""
    try:
        cache.room.make(_Now(meanwhile), entry, length).send(None)
    except StopIteration as end:
        return bool(end.value)
    raise AssertionError("it waits")


def bytes_on_disk(cache_dir: Path) -> int:
    """The bytes that the files of all cached objects really take."""
    taken = 0
    for path in (cache_dir / "objects").rglob("*"):
        with suppress(FileNotFoundError):  # a thread may give it its name meanwhile
            taken += path.stat().st_blocks * 512 if path.is_file() else 0
    return taken


@asynccontextmanager
async def rig_in(
    directory: Path, offload: Offload | None = None, **settings: object
) -> AsyncIterator[Rig]:
    """A rig whose cache is in `directory`; all of it ends with the block."""
    config = config_of(directory, **settings)
    cache = Cache(
        Path(config.cache_dir),
        config.cache_bytes_max,
        config.cache_free_share_min,
        limits_of(config).in_flight_bytes,
    )
    failure: Exception | None = None
    ends = ExitStack()
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield Rig(config, cache, offload or InlineOffload(), nursery, ends)
            except Exception as error:  # to be raised without the nursery's group around it
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        cache.shut()
        ends.close()
    if failure is not None:
        raise failure


async def read_of(vfs: Vfs, handle: int, offset: int, length: int) -> bytes:
    """Bytes of an open file, as the kernel gets them."""
    found = vfs.read_now(handle, offset, length)
    return b"".join(await vfs.read(handle, offset, length) if found is None else found.views)


class View:
    """A `Vfs` with attachments of fake stores, and their extended attributes."""

    def __init__(self, rig: Rig, fds: handoff.Fds | None = None) -> None:
        self.rig = rig
        self.released: list[Attachment] = []
        self.prefetched: list[tuple[Attachment, Wanted]] = []
        formats = FormatDetector(rig.fetcher, rig.offload, rig.nursery)
        self.fds = fds or rig.new_memory()
        self.handoff = handoff.Handoff(self.fds)
        handles = self.handoff.handles
        self.vfs = Vfs(rig.fetcher, formats, handles, 1, 2, self.released.append)
        self.metadata = MetadataKeeper(rig.offload, rig.config.read_deadline_s)
        self.xattrs = Xattrs(
            self.vfs,
            rig.fetcher,
            rig.cache,
            rig.offload,
            self.metadata,
            lambda attachment, wanted: self.prefetched.append((attachment, wanted)),
        )
        self.attachments: list[Attachment] = []

    def attach(self, store: FakeStore, location: Location = LOCATION) -> Attachment:
        """Show what the store lists now."""
        manifest = build_manifest(store.list(100_000))
        ordinal = len(self.attachments) + 1
        made = Made(location, manifest, UID, GID, time.time())
        attachment = Attachment(ordinal, made, store)
        self.attachments.append(attachment)
        self.vfs.add(attachment)
        return attachment

    def stat(self, attachment: Attachment, path: str) -> Stat:
        """Look a path up from the mount point on."""
        found = self.vfs.lookup(MOUNT_ROOT, attachment.name.encode())
        for component in filter(None, path.split("/")):
            found = self.vfs.lookup(found.inode, component.encode())
        return found

    def entries(self, inode: int, start: int = 0) -> "list[tuple[bytes, Stat, int]]":
        """The entries of a directory from a position on."""
        handle = self.vfs.opendir(inode, 1)
        found = list(self.vfs.readdir(handle, start))
        self.vfs.release(handle)
        return found

    async def read(self, inode: int, offset: int, length: int) -> bytes:
        """Bytes of an open file, as the kernel gets them."""
        return await read_of(self.vfs, inode, offset, length)

    async def quiet(self) -> None:
        """Return when no span is under way."""
        self.rig.files = [f for a in self.attachments for f in a.files.values()]
        await self.rig.quiet()

    async def names(self, inode: int) -> list[str]:
        """Names of the extended attributes."""
        return await self.xattrs.list(inode, UID)

    async def text(self, inode: int, name: str) -> str:
        """An extended attribute."""
        return (await self.xattrs.get(inode, name)).decode()


@asynccontextmanager
async def view_in(
    directory: Path, offload: Offload | None = None, **settings: object
) -> AsyncIterator[View]:
    """A view whose cache is in `directory`; all of it ends with the block."""
    async with rig_in(directory, offload, **settings) as rig:
        view = View(rig)
        yield view
        await view.quiet()
