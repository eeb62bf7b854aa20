"""The daemon process: it makes the parts and runs them.

Only the keeper starts a daemon. It passes these descriptors: the FUSE session, the listening
socket, the memory of `handoff`, and a pipe on which the daemon says that it is ready. Standard
input has the configuration as one line of JSON. A private daemon also finds the pickled filesystem
behind that line, and passes it on to its workers as it is.

A daemon that follows another one restores the other's attachments and handles before it takes the
kernel's requests. It says that it is ready when it serves. From then on it sends a heartbeat as
long as the event loop turns.
"""

import argparse
import contextlib
import functools
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from ckptfs._config.load import load_again
from ckptfs._daemon.attachment.inodes import entry_of
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.control.commands import Commands
from ckptfs._daemon.control.current_config import CurrentConfig
from ckptfs._daemon.control.lifetime import Lifetime
from ckptfs._daemon.control.named_stores import Stores, known_stores, opening_with
from ckptfs._daemon.control.reload import Reloading
from ckptfs._daemon.control.restore import restore
from ckptfs._daemon.control.server import Control
from ckptfs._daemon.control.service import Service
from ckptfs._daemon.fetch.fetcher import Fetcher
from ckptfs._daemon.fetch.limits import limits_of
from ckptfs._daemon.fuse import operations as fuse
from ckptfs._daemon.fuse import passthrough
from ckptfs._daemon.fuse.relay import Relay
from ckptfs._daemon.fuse.reply_threads import ReplyThreads, threads_for
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.quotas import limit_for
from ckptfs._model.config import NODE_IDLE_MEMORY_BYTES, Config
from ckptfs._model.wording import INSTALL_DAEMON
from ckptfs._mount import logs
from ckptfs._mount.handoff import BEAT_S, RESTART_STATUS, Fds, Handoff
from ckptfs._os.machine import usable_cores
from ckptfs._os.write_all import write_all
from ckptfs._workers.lifeline import end_with
from ckptfs._workers.pool import Pool
from ckptfs._workers.spread import load_for, processes_for
from ckptfs.errors import CkptfsError

log = logging.getLogger("ckptfs._daemon.app")  # this module is __main__


class _Inherited(NamedTuple):
    """Descriptors and facts from the keeper.

    Attributes:
        fuse_fd: The FUSE session.
        listen_fd: The listening control socket.
        ready_fd: The pipe to the keeper.
        handoff: Memory of the daemons of this mount.
        follows_another: Whether another daemon has served the mount before.
        is_private: Whether this is a private daemon, which has no configuration file.
    """

    fuse_fd: int
    listen_fd: int
    ready_fd: int
    handoff: Handoff
    follows_another: bool
    is_private: bool


def main() -> None:
    """Run the daemon until it is stopped, is idle, or its mount is gone."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until `_obey_signals` makes it a reload
    parser = argparse.ArgumentParser()
    for name in ("fuse-fd", "listen-fd", "ready-fd", "keeper-pid", "passthrough", "after-another"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--handoff-fds", type=int, nargs=3, required=True)
    parser.add_argument("--announces", type=int, default=0)
    args = parser.parse_args()
    end_with(args.keeper_pid)  # only the keeper can unmount
    if args.announces:
        os.write(args.ready_fd, b"\n")
    settings, end, pickled = sys.stdin.buffer.read().partition(b"\n")
    if not end:
        sys.exit(1)  # the keeper is dead, so it needs no spare daemon any more
    config = msgspec.json.decode(settings, type=Config)
    current = CurrentConfig(config)
    limiter = logs.configure(config)
    _raise_descriptor_limit()
    table, *journal = args.handoff_fds
    try:
        pool = Pool(
            limit_for,
            pickled,
            lambda: processes_for(current.config.fetch_processes, usable_cores()),
        )
        load = load_for(lambda: current.config.fetch_processes)
        open_with = opening_with(pool, load, is_private=bool(pickled))
        stores = Stores({} if pickled else known_stores(config.store), open_with)
        inherited = _Inherited(
            fuse_fd=args.fuse_fd,
            listen_fd=args.listen_fd,
            ready_fd=args.ready_fd,
            handoff=Handoff(Fds(table, (journal[0], journal[1]))),
            follows_another=bool(args.after_another),
            is_private=bool(pickled),
        )
        cache = Cache(
            Path(config.cache_dir),
            config.cache_bytes_max,
            config.cache_free_share_min,
            limits_of(config).in_flight_bytes,
            required=not args.after_another,  # readers are more important than a cache
            idle_memory_bytes_max=_idle_memory_bytes(config),
        )
    except CkptfsError as error:
        os.write(
            args.ready_fd, msgspec.json.encode({"code": error.code, "message": str(error)}) + b"\n"
        )
        sys.exit(1)
    os.set_blocking(args.fuse_fd, False)
    why_passthrough = passthrough.why_not(
        args.fuse_fd, config.passthrough, bool(args.passthrough), cache.index.root.lock_fd
    )
    gc.freeze()  # the modules stay, so no collection looks at them again
    status = 1
    try:
        status = trio.run(_run, current, cache, stores, inherited, why_passthrough, limiter)
        cache.shut()
    except BaseException:
        log.critical("the daemon cannot go on", exc_info=True)
    logging.shutdown()
    # Not sys.exit, which would wait for threads that wait for a store.
    os._exit(status)


async def _run(
    current: CurrentConfig,
    cache: Cache,
    stores: Stores,
    inherited: _Inherited,
    why_passthrough: str,
    limiter: logs.Limiter,
) -> int:
    """Serve, and return the exit status."""
    async with trio.open_nursery() as nursery:
        offload = Offload(limits_of(current.config).connections)

        def forget_name(name: str) -> None:
            forget = functools.partial(relay.forget_name, *entry_of(name))
            nursery.start_soon(offload.control, forget)

        service = Service(
            current=current,
            cache=cache,
            fetcher=Fetcher(current.config, cache, offload, nursery),
            offload=offload,
            nursery=nursery,
            forget_name=forget_name,
            open_store=stores.open,
            upload_target=stores.target,
            handoff=inherited.handoff,
            passthrough=why_passthrough,
        )
        relay = await _connect_libfuse(service, inherited.fuse_fd, cache)
        if inherited.follows_another:
            inherited.handoff.restarted()
            await restore(service)
            relay.take_over()
            service.attachments.release_all()
        await service.uploads.restore()
        await _start(nursery, service, stores, relay, inherited, limiter)
        await service.lifetime.stopped.wait()
        log.info("ending")
        nursery.cancel_scope.cancel()
    return RESTART_STATUS if service.lifetime.restarts else 0


def _idle_memory_bytes(config: Config) -> int:
    if config.idle_memory_bytes != "auto":
        return config.idle_memory_bytes
    return NODE_IDLE_MEMORY_BYTES if config.allow_other else 0


async def _connect_libfuse(service: Service, fuse_fd: int, cache: Cache) -> Relay:
    """Start libfuse on one end of a socket pair, and return the relay for the other end."""
    operations = fuse.Operations(service.vfs, service.xattrs, service.metadata)
    is_on = service.reporter.passthrough == passthrough.ON
    threads = threads_for(service.current.config.reply_threads, usable_cores())
    relay = Relay(
        fuse_fd,
        await fuse.take_session(operations),
        service.vfs,
        passthrough.Passthrough(fuse_fd, service.vfs, cache, on=is_on),
        service.handoff.handles,
        fuse.errno_of,
        ReplyThreads(fuse_fd, threads, cache.reads),
    )
    operations.before_reply = relay.deliver
    return relay


async def _start(
    nursery: trio.Nursery,
    service: Service,
    stores: Stores,
    relay: Relay,
    inherited: _Inherited,
    limiter: logs.Limiter,
) -> None:
    """Start all services, and say that the daemon is ready."""
    config = service.current.config
    reload = None
    if not inherited.is_private:
        reload = Reloading(
            service,
            stores,
            load=lambda: load_again(service.current.config),
            tell_keeper=lambda new: write_all(inherited.ready_fd, msgspec.json.encode(new) + b"\n"),
        ).reload
    name = f"the ckptfs daemon at {config.socket}"
    control = Control(service, Commands(service, stores, reload, name), name)
    await nursery.start(_obey_signals, service.lifetime, reload)
    # No await from here to "ready", so only a ready daemon answers clients.
    nursery.start_soon(control.serve, socket.socket(fileno=inherited.listen_fd))
    nursery.start_soon(service.uploads.run)
    nursery.start_soon(_stop_when_idle, service.lifetime)
    nursery.start_soon(_serve_fuse, service.lifetime, relay)
    if config.metrics:
        nursery.start_soon(_serve_metrics, config, service)
    take_back = relay.reply_threads.take_back
    nursery.start_soon(
        _beat, inherited.handoff.beat, limiter.flush, service.reporter.sample, take_back
    )
    os.write(inherited.ready_fd, b"{}\n")
    log.info("serving on %s", config.mount)


async def _beat(*calls: Callable[[], None]) -> None:
    while True:
        for call in calls:
            call()
        await trio.sleep(BEAT_S)


async def _obey_signals(
    lifetime: Lifetime,
    reload: Callable[[], Awaitable[object]] | None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number != signal.SIGHUP:
                lifetime.stopped.set()
            elif reload is not None:
                with contextlib.suppress(CkptfsError):  # the log has it
                    await reload()


async def _stop_when_idle(lifetime: Lifetime) -> None:
    await lifetime.wait_idle()
    lifetime.stopped.set()


async def _serve_fuse(lifetime: Lifetime, relay: Relay) -> None:
    await fuse.serve(relay)
    lifetime.stopped.set()  # the mount is gone


async def _serve_metrics(config: Config, service: Service) -> None:
    try:
        from ckptfs._daemon.control import (  # start-up time: a tenth of the daemon's imports
            metrics_server,
            prometheus,
        )
    except ModuleNotFoundError as error:
        log.error("no metrics: %s; %s", error, INSTALL_DAEMON)
        return
    exporter = prometheus.Exporter(
        config,
        service.attachments,
        service.reporter,
        service.offload,
        is_open=metrics_server.is_open(config.metrics),
    )
    await metrics_server.MetricsServer(exporter, config.metrics).serve()


def _raise_descriptor_limit() -> None:
    """Raise the limit to its maximum, because an open file of the mount takes two descriptors."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main()
