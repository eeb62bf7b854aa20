"""How drivers with ``--take-over`` follow each other on one node (`ckptfs._os.takeover`).

A driver that starts asks the running one, which then stops listening, finishes its calls, and hands
over the lock of the records. The kubelet's calls in between fail, and the kubelet repeats them.
Volumes stay readable. A former driver waits, without a socket, until SIGTERM or until its successor
ends, and then serves again. The same rules as for keepers decide which driver waits
(`ckptfs._keeper.succession`).

The kubelet does not notice, because the registration stays (`ckptfs._csi.registration`). A driver
that ends while none waits for it removes the registration.

If a call does not end in time, or the new driver dies before it serves, the old one serves again. A
driver reconciles the records before it serves, because the other one may have died in a call.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Generator
from importlib.metadata import version as version_of
from pathlib import Path
from typing import NamedTuple

import msgspec

from ckptfs._csi import records, server
from ckptfs._csi.publishing import Publishing
from ckptfs._csi.records import Records
from ckptfs._os import filelock, takeover
from ckptfs._os.claimants import Claimants, Heir
from ckptfs._os.takeover import Claim, Offered, Refused
from ckptfs.errors import PlaceUnusable

log = logging.getLogger(__name__)

_SOCKET = "takeover"
_LOCK = "lock"
_FORMER_MAX = 32
_PAUSE_S = 1.0
"""Time between two claims."""
_CALLS_S = 20.0
"""Longest end of calls that the stop of the server has not ended. A call takes 110 s at most, and
the kubelet should not wait so long for a driver."""


class _Owned(NamedTuple):
    """The lock of the records, the offer that it came with, the names of the containers whose
    drivers have owned it before, and whether one of them has served until now."""

    lock: int
    offered: Offered | None
    former: list[str]
    follows: bool


class _State(msgspec.Struct):
    """The state that a driver of any release gets."""

    former: list[str] = []


def serve_in_turn(settings: server.Settings, state_dir: Path) -> None:
    """Serve whenever this driver may, until SIGTERM or SIGINT. Raises PlaceUnusable, ConfigError,
    OSError."""
    waits = False
    records.check_directory(state_dir)
    while True:
        takeover.exit_on_signal()
        owned = _obtain(state_dir, waits=waits)
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame, stopped=stopped: stopped.set())
        is_owner = True
        try:
            is_owner = _serve(settings, state_dir, owned, stopped)
        finally:
            is_accepted = owned.offered is None or owned.offered.is_accepted
            if is_owner and is_accepted:
                filelock.release(str(records.lock_path(state_dir)), owned.lock)
            else:  # another driver has the lock, too
                os.close(owned.lock)
        takeover.exit_on_signal()
        if is_owner or stopped.is_set():
            return
        waits = True


def _obtain(state_dir: Path, *, waits: bool) -> _Owned:
    """Get the lock of the records, from the running driver or because there is none."""
    said = ""
    while True:
        wanted = Claim(takeover.name_of_container(), version_of("ckptfs"), waits)
        found = takeover.claim(str(state_dir / _SOCKET), wanted)
        reason = "it does not hand over"
        if isinstance(found, Refused):
            waits = waits or found.lasting
            reason = found.reason
        elif isinstance(found, Offered):
            owned = _accept(found)
            if isinstance(owned, _Owned):
                return owned
            reason = owned
        with contextlib.suppress(TimeoutError):
            lock = filelock.acquire(str(records.lock_path(state_dir)), 0)
            return _Owned(lock, None, [], follows=waits)
        if found is not None and reason != said:
            log.warning("cannot take over from the running driver: %s; trying again", reason)
            said = reason
        time.sleep(_PAUSE_S)


def _accept(offered: Offered) -> "_Owned | str":
    """Take over what a driver has offered. Returns the reason if that one goes on."""
    try:
        state = msgspec.json.decode(offered.state, type=_State)
    except msgspec.DecodeError as error:
        reason = f"its state is unknown: {error}"
    else:
        reason = offered.ready() if _LOCK in offered.fds else "its offer lacks the lock"
        if not reason:
            return _Owned(offered.fds.pop(_LOCK), offered, state.former, follows=True)
    offered.refuse(reason)
    offered.close_fds()
    return reason


def _serve(
    settings: server.Settings, state_dir: Path, owned: _Owned, stopped: threading.Event
) -> bool:
    """Serve until `stopped`, or until another driver has taken over. Returns whether this one is
    still the owner."""
    publishing = Publishing(Records(state_dir))
    registration = settings.registration
    upkeep = server.Upkeep(registration, publishing)
    offered = owned.offered
    taken_over = owned.follows
    while not stopped.is_set():
        publishing.reconcile()
        with server.running(settings, publishing), _claimants(state_dir, owned) as claimants:
            if offered is not None:
                log.info("took over from the former driver")
                offered.serving()
                offered.close_fds()
                offered = None
            if registration:
                registration.start(taken_over=taken_over)
            taken_over = True  # a heir that has failed has left the registration
            heir = _wait(claimants, upkeep, stopped)
            is_last = not claimants
        if heir is not None and _hand_over(heir, publishing):
            return False
        if stopped.is_set() and is_last and registration:
            registration.end()
    return True


@contextlib.contextmanager
def _claimants(state_dir: Path, owned: _Owned) -> Generator[Claimants]:
    path = str(state_dir / _SOCKET)
    state = _State([*owned.former, takeover.name_of_container()][-_FORMER_MAX:])
    offer = (state, {_LOCK: owned.lock})
    try:
        claimants = Claimants(path, owned.former, lambda: offer, log.info)
    except OSError as error:
        raise PlaceUnusable(
            f"{path}: {error.strerror or error}; give a shorter path as --state-dir"
        ) from None
    try:
        yield claimants
    finally:
        claimants.close(is_owner=True)


def _wait(claimants: Claimants, upkeep: server.Upkeep, stopped: threading.Event) -> Heir | None:
    """Wait for a driver that can begin, or for `stopped`."""
    while not stopped.is_set():
        heir = claimants.wait(server.LOOK_S)
        if heir is not None:
            return heir
        upkeep.run()
    return None


def _hand_over(heir: Heir, publishing: Publishing) -> bool:
    """Let another driver serve, after this one's server has stopped. Returns whether it does."""
    log.info("handing over to ckptfs %s on %r", heir.version, heir.name)
    if not publishing.wait_idle(_CALLS_S):
        log.warning("serving on, because calls are still running")
        heir.refuse("its calls are still running")
        return False
    if why_not := heir.grant():
        log.error("%r does not serve: %s; serving again", heir.name, why_not)
        return False
    log.info("%r serves the volumes now; waiting for its end", heir.name)
    return True
