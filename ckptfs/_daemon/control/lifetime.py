"""The end of the daemon: when it is idle, when a client stops it, and when another takes over."""

import math
from collections.abc import Callable

import trio

from ckptfs._daemon.control.current_config import CurrentConfig
from ckptfs._daemon.control.registry import Attachments
from ckptfs._model.wording import counted
from ckptfs.errors import Busy


class Lifetime:
    """Decides when the daemon ends. `uploads` returns the number of uploads that are not at the
    store yet, and that no error has ended.

    Attributes:
        stopped: Set when the daemon has to end.
        restarts: Whether the keeper has to start another daemon then.
    """

    def __init__(
        self, current: CurrentConfig, attachments: Attachments, uploads: Callable[[], int]
    ) -> None:
        self.stopped = trio.Event()
        self.restarts = False
        self._current = current
        self._attachments = attachments
        self._uploads = uploads
        self._clients = 0
        self._last_client_s = trio.current_time()

    def client_came(self) -> None:
        """Count a control connection that has opened."""
        self._clients += 1

    def client_left(self) -> None:
        """Count a control connection that has closed."""
        self._clients -= 1
        self._last_client_s = trio.current_time()

    async def wait_idle(self) -> None:
        """Return when the daemon had no client, attachment or upload for `idle_exit_s`."""
        last_upload_s = -math.inf
        while True:
            idle_exit_s = self._current.config.idle_exit_s
            if self._uploads():
                last_upload_s = trio.current_time()
            used = self._clients or len(self._attachments) or not idle_exit_s
            last_use_s = max(self._last_client_s, self._attachments.last_end_s, last_upload_s)
            left_s = last_use_s + idle_exit_s - trio.current_time()
            if not used and left_s <= 0:
                return
            await trio.sleep(min(1.0, max(0.05, left_s)) if not used else 1.0)

    def stop(self, *, force: bool) -> None:
        """End the daemon. Raises Busy while checkpoints are in use or uploads wait, unless
        `force`."""
        used = [a for a in self._attachments if a.leases.directories or a.leases.open_handles]
        if used and not force:
            more = counted(len(used) - 1, "more checkpoint")
            are = f"and {more} are" if len(used) > 1 else "is"
            raise Busy(
                f"{used[0].location.uri} {are} in use; ckptfs status names the processes; end "
                "them, or use --force (their reads will fail)"
            )
        if (count := self._uploads()) and not force:
            are = "is" if count == 1 else "are"
            raise Busy(
                f"{counted(count, 'upload')} {are} not at the store yet; ckptfs uploads --wait "
                "waits for them, or use --force (the next daemon sends those whose credentials it "
                "has)"
            )
        self.stopped.set()

    def restart(self) -> None:
        """End the daemon, and let another take over all attachments."""
        self.restarts = True
        self.stopped.set()
