"""The lock, the mount point and the socket of a keeper, on the disk."""

import os
import socket
import time
from pathlib import Path

from ckptfs._keeper.launch import DYING_S, LOCK_WAIT_S
from ckptfs._model.config import Config
from ckptfs._mount import session
from ckptfs._os.filelock import acquire
from ckptfs.errors import ConfigError, DaemonError, PlaceUnusable

_PAUSE_S = 0.25
_STACKED_MAX = 8
"""Most mounts on one mount point that a keeper removes."""
_BACKLOG = 128


class Served(DaemonError):
    """Another keeper has the socket."""


def as_mounted(config: Config) -> Path:
    """The mount point as the kernel names it. Its last part is not resolved, because a dead mount
    may be there."""
    return Path(os.path.realpath(os.path.dirname(config.mount)), Path(config.mount).name)


def lock_path(config: Config) -> str:
    """The lock by which only one keeper has the socket."""
    return f"{config.socket}.lock"


def takeover_path(config: Config) -> str:
    """The socket at which other keepers ask for the mount."""
    return f"{config.socket}.takeover"


def take_lock(config: Config) -> int:
    """Take the keeper's lock, and return its descriptor. Raises Served, PlaceUnusable."""
    path = lock_path(config)
    try:
        return acquire(path, LOCK_WAIT_S)
    except TimeoutError:
        raise Served(
            f"a ckptfs daemon is already running on {config.socket}; ckptfs umount ends it"
        ) from None
    except OSError as error:
        raise PlaceUnusable(
            f"{path}: {error.strerror}; set CKPTFS_SOCKET to another path"
        ) from None


def clear_mount_point(config: Config) -> bool:
    """Unmount the mount of a dead keeper, and make the mount point if it is missing. Returns
    whether it was missing. Raises PlaceUnusable."""
    mount = as_mounted(config)
    for _ in range(_STACKED_MAX):
        if session.device_of_mount(mount) is None:
            break
        _refuse_served(mount, config)
        session.unmount(mount)
    try:
        is_new = not mount.exists()
        mount.mkdir(mode=0o700, exist_ok=True)
        occupied = any(mount.iterdir())
    except OSError as error:
        cause = "not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise PlaceUnusable(f"mount point {mount}: {cause}; set CKPTFS_MOUNT to another") from None
    if occupied:
        raise PlaceUnusable(f"mount point {mount} is not empty; set CKPTFS_MOUNT to another")
    return is_new


def _refuse_served(mount: Path, config: Config) -> None:
    """Raise PlaceUnusable if a keeper with another socket has the mount. The daemon of a killed
    keeper answers for a moment longer."""
    end_s = time.monotonic() + DYING_S
    while session.is_served(mount, LOCK_WAIT_S):
        if time.monotonic() > end_s:
            raise PlaceUnusable(
                f"mount point {mount} is in use by another ckptfs daemon, whose socket is not "
                f"{config.socket}; set CKPTFS_MOUNT to another"
            )
        time.sleep(_PAUSE_S)


def listen(config: Config) -> int:
    """A new control socket, which listens. Replaces the one of a dead keeper. Raises
    PlaceUnusable."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o111 if config.allow_other else 0o177)
    try:
        Path(config.socket).unlink(missing_ok=True)
        listening.bind(config.socket)
    except OSError as error:
        listening.close()
        raise PlaceUnusable(
            f"socket {config.socket}: {error.strerror or error}; set CKPTFS_SOCKET to another path"
        ) from None
    finally:
        os.umask(mask)
    listening.listen(_BACKLOG)
    return listening.detach()


def listen_again(fd: int) -> None:
    """Let clients see this process as the one that listens (SO_PEERCRED), and not the keeper that
    has listened before (unix_listen in the kernel's net/unix/af_unix.c)."""
    with socket.socket(fileno=os.dup(fd)) as listening:
        listening.listen(_BACKLOG)


def check_socket(fd: int, config: Config) -> None:
    """Raise ConfigError unless the socket of a service manager is at the configured path, where the
    clients look."""
    with socket.socket(fileno=os.dup(fd)) as given:
        listens_at = given.getsockname()
    if listens_at != str(Path(config.socket)):
        raise ConfigError(
            f"the service manager listens at {listens_at}, and the configuration says "
            f"{config.socket}; set ListenStream in the socket unit, or CKPTFS_SOCKET"
        )
