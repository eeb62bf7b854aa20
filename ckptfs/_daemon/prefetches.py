"""All prefetches: whose they are, how many there may be, and which of them outlive the daemon."""

import time
from collections import Counter

import trio

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.prefetch import Prefetch
from ckptfs._daemon.records import PrefetchBegun, PrefetchEnded
from ckptfs._daemon.users import limit_for
from ckptfs._model.plan import Wanted
from ckptfs.errors import LimitExceeded

_PREFETCHES_MAX = 1024
"""That run at the same time: each has up to eight files open."""


class Prefetches:
    """Begins prefetches, which run in `nursery`."""

    def __init__(
        self, fetcher: Fetcher, cache: Cache, offload: Offload, nursery: trio.Nursery
    ) -> None:
        self._fetcher = fetcher
        self._cache = cache
        self._offload = offload
        self._nursery = nursery
        self._running: Counter[int] = Counter()  # by user

    def begin(self, attachment: Attachment, wanted: Wanted) -> Prefetch:
        """Begin to fetch that in the background. Raises LimitExceeded."""
        uid = attachment.uid
        most = limit_for(uid, _PREFETCHES_MAX)
        if self._running[uid] >= most or sum(self._running.values()) >= _PREFETCHES_MAX:
            raise LimitExceeded(
                f"{attachment.location.uri}: {most} prefetches are running, the most that there "
                f"can be for uid {uid}; wait for one to end"
            )
        prefetch = Prefetch(attachment, wanted, self._fetcher, self._cache, self._offload)
        self._running[uid] += 1
        self._nursery.start_soon(self._run, prefetch, uid)
        return prefetch

    async def _run(self, prefetch: Prefetch, uid: int) -> None:
        try:
            await prefetch.run()
        finally:
            self._running -= Counter([uid])  # zeros go

    def begin_unheld(self, attachment: Attachment, wanted: Wanted) -> None:
        """The same; no connection waits for it, so the next daemon goes on with it."""
        begun = PrefetchBegun(time.monotonic_ns(), wanted)
        self.go_on(attachment, begun)
        attachment.record(begun)

    def go_on(self, attachment: Attachment, begun: PrefetchBegun) -> None:
        """Begin one that is written down already. Raises LimitExceeded."""
        prefetch = self.begin(attachment, begun.wanted)
        self._nursery.start_soon(self._note_end, attachment, prefetch, begun.number)

    async def _note_end(self, attachment: Attachment, prefetch: Prefetch, number: int) -> None:
        await prefetch.ended.wait()
        attachment.record(PrefetchEnded(number))
