"""A checkpoint comes to all nodes of a cluster, for one download, whatever happens meanwhile."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import errno
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.cloudpickle
from conftest import wait_until
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from support.raycluster import OBJECT_STORE_BYTES, Member, Members, on
from support.s3server import S3Server

import ckptfs
import ckptfs.ray
import ckptfs.ray._nodes as nodes_module
from ckptfs import Checkpoint, CheckpointNotFound, LocationError
from ckptfs._model.plans.plan import Wanted
from ckptfs.ray._peer import Peer

pytestmark = pytest.mark.mount
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it

MIB = 1 << 20
SLOW_RATE = MIB
"""Bytes per second of a connection to the slow server: a chunk of 4 MiB takes four seconds."""
LARGE = {"a.bin": 17 * MIB + 5, "b.bin": 13 * MIB}
SMALL = {f"rank-{i}.json": 1000 + i for i in range(20)} | {"empty": 0, "deep/er/x": 7}


def make(folder: Path) -> dict[str, str]:
    """Write a checkpoint; returns the digests of its files."""
    for name, size in (LARGE | SMALL).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(size))
    return digests_in(str(folder))


def digests_in(folder: str) -> dict[str, str]:
    """SHA-256 of each file; of one that cannot be read, why."""
    found: dict[str, str] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            try:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                found[name] = errno.errorcode[error.errno or 0]
    return found


@pytest.fixture
def checkpoint(bucket: Path, s3: S3Server) -> Checkpoint:
    return Checkpoint(f"{bucket.name}/run/checkpoint", s3.filesystem())


@pytest.fixture
def content(bucket: Path) -> dict[str, str]:
    return make(bucket / "run" / "checkpoint")


def read(checkpoint: Checkpoint) -> dict[str, str]:
    with checkpoint.as_directory(mode="mount") as path:
        return digests_in(path)


def fetched(nodes: list[Member]) -> list[int]:
    """Bytes that each node's daemon has read from the store."""
    return [member.status().fetched_bytes for member in nodes]


def size_of(content: dict[str, str]) -> int:
    return sum((LARGE | SMALL)[name] for name in content)


def test_each_byte_comes_from_the_store_once_for_three_nodes(
    nodes: list[Member], s3: S3Server, checkpoint: Checkpoint, content: dict[str, str]
) -> None:
    report = ckptfs.ray.broadcast(checkpoint)
    size = size_of(content)
    assert report.is_complete
    assert (report.files, report.bytes) == (len(content), size)
    assert report.nodes.keys() == {member.id for member in nodes}
    parts = report.nodes.values()
    assert all(part.read + part.taken == size and not part.error for part in parts)
    assert sum(part.read for part in parts) == size
    assert [on(member, read, checkpoint) for member in nodes] == [content] * 3
    assert sum(fetched(nodes)) == size
    told = [member.status() for member in nodes]
    assert (
        sum(status.taken_bytes for status in told) == sum(part.taken for part in parts) == 2 * size
    )
    assert size <= sum(status.given_bytes for status in told) <= 2 * size
    assert s3.traffic().bytes_to_client <= 1.05 * size

    # A machine that takes the place of one gets everything from the others.
    s3.reset_traffic()
    nodes[1].forget()
    report = ckptfs.ray.broadcast(checkpoint, on="task")
    assert report.is_complete
    assert report.nodes[nodes[1].id].taken == size
    assert on(nodes[1], read, checkpoint) == content
    assert fetched(nodes)[1] == 0
    assert s3.traffic().bytes_to_client <= 0.05 * size


def test_a_source_gives_what_it_has_and_gets_nothing(
    nodes: list[Member], s3: S3Server, checkpoint: Checkpoint, content: dict[str, str]
) -> None:
    size = size_of(content)
    assert on(nodes[1], read, checkpoint) == content
    wait_until(lambda: nodes[1].status().cache_bytes >= size)
    s3.reset_traffic()
    targets = [nodes[0].id, nodes[2].id]
    report = ckptfs.ray.broadcast(checkpoint, targets, sources=[nodes[1].id, "f" * 56])
    assert report.is_complete
    assert list(report.nodes) == targets
    assert report.sources == {nodes[1].id: ckptfs.ray.NodeReport(size, 0, 0, had=size)}
    assert [part.taken for part in report.nodes.values()] == [size, size]
    assert s3.traffic().bytes_to_client <= 0.05 * size
    assert [on(nodes[i], read, checkpoint) for i in (0, 2)] == [content] * 2
    assert fetched(nodes) == [0, size, 0]


class NeverJoining(Peer):
    """Attaches for ever, on the node with the file `silent`."""

    def join(self) -> Any:
        if Path(os.environ["CKPTFS_MOUNT"]).with_name("silent").exists():
            threading.Event().wait()
        return super().join()


@pytest.mark.long
@pytest.mark.parametrize("peer", [NeverJoining], indirect=True)
def test_a_silent_source_is_left_out(
    peer: None, nodes: list[Member], checkpoint: Checkpoint, content: dict[str, str]
) -> None:
    marker = nodes[2].node.folder / "silent"
    marker.touch()
    report = ckptfs.ray.broadcast(
        checkpoint, [member.id for member in nodes[:2]], sources=[nodes[2].id]
    )
    marker.unlink()
    why = f"the node has not attached it within {nodes_module.SOURCE_JOIN_S:g} s"
    assert report.sources[nodes[2].id].error == why
    assert f"source {nodes[2].id}: {why}" in str(report)
    assert report.is_complete
    assert [on(member, read, checkpoint) for member in nodes[:2]] == [content] * 2


def test_what_is_named_comes_to_the_nodes_of_a_placement_group(
    nodes: list[Member], s3: S3Server, checkpoint: Checkpoint, content: dict[str, str]
) -> None:
    group = placement_group([{"CPU": 1}] * 2, "STRICT_SPREAD")
    report = ckptfs.ray.broadcast(checkpoint, group, ["rank-*", "b.bin"])
    remove_placement_group(group)
    assert report.is_complete
    assert report.bytes == LARGE["b.bin"] + sum(v for k, v in SMALL.items() if "rank" in k)
    chosen = [member for member in nodes if member.id in report.nodes]
    assert len(chosen) == 2
    for member in chosen:  # what was read from the store may not be on the disk yet
        wait_until(lambda m=member: m.status().cache_bytes >= report.bytes)
    assert s3.traffic().bytes_to_client <= 1.05 * report.bytes


@pytest.fixture
def slow(bucket: Path) -> Iterator[S3Server]:
    """A server whose connections are slow, so that a broadcast has a middle."""
    with S3Server(bucket.parent, counted=True, connection_rate=SLOW_RATE) as server:
        yield server


@contextlib.contextmanager
def in_the_middle(
    nodes: list[Member], checkpoint: Checkpoint, **options: Any
) -> Iterator[list[ckptfs.ray.BroadcastReport]]:
    """Something happens when a broadcast has begun to bring what it is to bring; at the end of the
    context it has ended, and the list has its report."""
    reports: list[ckptfs.ray.BroadcastReport] = []
    thread = threading.Thread(
        target=lambda: reports.append(ckptfs.ray.broadcast(checkpoint, **options))
    )
    thread.start()

    def has_begun() -> bool:
        attachments = [member.attachment() for member in nodes]
        return all(a is not None and a.cached > 0 for a in attachments)

    try:
        wait_until(has_begun, 60)
        assert thread.is_alive()
        yield reports
    finally:
        thread.join()


@pytest.mark.long
def test_a_node_that_dies_in_the_middle(
    nodes: list[Member], machines: Members, slow: S3Server, bucket: Path, content: dict[str, str]
) -> None:
    checkpoint = Checkpoint(f"{bucket.name}/run/checkpoint", slow.filesystem())
    fourth = machines.add()
    with in_the_middle([*nodes, fourth], checkpoint) as reports:
        fourth.kill()
    wait_until(lambda: not any(n["Alive"] for n in ray.nodes() if n["NodeID"] == fourth.id), 60)
    (report,) = reports
    assert not report.is_complete
    assert report.nodes[fourth.id].error
    assert [report.nodes[member.id].left for member in nodes] == [0, 0, 0]
    assert [on(member, read, checkpoint) for member in nodes] == [content] * 3
    # The nodes read again the bytes that the dead one had read and no other node had taken yet.
    again = sum(fetched([*nodes, fourth])) - size_of(content)
    assert again <= report.nodes[fourth.id].read + OBJECT_STORE_BYTES // 4


@pytest.mark.long
def test_a_daemon_that_is_killed_in_the_middle(
    nodes: list[Member], slow: S3Server, bucket: Path, content: dict[str, str]
) -> None:
    checkpoint = Checkpoint(f"{bucket.name}/run/checkpoint", slow.filesystem())
    with in_the_middle(nodes, checkpoint) as reports:
        os.kill(nodes[1].status().pid, signal.SIGKILL)
    (report,) = reports
    assert report.is_complete
    assert [on(member, read, checkpoint) for member in nodes] == [content] * 3
    assert nodes[1].status().restarts == 1


@pytest.mark.long
def test_an_object_that_changes_in_the_middle(
    nodes: list[Member], slow: S3Server, bucket: Path, content: dict[str, str]
) -> None:
    checkpoint = Checkpoint(f"{bucket.name}/run/checkpoint", slow.filesystem())
    changed = bucket / "run" / "checkpoint" / "b.bin"
    with contextlib.ExitStack() as held:
        with in_the_middle(nodes, checkpoint) as reports:
            changed.write_bytes(bytes(LARGE["b.bin"]))
            # The attachments stay: they are what was pinned.
            for member in nodes:
                attachment = member.attachment()
                assert attachment is not None
                connection = held.enter_context(member.connection())
                connection.prefetch(attachment.name, Wanted(["empty"]), lambda *_: None)
        (report,) = reports
        assert not report.is_complete
        for member in nodes:
            found = on(member, read, checkpoint)
            assert found.pop("b.bin") in ("ESTALE", content["b.bin"])
            assert found == {name: v for name, v in content.items() if name != "b.bin"}


@pytest.fixture
def peer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's parameter replaces `Peer` on the nodes."""
    monkeypatch.setattr(nodes_module, "Peer", request.param)


class Noisy(Peer):
    """Whatever it takes for the first time was damaged on the way."""

    def take(self, chunk: Any, sums: Any, data: Any) -> Any:
        import numpy as np

        if chunk not in self.__dict__.setdefault("seen", set()):
            self.seen.add(chunk)
            data = np.array(data)
            data[len(data) // 2] ^= 1
        return super().take(chunk, sums, data)


@pytest.mark.long
@pytest.mark.parametrize("peer", [Noisy], indirect=True)
def test_blocks_that_are_damaged_on_the_way_come_again(
    peer: None, nodes: list[Member], checkpoint: Checkpoint, content: dict[str, str]
) -> None:
    report = ckptfs.ray.broadcast(checkpoint)
    assert report.is_complete
    assert all("damaged" in part.error for part in report.nodes.values())
    assert [on(member, read, checkpoint) for member in nodes] == [content] * 3
    assert sum(fetched(nodes)) == size_of(content)
    assert all("damaged or of another version" in m.node.log() for m in nodes)


class Broken(Peer):
    """Whatever it takes is damaged."""

    def take(self, chunk: Any, sums: Any, data: Any) -> Any:
        return super().take(chunk, sums, data * 0)


@pytest.mark.long
@pytest.mark.parametrize("peer", [Broken], indirect=True)
def test_what_cannot_be_brought_is_read_from_the_store(
    peer: None, nodes: list[Member], checkpoint: Checkpoint, content: dict[str, str]
) -> None:
    report = ckptfs.ray.broadcast(checkpoint)
    assert not report.is_complete
    assert sum(part.taken for part in report.nodes.values()) == 0
    assert [on(member, read, checkpoint) for member in nodes] == [content] * 3
    assert sum(fetched(nodes)) == 3 * size_of(content)


class Silent(Peer):
    """Takes for ever, on the node with the file `silent`."""

    def take(self, chunk: Any, sums: Any, data: Any) -> Any:
        if Path(os.environ["CKPTFS_MOUNT"]).with_name("silent").exists():
            threading.Event().wait()
        return super().take(chunk, sums, data)


@pytest.mark.long
@pytest.mark.parametrize("peer", [Silent], indirect=True)
def test_a_silent_node_is_given_up(
    peer: None, nodes: list[Member], checkpoint: Checkpoint, content: dict[str, str]
) -> None:
    marker = nodes[2].node.folder / "silent"
    marker.touch()
    report = ckptfs.ray.broadcast(checkpoint, timeout_s=15)
    marker.unlink()
    assert report.nodes[nodes[2].id].error == "no answer for 15 s"
    assert [report.nodes[member.id].left for member in nodes[:2]] == [0, 0]
    assert [on(member, read, checkpoint) for member in nodes] == [content] * 3


class Refusing(Peer):
    """Its daemon does not exchange blocks with this user."""

    def _ask(self, request: Any, memory: Any = None) -> Any:
        raise ckptfs.AccessDenied("refused, as the test wants it")


@pytest.mark.parametrize("peer", [Refusing], indirect=True)
def test_daemons_that_exchange_nothing_with_this_user(
    peer: None, nodes: list[Member], checkpoint: Checkpoint, content: dict[str, str]
) -> None:
    report = ckptfs.ray.broadcast(checkpoint)
    assert {part.error for part in report.nodes.values()} == {"refused, as the test wants it"}
    assert all(part.left == report.bytes for part in report.nodes.values())
    assert on(nodes[0], read, checkpoint) == content


@ray.remote(num_cpus=0)
class Hoarder:
    """Fills its node's object store."""

    def __init__(self) -> None:
        self.held = [ray.put(bytes(8 * MIB)) for _ in range(OBJECT_STORE_BYTES // (8 * MIB))]

    def count(self) -> int:
        return len(self.held)


@pytest.mark.long
def test_a_full_object_store(
    nodes: list[Member], s3: S3Server, checkpoint: Checkpoint, content: dict[str, str]
) -> None:
    strategies = (NodeAffinitySchedulingStrategy(member.id, soft=False) for member in nodes)
    hoarders = [Hoarder.options(scheduling_strategy=s).remote() for s in strategies]
    assert ray.get([hoarder.count.remote() for hoarder in hoarders]) == [12] * 3
    ckptfs.ray.broadcast(checkpoint)
    assert [on(member, read, checkpoint) for member in nodes] == [content] * 3


@pytest.mark.long
def test_a_cache_that_is_too_small_takes_what_it_can_hold(
    nodes: list[Member], s3: S3Server, checkpoint: Checkpoint, content: dict[str, str]
) -> None:
    nodes[2].node.configure(cache_bytes_max=12 * MIB)
    nodes[2].end_daemon()  # an actor of the test before may have started one meanwhile
    try:
        report = ckptfs.ray.broadcast(checkpoint)
        assert report.nodes[nodes[2].id].left > 0
        assert [report.nodes[member.id].left for member in nodes[:2]] == [0, 0]
        assert [on(member, read, checkpoint) for member in nodes] == [content] * 3
    finally:
        nodes[2].node.configure()


def test_mistakes_are_said(
    nodes: list[Member], s3: S3Server, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(LocationError, match="is a local directory"):
        ckptfs.ray.broadcast(str(tmp_path))
    with pytest.raises(ValueError, match="no living node of the cluster has the id 1234"):
        ckptfs.ray.broadcast(checkpoint, ["1234"])
    with pytest.raises(ValueError, match="nodes is empty"):
        ckptfs.ray.broadcast(checkpoint, [])
    with pytest.raises(CheckpointNotFound, match="no node could attach"):
        ckptfs.ray.broadcast(checkpoint)
