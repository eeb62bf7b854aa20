"""Users of the node, and how much of everything is theirs.

Limits hold for all users together. Of each, one user other than root and the daemon's own may take
a quarter, so that nobody is shut out by one of the others.
"""

import os

_ONE_USERS_SHARE = 4
"""One of the other users may take the fourth part of what there is for all."""


def is_ours(uid: int) -> bool:
    """Whether it is root or the daemon's own user, for whom there are no limits of a user."""
    return uid in (0, os.geteuid())


def limit_for(uid: int, limit: int) -> int:
    """How much of a limit that user may take."""
    return limit if is_ours(uid) else share_of(limit)


def share_of(limit: int) -> int:
    """How much of a limit one of the other users may take."""
    return max(1, limit // _ONE_USERS_SHARE)
