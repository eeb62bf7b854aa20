"""Waits until files of a mounted checkpoint are in the node's cache, and reports failures."""

import os
import time
from collections.abc import Callable, Sequence

from ckptfs._client.connection import Connection
from ckptfs._model.manifest import printable
from ckptfs._model.plans.plan import Wanted
from ckptfs._model.protocol.replies import Prefetching
from ckptfs._model.units import size_text
from ckptfs.errors import BY_CODE, CkptfsError, PrefetchFailed

_SHOWN_MAX = 3
"""Files in a message. The attributes of each file have its error."""


def failure_of(state: Prefetching, shown: str) -> CkptfsError | None:
    """One error for all failures of an ended prefetch, or None. `shown` names the checkpoint."""
    said: list[str] = []
    if state.early_code:
        said.append(f"the prefetch ended early: {state.early_message}")
    if state.error_count:
        errors = [error.message for error in state.errors[:_SHOWN_MAX]]
        if state.error_count > len(errors):
            more = state.error_count - len(errors)
            errors.append(f"and {more} more (ckptfs prefetch --json lists them)")
        said.append(
            f"{state.error_count} of {state.files} files could not be fetched: {'; '.join(errors)}"
        )
    if state.unmatched and not state.early_code:
        globs = ", ".join(printable(each) for each in state.unmatched)
        fetched = "" if not state.files else " (others are fetched)"
        said.append(f"no file in {shown} matches {globs}{fetched}; ckptfs ls lists the files")
    if not said:
        return None
    kind = BY_CODE.get(state.early_code, CkptfsError) if state.early_code else PrefetchFailed
    return kind("; ".join(said))


def wait_fetched(
    connection: Connection,
    path: str,
    globs: Sequence[str],
    timeout_s: float | None,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Wait until the files of `globs` are complete and checked in the cache, which keeps them until
    the attachment ends.

    Args:
        connection: A connection to the daemon that has mounted the checkpoint.
        path: The checkpoint's directory in the mount, which the caller holds.
        globs: Globs on relative paths.
        timeout_s: Longest wait; None to wait as long as the store sends bytes.
        progress: Called with the bytes in the cache and the bytes of all these files.

    Raises:
        PrefetchFailed: A glob matches no file, files could not be fetched, or the time was over.
        StoreTimeout, LimitExceeded, NotAttached, ...: The reason of an early end.
    """
    until_s = None if timeout_s is None else time.monotonic() + timeout_s

    def look(there: int, all_: int) -> None:
        if progress is not None:
            progress(there, all_)
        if until_s is not None and time.monotonic() > until_s and there < all_:
            raise PrefetchFailed(
                f"{path}: only {size_text(there)} of {size_text(all_)} were fetched after "
                f"{timeout_s:g} s; give a longer timeout_s, or fewer files"
            )

    state = connection.prefetch(os.path.basename(path), Wanted(list(globs), keep=True), look)
    if (error := failure_of(state, path)) is not None:
        raise type(error)(f"{path}: {error}")
