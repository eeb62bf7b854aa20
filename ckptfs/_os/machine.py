"""The cores that this process may use.

A container's limit of CPU time (`docker run --cpus`, `resources.limits.cpu` of Kubernetes) leaves
the affinity as it is, so a node of 100 cores looks whole to a container of 2.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/proc/self/cgroup")
_TOP = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = _CGROUPS, top: Path = _TOP) -> int:
    """The cores of this process's affinity, or those that its cgroups have time for; at least 1.

    Args:
        cgroups: The file that names the cgroups of the process.
        top: The folder in which cgroups are mounted.
    """
    cores = len(os.sched_getaffinity(0))
    for quota in _quotas(cgroups, top):
        cores = min(cores, max(1, math.ceil(quota)))
    return cores


def _quotas(cgroups: Path, top: Path) -> Iterator[float]:
    """The limits of the cgroups and of all above them, in cores."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = cgroups.read_text(errors="surrogateescape").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        mount = top / "cpu" if controllers else top  # version 1: usually a link to cpu,cpuacct
        # A container may see its own cgroup as the top of the mount, whatever its path is.
        for folder in (PurePosixPath(path), *PurePosixPath(path).parents):
            place = mount / folder.relative_to("/")
            quota = _quota_v1(place) if controllers else _quota_v2(place)
            if quota is not None:
                yield quota


def _quota_v2(place: Path) -> float | None:
    """The limit of one cgroup; see cpu.max in Documentation/admin-guide/cgroup-v2.rst."""
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
