"""How a keeper comes to be: its directories, those of a private one, and the background."""

import contextlib
import json
import os
import stat
import sys
from pathlib import Path

import msgspec

from ckptfs._config import SOCKET_BYTES_MAX, log_path
from ckptfs._daemon import session
from ckptfs._daemon.process import READY_WAIT_S, read_line
from ckptfs._model.config import Config
from ckptfs.errors import CannotMount, ConfigError, DaemonError

LOCK_WAIT_S = 10.0
"""How long a predecessor may take to end."""
_PRIVATE_IDLE_S = 10.0
"""A private daemon serves one process and its children: nobody else comes."""
_LOG_BYTES_MAX = 4 << 20
_VARIABLES = "CKPTFS_SOCKET, CKPTFS_MOUNT and CKPTFS_CACHE_DIR"


class Report:
    """Where the start is reported to, once: a descriptor, or nowhere (-1)."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def send(self, told: dict[str, str]) -> None:
        """Report: ``code`` and ``message`` of an error, or what is to be known of a success."""
        if self.fd >= 0:
            os.write(self.fd, json.dumps(told).encode() + b"\n")
            os.close(self.fd)
            self.fd = -1


def make_directories(config: Config) -> None:
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


def private_config(config: Config, stack: contextlib.ExitStack) -> Config:
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
        metrics="",  # its address is the node's daemon's
    )


def detach(config: Config) -> int:
    """Go on in a child of its own session; the parent passes the child's report on and exits.

    Returns the descriptor for the report. Raises ConfigError where the log cannot be written.
    """
    log_fd = _open_log(log_path(config))
    ours, theirs = os.pipe()
    sys.stdout.flush()
    if os.fork():
        os.close(theirs)
        line = read_line(ours, LOCK_WAIT_S + READY_WAIT_S)
        error = DaemonError(f"the keeper did not come up; see {log_path(config)}")
        if line:
            os.write(1, line)
        else:
            Report(1).send({"code": error.code, "message": str(error)})
        os._exit(0)
    os.close(ours)
    os.setsid()
    null_fd = os.open(os.devnull, os.O_RDONLY)
    for fd, opened in ((0, null_fd), (1, log_fd), (2, log_fd)):
        os.dup2(opened, fd)
    for opened in (null_fd, log_fd):
        if opened > 2:
            os.close(opened)
    return theirs


def _open_log(path: Path) -> int:
    """Raises ConfigError."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > _LOG_BYTES_MAX:
            path.replace(f"{path}.1")
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cache directory {path.parent}: its log cannot be written: {error.strerror}; set "
            "cache_dir (CKPTFS_CACHE_DIR) to another directory"
        ) from None
