"""One timed piece of work in a process of its own: `python worker.py JOB`, a JSON object.

It imports what it needs, says "ready", waits for a line, does the work, and answers with one line
of JSON: `seconds`, `check` (a sum over the bytes, so that no contender wins by reading nothing) and
the other measurements of the task. A hung mount hangs this process only.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pyarrow.fs import LocalFileSystem, copy_files
from safetensors import safe_open
from safetensors.numpy import load_file

from benchmark.direct import DIRECT, s5cmd
from benchmark.stores import BUCKET, MIB, PAGE_WORDS, SMALL_FILES, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from benchmark.direct import Job, Result

READ_BYTES = MIB
"""Bytes of one read(2), which stay in the processor's cache. A larger buffer measures memory."""

PAGE_BYTES = 4096


# How a contender makes a folder of the bucket a directory of this machine.


@contextmanager
def reach(job: Job, stack: ExitStack) -> Iterator[str]:
    """The directory with the objects of `job["name"]`; whatever that takes is timed."""
    store, name = Store.of(job), job["name"]
    match job["way"]:
        case "place":  # it is there, or mounted there
            yield f"{job['place']}/{name}"
        case "ckptfs":
            from ckptfs import Checkpoint

            checkpoint = Checkpoint(store.uri(f"{BUCKET}/{name}"))
            with checkpoint.as_directory(mode="mount", plan=job.get("plan", False)) as path:
                yield path
        case "ray":  # what ray.train.Checkpoint.as_directory() does
            temp = stack.enter_context(tempfile.TemporaryDirectory(dir=job["temp"]))
            copy_files(
                f"{BUCKET}/{name}",
                temp,
                source_filesystem=store.filesystem(),
                destination_filesystem=LocalFileSystem(),
            )
            yield temp
        case "s5cmd":
            temp = stack.enter_context(tempfile.TemporaryDirectory(dir=job["temp"]))
            s5cmd(job, f"s3://{BUCKET}/{name}/*", f"{temp}/")
            yield temp
        case way:
            raise ValueError(f"{way!r} makes no directory")


# The work itself.


def sequential(directory: str, job: Job) -> Result:
    """Read one file from its start to its end."""
    return {"check": read_file(f"{directory}/{job['file']}")}


def read_file(path: str) -> int:
    """Read it; the sum of the first word of each page."""
    check = 0
    buffer = bytearray(READ_BYTES)
    words = np.frombuffer(buffer, np.int64)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            while count % PAGE_BYTES:  # a short read in the middle of a page
                more = file.readinto(memoryview(buffer)[count:])
                if not more:
                    break
                count += more
            check += int(words[: count // 8 : PAGE_WORDS].sum())
    return check


def interleaved(directory: str, job: Job) -> Result:
    """Read one file at `places` in turn, each with an equal part of it."""
    path = Path(directory, job["file"])
    part = -(-path.stat().st_size // job["places"] // READ_BYTES) * READ_BYTES
    starts = range(0, part * job["places"], part)
    offsets = (start + done for done in range(0, part, READ_BYTES) for start in starts)
    with path.open("rb", buffering=0) as file:
        return {"check": read_at(file.fileno(), offsets)}


def shared(directory: str, job: Job) -> Result:
    """Read one file by `processes` that inherit a descriptor, each every so many-th MiB."""
    count = job["processes"]
    with open(f"{directory}/{job['file']}", "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size

        def work(index: int) -> int:
            return read_at(file.fileno(), range(index * READ_BYTES, size, count * READ_BYTES))

        return {"check": in_processes(count, work)}


def parts(directory: str, job: Job) -> Result:
    """Read the files by `processes`, each with a descriptor and a part of its own of each file."""
    count = job["processes"]

    def work(index: int) -> int:
        check = 0
        for name in job["files"]:
            with open(f"{directory}/{name}", "rb", buffering=0) as file:
                blocks = -(-os.fstat(file.fileno()).st_size // READ_BYTES)
                start, end = (blocks * each // count * READ_BYTES for each in (index, index + 1))
                check += read_at(file.fileno(), range(start, end, READ_BYTES))
        return check

    return {"check": in_processes(count, work)}


def in_processes(count: int, work: Callable[[int], int]) -> int:
    """Do the work of each index in a process of its own; the sum of the results."""
    with ExitStack() as stack:
        pipes = [os.pipe() for _ in range(count)]
        for index, (_, theirs) in enumerate(pipes):
            if not os.fork():
                try:
                    os.write(theirs, str(work(index)).encode())
                finally:
                    os._exit(0)  # nothing, or what it has read, is in the pipe
            os.close(theirs)
        said = [stack.enter_context(open(ours, "rb")).read() for ours, _ in pipes]
        for _ in pipes:
            os.wait()
    return sum(map(int, said))


def strided(directory: str, job: Job) -> Result:
    """Read the first MiB of each `stride_bytes` of one file."""
    with open(f"{directory}/{job['file']}", "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        return {"check": read_at(file.fileno(), range(0, size, job["stride_bytes"]))}


def read_at(fd: int, offsets: Iterable[int]) -> int:
    """Read a MiB, or what there is, at each offset; the sum of the first word of each page."""
    check = 0
    buffer = bytearray(READ_BYTES)
    words = np.frombuffer(buffer, np.int64)
    for offset in offsets:
        done = 0
        while done < READ_BYTES:
            count = os.preadv(fd, [memoryview(buffer)[done:]], offset + done)
            if not count:
                break
            done += count
        check += int(words[: done // 8 : PAGE_WORDS].sum())
    return check


def whole(directory: str, job: Job) -> Result:
    """Read all shards from start to end."""
    return {"check": sum(read_file(f"{directory}/{shard}") for shard in job["shards"])}


def mapped(directory: str, job: Job) -> Result:
    """Touch all pages of a file through mmap."""
    with open(f"{directory}/{job['file']}", "rb") as file:
        area = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    words = np.frombuffer(area, np.int64)
    return {"check": int(words[::PAGE_WORDS].sum())}


def random(directory: str, job: Job) -> Result:
    """Read pages here and there; `us` has what each took."""
    check, us = 0, []
    with open(f"{directory}/{job['file']}", "rb", buffering=0) as file:
        for offset in job["offsets"]:
            start_s = time.perf_counter()
            data = os.pread(file.fileno(), PAGE_BYTES, offset)
            us.append((time.perf_counter() - start_s) * 1e6)
            check += int.from_bytes(data[:8], "little")
    return {"check": check, "us": us}


def load(directory: str, job: Job) -> Result:
    """Load all tensors of all shards and add them up."""
    check = 0
    for shard in job["shards"]:
        check += sum(int(tensor.sum()) for tensor in load_file(f"{directory}/{shard}").values())
    return {"check": check}


def tensor(directory: str, job: Job) -> Result:
    """Load one tensor and add it up."""
    with safe_open(f"{directory}/{job['file']}", framework="np") as shard:
        return {"check": int(shard.get_tensor(job["tensor"]).sum())}


def restore(directory: str, job: Job) -> Result:
    """Import torch, like a program that restores a model, and load `tensors`, in this order."""
    import torch  # noqa: F401

    check = 0
    for shard, name in job["tensors"]:
        with safe_open(f"{directory}/{shard}", framework="np") as file:
            check += int(file.get_tensor(name).sum())
    return {"check": check}


def files(directory: str, job: Job) -> Result:
    """Read small files, one after the other; the check is their bytes."""
    return {"check": sum(len(Path(directory, str(i)).read_bytes()) for i in range(SMALL_FILES))}


def tree(directory: str, job: Job) -> Result:
    """Find all files and stat them, `again` times more; `each_s` has the times."""
    each_s = []
    count = 0
    for _ in range(1 + job["again"]):
        start_s = time.perf_counter()
        command = ["find", directory, "-type", "f", "-printf", "%s\n"]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        each_s.append(time.perf_counter() - start_s)
        count = said.count(b"\n")
    return {"check": count, "each_s": each_s}


def nothing(directory: str, job: Job) -> Result:
    """The directory alone."""
    return {"check": 0}


TASKS: dict[str, Callable[[str, Job], Result]] = {
    task.__name__: task
    for task in (
        *(sequential, interleaved, shared, parts, strided, whole, mapped, random),
        *(load, tensor, restore, files, tree, nothing),
    )
}


def prepare(job: Job) -> None:
    """Import what is slow to import, so that it is not timed."""
    match job["way"]:
        case "s3torchconnector":
            import s3torchconnector  # noqa: F401
            import safetensors.torch  # noqa: F401
        case "runai":
            import runai_model_streamer  # noqa: F401
        case "ckptfs" | "upload_ckptfs":
            import ckptfs  # noqa: F401
        case "raw" | "ray" | "upload_ray":
            Store.of(job).filesystem()  # starts the AWS SDK


def main() -> None:
    job: Job = json.loads(sys.argv[1])
    prepare(job)
    print("ready", flush=True)
    sys.stdin.readline()
    with ExitStack() as stack:  # a copy is removed when the clock has stopped
        start_s = time.perf_counter()
        if job["way"] in DIRECT:
            result = DIRECT[job["way"]](job)
            seconds = time.perf_counter() - start_s
        else:
            with reach(job, stack) as directory:
                path_s = time.perf_counter() - start_s
                result = TASKS[job["task"]](directory, job)
                seconds = time.perf_counter() - start_s
            result["path_s"] = path_s
        print(json.dumps({"seconds": seconds, **result}), flush=True)
        sys.stdin.readline()  # what it holds stays held until its parent says so


if __name__ == "__main__":
    main()
