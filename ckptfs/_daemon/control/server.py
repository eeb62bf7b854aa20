"""The control socket's server: connections, their limits, and messages.

The kernel identifies the peer of each connection (SO_PEERCRED). Without `allow_other`, the daemon
serves its own user and root only. A connection holds its attachments until it closes, and its
prefetch and cache command end with it. The server notices the end of a client quickly, because no
reply takes long.

The server does not trust clients to be quick, or to stop:

- A message has to arrive, and its reply to leave, within some seconds.
- A user other than root and the daemon's own user may have a quarter of the connections.
- The server paces the requests of such a user. Each costs `_REQUEST_S`, and a status several times
  the time that it took. A user who has spent more than a second of that waits.
- The server takes no descriptors from such a user, so the kernel closes them. A descriptor from
  root or the daemon's own user belongs to the request that it came with. The daemon's memory may go
  to any user.
"""

import array
import logging
import math
import os
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import trio

from ckptfs._daemon.control.commands import COMMANDS, Commands, ConnectionState
from ckptfs._daemon.control.descriptors import Passed
from ckptfs._daemon.control.named_stores import Peer
from ckptfs._daemon.control.service import Service
from ckptfs._daemon.quotas import is_ours, limit_for
from ckptfs._model.protocol.message import LINE_BYTES_MAX
from ckptfs._model.protocol.replies import Failed, Reply
from ckptfs._model.protocol.requests import Request
from ckptfs._model.protocol.wire import decode_request, encode
from ckptfs._model.request_id import request_id
from ckptfs._os.peercred import is_anybody, peer_of
from ckptfs.errors import AccessDenied, CkptfsError, LimitExceeded, ProtocolError

log = logging.getLogger(__name__)

_CONNECTIONS_MAX = 256
_IDLE_S = 120.0
"""Longest time without a request before the server closes a connection. Clients need a connection
for moments only."""
_MESSAGE_S = 10.0
"""Longest time from a message's first byte to its last. Clients send one at once."""
_SEND_S = 30.0
"""Longest time until the client has received a reply."""
_REQUEST_S = 0.001
"""Cost of a request for one of the other users, who may so send a thousand a second."""
_STATUS_COST = 4
"""Cost of a status, as a multiple of the time that it took. One user's requests for status take at
most a fifth of the loop's time."""
_BURST_S = 1.0
"""Most that a user may spend at once."""
_SO_PEERGROUPS = 59  # asm-generic/socket.h
_GROUPS_BYTES = 1024
"""Longest buffer that ``socket.getsockopt`` accepts."""


class _User:
    """A user's connections, and the loop's time until which the user has paid (`paid_s`)."""

    def __init__(self) -> None:
        self.connections = 0
        self.paid_s = -math.inf


class Control:
    """Serves clients on a listening unix socket. `name` is the daemon's name in messages."""

    def __init__(self, service: Service, commands: Commands, name: str) -> None:
        self._service = service
        self._commands = commands
        self._allow_other = service.current.config.allow_other
        self._name = name
        self._connections = 0
        self._users: dict[int, _User] = {}

    async def serve(self, listening: socket.socket) -> None:
        """Answer connections until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        await trio.serve_listeners(self._connection, [listener])

    async def _connection(self, stream: trio.SocketStream) -> None:
        self._service.lifetime.client_came()
        pid, uid, gid = peer_of(stream.socket)
        peer = Peer(uid, gid, _groups_of(stream))
        client = ConnectionState(peer, pid)
        user = self._users.setdefault(uid, _User())
        self._connections += 1
        user.connections += 1
        try:
            self._admit(uid, user.connections)
            passed = client.passed if is_ours(uid) else None
            async with aclosing(_lines(stream, passed)) as lines:
                async for line in lines:
                    if not is_ours(uid):
                        await _pace(user)
                    reply = encode(await self._answer(line, client))
                    client.passed.close()
                    with trio.fail_after(_SEND_S):
                        await client.lent.send(stream, reply)
        except CkptfsError as error:  # the connection itself is at fault
            with trio.move_on_after(1), suppress(trio.BrokenResourceError):
                await stream.send_all(encode(Failed(code=error.code, message=str(error))))
        except (trio.BrokenResourceError, trio.TooSlowError):
            pass  # the client is gone, or silent
        except Exception:  # a client must not end the daemon
            log.exception("unexpected error on a control connection")
        finally:
            client.end()
            for attachment in client.attachments:
                self._service.attachments.let_go(attachment)
            self._connections -= 1
            user.connections -= 1
            if not user.connections and user.paid_s <= trio.current_time():
                del self._users[uid]
            self._service.lifetime.client_left()
            with trio.CancelScope(shield=True):
                await stream.aclose()

    def _admit(self, uid: int, connections: int) -> None:
        if is_anybody(uid):
            raise AccessDenied(
                f"your user has no id in the user namespace of {self._name}, which cannot tell you "
                "from others; use the node's user namespace, or start a daemon of your own"
            )
        if not self._allow_other and not is_ours(uid):
            raise AccessDenied(
                f"{self._name} serves uid {os.geteuid()} only; start your own (unset "
                "CKPTFS_SOCKET), or have allow_other set in its configuration"
            )
        most = limit_for(uid, _CONNECTIONS_MAX)
        if self._connections > _CONNECTIONS_MAX or connections > most:
            raise LimitExceeded(
                f"more than {most} control connections to {self._name}; try again later"
            )

    async def _answer(self, line: bytes, client: ConnectionState) -> Reply:
        request = decode_request(line)
        token = request_id.set(request.request)
        try:
            _log_request(request, client.peer.uid)
            began_s = time.perf_counter()
            reply = await self._commands.run(request, client)
            if COMMANDS[type(request)].is_charged and client.peer.uid in self._users:
                spent_s = _STATUS_COST * (time.perf_counter() - began_s)
                self._users[client.peer.uid].paid_s += spent_s
            return reply
        except ProtocolError:
            raise
        except CkptfsError as error:
            _log_refusal(request, error)
            return Failed(code=error.code, message=str(error))
        except Exception:
            log.exception("unexpected error in a control request")
            which = f" (request {request.request})" if request.request else ""
            return Failed(code="error", message=f"internal error of the daemon; see its log{which}")
        finally:
            request_id.reset(token)


def _log_request(request: Request[Any], uid: int) -> None:
    level = logging.DEBUG if COMMANDS[type(request)].is_frequent else logging.INFO
    operation = type(request).__name__
    about = {"event": "request", "operation": operation, "uid": uid}
    log.log(level, "%s asked by uid %d", operation, uid, extra=about)


def _log_refusal(request: Request[Any], error: CkptfsError) -> None:
    about = {"event": "refused", "operation": type(request).__name__, "error": error.code}
    log.info("%s refused: %s", type(request).__name__, error, extra=about)


def _groups_of(stream: trio.SocketStream) -> frozenset[int]:
    """All groups of the peer. The set is empty if the kernel does not tell them (Linux < 4.13), or
    if there are more than fit into Python's buffer (256)."""
    try:
        raw = stream.socket.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError:
        return frozenset()
    return frozenset(array.array("I", raw))


async def _pace(user: _User) -> None:
    start_s = max(user.paid_s, trio.current_time() - _BURST_S)
    user.paid_s = start_s + _REQUEST_S
    await trio.sleep_until(start_s)


async def _lines(stream: trio.SocketStream, passed: Passed | None) -> AsyncGenerator[bytes, None]:
    """Requests, one per line. `passed` keeps the descriptor that came with the last request.

    Raises ProtocolError for a request that is too long or too slow, and TooSlowError for silence.
    """
    pending = bytearray()
    searched = 0
    began_s = math.inf  # when the first byte of an unfinished message came
    while True:
        while 0 <= (end := pending.find(b"\n", searched)) <= LINE_BYTES_MAX:
            line = bytes(pending[:end])
            del pending[: end + 1]
            searched, began_s = 0, math.inf
            yield line
        if len(pending) > LINE_BYTES_MAX:
            raise ProtocolError(f"a control message is longer than {LINE_BYTES_MAX} bytes")
        searched = len(pending)
        now_s = trio.current_time()
        began_s = min(began_s, now_s) if pending else math.inf
        try:
            with trio.fail_at(min(now_s + _IDLE_S, began_s + _MESSAGE_S)):
                if passed is None:
                    data = await stream.receive_some(65536)
                else:
                    data = await passed.receive(stream, 65536)
        except trio.TooSlowError:
            if not pending:
                raise
            raise ProtocolError(f"a control message took longer than {_MESSAGE_S:g} s") from None
        if not data:
            return
        pending += data
