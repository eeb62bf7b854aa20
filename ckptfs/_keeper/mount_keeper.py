"""The life of one mount: a keeper's descriptors, daemons, signals, and the end.

The keeper never touches its own mount by path, because a request that no daemon answers would hang
it. Before it mounts, a child process checks whether a mount that is already there has a daemon
(`session.is_served`).

**The next daemon.** When a daemon dies, or its heart has stopped, the keeper starts another one.
It finds in the memory of `handoff` the facts that the kernel and the users expect, so they only
notice a pause. The keeper ends the mount instead if the kernel cannot repeat the requests that
the dead daemon had taken (Linux < 6.9), if the configuration forbids another daemon, or if daemons
die again and again. The kernel ends the daemon when the keeper ends. So no mount stays on which
processes hang.

**The start** has this order: the lock (one keeper per socket), the remains of a dead keeper, the
mount and its FUSE_INIT, the socket, the memory, the daemon.
"""

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from ckptfs._config.load import load_config
from ckptfs._keeper import launch, places
from ckptfs._keeper.daemon_process import ASKED_FOR_NEXT, DaemonProcess, Heart
from ckptfs._keeper.mount_state import Held, MountOffer
from ckptfs._keeper.systemd import ServiceManager
from ckptfs._model.config import Config
from ckptfs._mount import handoff, session
from ckptfs._os.claimants import Claimants, Heir
from ckptfs._os.filelock import release
from ckptfs._os.takeover import WORKER, Offered, Refusal, close_all
from ckptfs.errors import CkptfsError, ConfigError, PlaceUnusable

log = logging.getLogger("ckptfs._keeper.keeper")  # the program that users know

_DEATHS_WITHIN_S = 600.0
_SHORT_LIFE_S = 0.5
_SHORT_LIVES_MAX = 3
_PAUSE_S = 1.0
"""After so many short lives in a row the next daemon waits, because their cause may pass."""
_BEFORE_SPARE_S = 0.25
"""The processes that wait for the daemon have the processor first."""
_HEIR_WAIT_S = 15.0
"""An ending keeper waits so long for a claimant that starts its daemon. Kubernetes kills a pod 30 s
after its signal."""
_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


class Keeper:
    """The life of one mount, as a context. Its end removes everything again, unless the service
    manager restarts the service, or another keeper has taken the mount over.

    Args:
        config: The configuration.
        pickled: The filesystem of a private daemon.
        manager: The service manager of this process.
        hands_over: Whether other keepers may take the mount over (`takeover`).
        cache_lock: See `Held.cache_lock`.

    Attributes:
        handed_over: Whether another keeper has taken the mount over.
    """

    def __init__(
        self,
        config: Config,
        pickled: bytes = b"",
        manager: ServiceManager | None = None,
        *,
        hands_over: bool = False,
        cache_lock: int = -1,
    ) -> None:
        self.handed_over = False
        self._hands_over = hands_over
        self._claimants: Claimants | None = None
        self._heir_until_s = 0.0  # of the monotonic clock; 0 unless a signal waits for an heir
        self._held = Held(config, cache_lock=cache_lock)
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

    @property
    def is_ending(self) -> bool:
        """Whether a signal has told this process to end."""
        return self._is_ending or bool(self._heir_until_s)

    def __exit__(self, *_: object) -> None:
        if self.handed_over:
            self._undo.pop_all()
            if self._claimants is not None:
                self._claimants.close(is_owner=False)
            close_all(self._held.fds())
            return
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
        self._undo.callback(self._end_cache_lock)
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
        self._hear_claimants()
        self._undo.callback(self._end_daemons)
        self._catch_signals()
        self._start_daemon(after_another=False)

    def resume(self, held: Held) -> None:
        """Continue the mount of the keeper's former program, or of a former keeper, instead of
        `start`."""
        self._held = held
        held.set_inheritable(False)
        self._undo_all()
        self._hear_claimants()
        self._undo.callback(self._end_daemons)
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

    def take_over(self, held: Held, offered: Offered) -> str:
        """Continue the mount that a keeper has offered, instead of `start`. Returns "", or why that
        keeper goes on; then this one owns nothing, and the caller closes the descriptors.

        Raises DaemonError and the errors that a daemon reports. Then that keeper goes on, too.
        """
        self._held, self._mount = held, places.as_mounted(held.config)
        try:
            self._spare = self._new_process(after_another=True, announces=True)
            self._spare.wait_imported()
            why_not = offered.ready(self._spare.pidfd)
            if not why_not and session.device_of_mount(self._mount) is None:
                why_not = "it has ended the mount"
            if why_not:
                self._end_spare()
                offered.refuse(why_not)
                return why_not
            self._catch_signals()
            self._start_daemon(after_another=True)
        except BaseException as error:
            self._end_spare()
            if self._daemon is not None:
                self._daemon.end(at_once=True)
            if self._is_ending or not isinstance(error, CkptfsError):
                offered.refuse("it was told to end")
                sys.exit(0)
            offered.refuse(str(error))
            raise
        handoff.note_takeover(held.memory)
        offered.serving()
        held.save()
        self._undo_all()
        places.listen_again(held.listen)
        if os.geteuid() == 0:
            session.set_read_ahead(self._mount, held.config.read_ahead_kb)
        try:
            self._hear_claimants()
        except PlaceUnusable as error:
            log.error("no keeper can take this mount over: %s", error)
        self._undo.callback(self._end_daemons)
        return ""

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
            how = self._wait_and_hand_over(self._daemon, wait_s)
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

    # -- handing over

    def _hear_claimants(self) -> None:
        """Let other keepers take the mount over. Raises PlaceUnusable."""
        if not self._hands_over:
            return
        path = places.takeover_path(self._held.config)
        try:
            self._claimants = Claimants(path, self._held.former, self._offer, log.info)
        except OSError as error:
            raise PlaceUnusable(
                f"{path}: {error.strerror or error}; set CKPTFS_SOCKET to a shorter path in a "
                "directory of your own"
            ) from None
        self._undo.callback(self._claimants.close, is_owner=True)

    def _offer(self) -> tuple[MountOffer, dict[str, int]]:
        held = self._held
        if why_not := self._why_not_restart(0):
            raise Refusal(why_not)
        if not held.made_socket:
            raise Refusal("its socket belongs to a service manager")
        assert self._daemon is not None
        device = session.device_of_mount(self._mount)
        if device is None:
            raise Refusal("its mount is gone")
        return held.offer(device), held.offered() | {WORKER: self._daemon.pidfd}

    def _wait_and_hand_over(self, daemon: DaemonProcess, wait_s: float) -> str | None:
        """Wait for the daemon's end, and return the same as `DaemonProcess.wait`. Hand the mount
        over meanwhile, if a keeper can take it over; then return ""."""
        claimants = self._claimants
        if claimants is None:
            return daemon.wait(wait_s)
        if self._heir_until_s and not self._is_ending:
            is_late = time.monotonic() > self._heir_until_s
            if is_late or not claimants.offer_last():
                self._is_ending = True
                daemon.terminate()
        heir = claimants.wait(wait_s, daemon.pidfd)
        if heir is not None:
            if self._is_ending or daemon.wait(0) is not None:
                heir.refuse("its daemon has just ended")
            elif self._hand_over(heir, daemon):
                return ""
        assert self._daemon is not None
        return self._daemon.wait(0)

    def _hand_over(self, heir: Heir, daemon: DaemonProcess) -> bool:
        """Stop the daemon for a keeper that takes the mount over. Returns whether it has. If it has
        not, the next daemon of this keeper follows."""
        log.info("handing the mount over to ckptfs %s on %r", heir.version, heir.name)
        self._end_spare()
        daemon.end()
        if why_not := heir.grant():
            log.error("%r has not taken the mount over: %s", heir.name, why_not)
            self._start_next()
            return False
        self._manager.drop(self._held.named())
        self.handed_over = True
        return True

    def _undo_all(self) -> None:
        """Let the end of this context end the mount, and all that belongs to it."""
        self._undo.callback(self._end_cache_lock)
        self._undo.callback(release, places.lock_path(self._held.config), self._held.lock)
        for step in (self._end_directory, self._end_mount, self._end_socket, self._end_memory):
            self._undo.callback(step)

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
        command += ["--take-over"] if self._hands_over else []
        try:
            os.execve(sys.executable, command, {**os.environ, **self._manager.variables})
        except OSError as error:
            log.error("the keeper cannot be replaced: %s", error)
            held.set_inheritable(False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    # -- the end

    def _end_cache_lock(self) -> None:
        if self._held.cache_lock >= 0:
            os.close(self._held.cache_lock)

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

    def _new_process(self, *, after_another: bool, announces: bool = False) -> DaemonProcess:
        held = self._held
        return DaemonProcess(
            held.fuse,
            held.listen,
            held.memory,
            passthrough=held.passthrough,
            after_another=after_another,
            announces=announces,
        )

    def _start_daemon(self, *, after_another: bool) -> None:
        if self._daemon is not None:
            self._daemon.end(at_once=True)  # it has died, and has a pipe
        if self._claimants is not None:
            self._claimants.withdraw("its daemon has been replaced")
        self._daemon, self._spare = self._spare, None
        if self._daemon is not None and self._daemon.wait(0) is not None:
            self._daemon.end(at_once=True)  # the spare one has died, and has a pipe
            self._daemon = None
        if self._daemon is None:
            self._daemon = self._new_process(after_another=after_another)
        self._daemon.activate(self._held.config, self._pickled)
        self._manager.ready(f"serving on {self._held.config.mount}")
        if self._is_ending:  # the signal has met the former daemon
            self._daemon.terminate()

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
        `run` returns. If keepers wait for this one's end, the first signal lets one of them take
        the mount over before (`_wait_and_hand_over`)."""
        if number == signal.SIGHUP and not os.isatty(2):
            self._reload_asked = True
            return
        if self._claimants and not self._heir_until_s:
            self._heir_until_s = time.monotonic() + _HEIR_WAIT_S
            return
        self._is_ending = True
        if self._daemon is None:
            sys.exit(128 + number)
        self._daemon.terminate()
