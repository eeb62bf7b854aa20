"""Explanations of failed reads of a mounted checkpoint.

A program gets an errno from the kernel, without a reason. The daemon puts the reason into
``user.ckptfs.error`` of the file and of the checkpoint's root. `explain` finds it for an exception
or a path, and `noting` adds it to exceptions that leave ``as_directory``.

An explanation must not hide or delay the error. If a daemon hangs, a process that looks into its
mount cannot even be killed. So this module first asks the daemon on its control socket, with a
timeout. It does so in a thread, for which the caller waits no longer than `timeout_s`.
"""

import contextlib
import errno
import logging
import os
import queue
import re
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

from ckptfs import xattrs
from ckptfs._client import client, private_daemon
from ckptfs._client.connection import Connection
from ckptfs._model import attributes as names
from ckptfs._os.mountinfo import mounts
from ckptfs.errors import CkptfsError, NoDaemon, NotAttached

log = logging.getLogger("ckptfs")

_TIMEOUT_S = 2.0
"""Longest delay of an error. The daemon answers within milliseconds, or later on a busy machine."""
_MARK = "ckptfs: "
"""The beginning of each note."""
_ERRNOS = frozenset(
    (errno.EIO, errno.ETIMEDOUT, errno.EACCES, errno.ESTALE, errno.ENFILE, errno.ENOTCONN)
)
"""The errnos of reads that fail because of the store or the daemon, see SEMANTICS.md."""
_CHAIN_MAX = 32
"""Maximum number of exceptions in a chain that this module examines."""
_SHOWS_NOTES = sys.version_info >= (3, 11)
"""Whether tracebacks show notes. Otherwise the reason is also logged."""
_GONE = "gone"
"""A further state: the attachment has ended, or the daemon with its mount."""
_TEXT_LENGTH_MAX = 10_000
"""Maximum length of a message that is searched for paths."""


class _Entered(NamedTuple):
    """An ``as_directory`` of this process: its path, and the checkpoint's error before it."""

    path: str
    before: str


class _Cause(NamedTuple):
    """The cause of a failed read.

    Attributes:
        error: The time and the text of the last error, or ""; if `state` is `_GONE`, only a text.
        log: The path of the daemon's log, or "".
    """

    error: str
    state: str
    uri: str
    log: str


_entered: list[_Entered] = []


def explain(
    error: "BaseException | str | os.PathLike[str]", *, timeout_s: float = _TIMEOUT_S
) -> str | None:
    """Explain a failed read of a mounted checkpoint, with a remedy.

    >>> with Checkpoint("s3://bucket/run7").as_directory() as path:
    ...     try:
    ...         load_file(f"{path}/model.safetensors")
    ...     except (OSError, SafetensorError) as error:
    ...         print(ckptfs.explain(error))
    /run/ckptfs/mnt/run7-6f1d0c2a9b3e/model.safetensors: nothing came from the store within 60 ...

    The text is for people and may change. It has no credentials.

    Args:
        error: An exception, or a path, e.g. of a program that SIGBUS has ended. The function
            searches the exception with its causes, contexts and groups for a path in a mount, so
            libraries may wrap it. Without a path, it looks at the current ``as_directory`` contexts
            of this process.
        timeout_s: Longest wait for the daemon, in seconds.

    Returns:
        The reason; None if the path is in no mount, no read has failed, or the daemon does not
        answer.
    """
    if not isinstance(error, BaseException):
        return _explained([os.fsdecode(error)], timeout_s)
    chain = list(_chain(error))
    for each in chain:
        for note in _listed_in(each, "__notes__"):
            if isinstance(note, str) and note.startswith(_MARK):
                return note.removeprefix(_MARK)
    for each in chain:
        if isinstance(each, CkptfsError):
            return str(each)
    paths = list(dict.fromkeys(path for each in chain for path in _paths_in(each)))
    if not paths and isinstance(error, OSError) and error.filename is not None:
        return None  # its file is not in a mount
    return _explained(paths or [entered.path for entered in reversed(_entered)], timeout_s)


@contextlib.contextmanager
def noting(path: str) -> Generator[None]:
    """Add the reason as a note (PEP 678) to exceptions that leave the context.

    The context uses the checkpoint mounted at `path`. An exception gets a note if it is of a failed
    read of this checkpoint. It also gets one if such a read has failed meanwhile, because libraries
    wrap errors in exceptions of their own.
    """
    before = ""
    with contextlib.suppress(OSError):
        before = xattrs.get(path, names.ERROR) or ""
    entered = _Entered(path, before)
    _entered.append(entered)
    try:
        yield
    except Exception as error:
        with contextlib.suppress(Exception):
            _note(error, entered)
        raise
    finally:
        _entered.remove(entered)


def _note(error: Exception, entered: _Entered) -> None:
    chain = list(_chain(error))
    if any(isinstance(each, CkptfsError) for each in chain):
        return  # its message has the reason
    inside = [path for each in chain for path in _paths_in(each) if _is_below(path, entered.path)]
    path = inside[0] if inside else entered.path
    cause = _within(_TIMEOUT_S, path)
    if cause is None:
        return
    failed = any(
        isinstance(each, OSError)
        and each.errno in _ERRNOS
        and (each.filename is None or path in inside)
        for each in chain
    )
    is_new = cause.error != entered.before
    is_now = cause.state in ("failing", "changed", _GONE)
    if cause.error and (is_new or (failed and is_now)):
        _add_note(error, _MARK + _text(path, cause))


def _add_note(error: Exception, note: str) -> None:
    noted = _listed_in(error, "__notes__")
    if note in noted:  # by an inner context
        return
    error.__dict__["__notes__"] = [*noted, note]  # like add_note, which Python 3.10 lacks
    if not _SHOWS_NOTES:
        log.warning("%s", note)


def _explained(paths: "list[str]", timeout_s: float) -> str | None:
    for path in paths:
        cause = _within(timeout_s, path)
        if cause is not None and cause.error:
            return _text(path, cause)
    return None


def _text(path: str, cause: _Cause) -> str:
    where = f"; the daemon's log: {cause.log}" if cause.log else ""
    if cause.state == _GONE:
        return f"{path}: {cause.error}{where}"
    at, _, said = cause.error.partition(" ")
    advice = ""
    if cause.state == "failing":
        advice = f"; ckptfs doctor '{cause.uri}' looks for the reason"
    elif cause.state != "changed":  # that error has advice itself
        advice = "; the store has answered since, so try again"
    return f"{path}: {said} (at {at}){advice}{where}"


# -- exceptions


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: dict[int, BaseException] = {}
    left = [error]
    while left and len(seen) < _CHAIN_MAX:
        each = left.pop(0)
        if id(each) in seen:
            continue
        seen[id(each)] = each
        yield each
        found = (*_listed_in(each, "exceptions"), each.__cause__, each.__context__)
        left += [one for one in found if isinstance(one, BaseException)]


def _paths_in(error: BaseException) -> Iterator[str]:
    """The paths in mounts of ckptfs in an exception's attributes and message."""
    tops = [mount.path for mount in mounts()]
    for name in ("filename", "filename2"):
        found = _attribute(error, name)
        if isinstance(found, bytes):
            found = os.fsdecode(found)
        if isinstance(found, str) and any(_is_below(found, top) for top in tops):
            yield found
    with contextlib.suppress(Exception):  # a library's __str__ can fail
        text = str(error)[:_TEXT_LENGTH_MAX]
        for top in tops:
            for match in re.finditer(re.escape(top) + r"/[^\s'\":;,)]+", text):
                yield match[0]


def _attribute(error: BaseException, name: str) -> object:
    """An attribute, which in a library's exception can be a property that fails."""
    with contextlib.suppress(Exception):
        return getattr(error, name, None)
    return None


def _listed_in(error: BaseException, name: str) -> "Sequence[object]":
    found = _attribute(error, name)
    return cast("Sequence[object]", found) if isinstance(found, (list, tuple)) else ()


def _is_below(path: str, top: str) -> bool:
    try:
        full = os.path.abspath(path)
    except FileNotFoundError:  # the working directory is gone
        return False
    return os.path.join(full, "").startswith(os.path.join(top, ""))


# -- the daemon


def _within(timeout_s: float, path: str) -> _Cause | None:
    """The cause, or None if the daemon does not answer in time."""
    answers: queue.SimpleQueue[_Cause | None] = queue.SimpleQueue()

    def ask() -> None:
        found = None
        try:
            found = _ask(path, timeout_s)
        except (CkptfsError, OSError, ValueError) as error:
            log.debug("cannot explain %s: %s", path, error)
        finally:
            answers.put(found)

    threading.Thread(target=ask, name="ckptfs-explain", daemon=True).start()
    with contextlib.suppress(queue.Empty):
        return answers.get(timeout=timeout_s)
    return None


def _ask(path: str, timeout_s: float) -> _Cause | None:
    log_place = _log_of(path, timeout_s)  # first, because a hanging daemon raises an error here
    try:
        top = xattrs.root_of(path)
    except (FileNotFoundError, NotAttached):
        is_ours = any(_is_below(path, mount.path) for mount in mounts())
        ended = "its checkpoint is no longer attached, so attach it again"
        return _Cause(ended, _GONE, "", log_place) if is_ours else None
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise
        ended = "the daemon that served this mount has ended, so attach the checkpoint again"
        return _Cause(ended, _GONE, "", log_place)
    error = xattrs.get(path, names.ERROR) or xattrs.get(top, names.ERROR) or ""
    state = xattrs.get(path, names.STATE) or xattrs.get(top, names.STATE) or ""
    return _Cause(error, state, xattrs.get(top, names.URI) or "", log_place)


def _log_of(path: str, timeout_s: float) -> str:
    """Ask the daemons that may serve the mount. Return the path of the right one's log, or "".
    Raises DaemonError."""
    found = ""
    own = list(private_daemon.sockets.values())
    asked = [partial(Connection, socket, timeout_s) for socket in own]
    for connect in (*asked, partial(client.connect, timeout_s=timeout_s)):
        with contextlib.suppress(NoDaemon, FileNotFoundError, ConnectionRefusedError):
            with connect() as connection:
                status = connection.status()
            if _is_below(path, connection.mount or status.mount):
                found = status.log
    return found
