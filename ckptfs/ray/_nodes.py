"""The nodes of a Ray cluster, and an actor on each that has a checkpoint attached."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, cast

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ckptfs._local_directory import filesystem_behind
from ckptfs._store.describe import NotDescribable, describe
from ckptfs._store.filesystems import ArrowFileSystem, FileSystem, local_path_of
from ckptfs.checkpoint import Checkpoint
from ckptfs.errors import LocationError
from ckptfs.ray._peer import Failure, Joined, Peer


class RayCheckpoint(Protocol):
    """A ``ray.train.Checkpoint``, as a type checker sees it where Ray is not installed."""

    path: str

    @property
    def filesystem(self) -> ArrowFileSystem:  # pyright: ignore[reportUnknownParameterType]
        """The filesystem that holds the checkpoint."""
        ...


AnyCheckpoint: TypeAlias = Checkpoint | RayCheckpoint


class Bundles(Protocol):
    """A ``PlacementGroup`` of Ray, as a type checker sees it where Ray is not installed."""

    def ready(self) -> object:
        """A reference that resolves when Ray has reserved the bundles."""
        ...


Nodes: TypeAlias = Literal["all"] | list[str] | Bundles | None
"""All nodes of the cluster ("all" or None), a list of hex ids, or the nodes of a
``PlacementGroup``'s bundles."""

JOIN_S = 120.0
"""Longest wait for a node to attach, which can start a daemon and lists the store."""
SOURCE_JOIN_S = 5.0
"""Longest further wait for nodes that would only give. A node that has just failed may be among
them, and Ray takes 30 s to notice that."""
_TAKES_MAX = 4
"""Maximum number of chunks that a node takes at the same time."""


def place_of(checkpoint: AnyCheckpoint | str) -> tuple[FileSystem, str]:
    """Filesystem and path of a checkpoint that daemons of other nodes can attach. Raises
    LocationError."""
    if isinstance(checkpoint, str):
        checkpoint = Checkpoint(checkpoint)
    filesystem, path = filesystem_behind(checkpoint), checkpoint.path
    if local_path_of(filesystem, path) is not None:
        raise LocationError(f"{path} is a local directory; give a URI, which all nodes can attach")
    try:
        describe(filesystem, path)
    except NotDescribable as error:
        raise LocationError(f"other nodes cannot attach the checkpoint: {error}") from None
    return filesystem, path


def node_ids(nodes: Nodes) -> list[str]:
    """The ids of the given nodes, which must be alive. Raises ValueError."""
    living = living_ids()
    if nodes is None or nodes == "all":
        found = sorted(living)
    elif isinstance(nodes, PlacementGroup):
        ray.get(nodes.ready())
        found = placement_group_table(nodes)["bundles_to_node_id"].values()
    elif isinstance(nodes, str):
        raise ValueError(
            f'nodes must be "all", None, a list of node ids or a placement group, not {nodes!r}'
        )
    else:
        found = cast("list[str]", nodes)
    ids = list(dict.fromkeys(found))
    if unknown := [name for name in ids if name not in living]:
        raise ValueError(f"no living node of the cluster has the id {', '.join(unknown)}")
    if not ids:
        raise ValueError("nodes is empty; name a node, or leave it out for all nodes")
    return ids


def living_ids() -> set[str]:
    """The ids of the nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def start_peers(
    filesystem: FileSystem, path: str, ids: Sequence[str], chunk_bytes: int, gives_max: int
) -> dict[str, Any]:
    """Start an actor on each node. It takes no resources from jobs."""
    groups = {"give": gives_max, "take": _TAKES_MAX}
    remote = ray.remote(num_cpus=0, concurrency_groups=groups)(Peer)
    return {
        name: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)
        ).remote(filesystem, path, chunk_bytes)
        for name in ids
    }


def join(
    peers: Mapping[str, Any], sources: Collection[str] = ()
) -> tuple[dict[str, Joined], dict[str, Failure]]:
    """Have the actors attach the checkpoint. Return their answers and their failures, by node.

    When the others have answered, the `sources` have `SOURCE_JOIN_S` more."""
    refs = {peer.join.remote(): name for name, peer in peers.items()}
    joined: dict[str, Joined] = {}
    failed: dict[str, Failure] = {}
    for timeout_s, are_sources in ((JOIN_S, False), (SOURCE_JOIN_S, True)):
        these = {ref: name for ref, name in refs.items() if (name in sources) == are_sources}
        for ref, name in as_they_come(these, timeout_s):
            answer = answer_of(ref)
            if isinstance(answer, Joined):
                joined[name] = answer
            else:
                failed[name] = answer
        for name in set(these.values()) - joined.keys() - failed.keys():
            failed[name] = Failure("ray", f"the node has not attached it within {timeout_s:g} s")
    return joined, failed


def as_they_come(refs: Mapping[Any, str], timeout_s: float = JOIN_S) -> Iterator[tuple[Any, str]]:
    """Yield each answer that arrives in time, with its node."""
    waiting, end_s = list(refs), time.monotonic() + timeout_s
    while waiting:
        left_s = max(0.0, end_s - time.monotonic())
        ready, waiting = ray.wait(waiting, timeout=left_s, fetch_local=False)
        if not ready:
            return
        yield from ((ref, refs[ref]) for ref in ready)


def answer_of(ref: Any) -> Any:
    """The answer of an actor, or a `Failure` if Ray raises an error."""
    try:
        return ray.get(ref)
    except RayActorError as error:
        return Failure("lost", str(error).splitlines()[0])
    except RayError as error:
        return Failure("ray", f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")


def end(peers: Mapping[str, Any]) -> None:
    """End the actors, and with them their attachments."""
    for peer in peers.values():
        ray.kill(peer)


def smallest_object_store(ids: Sequence[str]) -> int:
    sizes = {n["NodeID"]: int(n["Resources"].get("object_store_memory", 0)) for n in ray.nodes()}
    return min(sizes.get(name, 0) for name in ids)
