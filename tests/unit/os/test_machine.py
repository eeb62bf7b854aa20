"""The cores and the memory that a process may use."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs._os.machine import usable_cores, usable_memory_bytes


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(100)))
    usable_cores.cache_clear()
    yield
    usable_cores.cache_clear()


def cores(folder: Path, cgroups: str, limits: dict[str, str]) -> int:
    """The cores with that text of /proc/self/cgroup, and these files below /sys/fs/cgroup."""
    write(folder, cgroups, limits)
    return usable_cores(folder / "cgroup", folder / "top")


def write(folder: Path, cgroups: str, limits: dict[str, str]) -> None:
    (folder / "cgroup").write_text(cgroups, errors="surrogateescape")
    for name, text in limits.items():
        path = folder / "top" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


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


@pytest.mark.parametrize(
    ("cgroups", "limits", "expected"),
    [
        ("0::/\n", {}, 64),
        ("0::/a/b\n", {"a/memory.max": "max\n", "a/b/memory.max": "16384\n"}, 4),
        ("0::/a/b\n", {"a/memory.max": "8192\n", "a/b/memory.max": "16384\n"}, 2),
        ("0::/kubepods/pod1\n", {"memory.max": "12288\n"}, 3),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "20480\n"}, 5),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712\n"}, 64),
    ],
)
def test_a_limit_of_the_memory_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cgroups: str,
    limits: dict[str, str],
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 64, "SC_PAGE_SIZE": 4096}.__getitem__)
    write(tmp_path, cgroups, limits)
    found = usable_memory_bytes(tmp_path / "cgroup", tmp_path / "top")
    assert found == expected * 4096


def test_this_machine_has_memory() -> None:
    assert usable_memory_bytes() >= 1 << 20
