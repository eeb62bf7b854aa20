"""What a restore costs a cluster: every node gets the same checkpoint.

Three ways, in turns, from a store that gives each connection so much a second: Ray's own
(``ray.train.Checkpoint.to_directory`` on every node), ckptfs on every node for itself, and
``ckptfs.ray.broadcast``. Measured from the driver: until all nodes have the bytes (but for the
second way, which begins to read at once), until they have read every byte; and what the server has
sent. Nodes are Ray nodes on this machine; each has a daemon and a cache of its own,
and the disk and the CPUs are shared by all of them and the server.

    ./scripts/setup --ray
    .venv-ray/bin/python scripts/benchmark/cluster.py --mib 300 --nodes 3 --rate 4
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "ray")]
os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import ray  # noqa: E402 - the variables come first
import ray.cloudpickle  # noqa: E402
import ray.train  # noqa: E402
from members import Member, members  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402
from s3server import S3Server  # noqa: E402

import ckptfs.ray  # noqa: E402
from ckptfs import Checkpoint  # noqa: E402

MIB = 1 << 20
SHARDS = 4
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


def line(way: str, there_s: float, read_s: float, sent: float) -> str:
    """A result."""
    return f"{way:10} there {there_s:6.1f} s, read {read_s:6.1f} s, sent {sent:.3f} x"


def nothing() -> None:
    """Have a worker started, which both ways need."""


class Bench:
    """All that is measured, with one server and one cluster."""

    def __init__(self, server: S3Server, nodes: list[Member], path: str, size: int) -> None:
        self.server = server
        self.nodes = nodes
        self.path = path
        self.size = size
        self.digest = digest_of(str(server.root / path))

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

    def run(self, way: str) -> tuple[float, float, float]:
        """Seconds until it is there, and until it is read; and what the server has sent as a
        multiple of the checkpoint."""
        for node in self.nodes:
            node.forget()
        self.on_all(nothing)
        filesystem = self.server.filesystem()
        checkpoint = Checkpoint(self.path, filesystem)
        self.server.reset_traffic()
        began_s = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            if way == "ray":
                self.on_all(copied, self.path, filesystem, folder)
            elif way == "broadcast":
                report = ckptfs.ray.broadcast(checkpoint, progress=False)
                assert report.is_complete, report
            there_s = time.perf_counter() - began_s
            if way == "ray":
                self.on_all(read_copy, folder)
            else:
                self.on_all(mounted, checkpoint)
            read_s = time.perf_counter() - began_s
        return there_s, read_s, self.server.traffic().bytes_to_client / self.size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=300, help="size of the checkpoint")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rate", type=float, default=4, help="MB/s of one connection; 0: all")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with tempfile.TemporaryDirectory(prefix="b") as folder:  # short: there are sockets in it
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """Do it, as the command line says."""
    rate = int(given.rate * 1e6)
    with (
        S3Server(counted=True, connection_rate=rate) as server,
        members(given.nodes, OBJECT_STORE_BYTES) as cluster,
    ):
        folder = server.bucket_dir("bench") / "checkpoint"
        folder.mkdir()
        for index in range(SHARDS):
            with (folder / f"shard-{index}.bin").open("wb") as file:
                for _ in range(given.mib // SHARDS):
                    file.write(os.urandom(MIB))
        size = sum(file.stat().st_size for file in folder.iterdir())
        ray.init(address=cluster.members[0].address, log_to_driver=False)
        bench = Bench(server, cluster.members, "bench/checkpoint", size)
        results: dict[str, list[tuple[float, float, float]]] = {
            "ray": [],
            "mount": [],
            "broadcast": [],
        }
        for _ in range(given.rounds):
            for way, found in results.items():
                found.append(bench.run(way))
                print(line(way, *found[-1]), flush=True)
        ray.shutdown()
    medians = {
        way: tuple(map(statistics.median, zip(*found, strict=True)))
        for way, found in results.items()
    }
    print(
        f"\n{given.nodes} nodes, {size / MIB:.0f} MiB, {given.rate:g} MB/s per connection: medians"
    )
    for way, median in medians.items():
        ratios = [mine / rays for mine, rays in zip(median, medians["ray"], strict=True)]
        print(f"{line(way, *median)}   ({ratios[0]:.2f} and {ratios[1]:.2f} of ray's)")


if __name__ == "__main__":
    main()
