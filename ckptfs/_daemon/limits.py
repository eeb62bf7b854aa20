"""What each user may do, and how many checkpoints and calls at stores are theirs (see `users`)."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import ParamSpec, TypeVar

import trio

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.users import is_ours, limit_for
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._store.draft import OF_CALLER, mount_namespace
from ckptfs._store.kinds import NAMESPACE, lent_for
from ckptfs.errors import LimitExceeded, RightsNotLent

_AT_STORE_MAX = 8
"""Listings and checks for one of the other users at the same time, of the sixteen that there can be
(``offload``): who attaches at stores that do not answer keeps nobody else waiting."""

P = ParamSpec("P")
T = TypeVar("T")


def may_see(uid: int, attachment: Attachment) -> bool:
    """Whether that user may know of the attachment."""
    return uid in (0, attachment.uid)


def check_rights(uid: int, location: Location, config: Config) -> None:
    """Raise RightsNotLent where the daemon would lend its own rights to another user.

    The table of a named store has decided who may use that. Files that another user names are never
    read, also where rights are lent: a profile of AWS, for example, can name a program to run.
    """
    if is_ours(uid) or location.store is not None:
        return
    if (lent := lent_for(location)) and not config.lend_daemon_rights:
        raise RightsNotLent(
            f"{location.uri} would be read with the ckptfs daemon's own {lent}, which are not "
            f"for uid {uid}; give credentials of your own (e.g. AWS_ACCESS_KEY_ID), or start a "
            "daemon of your own (CKPTFS_SOCKET), or have lend_daemon_rights set"
        )
    if named := sorted(OF_CALLER & location.options.keys()):
        raise RightsNotLent(
            f"{location.uri} names {named[0]}, which the ckptfs daemon does not read for uid "
            f"{uid}; start a daemon of your own (CKPTFS_SOCKET)"
        )


def check_files(location: Location) -> None:
    """Raise RightsNotLent where the caller's files are not the daemon's, though the user is the
    same: the caller runs in another container."""
    namespace = location.options.get(NAMESPACE)
    if namespace is not None and namespace != mount_namespace():
        raise RightsNotLent(
            f"{location.uri} names files of another mount namespace than the ckptfs daemon's; "
            "start a daemon of your own (CKPTFS_SOCKET)"
        )


def check_attached(
    uid: int, attached: Iterable[Attachment], config: Config, more_files: int = 0
) -> None:
    """Raise LimitExceeded where one more checkpoint, with so many files, is too much for that user
    or for all of them."""
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
    """Small requests to stores, of which each of the other users has `_AT_STORE_MAX` under way."""

    def __init__(self, offload: Offload) -> None:
        self._offload = offload
        self._under_way: dict[int, trio.CapacityLimiter] = {}  # by user, for all but ours

    async def run(self, uid: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a request for that user. A call that nobody waits for any more still counts, until
        its thread is free."""
        if is_ours(uid):
            return await self._offload.control(call, *args, **kwargs)
        limiter = self._under_way.setdefault(uid, trio.CapacityLimiter(_AT_STORE_MAX))
        borrower = object()
        loop = trio.lowlevel.current_trio_token()
        begun = False

        def give_back() -> None:
            if borrower in limiter.statistics().borrowers:
                limiter.release_on_behalf_of(borrower)
            if not limiter.statistics().borrowers and not limiter.statistics().tasks_waiting:
                self._under_way.pop(uid, None)

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
