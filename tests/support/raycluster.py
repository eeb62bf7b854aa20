"""A Ray cluster of several nodes on this machine, each with a daemon, mount and cache of its own.

Every node's raylet has its own ``CKPTFS_*`` variables, which its workers inherit.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conftest import Node, daemons, wait_until

from ckptfs._client import connection as _connection
from ckptfs._os.filelock import wait_unlocked
from ckptfs.errors import NoDaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ckptfs._model.protocol.replies import AttachmentStatus, StatusReply

OBJECT_STORE_BYTES = 100 << 20

# A process of its own, because it ends with all that it has started. A line of JSON is a command.
OWNER = """
import json, sys
from ray.cluster_utils import Cluster
cluster, nodes = Cluster(), {}
for line in sys.stdin:
    name, settings = json.loads(line)
    if settings:
        nodes[name] = cluster.add_node(**settings)
        print(json.dumps([cluster.address, nodes[name].node_id]), flush=True)
    else:
        cluster.remove_node(nodes.pop(name), allow_graceful=False)
        print("[]", flush=True)
cluster.shutdown()
"""


class Member:
    """One node of the cluster: `id` is Ray's."""

    def __init__(self, cluster: Members, name: str, folder: Path) -> None:
        self.node = Node(folder)
        self.name = name
        self._plans = folder / "xdg"
        self.address, self.id = cluster.ask(
            name,
            {
                "num_cpus": 2,
                "object_store_memory": cluster.object_store_bytes,
                "env_vars": {**self.node.environment, "XDG_CACHE_HOME": str(self._plans)},
                "include_dashboard": False,
            },
        )
        self._cluster = cluster

    def connection(self) -> _connection.Connection:
        """To its daemon. Raises NoDaemon."""
        return _connection.connect_to(str(self.node.socket), 30)

    def status(self) -> StatusReply:
        """Of its daemon."""
        with self.connection() as connection:
            return connection.status()

    def attachment(self) -> AttachmentStatus | None:
        """The one that it has, if its daemon runs."""
        with contextlib.suppress(NoDaemon):
            return next(iter(self.status().attachments), None)
        return None

    def kill(self) -> None:
        """End Ray's processes on it, at once. Its daemon goes on."""
        self._cluster.ask(self.name, {})

    def end_daemon(self) -> None:
        """End its daemon, if it runs."""
        with contextlib.suppress(NoDaemon):
            with self.connection() as connection:
                connection.stop(force=True)
            assert wait_unlocked(f"{self.node.socket}.lock", 30)

    def forget(self) -> None:
        """Let it be a machine that has never seen a checkpoint."""
        self.end_daemon()
        shutil.rmtree(self.node.cache_dir, ignore_errors=True)
        shutil.rmtree(self._plans, ignore_errors=True)


class Members:
    """The cluster. The first node that is added is its head."""

    def __init__(self, object_store_bytes: int) -> None:
        self.object_store_bytes = object_store_bytes
        self.folder = Path(tempfile.mkdtemp(prefix="r"))  # short: there are sockets in it
        (self.folder / "ray").mkdir()
        self._owner = subprocess.Popen(
            [sys.executable, "-c", OWNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"RAY_TMPDIR": str(self.folder)},
            text=True,
            start_new_session=True,
        )
        self.members: list[Member] = []

    def ask(self, name: str, settings: dict[str, Any]) -> Any:
        """Have a node started, or ended if there are no settings."""
        assert self._owner.stdin
        assert self._owner.stdout
        self._owner.stdin.write(json.dumps([name, settings]) + "\n")
        self._owner.stdin.flush()
        for line in self._owner.stdout:
            if line.startswith("["):
                return json.loads(line)
        raise RuntimeError("the cluster's process has died")

    def add(self) -> Member:
        """One more node."""
        name = f"n{len(self.members)}"
        folder = self.folder / name
        folder.mkdir()
        self.members.append(Member(self, name, folder))
        return self.members[-1]

    def end(self) -> None:
        """End all of it."""
        with self._owner:
            self._owner.communicate()
        shutil.rmtree(self.folder)


def on(member: Member, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function on that node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(member.id, soft=False)
    task = ray.remote(num_cpus=0)(function)
    return ray.get(task.options(scheduling_strategy=strategy).remote(*arguments))


@contextlib.contextmanager
def members(count: int, object_store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[Members]:
    """A cluster of `count` nodes."""
    cluster = Members(object_store_bytes)
    try:
        for _ in range(count):
            cluster.add()
        yield cluster
    finally:
        for member in cluster.members:
            member.end_daemon()
        wait_until(lambda: not daemons())
        cluster.end()
