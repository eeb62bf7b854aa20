"""Fixtures: one Ray cluster for all tests, and jobs on it that live on the test's node."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import hashlib
import importlib.util
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, daemons, wait_until
from pyarrow.fs import FileSelector, S3FileSystem
from support.raycluster import Member, Members, members
from support.s3server import S3Server

_spec = importlib.util.find_spec("ray")
# Without Ray, this very folder is found under that name; it has no origin.
collect_ignore_glob = [] if _spec and _spec.origin else ["test_*.py"]

WEIGHTS_BYTES = 32 << 20
CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"
"""Settings of the AWS SDK."""

os.environ |= {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default, of which Ray warns
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),  # else Ray writes one to the home directory
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "120",  # or a barrier waits for ever
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less to wait for
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # results are asked for that often, not every 2 s
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


@pytest.fixture(scope="session", autouse=True)
def _lockfiles() -> None:
    """Ray's own downloads leave this folder behind."""
    (Path(tempfile.gettempdir()) / "_ray_lockfiles").mkdir()


@pytest.fixture
def installed() -> Iterator[None]:
    """`ckptfs.ray.install` for the length of the test, in its own process."""
    import ckptfs.ray

    ckptfs.ray.install()
    yield
    ckptfs.ray.uninstall()


CLUSTER = """
import sys, ray
ray.init(
    num_cpus=4,
    object_store_memory=100 << 20,
    include_dashboard=False,
    log_to_driver=False,
    _temp_dir=sys.argv[1],
)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster. It belongs to a process of its own and ends with it."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    with tempfile.TemporaryDirectory(prefix="r") as folder:  # short: there are sockets in it
        owner = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TEST_CLUSTER": folder},
            text=True,
            start_new_session=True,
        )
        with owner:
            assert owner.stdout
            address = owner.stdout.readline().strip()
            assert address, "Ray did not start"
            yield address
            owner.communicate()
        assert owner.returncode == 0
        wait_until(lambda: not processes_with("TEST_CLUSTER", folder))


@pytest.fixture(scope="session")
def machines() -> Iterator[Members]:
    """A cluster of three nodes, each with a daemon of its own."""
    with members(3) as cluster:
        yield cluster


@pytest.fixture
def nodes(machines: Members, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Member]]:
    """Its nodes; this process is connected to it. Daemons and caches end with the test."""
    import ray

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    ray.init(address=machines.members[0].address, log_to_driver=False)
    try:
        yield machines.members[:3]
    finally:
        ray.shutdown()
        for member in machines.members:
            member.forget()
        wait_until(lambda: not daemons())


@pytest.fixture
def can_write(nodes: list[Member], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the job on `nodes` write to the S3 server (see `writable_s3`)."""
    import ray

    for name in CHECKSUMS:
        monkeypatch.setenv(name, "when_required")
    ray.shutdown()  # the job's processes need these, too
    ray.init(
        address=nodes[0].address,
        runtime_env={"env_vars": dict.fromkeys(CHECKSUMS, "when_required")},
        log_to_driver=False,
    )


def processes_with(name: str, value: str) -> dict[int, str]:
    """Other processes that were started with this environment variable: their commands."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"{name}={value}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode()
    return found


@pytest.fixture
def connect(
    cluster: str, node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """Connects the test to the cluster, as a job whose processes live on the test's node.

    Arguments are fields of the job's runtime environment.
    """
    import ray

    monkeypatch.chdir(tmp_path)  # or workers would import what lies in the repository's folder

    def connect(**runtime_env: Any) -> None:
        ray.init(
            address=cluster,
            runtime_env={"env_vars": node.environment, **runtime_env},
            log_to_driver=False,
        )

    yield connect
    if ray.is_initialized():
        with contextlib.suppress(ValueError):  # Ray Train's gift to the jobs that come after it
            ray.kill(ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator"))
        ray.shutdown()

    def workers() -> list[str]:
        commands = processes_with("CKPTFS_SOCKET", str(node.socket)).values()
        ours = "ckptfs._keeper", "ckptfs._daemon"
        return [command for command in commands if not any(name in command for name in ours)]

    wait_until(lambda: not workers())


@pytest.fixture
def writable_s3(s3: S3Server, node: Node, monkeypatch: pytest.MonkeyPatch) -> S3FileSystem:
    """A filesystem on the S3 server that Ray can write to.

    rclone does not understand the checksums that the AWS SDK sends, nor requests for directories:
    those must be there already, see `make_directory`.
    """
    for name in CHECKSUMS:
        monkeypatch.setenv(name, "when_required")
        node.environment[name] = "when_required"
    return s3.filesystem(check_directory_existence_before_creation=True)


def weights(index: int) -> bytes:
    """The content of a large file: of each index another one."""
    return hashlib.shake_128(str(index).encode()).digest(1 << 20) * (WEIGHTS_BYTES >> 20)


def make_directory(path: Path) -> None:
    """Make a directory in a bucket. An empty one would not be seen."""
    path.mkdir(parents=True)
    (path / ".keep").touch()


def settle(filesystem: Any, path: str, folder: Path) -> None:
    """Give the files below `path` of `filesystem`, which is `folder`, the times of their objects.

    Of an object that was written through it, rclone says when the upload began; where it lists the
    directory, it says when the file was written. No two answers of an S3 server differ like that.
    """
    listed = filesystem.get_file_info(FileSelector(path, recursive=True))
    for info in filesystem.get_file_info([info.path for info in listed if info.is_file]):
        os.utime(folder / info.path, ns=(info.mtime_ns, info.mtime_ns))
