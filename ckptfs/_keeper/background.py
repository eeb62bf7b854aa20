"""The reset of a keeper that goes to the background, so it leaves the job that started it.

The nice value, processors, limits and signals of that job are not those of the next one. Other
users than root cannot reset all of them, because the kernel does not let them improve a nice value,
a hard limit or an OOM score.

Only root can leave a cgroup, because that takes the right to write to the one above it. On cgroup
v1 the keeper leaves the hierarchies by which schedulers and systemd find the processes of a job,
and stays in those that only bound memory, processors or devices. On v2 these are one.
"""

import contextlib
import os
import resource
import signal
from pathlib import Path

from ckptfs._os.jobs import has_systemd
from ckptfs._os.mountinfo import mount_table

_CPUS_MAX = 8192
"""Most processors that Linux can be built for (NR_CPUS of x86, MAXSMP)."""
_UMASK = 0o022
_LIMITS = (
    *(resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE),
    *(resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK),
)
"""Without RLIMIT_STACK, from which libraries take the size of their threads' stacks, and without
RLIMIT_NOFILE, which the daemon raises."""
_IGNORED_BY_PYTHON = signal.SIGPIPE, signal.SIGXFSZ
_TRACKS_V1 = frozenset(["freezer", "name=systemd"])
_ROOT = "/"
_CGROUPS = Path("/proc/self/cgroup")


def reset_process() -> None:
    """Set umask, signals, processors, priority, limits and OOM score to the defaults of a new
    process, as far as the kernel allows it."""
    os.umask(_UMASK)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if number not in _IGNORED_BY_PYTHON and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    attempts = (
        lambda: os.sched_setaffinity(0, range(_CPUS_MAX)),  # the kernel ignores missing ones
        lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)),
        lambda: os.setpriority(os.PRIO_PROCESS, 0, 0),
        lambda: Path("/proc/self/oom_score_adj").write_text("0"),
    )
    for attempt in attempts:
        with contextlib.suppress(OSError):
            attempt()
    for limit in _LIMITS:
        _, hard = resource.getrlimit(limit)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (hard, hard))
        with contextlib.suppress(OSError, ValueError):  # CAP_SYS_RESOURCE
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def leave_cgroups() -> None:
    """Move this process out of the cgroups of its job, as far as that is allowed.

    systemd alone writes to its own hierarchies (https://systemd.io/CGROUP_DELEGATION). On its
    machines ``systemd-run`` has moved this process already.
    """
    of_systemd = has_systemd()
    try:
        cgroups = _CGROUPS.read_text().splitlines()
    except OSError:  # without cgroups or without /proc
        return
    for line in cgroups:
        number, controllers, path = line.split(":", 2)
        names = set(controllers.split(","))
        is_v2 = number == "0"
        if path == _ROOT or not (is_v2 or names & _TRACKS_V1):
            continue
        if of_systemd and (is_v2 or "name=systemd" in names):
            continue
        for top in _hierarchies(names, is_v2=is_v2):
            with contextlib.suppress(OSError):
                Path(top, "cgroup.procs").write_text(str(os.getpid()))


def _hierarchies(names: set[str], *, is_v2: bool) -> list[str]:
    """The mount points of a hierarchy's root; [] without /proc."""
    try:
        roots = [line for line in mount_table() if line.root == _ROOT]
    except OSError:
        return []
    if is_v2:
        return [line.path for line in roots if line.kind == "cgroup2"]
    v1 = (line for line in roots if line.kind == "cgroup")
    return [line.path for line in v1 if names & {*line.options.split(",")}]
