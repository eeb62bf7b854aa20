# Ray is not installed where the package is type-checked: its classes are of unknown type.
# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false
"""The nodes of a Ray cluster, and an actor on each that has a checkpoint attached."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ckptfs._store.describe import NotDescribable, describe
from ckptfs._store.filesystems import FileSystem, local_path_of
from ckptfs.checkpoint import Checkpoint, filesystem_behind
from ckptfs.errors import LocationError
from ckptfs.ray._peer import Failure, Joined, Peer

Nodes = Literal["all"] | list[str] | Any
"""All nodes of the cluster, these (hex ids), or those of a ``PlacementGroup``'s bundles."""

JOIN_S = 120.0
"""Longest wait for a node to attach: a daemon is started, and the store lists."""
_TAKES_MAX = 4
"""Chunks that a node takes at the same time, of those that wait for it."""


def place_of(checkpoint: Any) -> tuple[FileSystem, str]:
    """Filesystem and path of a checkpoint that daemons of other nodes can attach.

    Raises LocationError.
    """
    if isinstance(checkpoint, str):
        checkpoint = Checkpoint(checkpoint)
    filesystem, path = filesystem_behind(checkpoint), checkpoint.path
    if local_path_of(filesystem, path) is not None:
        raise LocationError(f"{path} is a local directory: other nodes cannot attach it")
    try:
        describe(filesystem, path)
    except NotDescribable as error:
        raise LocationError(f"other nodes cannot attach the checkpoint: {error}") from None
    return filesystem, path


def node_ids(nodes: Nodes) -> list[str]:
    """The living nodes that are meant. Raises ValueError."""
    living = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    if isinstance(nodes, PlacementGroup):
        ray.get(nodes.ready())
        found = placement_group_table(nodes)["bundles_to_node_id"].values()
    elif nodes == "all":
        found = sorted(living)
    elif isinstance(nodes, str):
        raise ValueError(f'nodes must be "all", a list of node ids or a placement group: {nodes!r}')
    else:
        found = nodes
    ids = list(dict.fromkeys(found))
    if unknown := [name for name in ids if name not in living]:
        raise ValueError(f"no living node of the cluster has the id {', '.join(unknown)}")
    if not ids:
        raise ValueError("the checkpoint is to be brought to no node")
    return ids


def start_peers(
    filesystem: FileSystem, path: str, ids: Sequence[str], chunk_bytes: int, gives_max: int
) -> dict[str, Any]:
    """An actor on each node; it takes none of the resources that jobs ask for."""
    groups = {"give": gives_max, "take": _TAKES_MAX}
    remote = ray.remote(num_cpus=0, concurrency_groups=groups)(Peer)
    return {
        name: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)
        ).remote(filesystem, path, chunk_bytes)
        for name in ids
    }


def join(peers: Mapping[str, Any]) -> tuple[dict[str, Joined], dict[str, Failure]]:
    """Have them attach the checkpoint: those that have, and the others."""
    refs = {peer.join.remote(): name for name, peer in peers.items()}
    joined: dict[str, Joined] = {}
    failed: dict[str, Failure] = {}
    for ref, name in as_they_come(refs):
        answer = answer_of(ref)
        if isinstance(answer, Joined):
            joined[name] = answer
        else:
            failed[name] = answer
    for name in peers.keys() - joined.keys() - failed.keys():
        failed[name] = Failure("ray", f"the node has not attached it within {JOIN_S:g} s")
    return joined, failed


def as_they_come(refs: Mapping[Any, str], timeout_s: float = JOIN_S) -> Iterator[tuple[Any, str]]:
    """The answers that are there within that time, and whose they are."""
    waiting, end_s = list(refs), time.monotonic() + timeout_s
    while waiting:
        left_s = max(0.0, end_s - time.monotonic())
        ready, waiting = ray.wait(waiting, timeout=left_s, fetch_local=False)
        if not ready:
            return
        yield from ((ref, refs[ref]) for ref in ready)


def answer_of(ref: Any) -> Any:
    """What an actor has answered; a `Failure` where Ray has."""
    try:
        return ray.get(ref)
    except RayActorError as error:
        return Failure("lost", str(error).splitlines()[0])
    except RayError as error:
        return Failure("ray", f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")


def end(peers: Mapping[str, Any]) -> None:
    """End the actors; each gives its attachment back."""
    for peer in peers.values():
        ray.kill(peer)


def smallest_object_store(ids: Sequence[str]) -> int:
    sizes = {n["NodeID"]: int(n["Resources"].get("object_store_memory", 0)) for n in ray.nodes()}
    return min(sizes.get(name, 0) for name in ids)
