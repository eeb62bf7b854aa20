"""The node of a run: its folders, the daemon, and what these take."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from chaostest.disk import Disk
from ckptfs._client import client
from ckptfs._client import connection as _connection
from ckptfs._config.load import load_config
from ckptfs.errors import CkptfsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfs._model.config import Config

CONTROL_TIMEOUT_S = 40.0
KEEPER, DAEMON = b"ckptfs._keeper.keeper", b"ckptfs._daemon.app"
WORKER, SENDER = b"ckptfs._workers", b"ckptfs._upload_process"


class Sample(NamedTuple):
    """Resident memory in bytes, open descriptors and threads of a process."""

    pid: int
    memory_bytes: int
    descriptors: int
    threads: int


class Node:
    """A node. As a context manager it leaves nothing behind, even if processes hang in it."""

    def __init__(self, settings: dict[str, Any], *, small_disk: bool) -> None:
        self._settings = settings
        self._small_disk = small_disk
        self._cleanup = ExitStack()
        self.disk: Disk | None = None

    def __enter__(self) -> Node:
        with ExitStack() as stack:
            # Short: a socket's path has a limit.
            self.folder = Path(tempfile.mkdtemp(prefix="ckc-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.cache = self.folder / "cache"
            self.cache.mkdir(mode=0o700)
            self.mount = self.folder / "mnt"
            if self._small_disk:
                self._make_disk(stack)
            lines = [f"{key} = {json.dumps(value)}\n" for key, value in self._settings.items()]
            self.local = self.folder / "local"
            lines.append(f"[store.disk]\nuri = {json.dumps(f'file://{self.local}')}\n")
            (self.folder / "config.toml").write_text("".join(lines))
            self.environment = {
                "CKPTFS_CONFIG": str(self.folder / "config.toml"),
                "CKPTFS_SOCKET": str(self.folder / "sock"),
                "CKPTFS_MOUNT": str(self.mount),
                "CKPTFS_CACHE_DIR": str(self.cache),
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            self.config: Config = load_config(os.environ | self.environment)
            stack.callback(self.end)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _make_disk(self, stack: ExitStack) -> None:
        """Put the cache on a disk of its own, if this machine lets us."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            disk = Disk(self.folder, self.cache, self.folder / "daemon.log")
            self.disk = stack.enter_context(disk)

    # -- the daemon

    @contextlib.contextmanager
    def control(self) -> Iterator[_connection.Connection]:
        """A connection to the daemon, which must run. Raises CkptfsError and OSError."""
        with _connection.connect_to(self.config.socket, CONTROL_TIMEOUT_S) as connection:
            yield connection

    def start(self) -> None:
        """Start it, or find that it runs."""
        client.connect_or_start(self.config, CONTROL_TIMEOUT_S).close()

    def status(self) -> dict[str, Any]:
        """As `ckptfs status --json`."""
        with self.control() as connection:
            return msgspec.to_builtins(connection.status())

    def processes(self, module: bytes) -> list[int]:
        """The node's processes that run `module`."""
        mine = f"CKPTFS_SOCKET={self.config.socket}".encode()
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if module in words and mine in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def serving(self, module: bytes) -> list[int]:
        """The same, without a spare daemon: that has not locked the cache."""
        pids = self.processes(module)
        return [pid for pid in pids if module != DAEMON or self._has_cache(pid)]

    def _has_cache(self, pid: int) -> bool:
        found: set[str] = set()
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(os.readlink(fd).removesuffix(" (deleted)"))
        return f"{self.cache}/lock" in found

    def sample(self, module: bytes) -> Sample | None:
        """A sample of the daemon or the keeper; None if there is not exactly one."""
        pids = self.serving(module)
        if len(pids) != 1:
            return None
        folder = Path(f"/proc/{pids[0]}")
        try:
            fields = dict(
                line.split(":", 1) for line in (folder / "status").read_text().splitlines()
            )
            descriptors = len(os.listdir(folder / "fd"))
            memory_bytes = int(fields["VmRSS"].split()[0]) << 10
            return Sample(pids[0], memory_bytes, descriptors, int(fields["Threads"]))
        except (OSError, KeyError):
            return None

    def log(self) -> str:
        """The log of keeper and daemon."""
        folder = self.folder if self.disk else self.cache
        found = [folder / "daemon.log.1", folder / "daemon.log"]
        return "".join(path.read_text(errors="replace") for path in found if path.exists())

    def end(self) -> None:
        """End the daemon and the mount: by asking, and where that does not help by force."""
        for pid in self.processes(DAEMON) + self.processes(KEEPER):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(CkptfsError, OSError):
            with _connection.connect_to(self.config.socket, 10.0) as connection:
                connection.stop(force=True)
            client.wait_ended(self.config, 10.0)
        for module in (KEEPER, DAEMON):
            for pid in self.processes(module):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 10
        while (self.processes(KEEPER) or self.processes(DAEMON)) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        for _ in range(8):
            if f" {self.mount} " not in Path("/proc/self/mountinfo").read_text():
                break
            way = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
            subprocess.run([*way, self.mount], check=False, capture_output=True)
