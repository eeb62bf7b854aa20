"""A short trial mount, which shows the abilities of this machine: see `try_mount`.

It takes the same steps as the keeper, so a daemon would have the same results.
"""

import os
from pathlib import Path
from typing import NamedTuple

from ckptfs._daemon.fuse import passthrough
from ckptfs._keeper import launch
from ckptfs._model.config import Config
from ckptfs._mount import session
from ckptfs._os.scratch import scratch_directory


class Trial(NamedTuple):
    """The results.

    Attributes:
        resend: Whether the kernel can repeat requests that a dead daemon had taken.
        passthrough: `passthrough.ON`, or the reason why it is off.
        read_ahead: Whether this process could set the kernel's readahead.
    """

    resend: bool
    passthrough: str
    read_ahead: bool


def try_mount(config: Config, cache_fd: int) -> Trial:
    """Mount in a temporary directory, and end the mount at once.

    No process answers requests to this mount. A process that opens it waits until the mount ends,
    and then gets an error. If this process is killed, the next trial ends the mount. `cache_fd` is
    a file on the file system of the daemon's cache.

    Raises:
        CannotMount, OSError: This machine cannot mount.
    """
    with scratch_directory("ckptfs-doctor-", session.unmount_scratch) as folder:
        mountpoint = Path(os.path.realpath(folder), "mnt")
        mountpoint.mkdir(mode=0o700)
        fd = session.mount(mountpoint, allow_other=False)
        try:
            return _look(fd, mountpoint, config, cache_fd)
        finally:
            session.unmount(mountpoint)
            os.close(fd)


def _look(fd: int, mountpoint: Path, config: Config, cache_fd: int) -> Trial:
    depth = launch.stack_depth(Path(config.cache_dir)) if config.passthrough else 0
    features = session.answer_init(fd, depth)
    read_ahead = os.geteuid() == 0 and session.set_read_ahead(mountpoint, config.read_ahead_kb)
    why_not = passthrough.why_not(fd, config.passthrough, features.passthrough, cache_fd)
    return Trial(features.resend, why_not, read_ahead)
