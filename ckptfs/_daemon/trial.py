"""A mount for a moment, which shows what this machine can do: see `try_mount`.

It takes the steps that the keeper takes, so what it finds is what a daemon would find.
"""

import os
from pathlib import Path
from typing import NamedTuple

from ckptfs._daemon import launch, passthrough, session
from ckptfs._model.config import Config
from ckptfs._scratch import scratch_directory


class Trial(NamedTuple):
    """What was found.

    Attributes:
        resend: The kernel can repeat what a dead daemon had taken.
        passthrough: `passthrough.ON`, or why not.
        read_ahead: The kernel's readahead could be set.
    """

    resend: bool
    passthrough: str
    read_ahead: bool


def try_mount(config: Config, cache_fd: int) -> Trial:
    """Mount in a temporary directory, and end that at once.

    Nobody answers on it meanwhile: whoever looks into it waits until it ends, with an error. One
    that is left because this process was killed is ended by the next trial.

    Args:
        config: Of the daemon.
        cache_fd: A file on the file system of its cache.

    Raises:
        CannotMount, OSError: The machine does not let us.
    """

    def end_mount(folder: Path) -> None:
        mountpoint = Path(os.path.realpath(folder), "mnt")
        if session.device_of_mount(mountpoint) is not None:
            session.unmount(mountpoint)

    with scratch_directory("ckptfs-doctor-", end_mount) as folder:
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
