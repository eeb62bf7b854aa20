"""The stores of one run: an S3 server, open and with the limits of a real one, and its objects.

`rclone serve s3` serves a folder. It is reached bare ("open"), through nginx, which gives each
connection so much a second and lets each request wait ("capped"), and through the proxy that counts
("counted"). All three show the same objects.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file
from support.s3server import CountingProxy, S3Server

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
BUCKET = "bench"
PAGE_WORDS = 512
"""int64 words of a page of 4 KiB: the check of a file is the sum of the first word of each."""

SHARDS = 4
TENSOR_SHAPE = (2048, 2048)
"""32 MiB of int64: integers, because their sum is the same in whatever order it is made."""

MANY_FILES = 10_000
SMALL_FILES = 500
SMALL_BYTES = 10_000
FEW_FILES = 5

CAPPED_RATE = "90m"
"""nginx's limit_rate: bytes per second of one connection, near what S3 gives one."""

CAPPED_LATENCY_S = 0.02
"""Until a request is passed on: near S3's time to the first byte within a region."""

START_DEADLINE_S = 10.0

# echo_sleep waits in nginx's event loop: no process, and no second copy of the bytes, is needed for
# the latency. The client's Host header is part of what it signed.
NGINX_CONFIG = """\
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
load_module /usr/lib/nginx/modules/ngx_http_echo_module.so;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
  proxy_max_temp_file_size 0;
  proxy_buffers 16 128k;
  proxy_buffer_size 128k;
  upstream server {{ server {upstream}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ echo_sleep {latency_s}; echo_exec @server; }}
    location @server {{
      proxy_pass http://server;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
      limit_rate {rate};
    }}
  }}
}}
"""


class Store(S3Server):
    """The server as seen through one address ("host:port"); it is not started from here."""

    def __init__(self, name: str, endpoint: str) -> None:
        self.name = name
        self.endpoint = endpoint

    def environment(self) -> dict[str, str]:
        """The variables with which programs that use an AWS SDK find the store."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL": f"http://{self.endpoint}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@dataclass(frozen=True)
class Objects:
    """The bucket's content: `large/data.bin`, `model`, `many`, `small` and `few`.

    Attributes:
        folder: Folder of the bucket on this machine.
        large_bytes: Size of `large/data.bin` and, without headers, of all shards of `model`.
        large_check: Sum of the first word of each of its pages.
        model_check: Sum of all numbers in all tensors.
        tensor: Name of the tensor that is loaded alone, and `tensor_shard` its file.
        tensor_check: Sum of its numbers.
    """

    folder: Path
    large_bytes: int
    large_check: int
    model_check: int
    tensor_shard: str
    tensor: str
    tensor_check: int

    def shards(self) -> list[str]:
        return [shard_name(index) for index in range(SHARDS)]


def shard_name(index: int) -> str:
    return f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"


def make_objects(folder: Path, large_bytes: int) -> Objects:
    """Write the objects into `folder`."""
    random = np.random.default_rng(1)
    (folder / "large").mkdir()
    large_check = 0
    with (folder / "large" / "data.bin").open("wb") as file:
        for _ in range(large_bytes // (8 * MIB)):
            words = random.integers(0, 1 << 40, MIB)
            large_check += int(words[::PAGE_WORDS].sum())
            file.write(words.tobytes())

    (folder / "model").mkdir()
    tensor_bytes = 8 * TENSOR_SHAPE[0] * TENSOR_SHAPE[1]
    model_check = tensor_check = 0
    tensors_each = large_bytes // SHARDS // tensor_bytes
    picked = f"layers.2.{tensors_each // 2}.weight"
    for index in range(SHARDS):
        tensors = {
            f"layers.{index}.{part}.weight": random.integers(0, 1 << 30, TENSOR_SHAPE)
            for part in range(tensors_each)
        }
        model_check += sum(int(tensor.sum()) for tensor in tensors.values())
        tensor_check += int(tensors[picked].sum()) if picked in tensors else 0
        save_file(tensors, folder / "model" / shard_name(index), {"format": "pt"})

    for part in range(100):
        top = folder / "many" / str(part)
        top.mkdir(parents=True)
        for index in range(MANY_FILES // 100):
            (top / f"part-{index:05}").write_bytes(b"x")
    for name, count in (("small", SMALL_FILES), ("few", FEW_FILES)):
        (folder / name).mkdir()
        for index in range(count):
            (folder / name / str(index)).write_bytes(os.urandom(SMALL_BYTES))
    for file in (folder / "large" / "data.bin", *(folder / "model").iterdir()):
        flush(file)  # or the disk is busy with it while others are measured
    return Objects(
        folder, large_bytes, large_check, model_check, shard_name(2), picked, tensor_check
    )


def flush(path: Path) -> None:
    """Wait until the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def warm_up(store: Store) -> None:
    """Let the server hash every object that is opened: it needs ETags, as a real one has them."""
    filesystem = store.filesystem()
    names = ["large/data.bin", *(f"model/{shard_name(index)}" for index in range(SHARDS))]
    names += [
        f"{name}/{i}" for name, n in (("small", SMALL_FILES), ("few", FEW_FILES)) for i in range(n)
    ]
    with ThreadPoolExecutor(8) as pool:
        for file in pool.map(filesystem.open_input_file, [f"{BUCKET}/{name}" for name in names]):
            file.close()


@contextmanager
def capped(server: S3Server, folder: Path) -> Iterator[Store]:
    """`server` behind nginx, which keeps its files in `folder`.

    Raises:
        RuntimeError: nginx or its module is not installed, or does not start.
    """
    nginx = Path("/usr/sbin/nginx")
    if not nginx.exists():
        raise RuntimeError("nginx is not installed (Debian: nginx, libnginx-mod-http-echo)")
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "nginx.conf").write_text(
        NGINX_CONFIG.format(
            folder=folder,
            upstream=server.endpoint,
            port=port,
            latency_s=CAPPED_LATENCY_S,
            rate=CAPPED_RATE,
        )
    )
    command = [nginx, "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "error.log"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_listening(process, port, folder / "error.log")
        yield Store("capped", f"127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def counted(server: S3Server) -> Iterator[tuple[Store, CountingProxy]]:
    """`server` behind the proxy that counts what passes."""
    with CountingProxy(server.endpoint) as proxy:
        yield Store("counted", proxy.endpoint), proxy


def _wait_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline_s = time.monotonic() + START_DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return
    process.terminate()
    said = log.read_text().strip().splitlines() if log.exists() else []
    raise RuntimeError(f"nginx does not start: {said[-1] if said else 'it said nothing'}")
