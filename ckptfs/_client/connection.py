"""A connection to a daemon's control socket."""

import contextlib
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ckptfs import errors
from ckptfs._model.plans.plan import Wanted
from ckptfs._model.protocol import replies, requests
from ckptfs._model.protocol.requests import R, Request, reply_type
from ckptfs._model.protocol.wire import decode_reply, encode
from ckptfs._model.request_id import new_request_id
from ckptfs._os.peercred import is_anybody, peer_of

if TYPE_CHECKING:
    from ckptfs._model.location import Location

_REPLY_BYTES_MAX = 64 << 20
TRIES = 5
"""An ending daemon closes connections, and the next try finds or starts another daemon."""
_RANK_VARIABLES = "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"
"""Variables in which torchrun and Ray Train, Slurm, Open MPI and MPICH give a process its rank."""


def rank_of_process() -> int:
    """The rank of this process in its job, from the environment; -1 if it has none."""
    for name in _RANK_VARIABLES:
        value = os.environ.get(name, "")
        if value.isascii() and value.isdigit() and len(value) < 9:
            return int(value)
    return -1


class Connection:
    """A connection, which holds the attachments that it has made until it is closed.

    Args:
        timeout_s: Longest wait for a reply.

    Attributes:
        path: Path of the socket.
        mount: The mount point, as this process sees it; "" for the daemon's own view.
        is_owned: Whether the daemon is this user's own, or this user is root.
    """

    def __init__(self, path: str, timeout_s: float, mount: str = "") -> None:
        self.path = path
        self.mount = mount
        self._timeout_s = timeout_s
        self._connect()

    @property
    def keeper_pid(self) -> int:
        """The process that listens, which is the keeper or a service manager; 0 if its PID
        namespace hides it."""
        return peer_of(self._socket).pid

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(self._timeout_s)
        try:
            self._socket.connect(self.path)
            self._check_server()
        except BaseException:
            self._socket.close()
            raise

    def _reconnect(self) -> None:
        """Connect to the next daemon, because this one has died. Raises DaemonError if there is no
        next daemon."""
        self._socket.close()
        try:
            self._connect()
        except OSError:
            raise errors.DaemonError(
                f"the ckptfs daemon at {self.path} has ended; see its log"
            ) from None

    def _check_server(self) -> None:
        """Check that the daemon is ours or root's, because credentials go to it."""
        uid = peer_of(self._socket).uid
        if is_anybody(uid):
            raise errors.CannotMount(
                f"{self.path} is served by a user outside of this user namespace, so ckptfs cannot "
                "tell whether that is root; in a container, use the node's user namespace "
                "(hostUsers: true)"
            )
        self.is_owned = os.geteuid() in (0, uid)
        self._origin = "" if uid == os.geteuid() else f" (said by root's daemon at {self.path})"
        if uid not in (0, os.geteuid()):
            raise errors.CannotMount(
                f"{self.path} is served by uid {uid}, which is neither you nor root; "
                "set CKPTFS_SOCKET to another path"
            )

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def interrupt(self) -> None:
        """End the `ask_once` of another thread, which raises ConnectionResetError."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Request[R], fd: int = -1) -> R:
        """Send a request and return its reply. If the daemon dies, ask the next one.

        The daemon may need a named store's place or the contents of a file in order to know the
        request's location. Then the request goes out again with these.

        Args:
            request: A request that has the same effect when it is sent twice.
            fd: A descriptor to pass along.

        Raises:
            CkptfsError: The daemon's own error.
            DaemonError: The daemon does not answer, or has ended and no other has followed.
        """
        return _located(request, lambda located: self._ask_until_answered(located, fd))

    def ask_once(self, request: Request[R], fd: int = -1) -> R:
        """As `ask`, but raise ConnectionResetError if the daemon dies."""
        return _located(request, lambda located: self._exchange(located, fd))

    def status(self) -> replies.StatusReply:
        """The daemon's state."""
        return self.ask(requests.Status())

    def prefetch(
        self, name: str, wanted: Wanted, progress: Callable[[int, int], None]
    ) -> replies.Prefetching:
        """Fetch files of an attachment, and return when the prefetch has ended.

        The prefetch ends with the connection. If the daemon dies, this starts the prefetch again at
        the next daemon, which skips the cached files.

        Args:
            name: The attachment's directory in the mount.
            wanted: The files or ranges to fetch, and their order.
            progress: Called several times a second with the bytes that are in the cache and the
                bytes of all these files.

        Raises:
            NotAttached: The daemon has no such attachment.
            DaemonError: The daemon has ended and no other has followed.
        """
        start = requests.StartPrefetch(name=name, **msgspec.structs.asdict(wanted))
        state = self.ask(start)
        while not state.ended:
            try:
                state = self.ask_once(requests.PrefetchProgress())
            except ConnectionResetError:
                self._reconnect()
                state = self.ask(start)
            progress(state.cached + state.fetched, state.bytes)
        return state

    def cache(
        self, request: requests.CacheRequest, take: Callable[[replies.CacheResults], None]
    ) -> None:
        """Run a command on the cache, and return when it has ended. The command ends with the
        connection.

        Args:
            request: The command.
            take: Called several times a second with new results, and at last with the end.

        Raises:
            CkptfsError: The daemon's own error.
            DaemonError: The daemon has ended.
        """
        try:
            results = self.ask_once(request)
            while not results.ended:
                take(results)
                results = self.ask_once(requests.CacheProgress())
        except ConnectionResetError:
            raise errors.DaemonError(
                f"the ckptfs daemon at {self.path} ended meanwhile; try again"
            ) from None
        take(results)
        if results.early_code:
            raise self._error(results.early_code, results.early_message)

    def borrow_memory(self) -> int:
        """Borrow memory of the daemon for `PIECE_BLOCKS_MAX` blocks. Returns its descriptor, which
        the caller closes. Raises ConnectionResetError, and as `ask_once`."""
        fds: list[int] = []

        def receive(count: int) -> bytes:
            data, passed, _, _ = socket.recv_fds(self._socket, count, 1)
            for fd in passed:
                os.set_inheritable(fd, False)
            fds.extend(passed)
            return data

        try:
            self._exchange(requests.BorrowMemory(), receive=receive)
            if not fds:
                raise errors.ProtocolError("the daemon lent no memory")
            return fds.pop()
        finally:
            for fd in fds:
                os.close(fd)

    def stop(self, *, force: bool = False) -> None:
        """End the daemon. Raises Busy."""
        with contextlib.suppress(ConnectionResetError):  # it can end before it answers
            self.ask_once(requests.Stop(force=force))

    def path_of(self, attached: replies.Attached | replies.Trace) -> str:
        """The attachment's directory, as this process sees it."""
        return os.path.join(self.mount or attached.mount, attached.name)

    def _ask_until_answered(self, request: Request[R], fd: int) -> R:
        for _ in range(TRIES):
            with contextlib.suppress(ConnectionResetError):
                return self._exchange(request, fd)
            self._reconnect()
        return self._exchange(request, fd)

    def _exchange(
        self, request: Request[R], fd: int = -1, receive: Callable[[int], bytes] | None = None
    ) -> R:
        request = msgspec.structs.replace(request, request=new_request_id())
        try:
            with contextlib.suppress(BrokenPipeError):  # the daemon may have sent the reason
                self._send(encode(request), fd)
            reply = decode_reply(_line_from(receive or self._socket.recv))
        except TimeoutError:
            raise errors.DaemonError(
                f"the ckptfs daemon at {self.path} does not answer; see its log"
            ) from None
        if isinstance(reply, replies.Failed):
            raise self._error(reply.code, reply.message)
        if not isinstance(reply, reply_type(request)):
            raise errors.ProtocolError(f"the daemon answered with a {type(reply).__name__}")
        return reply

    def _error(self, code: str, message: str) -> errors.CkptfsError:
        return errors.BY_CODE.get(code, errors.CkptfsError)(message + self._origin)

    def _send(self, line: bytes, fd: int) -> None:
        """Send a line, and with its first byte the descriptor, if there is one."""
        if fd >= 0:
            line = line[socket.send_fds(self._socket, [line], [fd]) :]
        self._socket.sendall(line)


def _line_from(receive: Callable[[int], bytes]) -> bytes:
    parts: list[bytes] = []
    length = 0
    while True:
        data = receive(1 << 20)
        if not data:
            raise ConnectionResetError("the daemon hung up")
        parts.append(data)
        length += len(data)
        if data.endswith(b"\n"):
            return b"".join(parts)
        if length > _REPLY_BYTES_MAX:
            raise errors.ProtocolError("the daemon's answer is too long")


def _located(request: Request[R], ask: Callable[[Request[R]], R]) -> R:
    """Ask, and if the daemon cannot use the request's location, ask again with a location that it
    can use.

    If the daemon does not know a named store, or does not let us use it, the second request has the
    place that our own configuration has for the store. If the daemon does not read our files, the
    second request has their contents.
    """
    location: Location | None = getattr(request, "location", None)
    if location is None:
        return ask(request)
    if not request.needs_secrets:
        location = msgspec.structs.replace(location, secrets={})
        request = msgspec.structs.replace(request, location=location)
    try:
        return ask(request)
    except (errors.UnknownStore, errors.StoreNotAllowed):
        if "like" not in location.options:
            raise
        from ckptfs._store.named import own_location  # start-up time

        usable = own_location(location)
    except errors.RightsNotLent:
        from ckptfs._store.portable import carried  # start-up time

        contents = carried(location)
        if contents is None:
            raise
        return ask(msgspec.structs.replace(request, location=contents))
    return _located(msgspec.structs.replace(request, location=usable), ask)


def connect_to(path: str, timeout_s: float, mount: str = "") -> Connection:
    """Connect to the socket `path`. Raises NoDaemon or DaemonError."""
    try:
        return Connection(path, timeout_s, mount)
    except (FileNotFoundError, ConnectionRefusedError):
        raise errors.NoDaemon(
            f"no ckptfs daemon is running at {path}; ckptfs mount starts one"
        ) from None
    except TimeoutError:
        raise errors.DaemonError(
            f"the ckptfs daemon at {path} does not answer; see its log"
        ) from None
    except OSError as error:
        raise errors.PlaceUnusable(
            f"{path}: {error.strerror or error}; set CKPTFS_SOCKET to a socket that you may use"
        ) from None
