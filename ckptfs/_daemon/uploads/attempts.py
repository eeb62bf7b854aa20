"""The attempts of one upload: which errors pass, and when to try again. Pure."""

from dataclasses import dataclass

from ckptfs.errors import DaemonError, StoreTimeout, StoreUnavailable

PATIENCE_S = 3600.0
"""Longest time without a further byte at the store. An outage of a store rarely takes longer, and
the files stay for `ckptfs uploads --retry`."""
_FIRST_PAUSE_S = 1.0
_PAUSE_S_MAX = 60.0
_PASSING = frozenset([StoreUnavailable.code, StoreTimeout.code, DaemonError.code])
"""The errors that may go away: a store that does not answer, and a process that was killed."""


@dataclass
class Attempts:
    """The attempts since the last one that has sent something.

    Attributes:
        count: Their number.
        since_s: The time of the last progress, or of the begin of the first of them.
    """

    since_s: float = 0.0
    count: int = 0

    def begun(self, now_s: float) -> None:
        """An attempt begins. An upload may have waited long for its turn."""
        if not self.count:
            self.since_s = now_s

    def progressed(self, now_s: float) -> None:
        """More bytes are at the store."""
        self.since_s, self.count = now_s, 0

    def pause_s(self, code: str, retry_after_s: float, now_s: float) -> float | None:
        """The time until the next attempt, after one that has failed with `code`; None if there is
        none. `retry_after_s` is the time that the store asks clients to wait."""
        self.count += 1
        pause_s = min(_PAUSE_S_MAX, _FIRST_PAUSE_S * 2 ** min(self.count - 1, 10))
        pause_s = max(pause_s, min(_PAUSE_S_MAX, retry_after_s))
        if code not in _PASSING or now_s + pause_s - self.since_s > PATIENCE_S:
            return None
        return pause_s
