"""The keeper: owns the mount and the control socket, and runs the daemon on them.

The keeper stays small (no pyarrow, no pyfuse3, no trio). It never touches its own mount by path,
because a request that no daemon answers would hang it. Before it mounts, a child process checks
whether a mount that is already there has a daemon (`session.is_served`).

**The next daemon.** When a daemon dies, or its heart has stopped, the keeper starts another one.
It finds in the memory of `handoff` the facts that the kernel and the users expect, so they only
notice a pause. The keeper ends the mount instead if the kernel cannot repeat the requests that
the dead daemon had taken (Linux < 6.9), if the configuration forbids another daemon, or if daemons
die again and again. The kernel ends the daemon when the keeper ends. So no mount stays on which
processes hang.

**The start** has this order: the lock (one keeper per socket), the remains of a dead keeper, the
mount and its FUSE_INIT, the socket, the memory, the daemon. With ``--background`` the keeper
reports the start as one JSON line on standard output: the socket, or an error's code and message.

**As a service** of systemd (`ServiceManager`), the keeper lets the service manager keep all
descriptors of the mount, if a daemon can follow another one. So the mount outlives the keeper, too.
After its death, or a restart of the service, the next keeper continues with the descriptors that it
gets back (`Held`). A keeper says that it is alive only while the daemon's heart beats.

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
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ckptfs._config.load import load as load_settings
from ckptfs._config.load import load_config
from ckptfs._keeper import launch, places
from ckptfs._keeper.background import leave_cgroups, reset_process
from ckptfs._keeper.daemon_process import ASKED_FOR_NEXT, DaemonProcess, Heart
from ckptfs._keeper.mount_state import CONTROL, Held, handed_back, load
from ckptfs._keeper.systemd import ServiceManager, taken_from
from ckptfs._model.config import Config
from ckptfs._model.wording import INSTALL_DAEMON
from ckptfs._mount import handoff, logs, session
from ckptfs._os.filelock import release
from ckptfs._os.jobs import job_of
from ckptfs.errors import CannotMount, CkptfsError, ConfigError

log = logging.getLogger("ckptfs._keeper.keeper")  # it is __main__, too

_DEATHS_WITHIN_S = 600.0
_SHORT_LIFE_S = 0.5
_SHORT_LIVES_MAX = 3
_PAUSE_S = 1.0
"""After so many short lives in a row the next daemon waits, because their cause may pass."""
_BEFORE_SPARE_S = 0.25
"""The processes that wait for the daemon have the processor first."""
_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


def main() -> None:
    """Run the keeper in the foreground, or in a process of its own."""
    parser = argparse.ArgumentParser(prog="ckptfs mount")
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--resume", type=int, default=-1)
    args = parser.parse_args()
    background = args.background or args.private
    manager, given = taken_from(os.environ)
    if background:  # the service is the program that starts it
        manager, given = ServiceManager({}), {}
    report = launch.Report(1 if background else -1)
    try:
        with contextlib.ExitStack() as stack:
            if args.resume >= 0:
                why_ended = _resume(load(args.resume), manager)
            else:
                why_ended = _run(args.private, report, stack, manager, given)
    except CkptfsError as error:
        print(f"ckptfs: error: {error}", file=sys.stderr)
        report.send({"code": error.code, "message": str(error)})
        sys.exit(1)
    sys.exit(1 if why_ended else 0)


def _run(
    private: bool,
    report: launch.Report,
    stack: contextlib.ExitStack,
    manager: ServiceManager,
    given: Mapping[str, int],
) -> str:
    """Mount and serve. Returns why the mount had to be ended; "" if a user ended it."""
    # No core file may have the credentials in this memory and the daemon's. The limit 1 also keeps
    # the dump from a program that collects dumps (fs/coredump.c).
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    held = _what_is_left(manager, given)
    if held is not None:
        return _resume(held, manager)
    loaded = load_settings()
    config = loaded.config
    if importlib.util.find_spec("pyfuse3") is None or importlib.util.find_spec("trio") is None:
        raise CannotMount(f"cannot mount: pyfuse3 is not installed; {INSTALL_DAEMON}")
    pickled = b""
    if private:
        pickled = sys.stdin.buffer.read()
        config = launch.private_config(config, stack)
    else:
        if report.fd >= 0:
            reset_process()
        config = launch.claim_cache(loaded, os.environ)
    is_on_demand = report.fd >= 0 and not private
    launch.make_directories(config)
    if report.fd >= 0:
        report.fd = launch.detach(config)
    if is_on_demand and config.leave_job:
        leave_cgroups()
    os.chdir("/")
    logs.configure(config)
    if is_on_demand and (job := job_of(os.getpid())):
        log.info("running inside %s, and ending with it; see ckptfs help jobs", job)
    with Keeper(config, pickled, manager) as keeper:
        keeper.start(given.get(CONTROL, -1))
        report.send({"socket": config.socket})
        return keeper.run()


def _resume(held: Held, manager: ServiceManager) -> str:
    """Continue after another program or keeper (`Keeper.resume`). Returns the same as `_run`."""
    logs.configure(held.config)
    with Keeper(held.config, b"", manager) as keeper:
        keeper.resume(held)
        return keeper.run()


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


class Keeper:
    """The life of one mount, as a context. Its end removes everything again, unless the service
    manager restarts the service. `pickled` is the filesystem of a private daemon."""

    def __init__(
        self, config: Config, pickled: bytes = b"", manager: ServiceManager | None = None
    ) -> None:
        self._held = Held(config)
        self._pickled = pickled
        self._manager = manager or ServiceManager({})
        self._mount = places.as_mounted(config)
        self._undo = contextlib.ExitStack()
        self._daemon: DaemonProcess | None = None
        self._spare: DaemonProcess | None = None
        self._is_ending = False
        self._reload_asked = False

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.ending()
        if self._is_ending and not self._why_not_restart(0) and self._manager.is_restarting():
            self._end_daemons()
            self._undo.pop_all()  # the rest is the next keeper's
        self._undo.close()

    def start(self, listen_fd: int = -1) -> None:
        """Mount, listen, and start the daemon. `listen_fd` is the socket of a service manager that
        listens; -1 if the keeper makes the socket.

        Raises CannotMount, PlaceUnusable, ConfigError, DaemonError.
        """
        held, config = self._held, self._held.config
        held.made_socket = listen_fd < 0
        held.lock = places.take_lock(config)
        self._undo.callback(release, places.lock_path(config), held.lock)
        held.made_mount = places.clear_mount_point(config)
        self._undo.callback(self._end_directory)
        held.fuse = session.mount(self._mount, allow_other=config.allow_other)
        self._undo.callback(self._end_mount)
        depth = launch.stack_depth(Path(config.cache_dir)) if config.passthrough else 0
        held.passthrough, held.resend = session.answer_init(
            held.fuse, depth, allow_other=config.allow_other
        )
        if os.geteuid() == 0:
            session.set_read_ahead(self._mount, config.read_ahead_kb)
        if not held.made_socket:
            places.check_socket(listen_fd, config)
        held.listen = places.listen(config) if held.made_socket else listen_fd
        self._undo.callback(self._end_socket)
        held.memory = handoff.create()
        self._undo.callback(self._end_memory)
        held.save()
        if not self._why_not_restart(0):
            self._manager.keep(held.named())
        self._undo.callback(self._end_daemons)
        self._catch_signals()
        self._start_daemon(after_another=False)

    def resume(self, held: Held) -> None:
        """Continue the mount of the keeper's former program, or of a former keeper, instead of
        `start`."""
        self._held = held
        held.set_inheritable(False)
        self._undo.callback(release, places.lock_path(held.config), held.lock)
        undo = self._end_directory, self._end_mount, self._end_socket, self._end_memory
        for step in (*undo, self._end_daemons):
            self._undo.callback(step)
        self._catch_signals()
        with contextlib.suppress(ConfigError):  # the old settings stay
            new = load_config()
            held.config = msgspec.structs.replace(
                new,
                socket=held.config.socket,
                mount=held.config.mount,
                cache_dir=held.config.cache_dir,
                allow_other=held.config.allow_other,
            )
        held.save()
        self._start_next()

    def run(self) -> str:
        """Run daemons until one has ended by itself, or too many have died. Returns why the mount
        has to be ended; "" if a user ended it."""
        deaths: list[float] = []
        short_lives = 0
        while not self._is_ending:
            began_s = time.monotonic()
            how = self._wait()
            if not how or self._is_ending:
                return ""
            now_s = time.monotonic()
            if how == ASKED_FOR_NEXT:
                self._replace_program()
            else:
                deaths = [at_s for at_s in deaths if now_s - at_s < _DEATHS_WITHIN_S] + [now_s]
                why_not = self._why_not_restart(len(deaths))
                if why_not:
                    log.error("the daemon %s: ending the mount, because %s", how, why_not)
                    return why_not
            short_lives = short_lives + 1 if now_s - began_s < _SHORT_LIFE_S else 0
            log.warning("the daemon %s: starting the next one", how)
            self._manager.status(f"the daemon {how}: starting the next one")
            time.sleep(_PAUSE_S if short_lives > _SHORT_LIVES_MAX else 0)
            self._start_next()
        return ""

    def _wait(self) -> str:
        """Wait for the daemon's end. Returns how it ended; "" if it ended by itself."""
        assert self._daemon is not None
        heart = Heart(self._held.memory)
        wait_s = _BEFORE_SPARE_S
        while True:
            how = self._daemon.wait(wait_s)
            self._take_in(self._daemon.reloaded())
            if how is not None:
                return how
            if self._reload_asked:
                self._reload_asked = False
                self._daemon.reload()
            if self._spare is None and self._has_spare():
                self._spare = self._new_process(after_another=True)
            if wait_s == handoff.BEAT_S:
                if heart.look():
                    self._daemon.end(at_once=True)
                    return "was stuck"
                if heart.beats:
                    self._manager.alive()
            wait_s = handoff.BEAT_S

    def _take_in(self, config: Config | None) -> None:
        """Use the configuration that the daemon has read again, if it has read one."""
        if config is None:
            return
        self._held.config = config
        self._held.save()
        if not self._has_spare():
            self._end_spare()

    def _has_spare(self) -> bool:
        config = self._held.config
        return config.spare and not self._pickled and not self._why_not_restart(0)

    def _why_not_restart(self, deaths: int) -> str:
        if not self._held.config.restart:
            return "restart = false in the configuration"
        if not self._held.resend:
            return f"the kernel ({os.uname().release}) cannot repeat its requests; Linux 6.9 can"
        if deaths > self._held.config.restarts_max:
            return f"it died {deaths} times in {_DEATHS_WITHIN_S / 60:g} minutes (restarts_max)"
        return ""

    def _replace_program(self) -> None:
        """Continue as the program that is installed now, so an upgrade reaches the keeper, too. A
        private daemon keeps its program, because the caller has the old one in memory."""
        if self._pickled or self._why_not_restart(0):
            return
        held = self._held
        held.save()
        self._end_spare()
        held.set_inheritable(True)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the next program handles them
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        command = [sys.executable, "-m", "ckptfs._keeper.keeper", "--resume", str(held.itself)]
        try:
            os.execve(sys.executable, command, {**os.environ, **self._manager.variables})
        except OSError as error:
            log.error("the keeper cannot be replaced: %s", error)
            held.set_inheritable(False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    # -- the end

    def _end_directory(self) -> None:
        if self._held.made_mount:
            with contextlib.suppress(OSError):
                self._mount.rmdir()

    def _end_mount(self) -> None:
        session.unmount(self._mount)
        self._manager.drop(self._held.named())  # readers wait until none is kept
        os.close(self._held.fuse)

    def _end_socket(self) -> None:
        if self._held.made_socket:
            Path(self._held.config.socket).unlink(missing_ok=True)
        os.close(self._held.listen)

    def _end_memory(self) -> None:
        for fd in (self._held.itself, *self._held.memory.all()):
            os.close(fd)

    def _end_spare(self) -> None:
        if self._spare is not None:
            self._spare.end(at_once=True)
            self._spare = None

    def _end_daemons(self) -> None:
        self._end_spare()
        if self._daemon is not None:
            self._daemon.end()

    # -- daemons and signals

    def _new_process(self, *, after_another: bool) -> DaemonProcess:
        held = self._held
        return DaemonProcess(
            held.fuse,
            held.listen,
            held.memory,
            passthrough=held.passthrough,
            after_another=after_another,
        )

    def _start_daemon(self, *, after_another: bool) -> None:
        if self._daemon is not None:
            self._daemon.end(at_once=True)  # it has died, and has a pipe
        self._daemon, self._spare = self._spare, None
        if self._daemon is not None and self._daemon.wait(0) is not None:
            self._daemon.end(at_once=True)  # the spare one has died, and has a pipe
            self._daemon = None
        if self._daemon is None:
            self._daemon = self._new_process(after_another=after_another)
        self._daemon.activate(self._held.config, self._pickled)
        self._manager.ready(f"serving on {self._held.config.mount}")

    def _start_next(self) -> None:
        try:
            self._start_daemon(after_another=True)
        except CkptfsError as error:
            log.error("the next daemon did not come up: %s", error)
            if self._daemon is not None:
                self._daemon.end(at_once=True)

    def _catch_signals(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _pass_on(self, number: int, _: object) -> None:
        """Reload after a hangup, except for that of a terminal. Otherwise end the daemon, and then
        `run` returns."""
        if number == signal.SIGHUP and not os.isatty(2):
            self._reload_asked = True
            return
        self._is_ending = True
        if self._daemon is None:
            sys.exit(128 + number)
        self._daemon.terminate()


if __name__ == "__main__":
    main()
