"""The rights of each user, and each user's limits of checkpoints and calls to stores."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import ParamSpec, TypeAlias, TypeVar

import trio

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.quotas import is_ours, limit_for
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.volume import Volume
from ckptfs._store.builders import NAMESPACE
from ckptfs._store.environment.draft import OF_CALLER, mount_namespace
from ckptfs._store.kinds import daemon_rights_for
from ckptfs.errors import LimitExceeded, LocationError, RightsNotLent

_AT_STORE_MAX = 8
"""Listings and checks for one of the other users at the same time, of the sixteen that can run
(``offload``). So a user whose stores do not answer does not keep others waiting. The volumes of one
owner count as one user."""
Caller: TypeAlias = int | str
"""A user, or the owner of volumes."""

P = ParamSpec("P")
T = TypeVar("T")


def may_see(uid: int, attachment: Attachment) -> bool:
    """Whether the user may know of the attachment."""
    return uid in (0, attachment.uid)


def check_rights(
    uid: int, location: Location, config: Config, volume: Volume | None = None
) -> None:
    """Raise RightsNotLent if another user, or a volume, would read with the daemon's own rights.

    The table of a named store has decided which users may use that store. With
    `lend_daemon_rights`, users may read with the daemon's credentials. The daemon still reads no
    files that another user names, because a profile of AWS, for example, can name a program to run.
    """
    if volume is not None:
        _check_volume(volume, location)
        return
    if is_ours(uid) or location.store is not None:
        return
    if (rights := daemon_rights_for(location)) and not config.lend_daemon_rights:
        raise RightsNotLent(
            f"{location.uri} would be read with the ckptfs daemon's own {rights}, which are not "
            f"for uid {uid}; give credentials of your own (e.g. AWS_ACCESS_KEY_ID), or start a "
            "daemon of your own (CKPTFS_SOCKET), or have lend_daemon_rights set"
        )
    if named := sorted(OF_CALLER & location.options.keys()):
        raise RightsNotLent(
            f"{location.uri} names {named[0]}, which the ckptfs daemon does not read for uid "
            f"{uid}; start a daemon of your own (CKPTFS_SOCKET)"
        )


def _check_volume(volume: Volume, location: Location) -> None:
    """A pod names the place, so the volume counts as another user, although root attaches it."""
    rights = "stores" if location.store is not None else daemon_rights_for(location)
    if rights and not volume.lends:
        raise RightsNotLent(
            f"{location.uri} would be read with the ckptfs daemon's own {rights}, which are not "
            "for this volume; give it credentials"
        )
    if named := sorted(OF_CALLER & location.options.keys()):
        raise RightsNotLent(
            f"{location.uri} names {named[0]}, which the ckptfs daemon does not read for a volume; "
            "leave it out"
        )


def check_files(location: Location) -> None:
    """Raise RightsNotLent if the caller's files are not the daemon's files, because the caller runs
    in another container."""
    namespace = location.options.get(NAMESPACE)
    if namespace is not None and namespace != mount_namespace():
        raise RightsNotLent(
            f"{location.uri} names files of another mount namespace than the ckptfs daemon's; "
            "start a daemon of your own (CKPTFS_SOCKET)"
        )


def check_namespace(location: Location, namespace: str) -> None:
    """Raise LocationError if a local target is a path of another container. `namespace` is the
    client's."""
    if location.kind == "local" and namespace != mount_namespace():
        raise LocationError(
            f"{location.uri} is a path of another mount namespace than the ckptfs daemon's; upload "
            "with wait=True"
        )


def check_attached(
    uid: int, attached: Iterable[Attachment], config: Config, more_files: int = 0
) -> None:
    """Raise LimitExceeded if one more checkpoint, with so many files, exceeds the limit of the user
    or of all users."""
    attached = list(attached)
    own = [a for a in attached if a.uid == uid]
    for those, who, share in ((own, uid, " for one user"), (attached, os.geteuid(), "")):
        if len(those) >= limit_for(who, config.attachments_max):
            raise LimitExceeded(
                f"{len(those)} checkpoints are attached, the most that attachments_max allows"
                f"{share}; detach one, or raise it"
            )
        files = sum(len(a.manifest.files) for a in those)
        if files + more_files > limit_for(who, config.attached_files_max):
            raise LimitExceeded(
                f"{files} files are attached, and {more_files} more are more than "
                f"attached_files_max allows{share}; detach a checkpoint, or raise it"
            )


class StoreCalls:
    """Runs small requests to stores, at most `_AT_STORE_MAX` at a time for one of the other
    users."""

    def __init__(self, offload: Offload) -> None:
        self._offload = offload
        self._under_way: dict[Caller, trio.CapacityLimiter] = {}  # for all but our users

    async def run(
        self, caller: Caller, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a request for a caller. A cancelled call still counts until its thread is free."""
        if isinstance(caller, int) and is_ours(caller):
            return await self._offload.control(call, *args, **kwargs)
        limiter = self._under_way.setdefault(caller, trio.CapacityLimiter(_AT_STORE_MAX))
        borrower = object()
        loop = trio.lowlevel.current_trio_token()
        begun = False

        def give_back() -> None:
            if borrower in limiter.statistics().borrowers:
                limiter.release_on_behalf_of(borrower)
            if not limiter.statistics().borrowers and not limiter.statistics().tasks_waiting:
                self._under_way.pop(caller, None)

        def counted() -> T:
            nonlocal begun
            begun = True
            try:
                return call(*args, **kwargs)
            finally:
                with suppress(trio.RunFinishedError):
                    loop.run_sync_soon(give_back)

        await limiter.acquire_on_behalf_of(borrower)
        try:
            return await self._offload.control(counted)
        finally:
            if not begun:
                give_back()
