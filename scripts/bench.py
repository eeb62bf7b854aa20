"""Side by side in one run: what ckptfs takes, and what the thing under it takes alone.

Absolute figures say little on a shared machine; the contenders alternate, and the ratio of their
medians is what counts. A case is one function here; without arguments all of them run.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pyarrow.fs import FileSelector
from rich.console import Console
from rich.table import Table

from ckptfs import Checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from s3server import S3Server

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
ROUNDS = 5
OBJECTS = 10_000
LARGE_BYTES = 1 << 30
SMALL_FILES = 500
SMALL_BYTES = 10_000
RAW_SPAN_BYTES = 8 * MIB
RAW_THREADS = 4
"""More do not help on two cores, where the server needs one."""

console = Console(highlight=False)


class Bench:
    """An S3 server, and a fresh node (daemon, mount, cache) for each measurement."""

    def __init__(self, temp: Path, server: S3Server) -> None:
        self.temp = temp
        self.server = server
        self.bucket = server.bucket_dir("bench")
        self._serial = 0
        self._node = temp

    def uri(self, name: str) -> str:
        return self.server.uri(f"bench/{name}")

    def fresh_node(self) -> None:
        """Point to a daemon that is running, with an empty cache."""
        self.end_node()
        self._serial += 1
        node = self._node = self.temp / f"node{self._serial}"
        node.mkdir()
        (node / "config.toml").write_text("linger_s = 0\ncache_free_share_min = 0.0\n")
        os.environ["CKPTFS_CONFIG"] = str(node / "config.toml")
        os.environ["CKPTFS_SOCKET"] = str(node / "socket")
        os.environ["CKPTFS_MOUNT"] = str(node / "mount")
        os.environ["CKPTFS_CACHE_DIR"] = str(node / "cache")
        self._cli("mount")

    def end_node(self) -> None:
        if self._serial:
            self._cli("umount", "--force")
            shutil.rmtree(self._node)

    def daemon_cpu_s(self) -> float:
        """CPU seconds of the daemon so far."""
        pid = json.loads(self._cli("status", "--json"))["pid"]
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _cli(self, *arguments: str) -> str:
        command = [Path(sys.executable).with_name("ckptfs"), *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def timed(action: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


def report(case: str, **seconds: list[float]) -> None:
    """Medians, and each one's ratio to the first."""
    table = Table(title=case, box=None, title_justify="left")
    for column in ("", "median", "min", "max", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    base = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        middle = statistics.median(values)
        shown = [f"{value:.3f} s" for value in (middle, min(values), max(values))]
        table.add_row(name.replace("_", " "), *shown, f"{middle / base:.2f}")
    console.print(table)
    console.print()


def attach(bench: Bench) -> None:
    """Attach a checkpoint of 10,000 objects, against the bare listing."""
    top = bench.bucket / "many"
    for index in range(OBJECTS):
        folder = top / str(index % 100)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"part-{index:05}").write_bytes(b"x")
    filesystem = bench.server.filesystem()
    checkpoint = Checkpoint(bench.uri("many"))

    def bare() -> None:
        found = filesystem.get_file_info(FileSelector("bench/many", recursive=True))
        assert sum(info.is_file for info in found) == OBJECTS

    def attached() -> None:
        with checkpoint.as_directory():
            pass

    bare_s, attach_s, find_s = [], [], []
    for _ in range(ROUNDS):
        bench.fresh_node()
        bare_s.append(timed(bare))
        attach_s.append(timed(attached))
        with checkpoint.as_directory() as path:
            find = ["find", path, "-type", "f", "-size", "1c"]
            find_s.append(timed(lambda find=find: subprocess.run(find, stdout=subprocess.DEVNULL)))
    report(f"attach {OBJECTS} objects", bare_listing=bare_s, attach=attach_s, find=find_s)


def sequential(bench: Bench) -> None:
    """Read 1 GiB cold through the mount, against parallel range reads that store nothing."""
    with (bench.bucket / "large.bin").open("wb") as file:
        for _ in range(LARGE_BYTES // MIB):
            file.write(os.urandom(MIB))
    (bench.bucket / "large").mkdir()
    (bench.bucket / "large.bin").rename(bench.bucket / "large" / "data.bin")
    filesystem = bench.server.filesystem()
    filesystem.open_input_file("bench/large/data.bin").close()  # the server hashes it now

    def raw() -> None:
        offsets = iter(range(0, LARGE_BYTES, RAW_SPAN_BYTES))
        lock = threading.Lock()

        def work() -> None:
            file = filesystem.open_input_file("bench/large/data.bin")
            buffer = memoryview(mmap.mmap(-1, RAW_SPAN_BYTES))
            while True:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    return
                file.seek(offset)
                done = 0
                while done < RAW_SPAN_BYTES:
                    done += file.readinto(buffer[done:])

        threads = [threading.Thread(target=work) for _ in range(RAW_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    raw_s, cold_s, warm_s, cpu_s = [], [], [], []
    for _ in range(ROUNDS):
        bench.fresh_node()
        raw_s.append(timed(raw))
        with Checkpoint(bench.uri("large")).as_directory() as path:
            before_s = bench.daemon_cpu_s()
            cold_s.append(timed(lambda path=path: read_all(f"{path}/data.bin")))
            cpu_s.append(bench.daemon_cpu_s() - before_s)
            warm_s.append(timed(lambda path=path: read_all(f"{path}/data.bin")))
    report(
        "read 1 GiB in sequence", raw_limit=raw_s, cold=cold_s, again=warm_s, daemon_CPU_cold=cpu_s
    )


def small(bench: Bench) -> None:
    """Read 500 files of 10 kB cold, one after the other, against the same through pyarrow."""
    top = bench.bucket / "small"
    top.mkdir()
    for index in range(SMALL_FILES):
        (top / str(index)).write_bytes(os.urandom(SMALL_BYTES))
    filesystem = bench.server.filesystem()

    def bare() -> None:
        for index in range(SMALL_FILES):
            with filesystem.open_input_file(f"bench/small/{index}") as file:
                assert len(file.read()) == SMALL_BYTES

    bare_s, cold_s, warm_s = [], [], []
    for _ in range(ROUNDS):
        bench.fresh_node()
        bare_s.append(timed(bare))
        with Checkpoint(bench.uri("small")).as_directory() as path:
            for times in (cold_s, warm_s):
                times.append(
                    timed(lambda path=path: [read_all(f"{path}/{i}") for i in range(SMALL_FILES)])
                )
    report(f"read {SMALL_FILES} files of 10 kB", pyarrow=bare_s, cold=cold_s, again=warm_s)


def read_all(path: str) -> None:
    buffer = bytearray(8 * MIB)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


CASES = {case.__name__: case for case in (attach, small, sequential)}


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"bench: unknown case {unknown[0]!r}; there are {', '.join(CASES)}")
    with tempfile.TemporaryDirectory(prefix="ckptfs-bench-") as temp, S3Server() as server:
        bench = Bench(Path(temp), server)
        try:
            for name in names:
                CASES[name](bench)
        finally:
            bench.end_node()


if __name__ == "__main__":
    main()
