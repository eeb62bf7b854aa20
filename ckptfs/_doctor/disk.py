"""Checks of the disk that the cache is on."""

import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from ckptfs._doctor.checks import Outcome, ok, skipped, warning
from ckptfs._doctor.node import Node, existing
from ckptfs._model.units import size_text

ROOM_MIN_BYTES = 1 << 30
"""Not even one shard of a usual checkpoint has room in less."""
SPEED_MIN = 100e6
"""Bytes per second: less is slower than a network of 1 Gbit/s, and the cache slows a read down."""
_TRIED_BYTES = 64 << 20
_CHUNK_BYTES = 4 << 20
_TRIED_S = 1.0
"""Longest time for writing, and for reading; a disk's single answer may add to it."""


class _Speed(NamedTuple):
    """Bytes per second."""

    write: float
    read: float


class Disk:
    """The checks. `cache_bytes`: what the daemon that answers has on it; set by ``serving``."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.cache_bytes = 0

    def space(self) -> Outcome:
        """Whether the cache has room."""
        if why := self._node.served_elsewhere():
            return skipped(why)
        config = self._node.config
        space = os.statvfs(existing(Path(config.cache_dir)))
        free, whole = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
        leave = int(config.cache_free_share_min * whole)
        # As much as it may grow, and what it can throw away for that.
        room = max(0, free - leave) + self.cache_bytes
        if config.cache_bytes_max:
            room = min(room, config.cache_bytes_max)
        facts = f"{size_text(free)} of {size_text(whole)} free in {config.cache_dir}"
        if space.f_files and not space.f_favail:
            return warning(f"no inode is free in {config.cache_dir}", "remove small files there")
        if room < ROOM_MIN_BYTES:
            return warning(
                f"{facts}, {size_text(leave)} have to stay free: {size_text(room)} for the cache",
                "free some, raise cache_bytes_max, lower cache_free_share_min, or move cache_dir",
            )
        return ok(f"{facts}; {size_text(room)} of it for the cache")

    def speed(self) -> Outcome:
        """How fast the disk writes and reads, measured on a file that has no name."""
        if why := self._node.served_elsewhere():
            return skipped(why)
        directory = existing(Path(self._node.config.cache_dir))
        if not os.access(directory, os.W_OK | os.X_OK):
            return skipped(f"{directory} is not ours to write into")
        space = os.statvfs(directory)
        if space.f_bavail * space.f_frsize < 2 * _TRIED_BYTES:
            return skipped(f"{directory} is full")
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            speed = _measure(file.fileno())
        facts = f"writes {speed.write / 1e6:,.0f} MB/s, reads {speed.read / 1e6:,.0f} MB/s"
        if min(speed) < SPEED_MIN:
            return warning(
                f"{facts}: slower than a network of 1 Gbit/s",
                "set cache_dir (CKPTFS_CACHE_DIR) to a local SSD",
            )
        return ok(facts)


def _measure(fd: int) -> _Speed:
    chunk = os.urandom(_CHUNK_BYTES)
    begun_s = time.monotonic()
    written = 0
    while written < _TRIED_BYTES and time.monotonic() - begun_s < _TRIED_S:
        written += os.write(fd, chunk)
        os.fdatasync(fd)
    write = written / (time.monotonic() - begun_s)
    # What is on the disk need not stay in memory; a file system that has only memory ignores it.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    begun_s = time.monotonic()
    done = 0
    while done < written and time.monotonic() - begun_s < _TRIED_S:
        done += len(os.pread(fd, _CHUNK_BYTES, done))
    return _Speed(write, done / (time.monotonic() - begun_s))
