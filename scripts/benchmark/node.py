"""A node of ckptfs for one measurement: a daemon of its own with an empty cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from benchmark import processes
from ckptfs._client import client
from ckptfs._client import connection as _connection
from ckptfs._config.load import load_config
from ckptfs.errors import DaemonError

if TYPE_CHECKING:
    from collections.abc import Iterator

CKPTFS = Path(sys.executable).with_name("ckptfs")
COMMAND_TIMEOUT_S = 60.0
IDLE_DEADLINE_S = 5.0
IDLE_LOOK_S = 0.15
IDLE_CPU_SHARE = 0.2
"""Below this share of one CPU, the daemon counts as idle. The kernel counts in steps of 10 ms."""


class Node:
    """Its folder, and the environment in which clients find its daemon."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.environment = {
            "CKPTFS_CONFIG": str(folder / "config.toml"),
            "CKPTFS_SOCKET": str(folder / "socket"),
            "CKPTFS_MOUNT": str(folder / "mount"),
            "CKPTFS_CACHE_DIR": str(self.cache),
        }
        settings = {"linger_s": 0.0, "cache_free_share_min": 0.0} | settings
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
        (folder / "config.toml").write_text("".join(lines))

    def cli(self, *arguments: str) -> str:
        """Run `ckptfs` with `arguments`; returns what it prints."""
        return subprocess.run(
            [CKPTFS, *arguments],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | self.environment,
            timeout=COMMAND_TIMEOUT_S,
        ).stdout

    def status(self) -> dict[str, Any]:
        """The output of `ckptfs status --json`, without a process for it."""
        with _connection.connect_to(
            self.environment["CKPTFS_SOCKET"], COMMAND_TIMEOUT_S
        ) as connection:
            return msgspec.to_builtins(connection.status())

    def end(self) -> None:
        """End the daemon if it runs, even while processes use it."""
        socket = self.environment["CKPTFS_SOCKET"]
        if not Path(socket).exists():
            return
        with _connection.connect_to(socket, COMMAND_TIMEOUT_S) as connection:
            connection.stop(force=True)
        if not client.wait_ended(load_config(self.environment), COMMAND_TIMEOUT_S):
            raise DaemonError(f"the daemon of {socket} has not ended")

    def cpu_s(self) -> float:
        """CPU seconds of all processes of the daemon so far."""
        return processes.tree_cpu_s(self.keeper_pid())

    def wait_idle(self) -> None:
        """Wait until the daemon does nothing.

        A daemon that has just begun starts a spare one, and no reader should pay for that.
        """
        keeper = self.keeper_pid()
        deadline_s = time.monotonic() + IDLE_DEADLINE_S
        before_s = processes.tree_cpu_s(keeper)
        while time.monotonic() < deadline_s:
            time.sleep(IDLE_LOOK_S)
            now_s = processes.tree_cpu_s(keeper)
            if now_s - before_s < IDLE_CPU_SHARE * IDLE_LOOK_S:
                return
            before_s = now_s

    def memory_bytes(self) -> int:
        """Memory of all processes of the daemon now."""
        return processes.memory_bytes(self.keeper_pid())

    def peak_bytes(self) -> int:
        """At most the memory that all processes of the daemon had together."""
        return processes.peak_bytes(self.keeper_pid())

    def worker_count(self) -> int:
        """Number of processes that the daemon has started, which read stores for it."""
        return len(processes.tree(self.pid())) - 1

    def roles(self) -> dict[int, str]:
        """The role of each process of the daemon, by its number."""
        keeper, daemon = self.keeper_pid(), self.pid()
        roles = dict.fromkeys(processes.tree(keeper), "spare daemon")
        roles |= dict.fromkeys(processes.tree(daemon), "worker")
        return roles | {keeper: "keeper", daemon: "daemon"}

    def keeper_pid(self) -> int:
        """The keeper, whose descendants are the daemon, a spare one, and their workers."""
        return processes.parent_of(self.pid())

    def pid(self) -> int:
        return self.status()["pid"]

    def data_files(self) -> list[Path]:
        """The files of the cache that hold content."""
        return sorted(self.cache.glob("objects/*/*/data"))


@contextmanager
def running_node(temp: Path, *, start: bool = True, **settings: Any) -> Iterator[Node]:
    """A fresh node below `temp`, with its daemon running if `start`; it is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="n", dir=temp))  # short: a socket's path has a limit
    node = Node(folder, settings)
    try:
        if start:
            node.cli("mount")
        yield node
    finally:
        try:
            node.end()
        finally:
            if not os.path.ismount(folder / "mount"):
                shutil.rmtree(folder)
