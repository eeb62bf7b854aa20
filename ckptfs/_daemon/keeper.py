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

With ``--private`` (also in the background) it runs a daemon for one process: socket, mount and
cache are in a scratch directory, and standard input, a pickled filesystem (see
``ckptfs._private``), is handed on to the daemon unread.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import signal
import socket
import stat
import sys
import time
from pathlib import Path

import msgspec

from ckptfs._config import SOCKET_BYTES_MAX, load_config, log_path
from ckptfs._daemon import handoff, session
from ckptfs._daemon.process import (
    ASKED_FOR_NEXT,
    READY_WAIT_S,
    DaemonProcess,
    Heart,
    read_line,
)
from ckptfs._filelock import held_lock, locked
from ckptfs._model.config import Config
from ckptfs.errors import CannotMount, CkptfsError, ConfigError, DaemonError

_LOCK_WAIT_S = 10.0
"""How long a predecessor may take to end."""
_PRIVATE_IDLE_S = 10.0
"""A private daemon serves one process and its children: nobody else comes."""
_DEATHS_WITHIN_S = 600.0
_SHORT_LIFE_S = 0.5
_SHORT_LIVES_MAX = 3
_PAUSE_S = 1.0
"""After so many short lives in a row the next daemon has to wait: what kills them may pass."""
_BEFORE_SPARE_S = 0.25
"""Let who has waited for the daemon have the processor first."""
_LOG_BYTES_MAX = 4 << 20
_BACKLOG = 128
_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
_VARIABLES = "CKPTFS_SOCKET, CKPTFS_MOUNT and CKPTFS_CACHE_DIR"


def main() -> None:
    """Run the keeper in the foreground, or in a process of its own; see the module's text."""
    parser = argparse.ArgumentParser(prog="ckptfs mount")
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--resume", type=int, default=-1)
    args = parser.parse_args()
    if args.resume >= 0:
        _resume(args.resume)
        return
    report = _Report(1 if args.background or args.private else -1)
    try:
        with contextlib.ExitStack() as stack:
            _run(args.private, report, stack)
    except CkptfsError as error:
        print(f"ckptfs: {error}", file=sys.stderr)
        report.send({"code": error.code, "message": str(error)})
        sys.exit(1)


class _Report:
    """Where the start is reported to, once: a descriptor, or nowhere (-1)."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def send(self, told: dict[str, str]) -> None:
        """Report: ``code`` and ``message`` of an error, or what is to be known of a success."""
        if self.fd >= 0:
            os.write(self.fd, json.dumps(told).encode() + b"\n")
            os.close(self.fd)
            self.fd = -1


def _run(private: bool, report: _Report, stack: contextlib.ExitStack) -> None:
    # Credentials in our memory, and the daemon's, are for no core file; 1 is the limit that also
    # keeps the dump from a program that takes dumps (fs/coredump.c).
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    config = load_config()
    if importlib.util.find_spec("pyfuse3") is None or importlib.util.find_spec("trio") is None:
        raise CannotMount("cannot mount: pyfuse3 is not installed; pip install 'ckptfs[daemon]'")
    pickled = b""
    if private:
        pickled = sys.stdin.buffer.read()
        config = _private(config, stack)
    _make_directories(config)
    if report.fd >= 0:
        report.fd = _detach(config)
    os.chdir("/")
    with Keeper(config, pickled) as keeper:
        keeper.start()
        report.send({"socket": config.socket})
        keeper.run()


def _resume(state_fd: int) -> None:
    """The keeper's program was replaced by this one: see `Keeper.resume`."""
    with open(state_fd, "rb") as state:
        state.seek(0)
        held = msgspec.json.decode(state.read(), type=_Held)
    with Keeper(held.config) as keeper:
        keeper.resume(held)
        keeper.run()


class _Held(msgspec.Struct):
    """What a mount consists of. It outlives the program that the keeper runs: see
    `Keeper._replace_program`."""

    config: Config
    lock_fd: int = -1
    made_mount: bool = False
    fuse_fd: int = -1
    passthrough: bool = False
    resend: bool = False
    listen_fd: int = -1
    memory: handoff.Fds = handoff.Fds(-1, (-1, -1))

    def fds(self) -> tuple[int, ...]:
        """All descriptors."""
        return self.lock_fd, self.fuse_fd, self.listen_fd, *self.memory.all()


class Keeper:
    """The life of one mount. Use it as a context: leaving it takes everything away again."""

    def __init__(self, config: Config, pickled: bytes = b"") -> None:
        self._held = _Held(config)
        self._pickled = pickled
        # As the kernel will name it. Not resolved itself: a dead mount may be on it.
        self._mount = Path(os.path.realpath(os.path.dirname(config.mount)), Path(config.mount).name)
        self._socket_path = Path(config.socket)
        self._undo = contextlib.ExitStack()
        self._daemon: DaemonProcess | None = None
        self._spare: DaemonProcess | None = None
        self._is_ending = False

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def start(self) -> None:
        """Mount, listen, and bring the daemon up. Raises CannotMount, ConfigError, DaemonError."""
        held, config = self._held, self._held.config
        self._take_lock()
        self._clear_leftovers()
        held.fuse_fd = session.mount(self._mount, allow_other=config.allow_other)
        self._undo.callback(self._end_mount)
        depth = stack_depth(Path(config.cache_dir)) if config.passthrough else 0
        held.passthrough, held.resend = session.answer_init(held.fuse_fd, depth)
        if os.geteuid() == 0:
            session.set_read_ahead(self._mount, config.read_ahead_kb)
        self._listen()
        self._undo.callback(self._end_socket)
        held.memory = handoff.create()
        self._undo.callback(self._end_daemons)
        self._catch_signals()
        self._start_daemon(after_another=False)

    def resume(self, held: _Held) -> None:
        """Go on with what the keeper's former program had, instead of `start`."""
        self._held = held
        for fd in held.fds():
            os.set_inheritable(fd, False)
        self._undo.enter_context(held_lock(f"{self._socket_path}.lock", held.lock_fd))
        for undo in (self._end_directory, self._end_mount, self._end_socket, self._end_daemons):
            self._undo.callback(undo)
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
        self._start_next()

    def run(self) -> None:
        """Have a daemon run until one has ended by itself, or too many have died."""
        deaths: list[float] = []
        short_lives = 0
        while not self._is_ending:
            began_s = time.monotonic()
            how = self._wait()
            if not how or self._is_ending:
                return
            now_s = time.monotonic()
            if how == ASKED_FOR_NEXT:
                self._replace_program()
            else:
                deaths = [at_s for at_s in deaths if now_s - at_s < _DEATHS_WITHIN_S] + [now_s]
                why_not = self._why_not_restart(len(deaths))
                if why_not:
                    _say(f"the daemon {how}: ending the mount, because {why_not}")
                    return
            short_lives = short_lives + 1 if now_s - began_s < _SHORT_LIFE_S else 0
            _say(f"the daemon {how}: starting the next one")
            time.sleep(_PAUSE_S if short_lives > _SHORT_LIVES_MAX else 0)
            self._start_next()

    def _wait(self) -> str:
        """Wait for the daemon's end. Returns how it ended; "": as it should."""
        assert self._daemon is not None
        heart = Heart(self._held.memory)
        wait_s = _BEFORE_SPARE_S
        while True:
            how = self._daemon.wait(wait_s)
            if how is not None:
                return how
            if self._spare is None and self._has_spare():
                self._spare = self._new_process(after_another=True)
            if wait_s == handoff.BEAT_S and heart.look():
                self._daemon.end(at_once=True)
                return "was stuck"
            wait_s = handoff.BEAT_S

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
        state = os.memfd_create("ckptfs-keeper", 0)
        os.write(state, msgspec.json.encode(self._held))
        if self._spare is not None:
            self._spare.end(at_once=True)
            self._spare = None
        for fd in self._held.fds():
            os.set_inheritable(fd, True)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until there is a handler again
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        command = [sys.executable, "-m", "ckptfs._daemon.keeper", "--resume", str(state)]
        try:
            os.execv(sys.executable, command)
        except OSError as error:
            _say(f"the keeper cannot be replaced: {error}")
            os.close(state)
            for fd in self._held.fds():
                os.set_inheritable(fd, False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    # -- parts of the start, and of the end

    def _take_lock(self) -> None:
        try:
            lock = locked(f"{self._socket_path}.lock", _LOCK_WAIT_S)
            self._held.lock_fd = self._undo.enter_context(lock)
        except TimeoutError:
            raise DaemonError(
                f"a ckptfs daemon is already running on {self._socket_path}; ckptfs umount ends it"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self._socket_path}.lock: {error.strerror}") from None

    def _clear_leftovers(self) -> None:
        """Whoever had the lock before us is dead, and so is what it left behind."""
        for _ in range(8):  # mounts can be stacked
            if session.device_of_mount(self._mount) is None:
                break
            session.unmount(self._mount)
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
        os.close(self._held.fuse_fd)

    def _listen(self) -> None:
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
        self._held.listen_fd = listening.detach()

    def _end_socket(self) -> None:
        self._socket_path.unlink(missing_ok=True)
        os.close(self._held.listen_fd)

    def _new_process(self, *, after_another: bool) -> DaemonProcess:
        held = self._held
        features = session.Features(held.passthrough, held.resend)
        fds = held.fuse_fd, held.listen_fd, held.memory
        return DaemonProcess(*fds, features, after_another=after_another)

    def _start_daemon(self, *, after_another: bool) -> None:
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
            _say(f"the next daemon did not come up: {error}")
            if self._daemon is not None:
                self._daemon.end(at_once=True)

    def _end_daemons(self) -> None:
        if self._spare is not None:
            self._spare.end(at_once=True)
        if self._daemon is not None:
            self._daemon.end()
        for fd in self._held.memory.all():
            os.close(fd)

    def _catch_signals(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _pass_on(self, number: int, _: object) -> None:
        """A signal to end: let the daemon end first. `run` then returns."""
        self._is_ending = True
        if self._daemon is None:
            sys.exit(128 + number)
        self._daemon.terminate()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a log on a full disk is no reason to end the mount
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} keeper: {text}", file=sys.stderr, flush=True)


# -- becoming a process of one's own


def _make_directories(config: Config) -> None:
    """The directories of socket, mount point and cache. Nobody else may be able to write there."""
    ours = 0o755 if config.allow_other else 0o700
    socket_dir, mount_dir = Path(config.socket).parent, Path(config.mount).parent
    for path, mode in ((socket_dir, ours), (mount_dir, ours), (Path(config.cache_dir), 0o700)):
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
            info = path.stat()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; set {_VARIABLES}") from None
        if not is_ours(info):
            raise ConfigError(
                f"{path} belongs to another user or is writable by others; set {_VARIABLES} to "
                "paths in a directory of your own"
            )


def is_ours(info: os.stat_result) -> bool:
    """Whether nobody but this user and root can put something into a directory with that status."""
    shared = info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX
    return info.st_uid in (0, os.geteuid()) and not shared


def stack_depth(cache_dir: Path) -> int:
    """For passthrough: 1, or 2 for a cache on an overlay. Not always 2: the mount could then not be
    a layer of an overlay itself (FILESYSTEM_MAX_STACK_DEPTH is 2)."""
    cache_dir = Path(os.path.realpath(cache_dir))
    found, kind = "", ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if cache_dir.is_relative_to(fields[4]) and len(fields[4]) >= len(found):
            found, kind = fields[4], fields[fields.index("-") + 1]
    return 2 if kind == "overlay" else 1


def _private(config: Config, stack: contextlib.ExitStack) -> Config:
    """The configuration of a private daemon, whose files live as long as `stack`."""

    def end_mount(folder: Path) -> None:
        mount = Path(os.path.realpath(folder), "mnt")  # as the kernel names it
        if session.device_of_mount(mount) is not None:
            session.unmount(mount)

    from ckptfs._scratch import scratch_directory  # its imports are a tenth of the keeper's

    # `_detach` forks, and the parent is gone then.
    scratch = scratch_directory("ckptfs-private-", end_mount, child_goes_on=True)
    folder = stack.enter_context(scratch)
    socket_path = f"{folder}/sock"
    if len(os.fsencode(socket_path)) > SOCKET_BYTES_MAX:
        raise CannotMount(
            f"cannot mount: {socket_path} is too long for a socket; set TMPDIR to a shorter path"
        )
    return msgspec.structs.replace(
        config,
        socket=socket_path,
        node_socket="",
        mount=f"{folder}/mnt",
        cache_dir=f"{folder}/cache",
        idle_exit_s=min(config.idle_exit_s or _PRIVATE_IDLE_S, _PRIVATE_IDLE_S),
        allow_other=False,
    )


def _detach(config: Config) -> int:
    """Go on in a child of its own session; the parent passes the child's report on and exits.

    Returns the descriptor for the report.
    """
    ours, theirs = os.pipe()
    sys.stdout.flush()
    if os.fork():
        os.close(theirs)
        line = read_line(ours, _LOCK_WAIT_S + READY_WAIT_S)
        error = DaemonError(f"the keeper did not come up; see {log_path(config)}")
        if line:
            os.write(1, line)
        else:
            _Report(1).send({"code": error.code, "message": str(error)})
        os._exit(0)
    os.close(ours)
    os.setsid()
    log = log_path(config)
    with contextlib.suppress(OSError):
        if log.stat().st_size > _LOG_BYTES_MAX:
            log.replace(f"{log}.1")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    for fd, path, mode in ((0, "/dev/null", os.O_RDONLY), (1, log, flags), (2, log, flags)):
        opened = os.open(path, mode, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    return theirs


if __name__ == "__main__":
    main()
