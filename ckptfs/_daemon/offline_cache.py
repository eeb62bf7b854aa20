"""A command on the cache while no daemon runs.

This runs the daemon's code on the cache's directory, under the directory's lock. As at a daemon's
start, it removes incomplete objects and objects of another format. It removes no object because of
a limit.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import trio

from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.control.cache_commands import CacheCommands
from ckptfs._daemon.offload import Offload
from ckptfs._model.config import Config
from ckptfs._model.protocol.replies import CacheResults
from ckptfs._model.protocol.requests import CacheRequest
from ckptfs.errors import BY_CODE, CkptfsError

_MEMORY_BYTES_MAX = 1 << 20
"""The command fetches no data."""


def carry_out(config: Config, request: CacheRequest, take: Callable[[CacheResults], None]) -> None:
    """Run a command; `take` gets its results, as in `Connection.cache`. If the cache has no
    directory, this does not create it.

    Raises ConfigError if the directory cannot be used, or a daemon uses it.
    """
    directory = Path(config.cache_dir)
    if not directory.exists():
        take(CacheResults(ended=True))
        return
    cache = Cache(directory, 0, config.cache_free_share_min, _MEMORY_BYTES_MAX)
    cache.index.bytes_max = config.cache_bytes_max  # a goal for a collection, not at the start
    try:
        was_interrupted = trio.run(_carry_out, cache, request, take)
    finally:
        cache.shut()
    if was_interrupted:
        raise KeyboardInterrupt


async def _carry_out(
    cache: Cache, request: CacheRequest, take: Callable[[CacheResults], None]
) -> bool:
    """Return whether SIGINT has interrupted the command."""
    results = CacheResults(ended=False)
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def end_on_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(end_on_signal)
            commands = CacheCommands(cache, Offload(1), nursery, attached=())
            job = commands.begin(request, os.geteuid())
            while not results.ended:
                results = await job.progress()
                take(results)
            nursery.cancel_scope.cancel()
    if results.early_code:
        raise BY_CODE.get(results.early_code, CkptfsError)(results.early_message)
    return not results.ended
