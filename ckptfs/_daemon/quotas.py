"""The users of a node, and their shares of its limits.

Each limit holds for all users together. One user other than root and the daemon's own may take a
quarter of it, so that no user can shut out the others.
"""

import os
from collections import Counter

import trio

from ckptfs._model.blocks import BLOCK_BYTES
from ckptfs._model.location import Location
from ckptfs._model.volume import Volume
from ckptfs.errors import LimitExceeded

_USERS_SHARE = 4
"""One of the other users may take the fourth part of a limit."""


_ROUTE_OPTIONS = frozenset(
    ["proxy", "tls_ca_dir_path", "tls_ca_file_path", "tls_ca_pem", "tls_verify_certificates"]
)
"""The options and secrets that decide which server answers for a store's name."""


def cache_scope(uid: int, location: Location, volume: Volume | None = None) -> str:
    """The suffix that separates the cached bytes of an attachment from those that all users of its
    store share; "" if the attachment shares them.

    A user who names a proxy, or the certificates to trust, could answer for the store. So the
    daemon caches bytes that come by such a route for that user only. A volume counts as a user of
    its own. `location` has its secrets.
    """
    if (is_ours(uid) and volume is None) or location.store is not None:
        return ""
    chosen = _ROUTE_OPTIONS & {*location.options, *location.secrets}
    who = f"uid {uid}" if volume is None else f"volume {volume.id}"
    return f" by the way of {who}" if chosen else ""


def saved_scope(uid: int, location: Location, volume: Volume | None = None) -> str:
    """`cache_scope` of an attachment that has blocks which the user has uploaded. Another user's
    blocks are for that user only, because nobody else can trust them. Volumes have no such
    blocks."""
    if volume is not None:
        return cache_scope(uid, location, volume)
    if is_ours(uid):
        return ""
    return cache_scope(uid, location) or f" saved by uid {uid}"


def is_ours(uid: int) -> bool:
    """Whether it is root or the daemon's own user, for whom the limits of a user do not hold."""
    return uid in (0, os.geteuid())


def limit_for(uid: int, limit: int) -> int:
    """The part of a limit that a user may take."""
    return limit if is_ours(uid) else share_of(limit)


def share_of(limit: int) -> int:
    """The part of a limit that one of the other users may take."""
    return max(1, limit // _USERS_SHARE)


class RunningQuota:
    """Counts what runs at the same time for each user.

    Args:
        running_max: Most for all users together.
        noun: Plural for messages.
    """

    def __init__(self, running_max: int, noun: str) -> None:
        self._running_max = running_max
        self._noun = noun
        self._running: Counter[int] = Counter()

    def take(self, uid: int, subject: str = "") -> None:
        """Count one more for the user, until `give_back`.

        Args:
            uid: The user.
            subject: Beginning of the message if the user may not have one more.

        Raises LimitExceeded.
        """
        most = limit_for(uid, self._running_max)
        if self._running[uid] >= most or self._running.total() >= self._running_max:
            raise LimitExceeded(
                f"{subject}{most} {self._noun} are running, the most that there can be for uid "
                f"{uid}; wait for one to end"
            )
        self._running[uid] += 1

    def give_back(self, uid: int) -> None:
        """Count one less."""
        self._running -= Counter([uid])  # removes zeros


class Pace:
    """Lets at most `rate` bytes pass in a second (0: no limit).

    Attributes:
        blocks_max: The most blocks to ask for at once: at most a quarter of a second's bytes, but
            at least one block.
    """

    def __init__(self, rate: int, blocks_max: int) -> None:
        self._rate = rate
        self._paid_s = 0.0
        self.blocks_max = min(blocks_max, max(1, rate // 4 // BLOCK_BYTES)) if rate else blocks_max

    async def wait(self, length: int) -> None:
        """Wait until the bytes before are paid for, and `length` more may pass."""
        if self._rate and length:
            start_s = max(self._paid_s, trio.current_time())
            self._paid_s = start_s + length / self._rate
            await trio.sleep_until(start_s)
