"""Checks of the cache's disk."""

import os
import tempfile
import time
from pathlib import Path

from ckptfs._config.paths import existing, is_memory, is_shared
from ckptfs._doctor.checks import Outcome, ok, skipped, warning
from ckptfs._doctor.node import Node
from ckptfs._model.units import size_text
from ckptfs._os.mountinfo import filesystem_type

ROOM_MIN_BYTES = 1 << 30
"""In less space, not even one shard of a usual checkpoint fits."""
SPEED_MIN = 100e6
"""Bytes per second. A slower disk than a network of 1 Gbit/s makes the cache slow down reads."""
_TRIED_BYTES = 64 << 20
_CHUNK_BYTES = 4 << 20
_TRIED_S = 1.0
"""Longest time for writing, and for reading. A slow single operation can exceed it."""


class Disk:
    """The checks. ``serving`` sets `cache_bytes` to the bytes in the running daemon's cache."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.cache_bytes = 0

    def place(self) -> Outcome:
        """Check the type of the cache's file system."""
        config = self._node.config
        kind = filesystem_type(config.cache_dir)
        facts = f"{config.cache_dir} is on {kind or 'a file system of unknown type'}"
        if is_shared(kind):
            return warning(
                f"{facts}, which is slower than a disk, and which other machines may share",
                "set cache_dir (CKPTFS_CACHE_DIR) to a disk of this machine",
            )
        if is_memory(kind):
            return warning(
                f"{facts}, so the cache takes memory, perhaps from a job's or container's limit",
                "set cache_dir (CKPTFS_CACHE_DIR) to a disk, or limit cache_bytes_max",
            )
        if kind == "overlay" and config.passthrough and os.geteuid() == 0:
            return warning(
                f"{facts}, so with passthrough the mount cannot be a layer of another overlay",
                "to lay an overlay over the mount, set cache_dir to a volume or a disk, or set "
                "passthrough = false",
            )
        return ok(facts)

    def space(self) -> Outcome:
        """Check whether the cache has enough space."""
        config = self._node.config
        space = os.statvfs(existing(Path(config.cache_dir)))
        free, whole = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
        leave = int(config.cache_free_share_min * whole)
        # The cache can grow into the free space, and can evict its own bytes.
        room = max(0, free - leave) + self.cache_bytes
        if config.cache_bytes_max:
            room = min(room, config.cache_bytes_max)
        facts = f"{size_text(free)} of {size_text(whole)} free in {config.cache_dir}"
        if space.f_files and not space.f_favail:
            return warning(f"{config.cache_dir} has no free inode", "remove small files there")
        if room < ROOM_MIN_BYTES:
            return warning(
                f"{facts}; {size_text(leave)} must stay free; the cache may use only "
                f"{size_text(room)}",
                "free disk space, raise cache_bytes_max, lower cache_free_share_min, or move "
                "cache_dir",
            )
        return ok(f"{facts}; the cache may use {size_text(room)}")

    def speed(self) -> Outcome:
        """Measure how fast the disk writes and reads, with a temporary file without a name."""
        directory = existing(Path(self._node.config.cache_dir))
        if not os.access(directory, os.W_OK | os.X_OK):
            return skipped(f"this user cannot write to {directory}")
        space = os.statvfs(directory)
        if space.f_bavail * space.f_frsize < 2 * _TRIED_BYTES:
            return skipped(f"{directory} is full")
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            write, read = _measure(file.fileno())
        facts = f"writes {size_text(round(write))}/s, reads {size_text(round(read))}/s"
        if min(write, read) < SPEED_MIN:
            return warning(
                f"{facts}, which is slower than a network of 1 Gbit/s",
                "set cache_dir (CKPTFS_CACHE_DIR) to a local SSD",
            )
        return ok(facts)


def _measure(fd: int) -> tuple[float, float]:
    """Measure the speed of writing and of reading, in bytes per second."""
    chunk = os.urandom(_CHUNK_BYTES)
    begun_s = time.monotonic()
    written = 0
    while written < _TRIED_BYTES and time.monotonic() - begun_s < _TRIED_S:
        written += os.write(fd, chunk)
        os.fdatasync(fd)
    write = written / (time.monotonic() - begun_s)
    # This drops the file from memory, so that the reads measure the disk. tmpfs ignores it.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    begun_s = time.monotonic()
    done = 0
    while done < written and time.monotonic() - begun_s < _TRIED_S:
        done += len(os.pread(fd, _CHUNK_BYTES, done))
    return write, done / (time.monotonic() - begun_s)
