"""The stores of one run: an S3 server, open and with the limits of a real one, and its objects.

`rclone serve s3` serves a folder. Its clients reach it

- bare ("open"),
- through nginx, which ends TLS ("TLS"),
- through nginx, which gives each connection so much a second and lets each request wait ("capped"),
- through the proxy that counts ("counted").

All of these show the same objects.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from safetensors.numpy import save_file
from support.s3server import CountingProxy, S3Server
from support.serverbase import free_port

from benchmark.nginx import Site, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pyarrow.fs
    from support.serverbase import Authority

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


class Store(S3Server):
    """The server as seen through one address ("host:port"); it is not started from here.

    With `ca_file` the address speaks HTTPS, and that file has the authority of its certificate.
    """

    def __init__(self, name: str, endpoint: str, ca_file: str = "") -> None:
        self.name = name
        self.endpoint = endpoint
        self.ca_file = ca_file

    @classmethod
    def of(cls, job: dict[str, Any]) -> Store:
        """The store that `job` names in a worker."""
        return cls("", job["endpoint"], job.get("ca_file", ""))

    def job(self) -> dict[str, Any]:
        """The part of a job from which `of` makes the store again."""
        return {"endpoint": self.endpoint, "ca_file": self.ca_file}

    @property
    def url(self) -> str:
        return f"{'https' if self.ca_file else 'http'}://{self.endpoint}"

    @property
    def suffix(self) -> str:
        """The end of a title that tells figures of this store from those over HTTP."""
        return ", HTTPS" if self.ca_file else ""

    def filesystem(self, **overrides: Any) -> pyarrow.fs.S3FileSystem:
        tls = {"scheme": "https", "tls_ca_file_path": self.ca_file} if self.ca_file else {}
        return super().filesystem(**(tls | overrides))

    def uri(self, path: str) -> str:
        uri = super().uri(path)
        if self.ca_file:
            uri = uri.replace("&scheme=http&", "&scheme=https&")
            uri += f"&tls_ca_file_path={quote(self.ca_file, safe='')}"
        return uri

    def environment(self) -> dict[str, str]:
        """The variables with which programs that use an AWS SDK find the store and trust it."""
        trust = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE") if self.ca_file else ()
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        } | dict.fromkeys(trust, self.ca_file)


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
def capped(
    server: S3Server, folder: Path, authority: Authority | None = None, name: str = "capped"
) -> Iterator[Store]:
    """`server` behind nginx, which keeps its files in `folder`; with `authority` by HTTPS.

    Raises:
        RuntimeError: nginx or its module is not installed, or does not start.
    """
    site = Site(
        f"127.0.0.1:{free_port()}",
        upstream=server.endpoint,
        latency_s=CAPPED_LATENCY_S,
        rate=CAPPED_RATE,
        pem=certificate(authority, folder),
    )
    with serving(site, folder):
        yield Store(name, site.endpoint, str(authority.ca_file) if authority else "")


@contextmanager
def encrypted(server: S3Server, folder: Path, authority: Authority) -> Iterator[Store]:
    """`server` behind nginx, which ends TLS and keeps its files in `folder`.

    Raises:
        RuntimeError: nginx is not installed, or does not start.
    """
    site = Site(
        f"127.0.0.1:{free_port()}",
        upstream=server.endpoint,
        pem=certificate(authority, folder),
        workers="auto",
    )
    with serving(site, folder):
        yield Store("TLS", site.endpoint, str(authority.ca_file))


def certificate(authority: Authority | None, folder: Path) -> Path | None:
    """A new certificate with its key, in a folder beside `folder`."""
    if authority is None:
        return None
    beside = folder.with_name(f"{folder.name}-tls")
    beside.mkdir()
    return authority.certify(beside)


@contextmanager
def counted(server: S3Server) -> Iterator[tuple[Store, CountingProxy]]:
    """`server` behind the proxy that counts what passes."""
    with CountingProxy(server.endpoint) as proxy:
        yield Store("counted", proxy.endpoint), proxy
