"""The process behind a place that ``mount.ckptfs`` has mounted: it holds the attachment.

It has opened the attachment's directory, says so by a line on standard output, and waits for
changes of the mount table (proc_pid_mountinfo(5)). When the place is no longer mounted, however
that was done, it ends, and with it the lease. When the daemon's own mount is gone, nobody will ever
answer at the place again, so it is unmounted.

Run as a program of its own, of the standard library alone: there may be many, and they stay.
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
    """A line of the mount table: its number, the device's, and which directory is mounted where."""

    id: str
    device: str
    root: str
    place: str


def mounts() -> list[Mount]:
    """All mounts of this process's namespace, the ones above others last."""
    with open(_MOUNTS, "rb") as file:
        return [_parse(os.fsdecode(line)) for line in file]


def mount_on(place: str) -> Mount | None:
    """What is mounted there, and not under another mount."""
    return next((mount for mount in reversed(mounts()) if mount.place == place), None)


def unmount(place: str) -> None:
    """Detach what is mounted there, also while it is in use."""
    ctypes.CDLL(None).umount2(os.fsencode(place), _MNT_DETACH)


def hold(number: str, device: str, place: str) -> None:
    """Return when the mount `number` of `device` on `place` is gone."""
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
    """Hold the directory `path` as long as `hold` takes."""
    os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    print("held", flush=True)
    os.dup2(0, 1)  # whoever waited for that need not wait for us
    hold(number, device, place)


if __name__ == "__main__":
    main(*sys.argv[1:])
