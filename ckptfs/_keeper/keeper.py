"""The keeper's program: owns the mount and the control socket, and runs the daemon on them.

The keeper stays small (no pyarrow, no pyfuse3, no trio). `mount_keeper` has the life of a mount.
With ``--background`` the keeper reports the start as one JSON line on standard output: the socket,
or an error's code and message.

**As a service** of systemd (`ServiceManager`), the keeper lets the service manager keep all
descriptors of the mount, if a daemon can follow another one. So the mount outlives the keeper, too.
After its death, or a restart of the service, the next keeper continues with the descriptors that it
gets back (`Held`). A keeper says that it is alive only while the daemon's heart beats.

**With** ``--take-over`` a keeper takes the mount over from a running one, and hands it over to a
later one (`succession`).

**A private daemon** (``--private``, also in the background) serves one process. Socket, mount and
cache are in a scratch directory. Standard input is a pickled filesystem (see
``ckptfs._client.private_daemon``), which the keeper hands on to the daemon unread.
"""

import argparse
import contextlib
import importlib.util
import logging
import os
import resource
import sys
from collections.abc import Mapping
from typing import NamedTuple

from ckptfs._config.load import Loaded
from ckptfs._config.load import load as load_settings
from ckptfs._keeper import launch, places, succession
from ckptfs._keeper.background import leave_cgroups, reset_process
from ckptfs._keeper.mount_keeper import Keeper
from ckptfs._keeper.mount_state import CONTROL, Held, handed_back, load
from ckptfs._keeper.systemd import ServiceManager, taken_from
from ckptfs._model.wording import INSTALL_DAEMON
from ckptfs._mount import logs, session
from ckptfs._os.jobs import job_of
from ckptfs._os.takeover import exit_on_signal
from ckptfs.errors import CannotMount, CkptfsError

log = logging.getLogger("ckptfs._keeper.keeper")  # it is __main__, too


class _Given(NamedTuple):
    """The arguments of the program, and its service manager.

    Attributes:
        private: Whether the daemon is private.
        takes_over: Whether keepers follow each other on the mount (`succession`).
        manager: The service manager.
        fds: The descriptors that came from it, by name.
        report: The descriptor for the report of the start.
    """

    private: bool
    takes_over: bool
    manager: ServiceManager
    fds: Mapping[str, int]
    report: launch.Report


def main() -> None:
    """Run the keeper in the foreground, or in a process of its own."""
    parser = argparse.ArgumentParser(prog="ckptfs mount")
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--take-over", action="store_true")
    parser.add_argument("--resume", type=int, default=-1)
    args = parser.parse_args()
    background = args.background or args.private
    manager, fds = taken_from(os.environ)
    if background:  # the service is the program that starts it
        manager, fds = ServiceManager({}), {}
    report = launch.Report(1 if background else -1)
    given = _Given(args.private, args.take_over, manager, fds, report)
    try:
        with contextlib.ExitStack() as stack:
            if args.resume >= 0:
                why_ended = _resume(load(args.resume), given)
            else:
                why_ended = _run(given, stack)
    except CkptfsError as error:
        print(f"ckptfs: error: {error}", file=sys.stderr)
        report.send({"code": error.code, "message": str(error)})
        sys.exit(1)
    sys.exit(1 if why_ended else 0)


def _run(given: _Given, stack: contextlib.ExitStack) -> str:
    """Mount and serve. Returns why the mount had to be ended; "" if a user ended it."""
    # No core file may have the credentials in this memory and the daemon's. The limit 1 also keeps
    # the dump from a program that collects dumps (fs/coredump.c).
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    held = _what_is_left(given.manager, given.fds)
    if held is not None:
        return _resume(held, given)
    if importlib.util.find_spec("pyfuse3") is None or importlib.util.find_spec("trio") is None:
        raise CannotMount(f"cannot mount: pyfuse3 is not installed; {INSTALL_DAEMON}")
    if given.takes_over:
        return _serve_in_turn(given, waits=False)
    return _mount(given, load_settings(), stack)


def _mount(given: _Given, loaded: Loaded, stack: contextlib.ExitStack) -> str:
    """Mount and serve. Returns the same as `_run`."""
    config, cache_lock, pickled, report = loaded.config, -1, b"", given.report
    if given.private:
        pickled = sys.stdin.buffer.read()
        config = launch.private_config(config, stack)
    else:
        if report.fd >= 0:
            reset_process()
        config, cache_lock = launch.claim_cache(loaded, os.environ)
    is_on_demand = report.fd >= 0 and not given.private
    launch.make_directories(config)
    if report.fd >= 0:
        report.fd = launch.detach(config)
    if is_on_demand and config.leave_job:
        leave_cgroups()
    os.chdir("/")
    logs.configure(config)
    if is_on_demand and (job := job_of(os.getpid())):
        log.info("running inside %s, and ending with it; see ckptfs help jobs", job)
    with Keeper(config, pickled, given.manager, cache_lock=cache_lock) as keeper:
        keeper.start(given.fds.get(CONTROL, -1))
        report.send({"socket": config.socket})
        return keeper.run()


def _resume(held: Held, given: _Given) -> str:
    """Continue after another program or keeper (`Keeper.resume`). Returns the same as `_run`."""
    logs.configure(held.config)
    with Keeper(held.config, b"", given.manager, hands_over=given.takes_over) as keeper:
        keeper.resume(held)
        why_ended = keeper.run()
    return _serve_in_turn(given, waits=True) if _follows(keeper) else why_ended


def _serve_in_turn(given: _Given, *, waits: bool) -> str:
    """Own the mount whenever this process may (`succession`). Returns the same as `_run`. `waits`
    says whether this process has owned it before."""
    os.chdir("/")
    while True:
        exit_on_signal()
        loaded = load_settings()
        logs.configure(loaded.config)
        keeper = Keeper(loaded.config, b"", given.manager, hands_over=True)
        is_new = not succession.take_over(keeper, loaded, waits=waits)
        if is_new:
            config, cache_lock = launch.claim_cache(loaded, os.environ)
            launch.make_directories(config)
            keeper = Keeper(config, b"", given.manager, hands_over=True, cache_lock=cache_lock)
        try:
            with keeper:
                if is_new:
                    keeper.start(given.fds.get(CONTROL, -1))
                why_ended = keeper.run()
        except places.Served:  # another keeper was faster
            continue
        if not _follows(keeper):
            return why_ended
        waits = True


def _follows(keeper: Keeper) -> bool:
    """Whether this process has handed its mount over, and may follow the next owner."""
    exit_on_signal()
    return keeper.handed_over and not keeper.is_ending


def _what_is_left(manager: ServiceManager, given: Mapping[str, int]) -> Held | None:
    """The mount that an earlier keeper of the service has left, if this one can continue it."""
    held = handed_back(given)
    if held is not None and session.device_of_mount(places.as_mounted(held.config)) is None:
        held = None  # a user has unmounted it meanwhile
    of_use = [given.get(CONTROL, -1)] if held is None else held.fds()
    for name, fd in given.items():
        if fd not in of_use:
            manager.drop([name])
            os.close(fd)
    return held


if __name__ == "__main__":
    main()
