"""The daemon process: puts the parts together and runs them.

Started by the keeper only, which passes the FUSE session, the listening socket, the memory of
`handoff` and a pipe to say "ready" on as descriptors, and on standard input the configuration, one
line of JSON; to a private daemon also the pickled filesystem, behind that line, which it passes on
to its workers as it is.

A daemon after another one restores what that had before it takes the kernel's requests. It says
"ready" when it serves, and from then on its heart beats as long as the event loop turns.
"""

import argparse
import contextlib
import functools
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import trio

from ckptfs._config import load_config
from ckptfs._daemon import fuse, logs, passthrough
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.control import Control
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.handoff import BEAT_S, RESTART_STATUS, Fds, Handoff
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.relay import Relay
from ckptfs._daemon.reload import Reloading, tell_by
from ckptfs._daemon.service import Service
from ckptfs._daemon.stores import Stores, known_stores, opening_with
from ckptfs._daemon.tree import MOUNT_ROOT
from ckptfs._daemon.users import limit_for
from ckptfs._model.config import Config
from ckptfs._workers.lifeline import end_with
from ckptfs._workers.pool import Pool
from ckptfs.errors import CkptfsError

log = logging.getLogger("ckptfs._daemon.app")  # this module is __main__


def main() -> None:
    """Run the daemon until it is stopped, is idle, or its mount is gone."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it is a reload: see `_run`
    parser = argparse.ArgumentParser()
    for name in ("fuse-fd", "listen-fd", "ready-fd", "keeper-pid", "passthrough", "after-another"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--handoff-fds", type=int, nargs=3, required=True)
    args = parser.parse_args()
    end_with(args.keeper_pid)  # without it nobody could unmount
    settings, end, pickled = sys.stdin.buffer.read().partition(b"\n")
    if not end:
        sys.exit(1)  # the keeper is dead, and nobody needs a spare daemon any more
    config = msgspec.json.decode(settings, type=Config)
    limiter = logs.configure(config)
    _raise_descriptor_limit()
    table, *journal = args.handoff_fds
    try:
        open_with = opening_with(Pool(limit_for, pickled), is_private=bool(pickled))
        stores = Stores({} if pickled else known_stores(config.store), open_with)
        handoff = Handoff(Fds(table, (journal[0], journal[1])))
        cache = Cache(
            Path(config.cache_dir),
            config.cache_bytes_max,
            config.cache_free_share_min,
            config.in_flight_bytes_max,
            required=not args.after_another,  # readers are more than a cache
        )
    except CkptfsError as error:
        os.write(
            args.ready_fd, msgspec.json.encode({"code": error.code, "message": str(error)}) + b"\n"
        )
        sys.exit(1)
    os.set_blocking(args.fuse_fd, False)
    why = passthrough.why_not(
        args.fuse_fd, config.passthrough, bool(args.passthrough), cache.lock_fd
    )
    fds = args.fuse_fd, args.listen_fd, args.ready_fd
    status = 1
    try:
        run = functools.partial(_run, config, cache, stores, handoff, *fds, why, limiter)
        options = {"after_another": bool(args.after_another), "reloads": not pickled}
        status = trio.run(functools.partial(run, **options))
        cache.shut()
    except BaseException:
        log.critical("the daemon cannot go on", exc_info=True)
    logging.shutdown()
    # Not sys.exit: threads that a store keeps waiting must not keep us.
    os._exit(status)


async def _run(
    config: Config,
    cache: Cache,
    stores: Stores,
    handoff: Handoff,
    fuse_fd: int,
    listen_fd: int,
    ready_fd: int,
    why_passthrough: str,
    limiter: logs.Limiter,
    *,
    after_another: bool,
    reloads: bool,
) -> int:
    """Serve; returns the exit status."""

    def forget_name(name: str) -> None:
        forget = functools.partial(relay.forget_name, MOUNT_ROOT, name.encode())
        nursery.start_soon(offload.control, forget)

    async with trio.open_nursery() as nursery:
        offload = Offload(config.connections_max)
        fetcher = Fetcher(config, cache, offload, nursery)
        service = Service(
            config,
            cache,
            fetcher,
            offload,
            nursery,
            forget_name,
            stores.open,
            handoff,
            why_passthrough,
        )
        lent = passthrough.Passthrough(fuse_fd, service.vfs, on=why_passthrough == passthrough.ON)
        operations = fuse.Operations(service)
        libfuse = await fuse.take_session(operations)
        relay = Relay(fuse_fd, libfuse, service.vfs, lent, handoff.handles, fuse.errno_of)
        operations.before_reply = relay.deliver
        if after_another:
            handoff.restarted()
            await service.restore()
            relay.take_over()
            service.restored()
        told = tell_by(ready_fd)
        parts = service, fetcher, offload, stores
        reload = Reloading(config, load_config, told, *parts).reload if reloads else None
        control = Control(service, config, stores, reload)
        await nursery.start(_obey_signals, service, reload)
        # From here to "ready" nothing is awaited: who is answered is so by a daemon that is ready.
        nursery.start_soon(control.serve, socket.socket(fileno=listen_fd))
        nursery.start_soon(_stop_when_idle, service)
        nursery.start_soon(_serve_fuse, service, relay)
        if config.metrics:
            nursery.start_soon(_serve_metrics, config, service, offload)
        nursery.start_soon(_beat, handoff.beat, limiter.flush, service.reporter.sample)
        os.write(ready_fd, b"{}\n")
        log.info("serving on %s", config.mount)
        await service.stopped.wait()
        log.info("ending")
        nursery.cancel_scope.cancel()
    return RESTART_STATUS if service.restarts else 0


async def _beat(*calls: Callable[[], None]) -> None:
    while True:
        for call in calls:
            call()
        await trio.sleep(BEAT_S)


async def _obey_signals(
    service: Service,
    reload: Callable[[], Awaitable[object]] | None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number != signal.SIGHUP:
                service.stopped.set()
            elif reload is not None:
                with contextlib.suppress(CkptfsError):  # it is in the log
                    await reload()


async def _stop_when_idle(service: Service) -> None:
    await service.wait_idle()
    service.stopped.set()


async def _serve_fuse(service: Service, relay: Relay) -> None:
    await fuse.serve(relay)
    service.stopped.set()  # somebody has unmounted it


async def _serve_metrics(config: Config, service: Service, offload: Offload) -> None:
    try:
        from ckptfs._daemon import exporter, scrapes  # a tenth of the daemon's imports
    except ModuleNotFoundError as error:
        log.error("no metrics: %s; pip install 'ckptfs[daemon]'", error)
        return
    parts = config, service.attachments, service.reporter, offload
    source = exporter.Exporter(*parts, is_open=scrapes.is_open(config.metrics))
    await scrapes.Scrapes(source, config.metrics).serve()


def _raise_descriptor_limit() -> None:
    """An open file of the mount takes two descriptors."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main()
