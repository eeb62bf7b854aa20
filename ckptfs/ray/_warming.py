# Ray is not installed where the package is type-checked: its classes are of unknown type.
# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false
"""Nodes fetch what their ranks will read, each from the store, while the job is being scheduled."""

from collections.abc import Mapping, Sequence
from typing import Any

from ckptfs.errors import BY_CODE, DaemonError, PrefetchFailed
from ckptfs.ray._nodes import Nodes, answer_of, end, join, node_ids, place_of, start_peers


class Warming:
    """What `warm` has begun. It ends when it is done, with `cancel`, or with this object."""

    def __init__(self, peers: Mapping[str, Any], refs: Mapping[str, Any]) -> None:
        self._peers = peers
        self._refs = refs

    def wait(self) -> dict[str, int]:
        """Return when every node has its files: bytes that it has now, by node id.

        Raises PrefetchFailed where a node could not fetch all of them; the others go on.
        """
        answers = {name: answer_of(ref) for name, ref in self._refs.items()}
        self.cancel()
        for name, answer in answers.items():
            if not isinstance(answer, tuple):
                raise PrefetchFailed(f"node {name}: {answer.message}")
        return {name: answer[0] for name, answer in answers.items()}

    def cancel(self) -> None:
        """Fetch no more. What was fetched stays cached."""
        end(self._peers)


def warm(
    checkpoint: Any,
    nodes: "Nodes | Mapping[str, Sequence[str]]" = "all",
    files: Sequence[str] = ("*",),
) -> Warming:
    """Begin to fetch files of a checkpoint into the caches of nodes, each from the store.

    For nodes that need different files; what all of them need, `broadcast` brings for less. Returns
    when every node has attached it. What runs for it takes no resources from jobs.

    Args:
        checkpoint: A ``ckptfs.Checkpoint``, one of Ray's, or a URI.
        nodes: As of `broadcast`; or globs for each node id.
        files: Globs on relative paths, in this order, where `nodes` has none.

    Raises as `broadcast`, also where only one of the nodes cannot attach it.
    """
    filesystem, path = place_of(checkpoint)
    wanted = nodes if isinstance(nodes, Mapping) else dict.fromkeys(node_ids(nodes), files)
    peers = start_peers(filesystem, path, node_ids(list(wanted)), 0, 1)
    try:
        _, failed = join(peers)
        for name, failure in failed.items():
            error = BY_CODE.get(failure.code, DaemonError)
            raise error(f"node {name} cannot attach {path}: {failure.message}")
        return Warming(
            peers, {name: peers[name].prefetch.remote(list(wanted[name])) for name in peers}
        )
    except BaseException:
        end(peers)
        raise
