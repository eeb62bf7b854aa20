"""An object to fetch, and many reads of it at the same time."""

import pytest
import trio
from support.fakes import MIB, FakeStore, InlineOffload, pattern
from support.rig import Rig

from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.offload import Offload
from ckptfs.errors import CkptfsError

SIZE = 20 * MIB + 5
DATA = pattern(SIZE)


@pytest.fixture
def store() -> FakeStore:
    """A store with the object "a", whose content is `DATA`."""
    return FakeStore({"a": DATA})


@pytest.fixture(params=[InlineOffload, lambda: Offload(16)], ids=["inline", "threads"])
def offload(request: pytest.FixtureRequest) -> Offload:
    """Calls in the event loop, and calls in threads."""
    return request.param()


async def collect(
    rig: Rig, file: RemoteFile, ranges: "list[tuple[int, int]]"
) -> "list[bytes | CkptfsError]":
    """Read all ranges (offset, length) at the same time. Returns the bytes or the error of each."""
    results: list[bytes | CkptfsError] = [b""] * len(ranges)

    async def one(number: int, offset: int, length: int) -> None:
        try:
            results[number] = await rig.read(file, offset, length)
        except CkptfsError as error:
            results[number] = error

    async with trio.open_nursery() as nursery:
        for number, (offset, length) in enumerate(ranges):
            nursery.start_soon(one, number, offset, length)
    return results
