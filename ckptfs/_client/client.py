"""The blocking client: it finds the daemon, or starts one, and attaches.

It does not import trio, pyfuse3 or pyarrow, which a container that uses its node's daemon need not
have.
"""

import contextlib
import errno
import logging
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from ckptfs._client.connection import TRIES, Connection, connect_to, rank_of_process
from ckptfs._client.start import kept_environment, run_keeper, scope_command
from ckptfs._config.load import Flags, flags_variable, load_config, log_path
from ckptfs._config.paths import make_folder
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.plans.plan import Plan
from ckptfs._model.protocol.replies import Attached
from ckptfs._model.protocol.requests import Attach, MetadataChanged
from ckptfs._model.volume import Volume
from ckptfs._os.callers import is_open_yet, level_of_caller
from ckptfs._os.filelock import locked, wait_unlocked
from ckptfs._os.jobs import job_of
from ckptfs._os.mountinfo import HAS_ENDED, MountEnded, require_seen
from ckptfs.errors import CannotMount, CkptfsError, DaemonError, NoDaemon, PlaceUnusable

_log = logging.getLogger(__name__)

_LOG_WAIT_S = 5.0
"""Longest wait for facts that only the log needs."""
_START_WAIT_S = 60.0
"""Longest wait for a daemon that another process is starting."""


def connect(config: Config | None = None, timeout_s: float | None = None) -> Connection:
    """Connect to the node's daemon if it serves this user, otherwise to the user's own.

    Raises NoDaemon, or DaemonError if the daemon is unusable.
    """
    config = config or load_config()
    timeout_s = config.attach_deadline_s + 10 if timeout_s is None else timeout_s
    mount = os.environ.get("CKPTFS_MOUNT", "")
    if config.node_socket not in ("", config.socket):
        with contextlib.suppress(OSError):  # no daemon, or its mode excludes this user
            return Connection(config.node_socket, timeout_s, mount)
    return connect_to(config.socket, timeout_s, mount)


@contextlib.contextmanager
def attached(
    location: Location,
    *,
    pinned: bool = False,
    saves: bool = False,
    volume: Volume | None = None,
    prefetch: Sequence[str] = (),
    plan: Plan | None = None,
    timeout_s: float | None = None,
    to: Callable[[Config, float | None], Connection] | None = None,
) -> Generator[tuple[str, Attached]]:
    """Attach through the daemon, and start one if necessary. Yields the path and the reply.

    The connection holds the attachment for the length of the context.

    Args:
        location: The checkpoint.
        pinned: Whether the attachment stays until it is detached.
        saves: Whether the caller will save blocks that it has uploaded.
        volume: The volume that gets an attachment of its own.
        prefetch: Globs of files to fetch in the background.
        plan: A plan to fetch in the background.
        timeout_s: Longest wait for the daemon's answer.
        to: Function that connects, instead of `connect_or_start`.
    """
    request = Attach(
        location=location,
        pinned=pinned,
        saves=saves,
        volume=volume,
        prefetch=list(prefetch),
        plan=plan,
        rank=rank_of_process(),
    )
    for attempt in range(TRIES):
        config = load_config()
        connection = (to or connect_or_start)(config, timeout_s)
        try:
            reply = connection.ask_once(request)
        except ConnectionResetError:
            connection.close()
            if attempt == TRIES - 1:
                raise DaemonError(
                    f"the ckptfs daemon ended before it replied; see {log_of(config)}"
                ) from None
            continue
        except BaseException:
            connection.close()
            raise
        with connection:
            path = connection.path_of(reply)
            why = _why_unseen(path, reply)
            if not why:
                _log_attached(connection, reply)
                _warn_of_job(connection)
                yield path, reply
                return
            if attempt == TRIES - 1:
                raise CannotMount(why)


def _why_unseen(path: str, reply: Attached) -> str:
    """The reason why this process does not see the attachment although the daemon has just shown
    it, or "". Raises CannotMount if another try would not help."""
    try:
        if require_seen(path, reply.mount):
            return ""
    except MountEnded as ended:  # its keeper may have just died
        return str(ended)
    return (
        f"{os.path.dirname(path)} is the mount of another daemon, and does not show the "
        "checkpoint; set CKPTFS_MOUNT to the mount of this daemon"
    )


def _warn_of_job(connection: Connection) -> None:
    """Warn if the daemon is in another job than this process, because it ends with that job."""
    job = job_of(connection.keeper_pid)
    if job and job != job_of(os.getpid()) and job not in _warned_of:
        _warned_of.add(job)
        warnings.warn(
            f"the ckptfs daemon at {connection.path} runs inside {job}, and its mount ends with "
            "that job; ckptfs help jobs shows how to keep a daemon running",
            stacklevel=level_of_caller(),
        )


_warned_of: set[str] = set()
"""Jobs in the warnings of this process."""


@contextlib.contextmanager
def leased(
    location: Location,
    *,
    saves: bool = False,
    prefetch: Sequence[str] = (),
    plan: Plan | None = None,
    timeout_s: float | None = None,
    to: Callable[[Config, float | None], Connection] | None = None,
) -> Generator[str]:
    """Attach, and hold the attachment by an open directory for the length of the context.

    The kernel closes the directory however this process ends. The arguments are those of
    `attached`. Yields the path.
    """
    path, lease = "", -1
    for left in reversed(range(TRIES)):
        attaching = attached(
            location, saves=saves, prefetch=prefetch, plan=plan, timeout_s=timeout_s, to=to
        )
        with attaching as found:
            path, reply = found
            for file in reply.lacking:
                text = f"{reply.uri} lacks {file.name}: {file.reason}"
                warnings.warn(text, stacklevel=level_of_caller())
            try:
                lease = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                break
            except OSError as error:
                # The daemon has died, and the next one has ended the unused attachment. Or the
                # keeper has died, and with it the mount.
                if not left or error.errno not in (errno.ENOENT, *HAS_ENDED):
                    raise
    try:
        directory = os.fstat(lease)
    except OSError:  # the mount has just ended
        os.close(lease)
        raise
    try:
        yield path
    finally:
        if is_open_yet(lease, directory, path):
            os.close(lease)
        # The kernel tells the daemon of a close and does not wait. This question follows on the
        # same way. Its answer means that the lease has ended, so the next attach lists the store.
        with contextlib.suppress(OSError):
            os.statvfs(os.path.dirname(path))


def _log_attached(connection: Connection, reply: Attached) -> None:
    if not _log.isEnabledFor(logging.DEBUG):
        return
    daemon = "which does not answer"
    # This has its own connection, because an error must not close the one with the attachment.
    with (
        contextlib.suppress(CkptfsError, OSError),
        Connection(connection.path, _LOG_WAIT_S) as asked,
    ):
        status = asked.status()
        daemon = f"pid {status.pid}, ckptfs {status.version}"
    text = "attached %s (%d files, %d bytes) by the daemon at %s, %s"
    _log.debug(text, reply.uri, reply.files, reply.size, connection.path, daemon)


def tell_metadata_changed(location: Location) -> None:
    """Tell the daemon, if one is running, that a checkpoint's metadata has changed.

    When the function returns, attachments show the change. It raises no error, because the store
    has the change already, and attachments look at the store within a second.
    """
    try:
        with connect() as connection:
            connection.ask(MetadataChanged(location=location))
    except (CkptfsError, OSError):  # mostly because there is no daemon
        pass
    except Exception as error:
        _log.warning("the daemon was not told of changed metadata: %s", type(error).__name__)
        _log.debug("because of this error", exc_info=True)


def connect_or_start(
    config: Config, timeout_s: float | None = None, flags: Flags | None = None
) -> Connection:
    """Connect to the daemon, or start one. Several processes can do so at the same time.

    `timeout_s` is the longest wait for a reply. `flags` are those of the command line in `config`.

    Raises:
        CannotMount, ConfigError, DaemonError: No daemon could be started.
    """
    with contextlib.suppress(NoDaemon):
        return connect(config, timeout_s)
    with _start_lock(config):
        # Another process may have started it during the wait for the lock.
        with contextlib.suppress(NoDaemon):
            return connect(config, timeout_s)
        try:
            _start(config, flags or Flags())
        except DaemonError:
            # The process with the lock before us may have died while its daemon was starting.
            with contextlib.suppress(NoDaemon):
                return connect(config, timeout_s)
            raise
        return connect(config, timeout_s)


def _start(config: Config, flags: Flags) -> None:
    """Start a daemon in the background and wait until it serves."""
    environment = kept_environment(os.environ, config) | flags_variable(flags)
    scope = scope_command(environment) if config.leave_job else ()
    run_keeper(["--background"], environment, scope=scope)


def log_of(config: Config) -> str:
    """The path of the daemon's log. If the daemon has just ended, its successor knows the path."""
    with contextlib.suppress(CkptfsError, OSError), connect(config) as connection:
        return connection.status().log
    return f"its log, which is {log_path(config)} unless it was a service"


@contextlib.contextmanager
def _start_lock(config: Config) -> Generator[None]:
    path = Path(f"{config.socket}.start")
    try:
        make_folder(path.parent)
        with locked(str(path), _START_WAIT_S):
            yield
    except TimeoutError:
        raise DaemonError(
            f"another process has been starting the daemon for {_START_WAIT_S:g} s; "
            f"see {log_path(config)}"
        ) from None
    except OSError as error:
        raise PlaceUnusable(
            f"{path}: {error.strerror or error}; set CKPTFS_SOCKET to another path"
        ) from None


def wait_ended(config: Config, timeout_s: float) -> bool:
    """Wait until the keeper has ended. Return whether it has."""
    return wait_unlocked(f"{config.socket}.lock", timeout_s)
