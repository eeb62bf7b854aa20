"""The control socket's server: who is asking, what is asked, and the answer.

Every connection is identified by the kernel (SO_PEERCRED). Without `allow_other` only the daemon's
own user and root are served. A connection holds the attachments it asked for until it is closed,
and its prefetch ends with it: that a client is gone is noticed because nothing answers at length.

Nobody is trusted to be quick, or to stop. A message has to be there, and its reply taken, within
some seconds. Of the connections one user other than root and the daemon's own may have a quarter,
and the requests of such a user are paced: each costs `_REQUEST_S`, a status several times what it
took, and who has spent more than a second of that waits. Descriptors that such a user passes along
are not taken: the kernel closes them. One of root or the daemon's own user is for the request that
it came with.
"""

import array
import logging
import math
import os
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import islice
from typing import TYPE_CHECKING

import trio

from ckptfs._daemon.descriptors import Passed
from ckptfs._daemon.service import Service
from ckptfs._daemon.stores import Peer, Stores
from ckptfs._daemon.users import is_ours, limit_for
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.message import LINE_BYTES_MAX
from ckptfs._model.plan import Wanted
from ckptfs._model.replies import Attached, Done, Failed, Prefetching
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
    TakeBlocks,
)
from ckptfs._model.wire import Reply, Request, decode_request, encode
from ckptfs._peers import is_anybody, peer_of
from ckptfs._requestid import request_id
from ckptfs.errors import AccessDenied, Busy, CkptfsError, LimitExceeded, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ckptfs._daemon.attachment import Attachment
    from ckptfs._daemon.cachetask import CacheTask
    from ckptfs._daemon.prefetch import Prefetch
    from ckptfs._model.replies import Reloaded

log = logging.getLogger(__name__)

_CONNECTIONS_MAX = 256
_IDLE_S = 120.0
"""A connection with no request for so long is closed; clients need it for moments only."""
_MESSAGE_S = 10.0
"""Longest time from a message's first byte to its last. Clients send one at once."""
_SEND_S = 30.0
"""Longest time for a reply to be taken."""
_REQUEST_S = 0.001
"""What a request costs one of the other users: a thousand a second."""
_STATUS_COST = 4
"""A status costs so many times what it took: one user's are a fifth of the loop's time at most."""
_BURST_S = 1.0
"""What may be spent at once."""
_PROGRESS_S = 0.2
"""Longest wait for news of a prefetch: five times a second looks live."""
_LACKING_SHOWN = 10
"""Files that a reply to an attach names, of those that cannot be read now."""
_OFTEN = Status, Activity, GetTrace, PrefetchProgress, CacheProgress, GiveBlocks, TakeBlocks
"""Requests that change nothing, or come by the thousand."""
_SO_PEERGROUPS = 59  # asm-generic/socket.h
_GROUPS_BYTES = 1024
"""Most that ``socket.getsockopt`` takes."""


class _Held:
    """What a connection of that process holds."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.attachments: list[Attachment] = []
        self.prefetch: Prefetch | None = None
        self.passed = Passed()
        self.cache_task: CacheTask | None = None


class _User:
    """What a user has and has spent: `paid_s` is the loop's time until which it is paid for."""

    def __init__(self) -> None:
        self.connections = 0
        self.paid_s = -math.inf


class Control:
    """Serves `service` on a listening unix socket.

    Args:
        service: Does what is asked.
        config: Whom to serve.
        stores: The named ones.
        reload: Reads the configuration anew.
    """

    def __init__(
        self,
        service: Service,
        config: Config,
        stores: Stores | None = None,
        reload: "Callable[[], Awaitable[Reloaded]] | None" = None,
    ) -> None:
        self._service = service
        self._stores = stores or Stores({})
        self._reload = reload
        self._allow_other = config.allow_other
        self._mount = config.mount
        self._connections = 0
        self._users: dict[int, _User] = {}

    async def serve(self, listening: socket.socket) -> None:
        """Answer connections until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        await trio.serve_listeners(self._connection, [listener])

    async def _connection(self, stream: trio.SocketStream) -> None:
        self._service.client_came()
        pid, uid, gid = peer_of(stream.socket)
        peer = Peer(uid, gid, _groups_of(stream))
        held = _Held(pid)
        user = self._users.setdefault(uid, _User())
        self._connections += 1
        user.connections += 1
        try:
            self._admit(uid, user.connections)
            passed = held.passed if is_ours(uid) else None
            async with aclosing(_lines(stream, passed)) as lines:
                async for line in lines:
                    if not is_ours(uid):
                        await _pace(user)
                    reply = encode(await self._answer(line, peer, held))
                    held.passed.close()
                    with trio.fail_after(_SEND_S):
                        await stream.send_all(reply)
        except CkptfsError as error:  # the connection itself is at fault: say so and hang up
            with trio.move_on_after(1):
                await _send_if_there(stream, Failed(code=error.code, message=str(error)))
        except (trio.BrokenResourceError, trio.TooSlowError):
            pass  # the client is gone, or silent
        except Exception:  # whatever a client does, it must not take the daemon with it
            log.exception("unexpected error on a control connection")
        finally:
            held.passed.close()
            if held.prefetch is not None:
                held.prefetch.cancel()
            if held.cache_task is not None:
                held.cache_task.cancel()
            for attachment in held.attachments:
                self._service.let_go(attachment)
            self._connections -= 1
            user.connections -= 1
            if not user.connections and user.paid_s <= trio.current_time():
                del self._users[uid]
            self._service.client_left()
            with trio.CancelScope(shield=True):
                await stream.aclose()

    def _admit(self, uid: int, connections: int) -> None:
        if is_anybody(uid):
            raise AccessDenied(
                "your user has no id in the user namespace of the ckptfs daemon, which cannot tell "
                "you from others; use the node's user namespace, or start a daemon of your own"
            )
        if not self._allow_other and not is_ours(uid):
            raise AccessDenied(
                f"this ckptfs daemon serves uid {os.geteuid()} only; start your own (unset "
                "CKPTFS_SOCKET), or have allow_other set in its configuration"
            )
        most = limit_for(uid, _CONNECTIONS_MAX)
        if self._connections > _CONNECTIONS_MAX or connections > most:
            raise LimitExceeded(
                f"more than {most} control connections to the ckptfs daemon; try again later"
            )

    async def _answer(self, line: bytes, peer: Peer, held: _Held) -> Reply:
        request = decode_request(line)
        token = request_id.set(request.request)
        try:
            self._log(request, peer.uid)
            return await self._handle(request, peer, held)
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

    @staticmethod
    def _log(request: Request, uid: int) -> None:
        """What is asked many times a second is only noted where that is wanted."""
        level = logging.DEBUG if isinstance(request, _OFTEN) else logging.INFO
        operation = type(request).__name__
        about = {"event": "request", "operation": operation, "uid": uid}
        log.log(level, "%s asked by uid %d", operation, uid, extra=about)

    async def _handle(self, request: Request, peer: Peer, held: _Held) -> Reply:
        uid = peer.uid
        if isinstance(request, Attach):
            location = self._stores.find(request.location, peer)
            attachment = await self._service.attach(location, uid, peer.gid, pinned=request.pinned)
            held.attachments.append(attachment)
            self._check_again(request.location, location, peer, attachment)
            if attachment.trace is not None:
                attachment.trace.joined(held.pid, request.rank)
            if request.plan is not None:
                wanted = Wanted(plan=request.plan, rank=request.rank)
                self._service.prefetch_unheld(attachment, wanted)
            if request.prefetch:
                self._service.prefetch_unheld(attachment, Wanted(request.prefetch))
            manifest = attachment.manifest
            return Attached(
                mount=self._mount,
                name=attachment.name,
                uri=attachment.location.uri,
                version=manifest.version,
                files=len(manifest.files),
                size=manifest.size,
                skipped=len(manifest.skipped),
                lacking=tuple(
                    islice((s for s in manifest.skipped if s.is_lacking), _LACKING_SHOWN)
                ),
            )
        if isinstance(request, Detach):
            place = self._place(request.location, peer)
            attachment = self._service.find(uid, request.name, place)
            self._service.detach(attachment, force=request.force)
            return Done()
        if isinstance(request, Status | Activity):
            began_s = time.perf_counter()
            told = self._service.status if isinstance(request, Status) else self._service.activity
            reply = told(uid)
            if uid in self._users:
                self._users[uid].paid_s += _STATUS_COST * (time.perf_counter() - began_s)
            return reply
        if isinstance(request, MetadataChanged):
            await self._service.metadata_changed(self._stores.find(request.location, peer), uid)
            return Done()
        if isinstance(request, GetTrace):
            place = self._place(request.location, peer)
            return self._service.trace(uid, request.name, place)
        if isinstance(request, StartPrefetch):
            return self._prefetch(request, uid, held)
        if isinstance(request, PrefetchProgress):
            if held.prefetch is None:
                raise ProtocolError("this connection has no prefetch")
            with trio.move_on_after(_PROGRESS_S):
                await held.prefetch.ended.wait()
            return held.prefetch.state()
        if isinstance(request, CacheRequest):
            if held.cache_task is not None and not held.cache_task.ended:
                raise Busy("the last cache command of this connection has not ended")
            held.cache_task = self._service.cache_tasks.begin(request, uid)
            return await held.cache_task.news()
        if isinstance(request, CacheProgress):
            if held.cache_task is None:
                raise ProtocolError("this connection has no cache command")
            return await held.cache_task.news()
        if not is_ours(uid):
            raise AccessDenied(
                "only root and the daemon's own user may reload, restart or stop it, or exchange "
                "blocks with it"
            )
        if isinstance(request, Reload):
            if self._reload is None:
                raise ProtocolError("this daemon has no configuration of its own to read")
            return await self._reload()
        if isinstance(request, GiveBlocks | TakeBlocks):
            attachment = self._service.find(uid, request.name, None)
            with self._service.holding(attachment), held.passed.used() as memfd:
                if isinstance(request, GiveBlocks):
                    return await self._service.exchange.give(attachment, request, memfd)
                return await self._service.exchange.take(attachment, request, memfd)
        if isinstance(request, Restart):
            self._service.restart()
            return Done()
        self._service.stop(force=request.force)
        return Done()

    def _place(self, location: Location | None, peer: Peer) -> Location | None:
        return None if location is None else self._stores.find(location, peer)

    def _check_again(
        self, asked: Location, found: Location, peer: Peer, attachment: "Attachment"
    ) -> None:
        """The store may have got another table while it was listed."""
        if found.store is None or attachment not in self._service.attachments:
            return
        try:
            now = self._stores.find(asked, peer)
        except CkptfsError:
            self._service.detach(attachment, force=True)
            raise
        if now != found:
            self._service.detach(attachment, force=True)
            raise Busy(f"{found.uri}: the configuration was reloaded meanwhile; try again")

    def _prefetch(self, request: StartPrefetch, uid: int, held: _Held) -> Prefetching:
        if held.prefetch is not None and not held.prefetch.ended.is_set():
            raise Busy("the last prefetch of this connection has not ended; use another connection")
        wanted = Wanted(request.globs, request.rate, request.plan, request.rank)
        attachment = self._service.find(uid, request.name, None)
        self._service.hold(attachment)
        held.attachments.append(attachment)
        held.prefetch = self._service.prefetch(attachment, wanted)
        return held.prefetch.state()


def _log_refusal(request: Request, error: CkptfsError) -> None:
    about = {"event": "refused", "operation": type(request).__name__, "error": error.code}
    log.info("%s refused: %s", type(request).__name__, error, extra=about)


def _groups_of(stream: trio.SocketStream) -> frozenset[int]:
    """All groups of who has connected; none where the kernel does not say (Linux < 4.13), or where
    there are more than Python has room for (256)."""
    try:
        raw = stream.socket.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError:
        return frozenset()
    return frozenset(array.array("I", raw))


async def _pace(user: _User) -> None:
    """Wait until the user's earlier requests are paid for."""
    start_s = max(user.paid_s, trio.current_time() - _BURST_S)
    user.paid_s = start_s + _REQUEST_S
    await trio.sleep_until(start_s)


async def _lines(stream: trio.SocketStream, passed: Passed | None) -> AsyncGenerator[bytes, None]:
    """Requests, one per line; `passed` keeps the descriptor that came with the last one. Raises
    ProtocolError for one that is too long or too slow, TooSlowError for silence."""
    pending = bytearray()
    looked_at = 0
    began_s = math.inf  # when the first byte of an unfinished message came
    while True:
        while 0 <= (end := pending.find(b"\n", looked_at)) <= LINE_BYTES_MAX:
            line = bytes(pending[:end])
            del pending[: end + 1]
            looked_at, began_s = 0, math.inf
            yield line
        if len(pending) > LINE_BYTES_MAX:
            raise ProtocolError(f"a control message is longer than {LINE_BYTES_MAX} bytes")
        looked_at = len(pending)
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


async def _send_if_there(stream: trio.SocketStream, reply: Reply) -> None:
    try:
        await stream.send_all(encode(reply))
    except trio.BrokenResourceError:
        return
