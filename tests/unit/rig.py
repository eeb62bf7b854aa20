"""The part of the daemon that reads, put together for a test: cache, offload and fetcher."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from unit.fakes import FakeStore, InlineOffload, config_of

from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cachedir import ObjectKey
from ckptfs._daemon.fetch import Fetcher, RemoteFile
from ckptfs._daemon.offload import Offload
from ckptfs._model.config import Config


class Rig:
    """A fetcher with everything that it needs."""

    def __init__(
        self, config: Config, cache: Cache, offload: Offload, nursery: trio.Nursery
    ) -> None:
        self.config = config
        self.cache = cache
        self.offload = offload
        self.nursery = nursery
        self.fetcher = Fetcher(config, cache, offload, nursery)
        self.files: list[RemoteFile] = []

    def open(self, store: FakeStore, path: str) -> RemoteFile:
        """A newly attached file, as the store lists it now, opened once."""
        pin = store.pin(path)
        file = RemoteFile(store, ObjectKey("store", path, pin.size, pin.mtime_ns), pin)
        self.files.append(file)
        self.fetcher.open(file)
        return file

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """Read as `vfs` does, without the readahead."""
        data = self.fetcher.read_now(file, offset, length)
        return bytes(data if data is not None else await self.fetcher.read(file, offset, length))

    async def quiet(self) -> None:
        """Return when no span is under way."""
        while any(file.flights for file in self.files):  # noqa: ASYNC110 - threads end them
            await trio.sleep(0.002)


def bytes_on_disk(cache_dir: Path) -> int:
    """What the files of all cached objects really take."""
    files = [path for path in (cache_dir / "objects").rglob("*") if path.is_file()]
    return sum(path.stat().st_blocks * 512 for path in files)


@asynccontextmanager
async def rig_in(
    directory: Path, offload: Offload | None = None, **settings: object
) -> AsyncIterator[Rig]:
    """A rig whose cache is in `directory`; all of it ends with the block."""
    config = config_of(directory, **settings)
    cache = Cache(Path(config.cache_dir), config.cache_bytes_max, config.cache_free_share_min)
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield Rig(config, cache, offload or InlineOffload(), nursery)
            except Exception as error:  # to be raised without the nursery's group around it
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        cache.shut()
    if failure is not None:
        raise failure
