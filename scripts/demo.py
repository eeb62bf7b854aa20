"""Load one tensor of a remote checkpoint of 1 GiB through a ckptfs mount, and show its cost.

The checkpoint, an S3 server for it, the daemon and its cache are in a temp directory, which the
demo removes at the end. A proxy in front of the server counts the bytes, and not ckptfs. The exit
status is 0 if the tensor is right, ckptfs has fetched hardly more than its bytes, and nothing is
left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pyarrow.fs import FileSelector, LocalFileSystem, copy_files
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import save_file

from ckptfs import Checkpoint, CkptfsError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.s3server import S3Server, Traffic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

SHARDS = 4
MATRIX_SHAPE = (4096, 4096)  # 64 MiB of float32
NORM_SHAPE = (4096,)
MATRICES = ("attention", "down", "gate", "up")
"""One layer of a model is a shard: these and a norm."""

BUCKET = "models"
NAME = "demo"
SHARD = f"model-00002-of-0000{SHARDS}.safetensors"
TENSOR = "layers.1.gate.weight"
"""The tensor to load, in the middle of its shard."""

FETCHED_RATIO_MAX = 1.1
FETCHED_EXTRA_BYTES_MAX = 2 << 20
"""Listing, metadata, and the readahead around what was asked for."""

DISK_BYTES = 3 << 30
"""The checkpoint, its full copy, and some."""

KEPT_ENTRIES = ("objects", "copy", "cache")
"""Entries that may stay in the temp directory: the demo's own, and the daemon's cache."""

SOCKET_PATH_BYTES_MAX = 100
"""A unix socket's path has room for 108 bytes; the daemon may add a suffix."""

END_DEADLINE_S = 10.0

console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """One way to get at the tensor: how long from the start, and what crossed the network."""

    path_s: float
    tensor_s: float
    tensor: Array
    traffic: Traffic


def say(text: str) -> None:
    console.print(f"[dim]demo:[/] {text}", soft_wrap=True)


def make_tensor(name: str) -> Array:
    """The same numbers for the same name, every time."""
    shape = NORM_SHAPE if name.endswith("norm.weight") else MATRIX_SHAPE
    return np.random.default_rng(list(name.encode())).random(shape, dtype=np.float32)


def make_checkpoint(folder: Path) -> int:
    """Write the checkpoint's files to `folder`; returns their size in bytes."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        names = [f"layers.{shard}.{part}.weight" for part in (*MATRICES, "norm")]
        save_file({name: make_tensor(name) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    texts = {
        "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map},
        "config.json": {"model_type": NAME, "hidden_size": NORM_SHAPE[0], "layers": SHARDS},
        ".metadata.json": {"step": 1000, "loss": 1.25},
    }
    for file, content in texts.items():
        (folder / file).write_text(json.dumps(content, indent=2))
    return sum(file.stat().st_size for file in folder.iterdir())


def count_needed_bytes(shard: Path) -> int:
    """Bytes that a load of TENSOR needs: those of the header of `shard` and the tensor itself."""
    with shard.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(header_bytes))[TENSOR]["data_offsets"]
    return 8 + header_bytes + end - start


def load_tensor(directory: str) -> Array:
    with safe_open(Path(directory) / SHARD, framework="np") as file:
        return file.get_tensor(TENSOR)


def run_mounted(server: S3Server) -> Run:
    server.reset_traffic()
    start_s = time.monotonic()
    with Checkpoint(server.uri(f"{BUCKET}/{NAME}")).as_directory(mode="mount") as path:
        path_s = time.monotonic() - start_s
        tensor = load_tensor(path)
        tensor_s = time.monotonic() - start_s
        say(f"its attributes, getfattr -d -m - {path}")
        subprocess.run(["getfattr", "--absolute-names", "-d", "-m", "-", path], check=True)
    return Run(path_s, tensor_s, tensor, server.traffic())


def run_copied(server: S3Server, folder: Path) -> Run:
    filesystem = server.filesystem()
    server.reset_traffic()
    start_s = time.monotonic()
    folder.mkdir()
    copy_files(
        f"{BUCKET}/{NAME}",
        str(folder),
        source_filesystem=filesystem,
        destination_filesystem=LocalFileSystem(),
    )
    path_s = time.monotonic() - start_s
    tensor = load_tensor(str(folder))
    return Run(path_s, time.monotonic() - start_s, tensor, server.traffic())


def show(needed_bytes: int, mounted: Run, copied: Run) -> None:
    def row(what: str, *values: str) -> None:
        table.add_row(what, *values)

    def in_mib(count: int) -> str:
        return f"{count / (1 << 20):.2f} MiB"

    table = Table(title=f"One tensor of {in_mib(make_tensor(TENSOR).nbytes)}")
    table.add_column()
    table.add_column("ckptfs", justify="right")
    table.add_column("full copy", justify="right")
    runs = (mounted, copied)
    row("time to the path", *(f"{run.path_s:.2f} s" for run in runs))
    row("time to the tensor", *(f"{run.tensor_s:.2f} s" for run in runs))
    row("bytes needed", in_mib(needed_bytes), in_mib(needed_bytes))
    row("bytes fetched", *(in_mib(run.traffic.bytes_to_client) for run in runs))
    row("fetched / needed", *(f"{run.traffic.bytes_to_client / needed_bytes:.3f}" for run in runs))
    row("requests", *(str(len(run.traffic.requests)) for run in runs))
    console.print(table)


def end_daemon() -> None:
    ckptfs = Path(sys.executable).with_name("ckptfs")
    subprocess.run([ckptfs, "umount"], check=False, timeout=END_DEADLINE_S)


def run_demo(temp: Path) -> bool:
    socket = temp / "socket"
    if len(os.fsencode(socket)) >= SOCKET_PATH_BYTES_MAX:
        sys.exit(f"demo: {temp} is too long for a socket's path: set TMPDIR to a shorter one")
    if shutil.disk_usage(temp).free < DISK_BYTES:
        sys.exit(f"demo: {temp} needs {DISK_BYTES >> 30} GiB of free disk: set TMPDIR elsewhere")
    # A daemon of its own, away from one that may be running here. Whatever makes temporary files
    # makes them below `temp`, where they are found if they stay.
    os.environ["TMPDIR"] = tempfile.tempdir = str(temp)
    os.environ["CKPTFS_SOCKET"] = str(socket)
    os.environ["CKPTFS_MOUNT"] = str(temp / "mount")
    os.environ["CKPTFS_CACHE_DIR"] = str(temp / "cache")

    say("making the checkpoint")
    objects = temp / "objects"
    bucket = objects / BUCKET
    size_bytes = make_checkpoint(bucket / NAME)
    needed_bytes = count_needed_bytes(bucket / NAME / SHARD)
    with S3Server(objects, counted=True) as server:
        # The server hashes an object for its ETag when it first sees it; a real store knew it.
        server.filesystem().get_file_info(FileSelector(f"{BUCKET}/{NAME}"))
        say(f"{size_bytes / (1 << 30):.2f} GiB in {SHARDS} shards at s3://{BUCKET}/{NAME}")
        try:
            say(f"loading {TENSOR} from a mount")
            mounted = run_mounted(server)
        finally:
            say("ending the daemon")
            end_daemon()
        say(f"loading {TENSOR} from a full copy")
        copied = run_copied(server, temp / "copy")
    show(needed_bytes, mounted, copied)

    expected = make_tensor(TENSOR)
    is_equal = all(np.array_equal(run.tensor, expected) for run in (mounted, copied))
    fetched_bytes_max = int(FETCHED_RATIO_MAX * needed_bytes) + FETCHED_EXTRA_BYTES_MAX
    is_lazy = mounted.traffic.bytes_to_client <= fetched_bytes_max
    say("the tensor is " + ("equal to the original" if is_equal else "[red]NOT the original"))
    if not is_lazy:
        say(f"[red]more than {fetched_bytes_max} bytes were fetched through the mount")
    return is_equal and is_lazy


def find_mounts(temp: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    return [f"mount: {os.fsdecode(line)}" for line in lines if os.fsencode(temp) in line]


def find_processes(temp: Path) -> list[str]:
    """Other processes that mention `temp` in their arguments or in their environment.

    The latter has CKPTFS_SOCKET, which gives away a process that was told nothing else.
    """
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
            mentions = command + (process / "environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if os.fsencode(temp) in mentions:
            found.append(f"process {process.name}: {os.fsdecode(command)}")
    return found


def find_files(temp: Path) -> list[str]:
    return [f"file: {path}" for path in sorted(temp.iterdir()) if path.name not in KEPT_ENTRIES]


def find_leftovers(temp: Path) -> list[str]:
    return find_mounts(temp) + find_processes(temp) + find_files(temp)


def clean_up(temp: Path) -> bool:
    """Remove `temp` and report what was left behind there; returns whether that is nothing."""
    deadline_s = time.monotonic() + END_DEADLINE_S
    while (leftovers := find_leftovers(temp)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    if find_mounts(temp):
        say(f"[red]{temp} is not removed, as that would go through a mount")
    else:
        shutil.rmtree(temp)
    for leftover in leftovers:
        say(f"[red]left behind: {leftover}")
    if not leftovers:
        say("nothing is left behind")
    return not leftovers


def main() -> int:
    argparse.ArgumentParser(prog="scripts/demo", description=__doc__).parse_args()
    # A program that a signal ends cleans up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    temp = Path(tempfile.mkdtemp(prefix="ckptfs-demo-")).resolve()
    passed = False
    try:
        passed = run_demo(temp)
    except CkptfsError as error:
        say(f"[red]{error}")
    finally:
        is_clean = clean_up(temp)
    return 0 if passed and is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
