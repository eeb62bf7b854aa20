"""Processes that end with their parent, or before it if memory runs out."""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)
_OOM_SCORE = "500"


def end_with(parent_pid: int) -> None:
    """Ask the kernel to end this process when the thread that has started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(1)


def end_before_others() -> None:
    """Have the kernel kill this process rather than its parent when memory runs out, because the
    parent starts another one."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_OOM_SCORE)
