"""The keeper: owns the mount and the control socket, and runs the daemon on them.

It stays small (no pyarrow, no pyfuse3, no trio) and never touches its own mount by path: a request
that no daemon answers would hang it. It ends the mount when the daemon ends, and the kernel ends
the daemon when the keeper ends, so that neither leaves a mount on which processes hang.

Start, in this order: the lock (one keeper per socket), what a dead predecessor left, the mount and
its FUSE_INIT, the socket, the daemon. With ``--background`` the start is reported as one JSON line
on standard output: the socket, or an error's code and message.

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
from ckptfs._daemon import session
from ckptfs._filelock import locked
from ckptfs._model.config import Config
from ckptfs.errors import BY_CODE, CannotMount, CkptfsError, ConfigError, DaemonError

_LOCK_WAIT_S = 10.0
"""How long a predecessor may take to end."""
_READY_WAIT_S = 30.0
"""How long the daemon may take to come up: importing pyarrow from a slow disk."""
_PRIVATE_IDLE_S = 10.0
"""A private daemon serves one process and its children: nobody else comes."""
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
        self._passthrough = False
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
        self._passthrough = session.answer_init(self._fuse_fd, depth)
        if os.geteuid() == 0:
            session.set_read_ahead(self._mount, self._config.read_ahead_kb)
        self._listening = self._listen()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        self._start_daemon()

    def run(self) -> None:
        """Wait for the daemon's end."""
        assert self._daemon is not None
        code = self._daemon.wait()
        if code:
            print(f"keeper: the daemon ended with {code}: ending the mount", file=sys.stderr)

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

    def _start_daemon(self) -> None:
        assert self._listening is not None
        ready, theirs = os.pipe()
        options = {
            "--fuse-fd": self._fuse_fd,
            "--listen-fd": self._listening.fileno(),
            "--ready-fd": theirs,
            "--keeper-pid": os.getpid(),
            "--passthrough": int(self._passthrough),
        }
        command = [sys.executable, "-m", "ckptfs._daemon.app"]
        self._daemon = subprocess.Popen(
            command + [str(word) for option in options.items() for word in option],
            stdin=subprocess.PIPE,
            pass_fds=(self._fuse_fd, self._listening.fileno(), theirs),
        )
        self._undo.callback(self._end_daemon)
        os.close(theirs)
        assert self._daemon.stdin is not None
        self._daemon.stdin.write(msgspec.json.encode(self._config) + b"\n" + self._pickled)
        self._daemon.stdin.close()
        line = _read_line(ready, _READY_WAIT_S)
        os.close(ready)
        _raise_reported(line, "the daemon did not come up; see its log")

    def _end_daemon(self) -> None:
        assert self._daemon is not None
        if self._daemon.poll() is None:
            self._daemon.terminate()
            try:
                self._daemon.wait(5)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()

    def _pass_on(self, number: int, _: object) -> None:
        """A signal to end: let the daemon end first. `run` then returns."""
        if self._daemon is None:
            sys.exit(128 + number)
        if self._daemon.poll() is None:
            self._daemon.send_signal(signal.SIGTERM)


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
