"""The cores and the memory that this process may use.

A container's limits (`docker run --cpus --memory`, `resources.limits` of Kubernetes) leave the
affinity and the size of the machine's memory as they are, so a large node looks whole to a small
container.

Both functions read files, and each process reads them once.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/proc/self/cgroup")
_TOP = Path("/sys/fs/cgroup")


@functools.cache
def usable_cores(cgroups: Path = _CGROUPS, top: Path = _TOP) -> int:
    """The cores of this process's affinity, or those that its cgroups have time for; at least 1.

    Args:
        cgroups: The file that names the cgroups of the process.
        top: The folder in which cgroups are mounted.
    """
    cores = len(os.sched_getaffinity(0))
    for place, is_v1 in _cgroups("cpu", cgroups, top):
        quota = _quota_v1(place) if is_v1 else _quota_v2(place)
        if quota is not None:
            cores = min(cores, max(1, math.ceil(quota)))
    return cores


@functools.cache
def usable_memory_bytes(cgroups: Path = _CGROUPS, top: Path = _TOP) -> int:
    """The machine's memory, or what its cgroups leave to this process. Arguments as above."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for place, is_v1 in _cgroups("memory", cgroups, top):
        # See memory.max in Documentation/admin-guide/cgroup-v2.rst, and cgroup-v1/memory.rst. The
        # word "max" says that there is no limit, and in version 1 a number above all memory.
        name = "memory.limit_in_bytes" if is_v1 else "memory.max"
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int((place / name).read_text()))
    return found


def _cgroups(controller: str, cgroups: Path, top: Path) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's cgroups with that controller, and of all above them. Each with
    whether it is of version 1."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = cgroups.read_text(errors="surrogateescape").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = top / controller if controllers else top  # version 1: perhaps a link
        # A container may see its own cgroup as the top of the mount, whatever its path is.
        for folder in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield mount / folder.relative_to("/"), bool(controllers)


def _quota_v2(place: Path) -> float | None:
    """The limit of one cgroup in cores; see cpu.max in Documentation/admin-guide/cgroup-v2.rst."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (place / "cpu.max").read_text().split()
        return int(quota) / int(period)  # "max": there is no limit
    return None


def _quota_v1(place: Path) -> float | None:
    """The same of version 1; see Documentation/scheduler/sched-bwc.rst. -1: there is no limit."""
    with contextlib.suppress(OSError, ValueError):
        quota = int((place / "cpu.cfs_quota_us").read_text())
        if quota > 0:
            return quota / int((place / "cpu.cfs_period_us").read_text())
    return None
