"""The machine and the versions of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from benchmark.contenders import ALL, first_line, package_version
from benchmark.results import Report

ROOT = Path(__file__).parents[2]


def begin_report(*, quick: bool) -> Report:
    """A report without figures yet."""
    return Report(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=_commit(),
        quick=quick,
        host={
            "machine": platform.machine(),
            "cpu": _line("/proc/cpuinfo", "model name"),
            "cpus": str(len(os.sched_getaffinity(0))),
            "kernel": platform.release(),
            "filesystem": first_line("findmnt", "-n", "-o", "FSTYPE", "-T", tempfile.gettempdir()),
            "memory": _line("/proc/meminfo", "MemTotal"),
        },
        versions=_versions(),
        absent={each.name: why for each in ALL if (why := each.missing())},
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    versions |= {
        name: package_version(name) for name in ("pyarrow", "pyfuse3", "safetensors", "torch")
    }
    versions["libfuse"] = first_line("pkg-config", "--modversion", "fuse3")
    versions["nginx"] = first_line("/usr/sbin/nginx", "-v")
    versions |= {each.name: each.version() for each in ALL if not each.missing()}
    return versions


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "HEAD") or "unknown") + ("+" if changed else "")


def _line(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"
