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
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from ckptfs._config import SOCKET_BYTES_MAX, load_config, log_path
from ckptfs._daemon import handoff, session
from ckptfs._filelock import locked
from ckptfs._model.config import Config
from ckptfs.errors import BY_CODE, CannotMount, CkptfsError, ConfigError, DaemonError

_LOCK_WAIT_S = 10.0
"""How long a predecessor may take to end."""
_READY_WAIT_S = 30.0
"""How long the daemon may take to come up: importing pyarrow from a slow disk."""
_END_WAIT_S = 5.0
"""How long the daemon may take to end."""
_PRIVATE_IDLE_S = 10.0
"""A private daemon serves one process and its children: nobody else comes."""
_HEART_STOPPED_BEATS = 10
"""So many looks in a row, one each `BEAT_S`, at a heart that does not beat: the daemon is stuck.
Looks are counted, and not seconds, so that a machine that was asleep has no stuck daemon."""
_DEATHS_WITHIN_S = 600.0
_SHORT_LIFE_S = 1.0
_PAUSE_S = 0.1
_PAUSE_S_MAX = 5.0
"""A daemon that did not live for long is followed by the next one after a pause; it doubles."""
_LOG_BYTES_MAX = 4 << 20
_BACKLOG = 128
_VARIABLES = "CKPTFS_SOCKET, CKPTFS_MOUNT and CKPTFS_CACHE_DIR"


def main() -> None:
    """Run the keeper in the foreground, or in a process of its own; see the module's text."""
    parser = argparse.ArgumentParser(prog="ckptfs mount")
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args()
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


class Keeper:
    """The life of one mount. Use it as a context: leaving it takes everything away again."""

    def __init__(self, config: Config, pickled: bytes = b"") -> None:
        self._config = config
        self._pickled = pickled
        # As the kernel will name it. Not resolved itself: a dead mount may be on it.
        self._mount = Path(os.path.realpath(os.path.dirname(config.mount)), Path(config.mount).name)
        self._socket_path = Path(config.socket)
        self._undo = contextlib.ExitStack()
        self._daemon: subprocess.Popen[bytes] | None = None
        self._fuse_fd = -1
        self._features = session.Features(passthrough=False, resend=False)
        self._memory: handoff.Fds | None = None
        self._is_ending = False
        self._listening: socket.socket | None = None

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def start(self) -> None:
        """Mount, listen, and bring the daemon up. Raises CannotMount, ConfigError, DaemonError."""
        self._take_lock()
        self._clear_leftovers()
        self._fuse_fd = session.mount(self._mount, allow_other=self._config.allow_other)
        self._undo.callback(os.close, self._fuse_fd)
        self._undo.callback(session.unmount, self._mount)
        depth = _stack_depth(Path(self._config.cache_dir)) if self._config.passthrough else 0
        self._features = session.answer_init(self._fuse_fd, depth)
        if os.geteuid() == 0:
            session.set_read_ahead(self._mount, self._config.read_ahead_kb)
        self._listening = self._listen()
        self._memory = handoff.create()
        for fd in self._memory.all():
            self._undo.callback(os.close, fd)
        self._undo.callback(self._end_daemon)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        self._start_daemon(after_another=False)

    def run(self) -> None:
        """Have a daemon run until one has ended by itself, or too many have died."""
        deaths: list[float] = []
        pause_s = 0.0
        while not self._is_ending:
            began_s = time.monotonic()
            how = self._wait()
            if not how or self._is_ending:
                return
            now_s = time.monotonic()
            if how != _RESTARTS:
                deaths = [at_s for at_s in deaths if now_s - at_s < _DEATHS_WITHIN_S] + [now_s]
                why_not = self._why_not_restart(len(deaths))
                if why_not:
                    _say(f"the daemon {how}: ending the mount, because {why_not}")
                    return
            lived = now_s - began_s > _SHORT_LIFE_S
            pause_s = 0.0 if lived else min(2 * pause_s or _PAUSE_S, _PAUSE_S_MAX)
            _say(f"the daemon {how}: starting the next one")
            time.sleep(pause_s)
            try:
                self._start_daemon(after_another=True)
            except CkptfsError as error:
                _say(f"the next daemon did not come up: {error}")
                self._end_daemon(at_once=True)

    def _wait(self) -> str:
        """Wait for the daemon's end. Returns how it ended; "": as it should."""
        assert self._daemon is not None
        assert self._memory is not None
        beats, silent = -1, 0
        while True:
            try:
                code = self._daemon.wait(handoff.BEAT_S)
                return _how_it_ended(code)
            except subprocess.TimeoutExpired:
                pass
            now = handoff.beats(self._memory)
            silent = 0 if now != beats else silent + 1
            beats = now
            if silent == _HEART_STOPPED_BEATS:
                self._end_daemon(at_once=True)
                return f"was stuck for {silent * handoff.BEAT_S:g} s"

    def _why_not_restart(self, deaths: int) -> str:
        if not self._config.restart:
            return "restart = false in the configuration"
        if not self._features.resend:
            return f"the kernel ({os.uname().release}) cannot repeat its requests; Linux 6.9 can"
        if deaths > self._config.restarts_max:
            return f"it died {deaths} times in {_DEATHS_WITHIN_S / 60:g} minutes (restarts_max)"
        return ""

    # -- parts of the start

    def _take_lock(self) -> None:
        try:
            self._undo.enter_context(locked(f"{self._socket_path}.lock", _LOCK_WAIT_S))
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
        created = not self._mount.exists()
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
        if created:
            self._undo.callback(_remove_directory, self._mount)

    def _listen(self) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        mask = os.umask(0o111 if self._config.allow_other else 0o177)
        try:
            listening.bind(str(self._socket_path))
        except OSError as error:
            raise ConfigError(f"socket {self._socket_path}: {error.strerror or error}") from None
        finally:
            os.umask(mask)
        listening.listen(_BACKLOG)
        self._undo.callback(listening.close)
        self._undo.callback(lambda: self._socket_path.unlink(missing_ok=True))
        return listening

    def _start_daemon(self, *, after_another: bool) -> None:
        assert self._listening is not None
        assert self._memory is not None
        ready, theirs = os.pipe()
        options = {
            "--fuse-fd": self._fuse_fd,
            "--listen-fd": self._listening.fileno(),
            "--ready-fd": theirs,
            "--keeper-pid": os.getpid(),
            "--passthrough": int(self._features.passthrough),
            "--after-another": int(after_another),
        }
        command = [sys.executable, "-m", "ckptfs._daemon.app"]
        command += [str(word) for option in options.items() for word in option]
        self._daemon = subprocess.Popen(
            [*command, "--handoff-fds", *map(str, self._memory.all())],
            stdin=subprocess.PIPE,
            pass_fds=(self._fuse_fd, self._listening.fileno(), theirs, *self._memory.all()),
        )
        os.close(theirs)
        assert self._daemon.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then it has no report, either
            self._daemon.stdin.write(msgspec.json.encode(self._config) + b"\n" + self._pickled)
            self._daemon.stdin.close()
        line = _read_line(ready, _READY_WAIT_S)
        os.close(ready)
        _raise_reported(line, "the daemon did not come up; see its log")

    def _end_daemon(self, *, at_once: bool = False) -> None:
        if self._daemon is None or self._daemon.poll() is not None:
            return
        if not at_once:
            self._daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._daemon.wait(_END_WAIT_S)
                return
        self._daemon.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a dead disk may keep it
            self._daemon.wait(_END_WAIT_S)

    def _pass_on(self, number: int, _: object) -> None:
        """A signal to end: let the daemon end first. `run` then returns."""
        self._is_ending = True
        if self._daemon is None:
            sys.exit(128 + number)
        if self._daemon.poll() is None:
            self._daemon.send_signal(signal.SIGTERM)


_RESTARTS = "has asked for a restart"


def _how_it_ended(status: int) -> str:
    if not status:
        return ""
    if status == handoff.RESTART_STATUS:
        return _RESTARTS
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} keeper: {text}", file=sys.stderr, flush=True)


# -- the start's report


def _read_line(fd: int, timeout_s: float) -> bytes:
    """The first line that arrives, or b"" at end of file or when the time is over."""
    line = b""
    deadline = time.monotonic() + timeout_s
    while not line.endswith(b"\n"):
        if not select.select([fd], [], [], max(0, deadline - time.monotonic()))[0]:
            return b""
        data = os.read(fd, 65536)
        if not data:
            return b""
        line += data
    return line


def _raise_reported(line: bytes, otherwise: str) -> None:
    told: Any = json.loads(line) if line else {"code": DaemonError.code, "message": otherwise}
    if told:
        raise BY_CODE.get(told["code"], DaemonError)(told["message"])


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
        shared = info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX
        if info.st_uid not in (0, os.geteuid()) or shared:
            raise ConfigError(
                f"{path} belongs to another user or is writable by others; set {_VARIABLES} to "
                "paths in a directory of your own"
            )


def _stack_depth(cache_dir: Path) -> int:
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
        line = _read_line(ours, _LOCK_WAIT_S + _READY_WAIT_S)
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


def _remove_directory(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


if __name__ == "__main__":
    main()
