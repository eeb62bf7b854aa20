"""The start of a keeper: its directories, those of a private daemon, and the background."""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ckptfs._config import paths
from ckptfs._config.load import Loaded, log_path
from ckptfs._keeper.daemon_process import READY_WAIT_S, read_line
from ckptfs._model.config import Config
from ckptfs._model.config_values import SOCKET_BYTES_MAX
from ckptfs._mount import session
from ckptfs._os.filelock import wait_unlocked
from ckptfs._os.mountinfo import filesystem_type
from ckptfs.errors import CannotMount, DaemonError, PlaceUnusable

LOCK_WAIT_S = 10.0
"""Longest end of an earlier keeper."""
_PRIVATE_IDLE_S = 10.0
"""A private daemon has no further clients, because it serves one process and its children."""
_LOG_BYTES_MAX = 4 << 20
DYING_S = 2.0
"""Longest end of a daemon after that of its keeper, which the kernel reports to it."""
_PAUSE_S = 0.02
KEEPER_LOCK = "keeper.lock"
"""Names the keeper that has a default cache directory (`_name_of_us`)."""
_VARIABLES = "CKPTFS_SOCKET, CKPTFS_MOUNT and CKPTFS_CACHE_DIR"
_OWN = "to paths in a directory of your own"


class Report:
    """The descriptor for one report of the start; -1 for none."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def send(self, told: dict[str, str]) -> None:
        """Send the report: ``code`` and ``message`` of an error, or the ``socket``."""
        if self.fd >= 0:
            os.write(self.fd, json.dumps(told).encode() + b"\n")
            os.close(self.fd)
            self.fd = -1


def make_directories(config: Config) -> None:
    """Make the directories of socket, mount point and cache. Raises PlaceUnusable if one cannot be
    made, or if another user could write into it."""
    ours = 0o755 if config.allow_other else 0o700
    socket_dir, mount_dir = Path(config.socket).parent, Path(config.mount).parent
    for path, mode in ((socket_dir, ours), (mount_dir, ours), (Path(config.cache_dir), 0o700)):
        try:
            paths.make_folder(path, mode)
            fault = paths.owner_fault(path)
        except OSError as error:
            raise PlaceUnusable(f"{path}: {error.strerror}; set {_VARIABLES} {_OWN}") from None
        if fault:
            raise PlaceUnusable(f"{fault}; set {_VARIABLES} {_OWN}")
    for path in {socket_dir, mount_dir} & {p.path for p in paths.runtime_places(os.environ)}:
        if config.allow_other:
            _open_to_others(path)
        if not path.samefile(config.cache_dir):  # the daemon locks that one exclusively
            _keep_from_ageing(path)


def _open_to_others(path: Path) -> None:
    """Let other users reach the socket and the mount in ckptfs's own directory, which a client or
    an earlier daemon may have made for one user. Raises PlaceUnusable."""
    info = path.stat()
    if info.st_uid == os.geteuid() and info.st_mode & 0o055 != 0o055:
        try:
            path.chmod(0o755)
        except OSError as error:
            raise PlaceUnusable(f"{path}: {error.strerror}; chmod 755 {path}") from None


def _keep_from_ageing(path: Path) -> None:
    """Share the lock of a directory until this process ends, also as another program.

    systemd-tmpfiles(8) removes files from /tmp after 10 days, except in locked directories
    (tmpfiles.d(5)). Without the keeper's lock file a second keeper would end this mount.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # systemd-tmpfiles is at work, or there are no locks
        os.close(fd)
    else:
        os.set_inheritable(fd, True)


# -- the default cache


def claim_cache(loaded: Loaded, environ: Mapping[str, str]) -> tuple[Config, int]:
    """The configuration with a cache that no other daemon uses, made and kept for this keeper, and
    the lock by which it is kept; -1 for a configured cache.

    A configured cache stays as it is, and the daemon refuses it if it is in use. If a default cache
    is in use, the keeper takes the next sibling, and if it cannot be used, the next candidate. The
    keeper holds the lock until this process ends, also as another program.

    Raises PlaceUnusable if no candidate can be used.
    """
    config = loaded.config
    if loaded.sources["cache_dir"] != "default":
        return config, -1
    # An earlier keeper on the same socket holds the cache until its end.
    with contextlib.suppress(OSError):
        wait_unlocked(f"{config.socket}.lock", LOCK_WAIT_S)
    faults: list[str] = []
    for place in paths.cache_places(environ):
        if place.fault:
            faults.append(place.fault)
            continue
        for directory in paths.siblings(place.path):
            try:
                if (lock := _claim(directory, config.socket)) >= 0:
                    return msgspec.structs.replace(config, cache_dir=str(directory)), lock
            except OSError as error:
                faults.append(f"{directory}: {error.strerror}")
                break
        else:
            faults.append(f"{place.path} and {paths.SIBLINGS_MAX - 1} beside it are in use")
    raise PlaceUnusable(
        f"no directory for the cache can be used ({', '.join(faults)}); set cache_dir "
        "(CKPTFS_CACHE_DIR) to a directory of your own"
    )


def free_cache(environ: Mapping[str, str]) -> tuple[Path | None, list[str]]:
    """The default cache directory that `claim_cache` would take now, or None, and the reasons
    against those before it. Makes nothing."""
    faults: list[str] = []
    for place in paths.cache_places(environ):
        if place.fault:
            faults.append(place.fault)
            continue
        for directory in paths.siblings(place.path):
            if not is_in_use(directory) and not is_kept(directory):
                return directory, faults
            faults.append(f"{directory} is in use by another daemon of this user")
    return None, faults


def _claim(directory: Path, socket_path: str) -> int:
    """Keep a cache directory for this keeper. Returns its lock; -1 if it is not free. Raises
    OSError."""
    paths.make_folder(directory)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(directory / KEEPER_LOCK, flags, 0o600)
    name = _name_of_us(socket_path)
    with contextlib.ExitStack() as unlock:
        unlock.callback(os.close, fd)
        if not _lock_soon(fd, name):
            return -1
        os.ftruncate(fd, 0)
        os.pwrite(fd, name, 0)
        end_s = time.monotonic() + DYING_S  # of the daemon of a killed keeper
        while is_in_use(directory):
            if time.monotonic() > end_s:
                return -1
            time.sleep(_PAUSE_S)
        unlock.pop_all()
    return fd


def _name_of_us(socket_path: str) -> bytes:
    """The name that a keeper shares only with its predecessors: the socket and the mount namespace.
    Jobs with a ``/tmp`` of their own have the same socket path in namespaces of their own."""
    try:
        namespace = os.readlink("/proc/self/ns/mnt")
    except OSError:
        namespace = ""
    return os.fsencode(f"{socket_path} {namespace}")


def _lock_soon(fd: int, name: bytes) -> bool:
    """Lock a file, perhaps after a wait for the end of a predecessor, which has written `name` into
    it. Returns whether it is locked. Raises OSError."""
    end_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if os.pread(fd, 4096, 0) != name or time.monotonic() > end_s:
                return False
            time.sleep(_PAUSE_S)
        else:
            return True


def is_in_use(directory: Path) -> bool:
    """Whether a daemon or ``ckptfs cache`` uses that cache directory now. Makes nothing there."""
    return _is_locked(directory / "lock")


def is_kept(directory: Path) -> bool:
    """Whether a keeper keeps that cache directory for its daemon. Makes nothing there."""
    return _is_locked(directory / KEEPER_LOCK)


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def stack_depth(cache_dir: Path) -> int:
    """The depth for `session.answer_init`: 2 for a cache on an overlay, else 1.

    A mount with depth 2 could not be a layer of an overlay (FILESYSTEM_MAX_STACK_DEPTH is 2). That
    of a user's daemon always can, because it never has passthrough.
    """
    return 2 if os.geteuid() == 0 and filesystem_type(cache_dir) == "overlay" else 1


def private_config(config: Config, stack: contextlib.ExitStack) -> Config:
    """The configuration of a private daemon, whose files exist as long as `stack`. Raises
    PlaceUnusable, CannotMount."""
    from ckptfs._os.scratch import scratch_directory  # its imports are a tenth of the keeper's

    # `detach` forks, and its parent ends.
    scratch = scratch_directory("ckptfs-private-", session.unmount_scratch, child_goes_on=True)
    try:
        folder = stack.enter_context(scratch)
    except OSError as error:
        raise PlaceUnusable(
            f"cannot mount: no temporary directory ({error.strerror}); set TMPDIR"
        ) from None
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
    """Continue in a child with a session of its own. The parent passes the child's report on, and
    exits. Returns the descriptor for the report. Raises PlaceUnusable if the log cannot be written.
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
    with contextlib.suppress(OSError):
        if path.stat().st_size > _LOG_BYTES_MAX:
            path.replace(f"{path}.1")
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise PlaceUnusable(
            f"cache directory {path.parent}: its log cannot be written: {error.strerror}; set "
            "cache_dir (CKPTFS_CACHE_DIR) to another directory"
        ) from None
