"""The cores that a process may use."""

import os
from pathlib import Path

import pytest

from ckptfs._os.cores import usable_cores


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(100)))


def cores(folder: Path, cgroups: str, limits: dict[str, str]) -> int:
    """The cores with that text of /proc/self/cgroup, and these files below /sys/fs/cgroup."""
    (folder / "cgroup").write_text(cgroups, errors="surrogateescape")
    for name, text in limits.items():
        path = folder / "top" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return usable_cores(folder / "cgroup", folder / "top")


@pytest.mark.parametrize(
    ("cgroups", "limits", "expected"),
    [
        ("0::/\n", {}, 100),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 100),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 100),
        ("0::/a/b\n", {"a/cpu.max": "800000 100000\n", "a/b/cpu.max": "max 100000\n"}, 8),
        ("0::/a/b\n", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "300000 100000\n"}, 3),
        ("0::/kubepods/pod1\n", {"cpu.max": "400000 100000\n"}, 4),
        (
            "5:memory:/m\n4:cpu,cpuacct:/docker/x\n",
            {
                "memory/m/cpu.cfs_quota_us": "100000\n",
                "cpu/docker/x/cpu.cfs_quota_us": "600000\n",
                "cpu/docker/x/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        (
            "4:cpuacct,cpu:/x\udcff\n",
            {
                "cpu/x\udcff/cpu.cfs_quota_us": "600000\n",
                "cpu/x\udcff/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        (
            "4:cpu,cpuacct:/docker/x\n",
            {
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
            100,
        ),
    ],
)
def test_a_limit_of_the_cpu_counts(
    tmp_path: Path, cgroups: str, limits: dict[str, str], expected: int
) -> None:
    assert cores(tmp_path, cgroups, limits) == expected


def test_a_machine_without_cgroups_has_its_cores(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "no", tmp_path) == 100


def test_this_machine_has_cores() -> None:
    assert 1 <= usable_cores() <= 100
