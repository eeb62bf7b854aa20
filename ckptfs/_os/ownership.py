"""The check that a file belongs to this user, and that no other user may change it.

Callers pass the status of a descriptor that they have opened (``fstat``), so another user cannot
exchange the file between the check and the use. Callers that care about links and types of files
check those themselves.
"""

import os

WRITE_BY_GROUP_OR_OTHERS = 0o022


def is_this_users_alone(
    info: os.stat_result, forbidden: int = WRITE_BY_GROUP_OR_OTHERS, *, or_roots: bool = False
) -> bool:
    """Whether a file belongs to the effective user of this process, and its mode is narrow enough.

    Args:
        info: The status of the file.
        forbidden: The bits of the mode that must not be set.
        or_roots: Whether the file may belong to root instead.
    """
    owners = (os.geteuid(), 0) if or_roots else (os.geteuid(),)
    return info.st_uid in owners and not info.st_mode & forbidden
