"""The process that holds the attachment of a place that ``mount.ckptfs`` has mounted.

It opens the attachment's directory, which is the lease, and prints a line on standard output. Then
it waits for changes of the mount table (proc_pid_mountinfo(5)). When the place is unmounted, the
process ends, and with it the lease. When the daemon's own mount ends, the process unmounts the
place, because no daemon will ever answer there again.

The module is a program of its own that imports only the standard library, because there can be many
of these processes for a long time.
"""

import ctypes
import os
import re
import select
import sys
from typing import NamedTuple

_MNT_DETACH = 2
_MOUNTS = "/proc/self/mountinfo"


class Mount(NamedTuple):
    """A line of the mount table. The directory `root` of the device is mounted on `place`."""

    id: str
    device: str
    root: str
    place: str


def mounts() -> list[Mount]:
    """All mounts in this process's namespace. A mount on top of another comes after it."""
    with open(_MOUNTS, "rb") as file:
        return [_parse(os.fsdecode(line)) for line in file]


def mount_on(place: str) -> Mount | None:
    """The topmost mount on a place."""
    return next((mount for mount in reversed(mounts()) if mount.place == place), None)


def unmount(place: str) -> None:
    """Unmount a place, even while it is in use."""
    ctypes.CDLL(None).umount2(os.fsencode(place), _MNT_DETACH)


def hold(number: str, device: str, place: str) -> None:
    """Wait until the mount `number` of `device` on `place` has ended."""
    with open(_MOUNTS, "rb") as table:
        changes = select.poll()
        changes.register(table, select.POLLPRI)
        while True:
            known = mounts()
            if not any(mount.id == number for mount in known):
                return
            if not any(mount.device == device and mount.root == "/" for mount in known):
                unmount(place)
                return
            changes.poll()


def _parse(line: str) -> Mount:
    number, _, device, *paths = line.split(" ")[:5]
    root, place = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), path) for path in paths)
    return Mount(number, device, root, place)


def main(path: str, number: str, device: str, place: str) -> None:
    """Hold the directory `path` until the mount ends."""
    os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    print("held", flush=True)
    os.dup2(0, 1)  # closes the pipe, on which mount.ckptfs waits
    hold(number, device, place)


if __name__ == "__main__":
    main(*sys.argv[1:])
