"""The named stores of this daemon: their places, their users, and how the daemon opens them.

A client sends the name of a store and a path in it. `find` looks the name up here, and the daemon
reads the credentials. The `users` and `groups` of the store's table, root and the daemon's own user
may use the store. They never get its credentials, and they reach only paths below its URI.

`find` notes its answer in `Location.store`. The control socket rejects requests with that field,
because the field stands for the permission.

The daemon reads S3, Google and Azure with its own client, in threads that end by themselves. Under
a sustained load, it reads them in workers as well (``ckptfs._workers.spread``). Workers read all
other stores (``ckptfs._workers``), which need a library. A worker also reads local files, because a
network file system may not answer. A thread that waits for it would keep a killed daemon alive, and
the next daemon could not begin.
"""

import functools
import grp
import logging
import os
import pwd
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from ckptfs._daemon.quotas import is_ours
from ckptfs._model.location import Location
from ckptfs._model.named_store import Credentials, StoreTable, Who
from ckptfs._store.base import Store
from ckptfs._store.resolve import IN_PROCESS, open_store
from ckptfs._workers.pool import Pool
from ckptfs._workers.spread import Load, SpreadStore
from ckptfs._workers.store import WorkerStore
from ckptfs.errors import CkptfsError, LocationError, ProtocolError, StoreNotAllowed, UnknownStore

log = logging.getLogger(__name__)

OpenFor: TypeAlias = Callable[[Location, float, int], Store]
"""Opens a location for a user: location, timeout (see ``resolve.open_store``), uid."""
OpenWith: TypeAlias = Callable[[Location, float, int, Credentials], Store]
"""The same, with credentials as the last argument."""
_OPTIONS = frozenset(["store", "like"])


class Peer(NamedTuple):
    """A client's user and groups, from the kernel. `groups` are the supplementary groups."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()


class Known(NamedTuple):
    """A store's table, and the ids of its users and groups; None for all users."""

    table: StoreTable
    uids: frozenset[int] | None
    gids: frozenset[int] | None

    def allows(self, peer: Peer) -> bool:
        """Whether the client may use the store."""
        return (
            is_ours(peer.uid)
            or self.uids is None
            or self.gids is None
            or peer.uid in self.uids
            or not self.gids.isdisjoint([peer.gid, *peer.groups])
        )


def known_stores(tables: Mapping[str, StoreTable]) -> dict[str, Known]:
    """The tables with the ids of their users and groups. Blocking, because that may ask a directory
    service.

    The log names each user and group that the machine does not have. Such a name gives no right.
    """
    return {
        name: Known(
            table,
            _numbers(name, table.users, lambda user: pwd.getpwnam(user).pw_uid),
            _numbers(name, table.groups, lambda group: grp.getgrnam(group).gr_gid),
        )
        for name, table in tables.items()
    }


def _numbers(store: str, who: Who, number_of: Callable[[str], int]) -> frozenset[int] | None:
    if isinstance(who, str):
        return None
    found: set[int] = set()
    for each in who:
        try:
            found.add(each if isinstance(each, int) else number_of(each))
        except KeyError:
            log.warning("store.%s: there is no user or group %r on this machine", store, each)
    return frozenset(found)


def opening_with(pool: Pool, load: Load, *, is_private: bool) -> OpenWith:
    """The function that opens all stores of a daemon, with workers of `pool`, and counts their long
    reads in `load`. A private daemon has one filesystem, which its workers know."""

    def open_with(
        location: Location, timeout_s: float, uid: int, credentials: Credentials
    ) -> Store:
        in_worker = functools.partial(WorkerStore, pool, uid)
        if is_private:
            return in_worker(location, timeout_s)
        store = open_store(location, timeout_s, credentials, in_worker)
        if location.kind not in IN_PROCESS:
            return store
        in_workers = in_worker(location, timeout_s, credentials, is_needed=False)
        return SpreadStore(store, in_workers, load)

    return open_with


def _open_nothing(location: Location, *_: object) -> Store:
    raise LocationError(f"{location.uri} cannot be opened here")


class Stores:
    """Looks named stores up, and opens named stores and all others."""

    def __init__(self, known: Mapping[str, Known], open_with: OpenWith = _open_nothing) -> None:
        self.known = dict(known)
        self._open_with = open_with

    def find(self, location: Location, peer: Peer) -> Location:
        """The place that a client's location names. A location without a named store stays as it
        is.

        Raises UnknownStore, StoreNotAllowed, and LocationError for a path that leads out of the
        store.
        """
        if location.store is not None:
            raise ProtocolError("a client must not name the store of a location (Location.store)")
        if location.kind != "named":
            return location
        name, like = location.options.get("store"), location.options.get("like")
        if not isinstance(name, str) or location.secrets or location.options.keys() - _OPTIONS:
            raise LocationError("not the name of a store")
        known = self.known.get(name)
        if known is None or (like is not None and like != known.table.like()):
            raise UnknownStore(
                f"{location.uri}: the ckptfs daemon knows no store {name!r}"
                f"{' like yours' if known else ''}; add [store.{name}] to its configuration, and "
                "ckptfs reload"
            )
        if not known.allows(peer):
            raise StoreNotAllowed(
                f"{location.uri}: the store {name!r} of the ckptfs daemon is not for uid "
                f"{peer.uid}; have that added to its users or groups"
            )
        return known.table.location(name, location.path)

    def target(self, location: Location, uid: int, gid: int) -> tuple[Location, Credentials]:
        """The place that a location of a client names for an upload, and the credentials of its
        named store. Raises as `find`."""
        found = self.find(location, Peer(uid, gid))
        if found.store is None:
            return found, "default"
        return found, self.known[found.store.name].table.credentials

    def open(self, location: Location, timeout_s: float, uid: int) -> Store:
        """Open a store, as ``resolve.open_store``. Raises LocationError also if the table of the
        location's named store has changed since `find`."""
        if location.store is None:
            return self._open_with(location, timeout_s, uid, "default")
        known = self.known.get(location.store.name)
        if known is None or not self._leads_to(location):
            raise LocationError(
                f"{location.uri}: the store {location.store.name!r} is no longer what it was; "
                "attach it again"
            )
        return self._open_with(location, timeout_s, uid, known.table.credentials)

    def still_for(self, location: Location, uid: int, gid: int) -> bool:
        """Whether the name of a location from `find` still stands for the same place, and the user
        may still use it. Blocking."""
        if location.store is None:
            return True
        known = self.known.get(location.store.name)
        groups = _groups_of(uid, gid)
        return (
            known is not None and self._leads_to(location) and known.allows(Peer(uid, gid, groups))
        )

    def _leads_to(self, location: Location) -> bool:
        assert location.store is not None
        below = location.path[len(location.store.root) :].lstrip("/")
        known = self.known[location.store.name]
        try:
            return known.table.location(location.store.name, below) == location
        except CkptfsError:
            return False


def _groups_of(uid: int, gid: int) -> frozenset[int]:
    try:
        return frozenset(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
    except KeyError:
        return frozenset([gid])
