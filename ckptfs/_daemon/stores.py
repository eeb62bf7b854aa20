"""The named stores that this daemon knows: what a name stands for, who may use it, and opening it.

A client sends a name and a path in it. What a name stands for is looked up here (`find`), and the
credentials are read here: who may use a store (`users` and `groups` of its table, and always root
and the daemon's own user) never gets them, and gets nowhere but below its URI.

A location that has been looked up says so in `Location.store`. On the control socket that field is
refused, because it stands for the permission.

S3 is read by our own client in threads of the daemon, which end by themselves. Everything else
needs a library, and so is read by a worker (``ckptfs._workers``). So are local files, because a
file system of the network may not answer: the thread that waits for it keeps a process that is
killed, and so the next daemon could not begin.
"""

import functools
import grp
import logging
import os
import pwd
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from ckptfs._daemon.users import is_ours
from ckptfs._model.location import Location
from ckptfs._model.stores import Credentials, StoreTable, Who
from ckptfs._store.base import Store
from ckptfs._store.resolve import open_store
from ckptfs._workers.pool import Pool
from ckptfs._workers.store import WorkerStore
from ckptfs.errors import CkptfsError, LocationError, ProtocolError, StoreNotAllowed, UnknownStore

log = logging.getLogger(__name__)

OpenFor: TypeAlias = Callable[[Location, float, int], Store]
"""Opens a location with that timeout (see ``resolve.open_store``) for that user."""
OpenWith: TypeAlias = Callable[[Location, float, int, Credentials], Store]
"""Likewise, with these credentials."""
_OPTIONS = frozenset(["store", "like"])


class Peer(NamedTuple):
    """Who asks, as the kernel says; `groups` are the further ones."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()


class Known(NamedTuple):
    """A table, and the numbers of who may use it; None: everybody."""

    table: StoreTable
    uids: frozenset[int] | None
    gids: frozenset[int] | None

    def allows(self, peer: Peer) -> bool:
        """Whether they may use it."""
        return (
            is_ours(peer.uid)
            or self.uids is None
            or self.gids is None
            or peer.uid in self.uids
            or not self.gids.isdisjoint([peer.gid, *peer.groups])
        )


def known_stores(tables: Mapping[str, StoreTable]) -> dict[str, Known]:
    """Blocking (a directory service may be asked). The tables with the numbers of users and groups.

    A name that nobody has is noted in the log, and allows nobody.
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


def opening_with(pool: Pool, *, is_private: bool) -> OpenWith:
    """What opens all stores of a daemon, whose workers are those of `pool`. A private daemon has
    one filesystem, which they know."""

    def open_with(
        location: Location, timeout_s: float, uid: int, credentials: Credentials
    ) -> Store:
        in_worker = functools.partial(WorkerStore, pool, uid)
        if is_private:
            return in_worker(location, timeout_s)
        return open_store(location, timeout_s, credentials, in_worker)

    return open_with


def _open_nothing(location: Location, *_: object) -> Store:
    raise LocationError(f"{location.uri} cannot be opened here")


class Stores:
    """The named stores, and all others, for `open`.

    Args:
        known: The named ones.
        open_with: Opens all of them.
    """

    def __init__(self, known: Mapping[str, Known], open_with: OpenWith = _open_nothing) -> None:
        self.known = dict(known)
        self._open_with = open_with

    def find(self, location: Location, peer: Peer) -> Location:
        """The place that a client asks for. Other locations than named ones are what they say.

        Raises UnknownStore, StoreNotAllowed, and LocationError for a path that leads out of it.
        """
        if location.store is not None:
            raise ProtocolError("a client does not say by whose credentials a location is read")
        if location.kind != "named":
            return location
        name, like = location.options.get("store"), location.options.get("like")
        if not isinstance(name, str) or location.secrets or location.options.keys() - _OPTIONS:
            raise LocationError("no name of a store")
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

    def open(self, location: Location, timeout_s: float, uid: int) -> Store:
        """See ``resolve.open_store``. Raises LocationError, too, for what a named store was."""
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
        """Blocking. Whether a location that was looked up earlier is still what its name stands
        for, and for that user."""
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
