"""The scheduler's job of a process, from its cgroups.

A scheduler ends a job by killing all processes in the job's cgroup (Slurm's proctrack/cgroup, the
cgroup hook of OpenPBS, LSF's LSF_PROCESS_TRACKING). A daemon in that cgroup ends with the job, and
so does the mount, for the user's other jobs, too.
"""

import re
from pathlib import Path

_JOBS = (
    # cgroup v1: /slurm/uid_1000/job_7/step_0; v2: /system.slice/slurmstepd.scope/job_7/step_0
    # (https://slurm.schedmd.com/cgroup_v2.html). A node's name may stand before both.
    (re.compile(r"/[^/]*slurm[^/]*/(?:uid_\d+/)?job_(\d+)(?:/|$)"), "Slurm job"),
    # cgroup v1 has jobid, and v2 has jobs (the hook pbs_cgroups of OpenPBS).
    (re.compile(r"/pbs_jobs\.service/job(?:id|s)/([\w.\[\]-]+)"), "PBS job"),
    (re.compile(r"/lsf/[^/]+/job\.(\d+)"), "LSF job"),
)


def job_in(cgroups: str) -> str:
    """The job that a text of ``/proc/PID/cgroup`` names, such as ``Slurm job 7``, or ""."""
    for line in cgroups.splitlines():
        path = line.split(":", 2)[-1]
        for pattern, kind in _JOBS:
            if found := pattern.search(path):
                return f"{kind} {found[1]}"
    return ""


def job_of(pid: int) -> str:
    """The job of a process; "" if it has none, or this process cannot see it."""
    try:
        return job_in(Path(f"/proc/{pid}/cgroup").read_text()) if pid > 0 else ""
    except OSError:
        return ""


def has_systemd() -> bool:
    """Whether the first process of this pid namespace is systemd.

    A container may have the node's /run and another first process. The node's systemd would take
    this container's process ids for other processes.
    """
    try:
        return Path("/proc/1/comm").read_text() == "systemd\n"
    except OSError:
        return False
