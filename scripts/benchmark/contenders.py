"""The contenders: the preparation of each (untimed), and whether it can run here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.node import Node, running_node
from benchmark.stores import BUCKET, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOUNT_DEADLINE_S = 15.0
VENV = Path(sys.prefix)

RCLONE_FLAGS = ["--vfs-read-chunk-streams", "16", "--vfs-read-chunk-size", "4M"]
"""The flags that rclone's documentation recommends for large files on a fast store."""

S3FS_OPTIONS = ["ro", "use_path_request_style", "complement_stat"]
S3FS_OPTIONS += ["parallel_count=16", "multipart_size=16"]


TRUSTED = Path("/etc/ssl/certs/ca-certificates.crt")
REPLACE_TRUST = f'mount --bind "$0" {TRUSTED} && exec "$@"'


@dataclass(frozen=True)
class Ready:
    """A contender that is ready to be timed.

    Attributes:
        job: The contender's part of a job.
        environment: Variables of the process that does the job.
        node: The node of ckptfs that it reads through.
        prefix: The beginning of that process's command line.
    """

    job: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    node: Node | None = None
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contender:
    """One way to get at a checkpoint.

    Attributes:
        name: Its name in the report.
        cold: Function from store and temp folder to a context, in which it is ready with an empty
            cache.
        missing: The reason why it cannot run here, or "".
        version: Its version.
        no_tls: The reason why it cannot trust the authority of a run's stores with TLS, or "".
    """

    name: str
    cold: Callable[[Store, Path], Any]
    missing: Callable[[], str] = lambda: ""
    version: Callable[[], str] = lambda: ""
    no_tls: Callable[[], str] = lambda: ""


@contextmanager
def direct(way: str, store: Store, temp: Path, prefix: tuple[str, ...] = ()) -> Iterator[Ready]:
    """Nothing to prepare but an environment."""
    environment = store.environment() | {"RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"}
    yield Ready({"way": way, "temp": str(temp)} | store.job(), environment, prefix=prefix)


@contextmanager
def trusting(way: str, store: Store, temp: Path) -> Iterator[Ready]:
    """The same for a program that trusts the certificates of the system only.

    With TLS its process has a mount namespace of its own, where the file of these certificates is
    the store's.
    """
    prefix = ("unshare", "--mount", "sh", "-c", REPLACE_TRUST, store.ca_file)
    with direct(way, store, temp, prefix if store.ca_file else ()) as ready:
        yield ready


def why_not_trusting() -> str:
    """The reason why `trusting` cannot work here, or ""."""
    if os.geteuid() or not shutil.which("unshare") or not TRUSTED.exists():
        return "it trusts the system's certificates only, which root alone can replace for one"
    return ""


@contextmanager
def ckptfs_node(store: Store, temp: Path, **settings: Any) -> Iterator[Ready]:
    """A fresh node, its daemon running."""
    with running_node(temp, **settings) as node:
        yield Ready({"way": "ckptfs"} | store.job(), node.environment, node)


@contextmanager
def pinned(store: Store, temp: Path, name: str, **settings: Any) -> Iterator[Ready]:
    """A node with the checkpoint attached until the end; jobs use its directory as it is."""
    with ckptfs_node(store, temp, **settings) as ready:
        assert ready.node
        path = Path(ready.node.cli("attach", store.uri(f"{BUCKET}/{name}")).strip())
        job = {"way": "place", "endpoint": "", "place": str(path.parent), "name": path.name}
        yield Ready(job, ready.environment, ready.node)


@contextmanager
def rclone_mount(mode: str, store: Store, temp: Path) -> Iterator[Ready]:
    """`rclone mount` with a cache of `mode`, empty."""
    folder = Path(tempfile.mkdtemp(prefix="rclone-", dir=temp))
    environment = {
        "RCLONE_CONFIG_STORE_TYPE": "s3",
        "RCLONE_CONFIG_STORE_PROVIDER": "Rclone",
        "RCLONE_CONFIG_STORE_ACCESS_KEY_ID": store.access_key,
        "RCLONE_CONFIG_STORE_SECRET_ACCESS_KEY": store.secret_key,
        "RCLONE_CONFIG_STORE_ENDPOINT": store.url,
        "RCLONE_CONFIG_STORE_REGION": store.region,
    }
    if store.ca_file:
        environment["RCLONE_CA_CERT"] = store.ca_file
    command = [find_rclone(), "mount", f"store:{BUCKET}", folder / "mount", "--config", ""]
    command += ["--read-only", "--vfs-cache-mode", mode, "--cache-dir", folder / "cache"]
    with _mounted([*command, *RCLONE_FLAGS], folder, environment) as place:
        yield Ready({"way": "place", "place": place} | store.job())


@contextmanager
def s3fs_mount(store: Store, temp: Path) -> Iterator[Ready]:
    """`s3fs`, which keeps what it has read in temporary files of its own."""
    folder = Path(tempfile.mkdtemp(prefix="s3fs-", dir=temp))
    password = folder / "password"
    password.touch(0o600)
    password.write_text(f"{store.access_key}:{store.secret_key}")
    options = [*S3FS_OPTIONS, f"url={store.url}", f"passwd_file={password}"]
    options.append(f"tmpdir={folder}")
    command = ["s3fs", BUCKET, folder / "mount", "-f", "-o", ",".join(options)]
    environment = {"CURL_CA_BUNDLE": store.ca_file} if store.ca_file else {}
    with _mounted(command, folder, environment) as place:
        yield Ready({"way": "place", "place": place} | store.job())


@contextmanager
def local_directory(folder: Path) -> Iterator[Ready]:
    """Plain files of this machine's disk."""
    yield Ready({"way": "place", "endpoint": "", "place": str(folder)})


@contextmanager
def _mounted(command: list[Any], folder: Path, environment: dict[str, str]) -> Iterator[str]:
    mount = folder / "mount"
    mount.mkdir()
    device = mount.stat().st_dev
    log = folder / "log"
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
        )
    try:
        deadline_s = time.monotonic() + MOUNT_DEADLINE_S
        while mount.stat().st_dev == device:
            if process.poll() is not None or time.monotonic() > deadline_s:
                said = log.read_text().strip().splitlines()
                raise RuntimeError(f"does not mount: {said[-1] if said else 'it said nothing'}")
            time.sleep(0.02)
        yield str(mount)
    finally:
        unmount(mount)
        process.terminate()
        try:
            process.wait(MOUNT_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if not os.path.ismount(mount):
            shutil.rmtree(folder)


def unmount(mount: Path) -> None:
    """End a mount; one that is in use still goes out of sight."""
    for lazily in ([], ["-z"]):
        if os.path.ismount(mount):
            command = ["fusermount3", "-u", *lazily, mount]
            subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


def find_rclone() -> str:
    return str(Path(sys.executable).with_name("rclone"))


def first_line(*command: str) -> str:
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (said.stdout or said.stderr).strip().splitlines()
    return lines[0] if lines else ""


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _lacks_module(name: str, group: str) -> str:
    if importlib.util.find_spec(name) is None:
        return why_not_installed(group)
    return ""


def why_not_installed(group: str) -> str:
    """pip's message if scripts/setup could not install the group."""
    failed = VENV / f"{group}.failed"
    lines = failed.read_text().strip().splitlines() if failed.exists() else []
    return f"not installed: {lines[-1]}" if lines else "not installed; see scripts/setup --bench"


def _lacks_program(path: str, hint: str) -> str:
    return "" if shutil.which(path) else f"not installed ({hint})"


def _no_fuse() -> str:
    return "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "no /dev/fuse here"


def _direct(
    name: str, way: str, package: str, missing: Callable[[], str] = lambda: ""
) -> Contender:
    return Contender(name, partial(direct, way), missing, partial(package_version, package))


def _trusting(name: str, package: str, module: str, group: str) -> Contender:
    missing, version_of = partial(_lacks_module, module, group), partial(package_version, package)
    return Contender(name, partial(trusting, group), missing, version_of, why_not_trusting)


def _rclone(mode: str) -> Contender:
    version_of = partial(first_line, find_rclone(), "version")
    return Contender(f"rclone mount, {mode}", partial(rclone_mount, mode), _no_fuse, version_of)


RAW = _direct("raw", "raw", "pyarrow")
CKPTFS = Contender("ckptfs", ckptfs_node, _no_fuse, partial(package_version, "ckptfs"))
RAY = _direct("Ray's way", "ray", "pyarrow")
COPY_FILES = _direct("copy_files", "ray", "pyarrow")
RCLONE_FULL = _rclone("full")
RCLONE_OFF = _rclone("off")
S3FS = Contender(
    "s3fs",
    s3fs_mount,
    lambda: _no_fuse() or _lacks_program("s3fs", "Debian: s3fs"),
    partial(first_line, "s3fs", "--version"),
)
S5CMD = _direct(
    "s5cmd",
    "s5cmd",
    "s5cmd",
    lambda: "" if (VENV / "bin" / "s5cmd").exists() else why_not_installed("s5cmd"),
)
S3TORCH = _trusting("s3torchconnector", "s3torchconnector", "s3torchconnector", "s3torchconnector")
RUNAI = _trusting("runai streamer", "runai-model-streamer", "runai_model_streamer", "runai")
LOCAL = "local files"
"""The ceiling for what is cached: the same on this machine's disk."""

ALL = (RAW, CKPTFS, RAY, RCLONE_FULL, RCLONE_OFF, S3FS, S5CMD, S3TORCH, RUNAI)
