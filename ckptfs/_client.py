"""The blocking client of the control socket; it finds the daemon, or starts one.

Nothing of trio, pyfuse3 or pyarrow is imported here: a container that only talks to its node's
daemon has none of them.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from ckptfs._config import Flags, flags_variable, load_config, log_path
from ckptfs._filelock import locked, wait_unlocked
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.plan import Plan, Wanted
from ckptfs._model.wire import (
    Activity,
    ActivityReply,
    Attach,
    Attached,
    CacheNews,
    CacheProgress,
    CacheRequest,
    Detach,
    Done,
    Failed,
    GetTrace,
    GiveBlocks,
    Given,
    MetadataChanged,
    Prefetching,
    PrefetchProgress,
    Reload,
    Reloaded,
    Reply,
    Request,
    Restart,
    StartPrefetch,
    Status,
    StatusReply,
    Stop,
    TakeBlocks,
    Taken,
    Trace,
    decode_reply,
    encode,
)
from ckptfs._mounts import require_seen
from ckptfs._peers import is_anybody, peer_of
from ckptfs._requestid import new_request_id
from ckptfs.errors import (
    BY_CODE,
    CkptfsError,
    DaemonError,
    NoDaemon,
    ProtocolError,
    StoreNotAllowed,
    UnknownStore,
)

_START_WAIT_S = 60.0
"""Longest wait for a daemon that somebody else is starting."""
_REPLY_BYTES_MAX = 64 << 20
_TRIES = 5
"""A daemon that is just ending hangs up on us; the next try finds or starts another."""
_SECRETS = frozenset(
    [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_CLIENT_SECRET",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_SAS_TOKEN",
        "GOOGLE_OAUTH_ACCESS_TOKEN",
        "HF_TOKEN",
    ]
)
"""Variables whose values go with a location (``_store.describe``), so a daemon that is started on
demand does without."""

R = TypeVar("R", bound=Reply)
T = TypeVar("T")

_RANK_VARIABLES = "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"
"""Where torchrun and Ray Train, Slurm, Open MPI and MPICH say which process of a job one is."""


def rank_of_process() -> int:
    """The rank of this process in its job, as its environment says; -1: it does not."""
    for name in _RANK_VARIABLES:
        value = os.environ.get(name, "")
        if value.isascii() and value.isdigit() and len(value) < 9:
            return int(value)
    return -1


class Connection:
    """One connection. Attachments that were asked for on it are held until it is closed.

    Args:
        path: Of the socket.
        timeout_s: Longest wait for an answer.
        mount: Where this process sees the mount; "": where the daemon does.
    """

    def __init__(self, path: str, timeout_s: float, mount: str = "") -> None:
        self._path = path
        self._mount = mount
        self._timeout_s = timeout_s
        self._connect()

    @property
    def path(self) -> str:
        """Of the socket."""
        return self._path

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(self._timeout_s)
        try:
            self._socket.connect(self._path)
            self._check_server()
        except BaseException:
            self._socket.close()
            raise

    def _reconnect(self) -> None:
        """The daemon has died: go on with the next one. Raises DaemonError if there is none."""
        self._socket.close()
        try:
            self._connect()
        except OSError:
            raise DaemonError(f"the ckptfs daemon at {self._path} has ended; see its log") from None

    def _check_server(self) -> None:
        """Credentials go to a daemon of our own or of root's, not to whoever owns the path."""
        uid = peer_of(self._socket).uid
        if is_anybody(uid):
            raise DaemonError(
                f"{self._path} is served by a user whom this user namespace does not have, so "
                "nobody can tell whether that is root; in a container, use the node's user "
                "namespace (hostUsers: true)"
            )
        if uid not in (0, os.geteuid()):
            raise DaemonError(
                f"{self._path} is served by uid {uid}, which is neither you nor root; "
                "set CKPTFS_SOCKET to another path"
            )

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(
        self,
        location: Location,
        *,
        pinned: bool = False,
        prefetch: Sequence[str] = (),
        plan: Plan | None = None,
    ) -> Attached:
        """Attach a checkpoint, and begin to fetch the files that the globs `prefetch` name, and
        what `plan` names for this process.

        Raises what the store or the daemon says.
        """

        def attach(place: Location) -> Attached:
            request = Attach(
                location=place,
                pinned=pinned,
                prefetch=list(prefetch),
                plan=plan,
                rank=rank_of_process(),
            )
            return self._request(request, Attached)

        return _at(location, attach)

    def detach(self, name: str, location: Location | None = None, *, force: bool = False) -> None:
        """End an attachment. Raises NotAttached or Busy."""

        def detach(place: Location | None) -> None:
            self._persist(Detach(name=name, location=place, force=force), Done)

        detach(None) if location is None else _at(location, detach)

    def status(self) -> StatusReply:
        """The daemon's state."""
        return self._persist(Status(), StatusReply)

    def trace(self, name: str, location: Location | None = None) -> Trace:
        """How a checkpoint was read. Raises NotAttached."""

        def trace(place: Location | None) -> Trace:
            return self._persist(GetTrace(name=name, location=place), Trace)

        return trace(None) if location is None else _at(location, trace)

    def activity(self) -> ActivityReply:
        """What was read and fetched since the daemon started."""
        return self._persist(Activity(), ActivityReply)

    def metadata_changed(self, location: Location) -> None:
        """Tell the daemon that a checkpoint's metadata was changed at the store."""

        def tell(place: Location) -> None:
            public = msgspec.structs.replace(place, secrets={})
            self._persist(MetadataChanged(location=public), Done)

        _at(location, tell)

    def prefetch(
        self, name: str, wanted: Wanted, progress: Callable[[int, int], None]
    ) -> Prefetching:
        """Fetch files of an attachment; returns when that has ended. It ends with the connection.

        Args:
            name: The attachment's directory in the mount.
            wanted: What to fetch, in which order.
            progress: Called several times a second with the bytes that are there and the bytes of
                all these files.

        A daemon that dies meanwhile is followed by another one, which begins anew and finds what is
        cached. Raises NotAttached, and DaemonError if the daemon ends.
        """
        start = StartPrefetch(
            name=name,
            globs=wanted.globs,
            plan=wanted.plan,
            rank=wanted.rank,
            rate=wanted.rate,
        )
        state = self._persist(start, Prefetching)
        while not state.ended:
            try:
                state = self._request(PrefetchProgress(), Prefetching)
            except ConnectionResetError:
                self._reconnect()
                state = self._persist(start, Prefetching)
            progress(state.cached + state.fetched, state.bytes)
        return state

    def reload(self) -> Reloaded:
        """Have the daemon read its configuration anew. Raises ConfigError: it keeps the old one."""
        return self._persist(Reload(), Reloaded)

    def give(self, request: GiveBlocks, memfd: int) -> Given:
        """Have blocks written into `memfd`, which has to be long enough. Raises what a read would
        raise."""
        return self._persist(request, Given, memfd)

    def take(self, request: TakeBlocks, memfd: int) -> Taken:
        """Put blocks from `memfd` into the cache.

        Raises AccessDenied where the daemon takes none from this user, LimitExceeded where it has
        no room for them, StoreError or ObjectChanged where it refuses them.
        """
        return self._persist(request, Taken, memfd)

    def cache(self, request: CacheRequest, tell: Callable[[CacheNews], None]) -> None:
        """Have a command on the cache carried out; returns when it has ended. It ends with the
        connection.

        `tell` is called several times a second with what is new, and at last with the end.

        Raises what the daemon says, and DaemonError if it ends.
        """
        try:
            news = self._request(request, CacheNews)
            while not news.ended:
                tell(news)
                news = self._request(CacheProgress(), CacheNews)
        except ConnectionResetError:
            raise DaemonError(
                f"the ckptfs daemon at {self._path} ended meanwhile; try again"
            ) from None
        tell(news)
        if news.early_code:
            raise BY_CODE.get(news.early_code, CkptfsError)(news.early_message)

    def stop(self, *, force: bool = False) -> None:
        """Ask the daemon to end. Raises Busy."""
        with contextlib.suppress(ConnectionResetError):  # it may end before it has answered
            self._request(Stop(force=force), Done)

    def restart(self) -> None:
        """Ask the daemon to end, and to be followed by another one."""
        with contextlib.suppress(ConnectionResetError):
            self._request(Restart(), Done)

    def path_of(self, attached: Attached | Trace) -> str:
        """Where the attachment is, as this process sees it."""
        return os.path.join(self._mount or attached.mount, attached.name)

    def _persist(self, request: Request, expected: type[R], fd: int = -1) -> R:
        """Ask what can be asked twice: also the next daemon, if this one dies."""
        for _ in range(_TRIES):
            with contextlib.suppress(ConnectionResetError):
                return self._request(request, expected, fd)
            self._reconnect()
        return self._request(request, expected, fd)

    def _request(self, request: Request, expected: type[R], fd: int = -1) -> R:
        request = msgspec.structs.replace(request, request=new_request_id())
        try:
            with contextlib.suppress(BrokenPipeError):  # it may have hung up with a reason
                self._send(encode(request), fd)
            reply = decode_reply(self._read_line())
        except TimeoutError:
            raise DaemonError(
                f"the ckptfs daemon at {self._path} does not answer; see its log"
            ) from None
        if isinstance(reply, Failed):
            raise BY_CODE.get(reply.code, CkptfsError)(reply.message)
        if not isinstance(reply, expected):
            raise ProtocolError(f"the daemon answered with a {type(reply).__name__}")
        return reply

    def _send(self, line: bytes, fd: int) -> None:
        """Send it, and with its first byte the descriptor, if there is one."""
        if fd >= 0:
            line = line[socket.send_fds(self._socket, [line], [fd]) :]
        self._socket.sendall(line)

    def _read_line(self) -> bytes:
        parts: list[bytes] = []
        length = 0
        while True:
            data = self._socket.recv(1 << 20)
            if not data:
                raise ConnectionResetError("the daemon hung up")
            parts.append(data)
            length += len(data)
            if data.endswith(b"\n"):
                return b"".join(parts)
            if length > _REPLY_BYTES_MAX:
                raise ProtocolError("the daemon's answer is too long")


def _at(location: Location, ask: Callable[[Location], T]) -> T:
    """Ask about a location. A named store that the daemon does not know, or not for us, and that
    our own configuration has, is asked about as the place that it is there."""
    try:
        return ask(location)
    except (UnknownStore, StoreNotAllowed):
        if "like" not in location.options:
            raise
    from ckptfs._store.named import own_location

    return ask(own_location(location))


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


def connect_to(path: str, timeout_s: float, mount: str = "") -> Connection:
    """Connect to the socket `path`. Raises NoDaemon or DaemonError."""
    try:
        return Connection(path, timeout_s, mount)
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoDaemon(f"no ckptfs daemon is running at {path}; ckptfs mount starts one") from None
    except OSError as error:
        raise DaemonError(f"{path}: {error.strerror or error}") from None


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
    for attempt in range(_TRIES):
        config = load_config()
        connection = (to or connect_or_start)(config, timeout_s)
        try:
            reply = connection.attach(location, pinned=pinned, prefetch=prefetch, plan=plan)
        except ConnectionResetError:
            connection.close()
            if attempt == _TRIES - 1:
                raise DaemonError(
                    f"the ckptfs daemon ended while it was asked; see {log_path(config)}"
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
            if attempt == _TRIES - 1:
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
    for left in reversed(range(_TRIES)):
        with attached(location, prefetch=prefetch, plan=plan, timeout_s=timeout_s, to=to) as (
            path,
            _,
        ):
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
        start(dict.fromkeys(_secrets_in(os.environ, config), ""), flags)
        return connect(config, timeout_s)


def _secrets_in(environ: Mapping[str, str], config: Config) -> set[str]:
    """Variables that hold credentials, those of named stores too."""
    sources = [table.credentials for table in config.store.values()]
    prefixes = {"", *(s.environment for s in sources if not isinstance(s, str))}
    return {prefix + name for prefix in prefixes for name in _SECRETS} & environ.keys()


def start(environment: Mapping[str, str] | None = None, flags: Flags | None = None) -> None:
    """Start a daemon in the background and wait until it serves.

    Args:
        environment: Added to that of this process.
        flags: Of the command line.

    Raises CannotMount, ConfigError or DaemonError.
    """
    run_keeper(["--background"], {**(environment or {}), **flags_variable(flags or Flags())})


def run_keeper(
    options: list[str], environment: Mapping[str, str], given: bytes = b""
) -> dict[str, str]:
    """Run the keeper until it has gone to the background; returns its report.

    Args:
        options: Of the keeper's command line.
        environment: Added to that of this process.
        given: Its standard input.

    Raises CannotMount, ConfigError, DaemonError, or what else the report names.
    """
    # In "/", because "-m" puts the working directory on the module path.
    done = subprocess.run(
        [sys.executable, "-m", "ckptfs._daemon.keeper", *options],
        cwd="/",
        env={**os.environ, **environment},
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
