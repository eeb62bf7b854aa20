"""A signal for all tasks that wait for any change of the uploads."""

from collections.abc import Callable

import trio


class Changes:
    """The changes of the uploads. Belongs to the event loop."""

    def __init__(self) -> None:
        self._next = trio.Event()

    def tell(self) -> None:
        """Wake all waiting tasks."""
        self._next.set()
        self._next = trio.Event()

    async def wait(self) -> None:
        """Return with the next change."""
        await self._next.wait()

    async def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Return when `condition` holds, which is asked at each change, or after `seconds`."""
        with trio.move_on_after(seconds):
            while not condition():
                await self.wait()
