"""A queue of uploads on a directory of the test."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from support.background import Process, World

from ckptfs._daemon.uploads import queue as queue_module
from ckptfs._daemon.uploads.queue import Queue


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    """The processes that run now."""
    running: list[Process] = []
    monkeypatch.setattr(Process, "running", running)
    monkeypatch.setattr(queue_module, "Sender", Process)
    return running


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    for fd in world.fds.all():
        os.close(fd)


@pytest.fixture
async def queue(world: World, processes: list[Process]) -> AsyncIterator[Queue]:
    """A queue that runs."""
    found = world.queue()
    await found.restore()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        yield found
        nursery.cancel_scope.cancel()
