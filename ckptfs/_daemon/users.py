"""Users of the node, and how much of everything is theirs.

Limits hold for all users together. Of each, one user other than root and the daemon's own may take
a quarter, so that nobody is shut out by one of the others.
"""

import os

from ckptfs._model.location import Location

_ONE_USERS_SHARE = 4
"""One of the other users may take the fourth part of what there is for all."""


_WAY = frozenset(
    [
        "proxy",
        "tls_ca_dir_path",
        "tls_ca_file_path",
        "tls_ca_pem",
        "tls_verify_certificates",
    ]
)
"""Options and secrets that decide which server answers for a store's name."""


def cache_scope(uid: int, location: Location) -> str:
    """What tells the cached bytes of an attachment apart from those that all users of its store
    share; "": nothing.

    A user who names a proxy, or the certificates to trust, could answer for the store. So the bytes
    that come by such a way are cached for that user only. `location` has its secrets.
    """
    if is_ours(uid) or location.store is not None:
        return ""
    chosen = _WAY & {*location.options, *location.secrets}
    return f" by the way of uid {uid}" if chosen else ""


def is_ours(uid: int) -> bool:
    """Whether it is root or the daemon's own user, for whom there are no limits of a user."""
    return uid in (0, os.geteuid())


def limit_for(uid: int, limit: int) -> int:
    """How much of a limit that user may take."""
    return limit if is_ours(uid) else share_of(limit)


def share_of(limit: int) -> int:
    """How much of a limit one of the other users may take."""
    return max(1, limit // _ONE_USERS_SHARE)
