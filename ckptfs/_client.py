"""The blocking client: it finds the daemon, or starts one, and attaches.

Nothing of trio, pyfuse3 or pyarrow is imported here: a container that only talks to its node's
daemon has none of them.
"""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

from ckptfs._config import Flags, flags_variable, load_config, log_path
from ckptfs._connection import TRIES, Connection, connect_to
from ckptfs._filelock import locked, wait_unlocked
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.plan import Plan
from ckptfs._model.replies import (
    Attached,
)
from ckptfs._mounts import require_seen
from ckptfs._store.kinds import PROXIES, TRAVELLING
from ckptfs.errors import (
    BY_CODE,
    CkptfsError,
    DaemonError,
    NoDaemon,
)

_START_WAIT_S = 60.0
"""Longest wait for a daemon that somebody else is starting."""


def connect(config: Config | None = None, timeout_s: float | None = None) -> Connection:
    """Connect to the node's daemon if it serves us, else to our own.

    Raises NoDaemon where none is running, DaemonError for one that cannot be used.
    """
    config = config or load_config()
    timeout_s = config.attach_deadline_s + 10 if timeout_s is None else timeout_s
    mount = os.environ.get("CKPTFS_MOUNT", "")
    if config.node_socket not in ("", config.socket):
        with contextlib.suppress(OSError):  # not there, or not for us (its mode)
            return Connection(config.node_socket, timeout_s, mount)
    return connect_to(config.socket, timeout_s, mount)


@contextlib.contextmanager
def attached(
    location: Location,
    *,
    pinned: bool = False,
    prefetch: Sequence[str] = (),
    plan: Plan | None = None,
    timeout_s: float | None = None,
    to: Callable[[Config, float | None], Connection] | None = None,
) -> Generator[tuple[str, Attached]]:
    """Attach through the running daemon, or one that is started; yields path and reply.

    The connection, which holds the attachment, lasts as long as the context.

    Args:
        location: The checkpoint.
        pinned: It stays until it is detached.
        prefetch: Globs of files to fetch in the background.
        plan: What else to fetch.
        timeout_s: Longest wait for the daemon's answer.
        to: Makes the connection; without it, `connect_or_start`.
    """
    for attempt in range(TRIES):
        config = load_config()
        connection = (to or connect_or_start)(config, timeout_s)
        try:
            reply = connection.attach(location, pinned=pinned, prefetch=prefetch, plan=plan)
        except ConnectionResetError:
            connection.close()
            if attempt == TRIES - 1:
                raise DaemonError(
                    f"the ckptfs daemon ended while it was asked; see {log_of(config)}"
                ) from None
            continue
        except BaseException:
            connection.close()
            raise
        with connection:
            path = connection.path_of(reply)
            if require_seen(path, reply.mount):
                yield path, reply
                return
            if attempt == TRIES - 1:
                raise DaemonError(
                    f"{os.path.dirname(path)} does not show what the daemon has attached: it is "
                    "the mount of another one; set CKPTFS_MOUNT to where this one's is"
                )


@contextlib.contextmanager
def leased(
    location: Location,
    *,
    prefetch: Sequence[str] = (),
    plan: Plan | None = None,
    timeout_s: float | None = None,
    to: Callable[[Config, float | None], Connection] | None = None,
) -> Generator[str]:
    """Attach, and hold the attachment by an open directory for the length of the context.

    From then on the kernel gives the lease back for us, however this process ends. Yields the path.
    The arguments are those of `attached`.
    """
    path, lease = _take_lease(location, prefetch, plan, timeout_s, to)
    try:
        yield path
    finally:
        os.close(lease)
        # The kernel tells the daemon of a close and does not wait. This question comes after it and
        # takes the same way, so when it is answered the lease is gone, and who attaches next sees
        # the store anew.
        with contextlib.suppress(OSError):
            os.statvfs(os.path.dirname(path))


def _take_lease(
    location: Location,
    prefetch: Sequence[str],
    plan: Plan | None,
    timeout_s: float | None,
    to: Callable[[Config, float | None], Connection] | None,
) -> tuple[str, int]:
    """Attach and open the directory, which the connection holds until then.

    If the daemon dies meanwhile, and the connection with it, the next one may find the attachment
    in nobody's use: then it is attached anew.
    """
    for left in reversed(range(TRIES)):
        with attached(location, prefetch=prefetch, plan=plan, timeout_s=timeout_s, to=to) as (
            path,
            reply,
        ):
            for file in reply.lacking:
                warnings.warn(f"{reply.uri} lacks {file.name}: {file.reason}", stacklevel=2)
            try:
                return path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                if not left:
                    raise
    raise AssertionError


def tell_metadata_changed(location: Location) -> None:
    """Tell the daemon that serves us, if there is one, that a checkpoint's metadata was changed.

    Returns when attachments of it show that. Whatever fails, the change itself is done.
    """
    with contextlib.suppress(CkptfsError, OSError), connect() as connection:
        connection.metadata_changed(location)


def connect_or_start(
    config: Config, timeout_s: float | None = None, flags: Flags | None = None
) -> Connection:
    """Connect to the daemon; where none is running, start one, whoever else does so too.

    `flags`: of the command line, with which `config` was loaded.

    Raises CannotMount, ConfigError or DaemonError.
    """
    with contextlib.suppress(NoDaemon):
        return connect(config, timeout_s)
    with _start_lock(config):
        # Somebody else may have started it while we waited for the lock.
        with contextlib.suppress(NoDaemon):
            return connect(config, timeout_s)
        # These travel with each request, and are for who asks: not for whoever asks next.
        try:
            start(dict.fromkeys(_travelling_in(os.environ, config)), flags)
        except DaemonError:
            # Whoever had the lock before us may have died while its daemon was coming up.
            with contextlib.suppress(NoDaemon):
                return connect(config, timeout_s)
            raise
        return connect(config, timeout_s)


def _travelling_in(environ: Mapping[str, str], config: Config) -> set[str]:
    """Variables that say whose credentials are used, those of named stores too."""
    sources = [table.credentials for table in config.store.values()]
    prefixes = {"", *(s.environment for s in sources if not isinstance(s, str))}
    found = {prefix + name for prefix in prefixes for name in TRAVELLING} & environ.keys()
    proxies = {each for name in PROXIES for each in (name, name.lower())} & environ.keys()
    return found | {name for name in proxies if "@" in environ[name]}  # with a password


def start(environment: Mapping[str, str | None] | None = None, flags: Flags | None = None) -> None:
    """Start a daemon in the background and wait until it serves.

    Args:
        environment: Changes to that of this process; None: the variable is taken out.
        flags: Of the command line.

    Raises CannotMount, ConfigError or DaemonError.
    """
    run_keeper(["--background"], {**(environment or {}), **flags_variable(flags or Flags())})


def run_keeper(
    options: list[str], environment: Mapping[str, str | None], given: bytes = b""
) -> dict[str, str]:
    """Run the keeper until it has gone to the background; returns its report.

    Args:
        options: Of the keeper's command line.
        environment: Changes to that of this process; None: the variable is taken out.
        given: Its standard input.

    Raises CannotMount, ConfigError, DaemonError, or what else the report names.
    """
    # In "/", because "-m" puts the working directory on the module path.
    done = subprocess.run(
        [sys.executable, "-m", "ckptfs._daemon.keeper", *options],
        cwd="/",
        env={k: v for k, v in {**os.environ, **environment}.items() if v is not None},
        input=given,
        capture_output=True,
        check=False,
    )
    try:
        told: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise DaemonError(f"the ckptfs daemon did not start: {last or done.returncode}") from None
    if "code" in told:
        raise BY_CODE.get(told["code"], DaemonError)(told["message"])
    return told


def log_of(config: Config) -> str:
    """Where the daemon's log is, or that of one that has just ended: its successor knows."""
    with contextlib.suppress(CkptfsError, OSError), connect(config) as connection:
        return connection.status().log
    return f"its log, which is {log_path(config)} unless it was a service"


@contextlib.contextmanager
def _start_lock(config: Config) -> Generator[None]:
    path = Path(f"{config.socket}.start")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(str(path), _START_WAIT_S):
            yield
    except TimeoutError:
        raise DaemonError(
            f"another process has been starting the daemon for {_START_WAIT_S:g} s; "
            f"see {log_path(config)}"
        ) from None
    except OSError as error:
        raise DaemonError(f"{path}: {error.strerror}; set CKPTFS_SOCKET to another path") from None


def wait_ended(config: Config, timeout_s: float) -> bool:
    """Wait until the keeper has ended; returns whether it has."""
    return wait_unlocked(f"{config.socket}.lock", timeout_s)
