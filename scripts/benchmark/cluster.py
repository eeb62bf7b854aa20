"""The cost of a restore for a cluster whose nodes all get the same checkpoint.

The three ways take turns: Ray's own (``ray.train.Checkpoint.to_directory`` on every node), ckptfs
on every node by itself, and ``ckptfs.ray.broadcast``. The store limits each connection's rate. The
driver measures the time until all nodes have the bytes (except for the second way, which begins to
read at once), the time until they have read every byte, the bytes that the server has sent, and the
CPU time with the server's. Each round begins with a tiny checkpoint, which shows the cost of a way
before the first byte. The driver repeats a round in which other processes had much of the CPUs.

Nodes are Ray nodes on this machine. Each has a daemon and a cache of its own, and all of them and
the server share the disk and the CPUs. The program needs root, and version 2 of the cgroups, to
tell its own CPU time from that of others.

    ./scripts/setup --ray
    .venv-ray/bin/python scripts/benchmark/cluster.py --mib 300 --nodes 3 --rate 4 --json FILE
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "ray")]
os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import ray  # noqa: E402 - the variables come first
import ray.cloudpickle  # noqa: E402
import ray.train  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402
from support.raycluster import Member, members  # noqa: E402
from support.s3server import S3Server  # noqa: E402

import ckptfs.ray  # noqa: E402
from ckptfs import Checkpoint  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
SHARDS = 4
WAYS = ("ray", "mount", "broadcast")
START_BYTES = SHARDS << 12
"""Size of the checkpoint that is next to nothing."""
OTHERS_MAX = 0.1
"""Of the CPUs, which other processes may have in a round that counts."""
OBJECT_STORE_BYTES = 400 * MIB
"""Of each node. A broadcast uses a quarter of it."""


def digest_of(folder: str) -> str:
    """Of all files, read one after the other as a loader does."""
    digest = hashlib.blake2b()
    for path in sorted(Path(folder).iterdir()):
        with path.open("rb", buffering=0) as file:
            while data := file.read(8 * MIB):
                digest.update(data)
    return digest.hexdigest()


def mounted(checkpoint: Checkpoint) -> str:
    """Read a checkpoint through the node's mount."""
    with checkpoint.as_directory(mode="mount") as path:
        return digest_of(path)


def copied(path: str, filesystem: Any, folder: str) -> None:
    """Copy it as Ray does."""
    own = os.path.join(folder, ray.get_runtime_context().get_node_id())
    ray.train.Checkpoint(path, filesystem).to_directory(own)


def read_copy(folder: str) -> str:
    """Read what `copied` has made."""
    return digest_of(os.path.join(folder, ray.get_runtime_context().get_node_id()))


@dataclass(frozen=True)
class Round:
    """The cost of one run of a way: seconds until the bytes are on all nodes, and until all of
    them have read them; CPU seconds until then; the share of the CPUs that other processes had;
    the bytes that the server has sent."""

    there_s: float
    read_s: float
    there_cpu_s: float
    read_cpu_s: float
    others: float
    sent_bytes: int


def median(rounds: list[Round]) -> Round:
    """Of each figure."""
    return Round(*map(statistics.median, zip(*(asdict(r).values() for r in rounds), strict=True)))


def line(way: str, taken: Round, size: int) -> str:
    """A result."""
    times = f"there {taken.there_s:6.1f} s, read {taken.read_s:6.1f} s"
    return f"{way:10} {times}, sent {taken.sent_bytes / size:.3f} x, CPU {taken.read_cpu_s:.1f} s"


@contextlib.contextmanager
def own_group() -> Iterator[Path]:
    """Put this process, and so all that it starts, into a cgroup of its own, which counts."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((Path(point) for _, point, kind, *_ in mounts if kind == "cgroup2"), None)
    if root is None or os.geteuid():
        sys.exit("this needs root, and a mounted cgroup2 (see cgroups(7)), to count CPU time")
    before = next(
        line[len("0::/") :]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::/")
    )
    group = root / f"ckptfs-cluster-{os.getpid()}"
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield group
    finally:
        (root / before / "cgroup.procs").write_text(str(os.getpid()))
        for _ in range(50):
            with contextlib.suppress(OSError):  # what was ended is still about to go
                group.rmdir()
                break
            time.sleep(0.1)


def cpu_s(group: Path) -> tuple[float, float]:
    """CPU seconds of a cgroup, and of the whole machine (proc_stat(5))."""
    own_us = int((group / "cpu.stat").read_text().split()[1])
    user, nice, system, _idle, _waiting, irq, softirq = map(
        int, Path("/proc/stat").read_text().split()[1:8]
    )
    return own_us / 1e6, (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def nothing() -> None:
    """Have a worker started, which both ways need."""


class Bench:
    """All that is measured, with one server and one cluster."""

    def __init__(
        self, group: Path, server: S3Server, nodes: list[Member], path: str, size: int
    ) -> None:
        self.group = group
        self.server = server
        self.nodes = nodes
        self.path = path
        self.size = size
        folder = server.root / path
        folder.mkdir(parents=True)
        for index in range(SHARDS):
            with (folder / f"shard-{index}.bin").open("wb") as file:
                for start in range(0, size // SHARDS, MIB):
                    file.write(os.urandom(min(MIB, size // SHARDS - start)))
        self.digest = digest_of(str(folder))

    def on_all(self, function: Any, *arguments: Any) -> None:
        """Run it on every node at once, and check what each has read."""
        task = ray.remote(num_cpus=1)(function)
        refs = [
            task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            ).remote(*arguments)
            for node in self.nodes
        ]
        assert set(ray.get(refs)) <= {self.digest, None}, "a node has read something else"

    def run(self, way: str) -> Round:
        """One round of a way."""
        for node in self.nodes:
            node.forget()
        self.on_all(nothing)
        filesystem = self.server.filesystem()
        checkpoint = Checkpoint(self.path, filesystem)
        self.server.reset_traffic()
        began_cpu_s, began_all_s = cpu_s(self.group)
        began_s = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            if way == "ray":
                self.on_all(copied, self.path, filesystem, folder)
            elif way == "broadcast":
                report = ckptfs.ray.broadcast(checkpoint, progress=False)
                assert report.is_complete, report
            there_s, there_cpu_s = time.perf_counter() - began_s, cpu_s(self.group)[0] - began_cpu_s
            if way == "ray":
                self.on_all(read_copy, folder)
            else:
                self.on_all(mounted, checkpoint)
            read_s = time.perf_counter() - began_s
            own_s, all_s = cpu_s(self.group)
        read_cpu_s = own_s - began_cpu_s
        others = (all_s - began_all_s - read_cpu_s) / read_s / len(os.sched_getaffinity(0))
        sent_bytes = self.server.traffic().bytes_to_client
        return Round(there_s, read_s, there_cpu_s, read_cpu_s, others, sent_bytes)

    def run_undisturbed(self, way: str, tries: int) -> Round:
        """A round in which nothing else had much of the CPUs, or the best of so many."""
        taken: list[Round] = []
        while len(taken) < tries:
            taken.append(self.run(way))
            if taken[-1].others <= OTHERS_MAX:
                break
            print(f"{way:10} others had {taken[-1].others:.0%} of the CPUs", flush=True)
        return min(taken, key=lambda one: one.others)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=300, help="size of the checkpoint")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rate", type=float, default=4, help="MB/s of one connection; 0: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=4, help="of a round that others disturb")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all single figures to it")
    given = parser.parse_args()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with tempfile.TemporaryDirectory(prefix="b") as folder:  # short: there are sockets in it
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """Do it, as the command line says."""
    rate = int(given.rate * 1e6)
    with (
        own_group() as group,
        S3Server(counted=True, connection_rate=rate) as server,
        members(given.nodes, OBJECT_STORE_BYTES) as cluster,
    ):
        ray.init(address=cluster.members[0].address, log_to_driver=False)
        size = given.mib // SHARDS * SHARDS * MIB
        start = Bench(group, server, cluster.members, "bench/start", START_BYTES)
        bench = Bench(group, server, cluster.members, "bench/checkpoint", size)
        starts: dict[str, list[Round]] = {way: [] for way in WAYS}
        results: dict[str, list[Round]] = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way in WAYS:
                starts[way].append(start.run(way))
                results[way].append(bench.run_undisturbed(way, given.tries))
                print(line(way, results[way][-1], size), flush=True)
        ray.shutdown()
    medians = {way: median(rounds) for way, rounds in results.items()}
    print(
        f"\n{given.nodes} nodes, {size / MIB:.0f} MiB, {given.rate:g} MB/s per connection: medians"
    )
    rays = medians["ray"]
    for way, mine in medians.items():
        ratios = f"({mine.there_s / rays.there_s:.2f} and {mine.read_s / rays.read_s:.2f} of ray's)"
        print(f"{line(way, mine, size)}   {ratios}")
    if given.json:
        write(given.json, given, size, starts, results)


def write(
    file: Path,
    given: argparse.Namespace,
    size: int,
    starts: dict[str, list[Round]],
    results: dict[str, list[Round]],
) -> None:
    """All single figures, and what they were measured on."""
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": {
            "machine": platform.machine(),
            "cpus": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("ckptfs", "pyarrow", "pyfuse3", "ray")},
        },
        "nodes": given.nodes,
        "bytes": size,
        "shards": SHARDS,
        "connection_bytes_per_s": int(given.rate * 1e6),
        "object_store_bytes": OBJECT_STORE_BYTES,
        "start": {way: [asdict(one) for one in rounds] for way, rounds in starts.items()},
        "rounds": {way: [asdict(one) for one in rounds] for way, rounds in results.items()},
    }
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
