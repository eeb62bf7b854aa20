"""The keeper: owns the mount and the control socket, and runs the daemon on them.

It stays small (no pyarrow, no pyfuse3, no trio) and never touches its own mount by path: a request
that no daemon answers would hang it.

A daemon that dies, or whose heart has stopped, is followed by another one, which finds in the
memory of `handoff` what the kernel and the users expect, so that they notice a pause only. Where
the kernel cannot repeat what the dead one had taken (Linux < 6.9), where that is turned off, and
when it dies again and again, the keeper ends the mount instead. The kernel ends the daemon when the
keeper ends. So nothing leaves a mount on which processes hang.

Start, in this order: the lock (one keeper per socket), what a dead predecessor left, the mount and
its FUSE_INIT, the socket, the memory, the daemon. With ``--background`` the start is reported as
one JSON line on standard output: the socket, or an error's code and message.

As a service (of systemd; see `notify`) the keeper has all descriptors of the mount kept there,
where a daemon can follow another. So the mount outlives the keeper, too: when it has died, and when
the service is restarted, the next keeper goes on with what it gets back (`held`). It tells the
service manager that it is alive only while the daemon's heart beats.

With ``--private`` (also in the background) it runs a daemon for one process: socket, mount and
cache are in a scratch directory, and standard input, a pickled filesystem (see
``ckptfs._private``), is handed on to the daemon unread.
"""

import argparse
import contextlib
import importlib.util
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ckptfs._config import load_config
from ckptfs._daemon import handoff, logs, session
from ckptfs._daemon.held import CONTROL, Held, handed_back, load
from ckptfs._daemon.launch import (
    LOCK_WAIT_S,
    Report,
    detach,
    make_directories,
    private_config,
    stack_depth,
)
from ckptfs._daemon.notify import ServiceManager, taken_from
from ckptfs._daemon.process import ASKED_FOR_NEXT, DaemonProcess, Heart
from ckptfs._filelock import acquire, release
from ckptfs._model.config import Config
from ckptfs.errors import CannotMount, CkptfsError, ConfigError, DaemonError

log = logging.getLogger("ckptfs._daemon.keeper")  # it is __main__, too

_DEATHS_WITHIN_S = 600.0
_SHORT_LIFE_S = 0.5
_SHORT_LIVES_MAX = 3
_PAUSE_S = 1.0
"""After so many short lives in a row the next daemon has to wait: what kills them may pass."""
_BEFORE_SPARE_S = 0.25
"""Let who has waited for the daemon have the processor first."""
_BACKLOG = 128
_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


def main() -> None:
    """Run the keeper in the foreground, or in a process of its own; see the module's text."""
    parser = argparse.ArgumentParser(prog="ckptfs mount")
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--resume", type=int, default=-1)
    args = parser.parse_args()
    background = args.background or args.private
    manager, given = taken_from(os.environ)
    if background:  # the service is whoever has started it
        manager, given = ServiceManager({}), {}
    report = Report(1 if background else -1)
    try:
        with contextlib.ExitStack() as stack:
            if args.resume >= 0:
                why_ended = _resume(load(args.resume), manager)
            else:
                why_ended = _run(args.private, report, stack, manager, given)
    except CkptfsError as error:
        print(f"ckptfs: {error}", file=sys.stderr)
        report.send({"code": error.code, "message": str(error)})
        sys.exit(1)
    sys.exit(1 if why_ended else 0)


def _run(
    private: bool,
    report: Report,
    stack: contextlib.ExitStack,
    manager: ServiceManager,
    given: Mapping[str, int],
) -> str:
    """Returns why the mount had to be ended, "" if that was asked for."""
    # Credentials in our memory, and the daemon's, are for no core file; 1 is the limit that also
    # keeps the dump from a program that takes dumps (fs/coredump.c).
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    held = _what_is_left(manager, given)
    if held is not None:
        return _resume(held, manager)
    config = load_config()
    if importlib.util.find_spec("pyfuse3") is None or importlib.util.find_spec("trio") is None:
        raise CannotMount("cannot mount: pyfuse3 is not installed; pip install 'ckptfs[daemon]'")
    pickled = b""
    if private:
        pickled = sys.stdin.buffer.read()
        config = private_config(config, stack)
    make_directories(config)
    if report.fd >= 0:
        report.fd = detach(config)
    os.chdir("/")
    logs.configure(config)
    with Keeper(config, pickled, manager) as keeper:
        keeper.start(given.get(CONTROL, -1))
        report.send({"socket": config.socket})
        return keeper.run()


def _resume(held: Held, manager: ServiceManager) -> str:
    """This program, or this keeper, comes after another one: see `Keeper.resume`."""
    logs.configure(held.config)
    with Keeper(held.config, b"", manager) as keeper:
        keeper.resume(held)
        return keeper.run()


def _what_is_left(manager: ServiceManager, given: Mapping[str, int]) -> Held | None:
    """The mount that an earlier keeper of the service has left, if one can go on with it."""
    held = handed_back(given)
    if held is not None and session.device_of_mount(_as_mounted(held.config)) is None:
        held = None  # somebody has unmounted it meanwhile
    of_use = [given.get(CONTROL, -1)] if held is None else held.fds()
    for name, fd in given.items():
        if fd not in of_use:
            manager.drop([name])
            os.close(fd)
    return held


def _as_mounted(config: Config) -> Path:
    """The mount point as the kernel names it. Not resolved itself: a dead mount may be on it."""
    return Path(os.path.realpath(os.path.dirname(config.mount)), Path(config.mount).name)


class Keeper:
    """The life of one mount. Use it as a context: leaving it takes everything away again, unless
    the service manager has it restarted.

    Args:
        config: The settings.
        pickled: Of a private daemon.
        manager: The service manager.
    """

    def __init__(
        self, config: Config, pickled: bytes = b"", manager: ServiceManager | None = None
    ) -> None:
        self._held = Held(config)
        self._pickled = pickled
        self._manager = manager or ServiceManager({})
        self._mount = _as_mounted(config)
        self._socket_path = Path(config.socket)
        self._lock_path = f"{config.socket}.lock"
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
            self._undo.pop_all()  # all that is the next keeper's
        self._undo.close()

    def start(self, listen_fd: int = -1) -> None:
        """Mount, listen, and bring the daemon up. Raises CannotMount, ConfigError, DaemonError.

        Args:
            listen_fd: The socket, if the service manager listens; else it is made.
        """
        held, config = self._held, self._held.config
        held.made_socket = listen_fd < 0
        self._take_lock()
        self._clear_leftovers()
        held.fuse = session.mount(self._mount, allow_other=config.allow_other)
        self._undo.callback(self._end_mount)
        depth = stack_depth(Path(config.cache_dir)) if config.passthrough else 0
        held.passthrough, held.resend = session.answer_init(held.fuse, depth)
        if os.geteuid() == 0:
            session.set_read_ahead(self._mount, config.read_ahead_kb)
        held.listen = self._listen() if held.made_socket else self._check_socket(listen_fd)
        self._undo.callback(self._end_socket)
        held.memory = handoff.create()
        self._undo.callback(self._end_memory)
        held.save()
        if not self._why_not_restart(0):
            self._manager.keep(held.named())
        self._undo.callback(self._end_daemons)
        self._catch_signals()
        self._start_daemon(after_another=False)
        self._manager.ready(self._serving)

    def resume(self, held: Held) -> None:
        """Go on with what the keeper's former program, or a former keeper, had, instead of
        `start`."""
        self._held = held
        for fd in held.fds():
            os.set_inheritable(fd, False)
        self._undo.callback(release, self._lock_path, held.lock)
        undo = self._end_directory, self._end_mount, self._end_socket, self._end_memory
        for step in (*undo, self._end_daemons):
            self._undo.callback(step)
        self._catch_signals()
        with contextlib.suppress(ConfigError):  # then the old settings have to do
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
        """Have a daemon run until one has ended by itself, or too many have died. Returns why the
        mount has to be ended; "": that was asked for."""
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

    @property
    def _serving(self) -> str:
        return f"serving on {self._held.config.mount}"

    def _wait(self) -> str:
        """Wait for the daemon's end. Returns how it ended; "": as it should."""
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
        """The daemon has read its configuration anew: go on with that, too."""
        if config is None:
            return
        self._held.config = config
        self._held.save()
        if self._spare is not None and not self._has_spare():
            self._spare.end(at_once=True)
            self._spare = None

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
        """Go on as the program that is installed now: an upgrade is one of the keeper, too. What
        has been pickled is no program's but the caller's, who has the old one in memory."""
        if self._pickled or self._why_not_restart(0):
            return
        held = self._held
        held.save()
        if self._spare is not None:
            self._spare.end(at_once=True)
            self._spare = None
        for fd in held.fds():
            os.set_inheritable(fd, True)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until there is a handler again
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        command = [sys.executable, "-m", "ckptfs._daemon.keeper", "--resume", str(held.itself)]
        try:
            os.execve(sys.executable, command, {**os.environ, **self._manager.variables})
        except OSError as error:
            log.error("the keeper cannot be replaced: %s", error)
            for fd in held.fds():
                os.set_inheritable(fd, False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    # -- parts of the start, and of the end

    def _take_lock(self) -> None:
        try:
            self._held.lock = acquire(self._lock_path, LOCK_WAIT_S)
        except TimeoutError:
            raise DaemonError(
                f"a ckptfs daemon is already running on {self._socket_path}; ckptfs umount ends it"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self._lock_path}: {error.strerror}") from None
        self._undo.callback(release, self._lock_path, self._held.lock)

    def _clear_leftovers(self) -> None:
        """Whoever had the lock before us is dead, and so is what it left behind."""
        for _ in range(8):  # mounts can be stacked
            if session.device_of_mount(self._mount) is None:
                break
            session.unmount(self._mount)
        if self._held.made_socket:
            self._socket_path.unlink(missing_ok=True)
        self._held.made_mount = not self._mount.exists()
        try:
            self._mount.mkdir(mode=0o700, exist_ok=True)
            occupied = any(self._mount.iterdir())
        except OSError as error:
            cause = "not a directory" if isinstance(error, FileExistsError) else error.strerror
            raise ConfigError(
                f"mount point {self._mount}: {cause}; set CKPTFS_MOUNT to another"
            ) from None
        if occupied:
            raise ConfigError(
                f"mount point {self._mount} is not empty; set CKPTFS_MOUNT to another"
            )
        self._undo.callback(self._end_directory)

    def _end_directory(self) -> None:
        if self._held.made_mount:
            with contextlib.suppress(OSError):
                self._mount.rmdir()

    def _end_mount(self) -> None:
        session.unmount(self._mount)
        self._manager.drop(self._held.named())  # as long as one is kept, readers wait
        os.close(self._held.fuse)

    def _listen(self) -> int:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        mask = os.umask(0o111 if self._held.config.allow_other else 0o177)
        try:
            listening.bind(str(self._socket_path))
        except OSError as error:
            listening.close()
            raise ConfigError(f"socket {self._socket_path}: {error.strerror or error}") from None
        finally:
            os.umask(mask)
        listening.listen(_BACKLOG)
        return listening.detach()

    def _check_socket(self, fd: int) -> int:
        """The service manager listens where the clients look. Raises ConfigError."""
        with socket.socket(fileno=os.dup(fd)) as given:
            listens_at = given.getsockname()
        if listens_at != str(self._socket_path):
            raise ConfigError(
                f"the service manager listens at {listens_at}, and the configuration says "
                f"{self._socket_path}; set ListenStream in the socket unit, or CKPTFS_SOCKET"
            )
        return fd

    def _end_socket(self) -> None:
        if self._held.made_socket:
            self._socket_path.unlink(missing_ok=True)
        os.close(self._held.listen)

    def _end_memory(self) -> None:
        for fd in (self._held.itself, *self._held.memory.all()):
            os.close(fd)

    def _new_process(self, *, after_another: bool) -> DaemonProcess:
        held = self._held
        features = session.Features(held.passthrough, held.resend)
        fds = held.fuse, held.listen, held.memory
        return DaemonProcess(*fds, features, after_another=after_another)

    def _start_daemon(self, *, after_another: bool) -> None:
        if self._daemon is not None:
            self._daemon.end(at_once=True)  # it has died: give its pipe back
        self._daemon, self._spare = self._spare, None
        if self._daemon is not None and self._daemon.wait(0) is not None:
            self._daemon.end(at_once=True)  # the spare one has died: give its pipe back
            self._daemon = None
        if self._daemon is None:
            self._daemon = self._new_process(after_another=after_another)
        self._daemon.activate(self._held.config, self._pickled)

    def _start_next(self) -> None:
        try:
            self._start_daemon(after_another=True)
        except CkptfsError as error:
            log.error("the next daemon did not come up: %s", error)
            if self._daemon is not None:
                self._daemon.end(at_once=True)
        else:
            self._manager.ready(self._serving)

    def _end_daemons(self) -> None:
        if self._spare is not None:
            self._spare.end(at_once=True)
        if self._daemon is not None:
            self._daemon.end()

    def _catch_signals(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _pass_on(self, number: int, _: object) -> None:
        """A signal to end: let the daemon end first. `run` then returns. A hangup is a reload, but
        in a terminal it is the terminal's end, and ours."""
        if number == signal.SIGHUP and not os.isatty(2):
            self._reload_asked = True
            return
        self._is_ending = True
        if self._daemon is None:
            sys.exit(128 + number)
        self._daemon.terminate()


if __name__ == "__main__":
    main()
