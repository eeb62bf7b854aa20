"""A connection to a daemon's control socket: what can be asked there."""

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from ckptfs._model.location import Location
from ckptfs._model.plan import Plan, Wanted
from ckptfs._model.replies import (
    ActivityReply,
    Attached,
    CacheNews,
    Done,
    Failed,
    Given,
    Prefetching,
    Reloaded,
    StatusReply,
    Taken,
    Trace,
)
from ckptfs._model.requests import (
    Activity,
    Attach,
    CacheProgress,
    CacheRequest,
    Detach,
    GetTrace,
    GiveBlocks,
    MetadataChanged,
    PrefetchProgress,
    Reload,
    Restart,
    StartPrefetch,
    Status,
    Stop,
    TakeBlocks,
)
from ckptfs._model.wire import Reply, Request, decode_reply, encode
from ckptfs._peers import is_anybody, peer_of
from ckptfs._requestid import new_request_id
from ckptfs.errors import (
    BY_CODE,
    CkptfsError,
    DaemonError,
    NoDaemon,
    ProtocolError,
    RightsNotLent,
    StoreNotAllowed,
    UnknownStore,
)

_REPLY_BYTES_MAX = 64 << 20
TRIES = 5
"""A daemon that is just ending hangs up on us; the next try finds or starts another."""

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
        for _ in range(TRIES):
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
    """Ask about a location.

    A named store that the daemon does not know, or not for us, and that our own configuration has,
    is asked about as the place that it is there. A daemon that does not read our files gets their
    contents.
    """
    try:
        return ask(location)
    except (UnknownStore, StoreNotAllowed):
        if "like" not in location.options:
            raise
    except RightsNotLent:
        from ckptfs._store.carrying import carried

        place = carried(location)
        if place is None:
            raise
        return ask(place)
    from ckptfs._store.named import own_location

    return _at(own_location(location), ask)


def connect_to(path: str, timeout_s: float, mount: str = "") -> Connection:
    """Connect to the socket `path`. Raises NoDaemon or DaemonError."""
    try:
        return Connection(path, timeout_s, mount)
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoDaemon(f"no ckptfs daemon is running at {path}; ckptfs mount starts one") from None
    except OSError as error:
        raise DaemonError(f"{path}: {error.strerror or error}") from None
