"""A command on the cache where no daemon runs: on the directory, under its lock.

It is what a daemon would do, by the same code. As at a daemon's start, what is not whole, or of
another format, is removed from the directory. Nothing goes because of a limit.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import trio

from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cachetasks import CacheTasks
from ckptfs._daemon.offload import Offload
from ckptfs._model.config import Config
from ckptfs._model.replies import CacheNews
from ckptfs._model.requests import CacheRequest
from ckptfs.errors import BY_CODE, CkptfsError

_MEMORY_BYTES_MAX = 1 << 20
"""Nothing is fetched."""


def carry_out(config: Config, request: CacheRequest, tell: Callable[[CacheNews], None]) -> None:
    """Do it; as `Connection.cache`. A directory that is not there is not made.

    Raises ConfigError where the directory cannot be used, or a daemon uses it.
    """
    directory = Path(config.cache_dir)
    if not directory.exists():
        tell(CacheNews(ended=True))
        return
    cache = Cache(directory, 0, config.cache_free_share_min, _MEMORY_BYTES_MAX)
    try:
        was_interrupted = trio.run(_carry_out, config, cache, request, tell)
    finally:
        cache.shut()
    if was_interrupted:
        raise KeyboardInterrupt


async def _carry_out(
    config: Config, cache: Cache, request: CacheRequest, tell: Callable[[CacheNews], None]
) -> bool:
    """Returns whether it was interrupted."""
    news = CacheNews(ended=False)
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def end_on_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(end_on_signal)
            tasks = CacheTasks(cache, lambda: config.cache_bytes_max, Offload(1), nursery, ())
            task = tasks.begin(request, os.geteuid())
            while not news.ended:
                news = await task.news()
                tell(news)
            nursery.cancel_scope.cancel()
    if news.early_code:
        raise BY_CODE.get(news.early_code, CkptfsError)(news.early_message)
    return not news.ended
