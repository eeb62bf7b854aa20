"""While Ray schedules a job, each node fetches the files of its ranks from the store."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptfs._client.plans import read as read_plan
from ckptfs._model.plans.plan import Plan, Wanted, joined
from ckptfs._model.units import size_text
from ckptfs.errors import BY_CODE, DaemonError, PrefetchFailed
from ckptfs.ray import _nodes
from ckptfs.ray._nodes import AnyCheckpoint, Nodes, answer_of

if TYPE_CHECKING:
    import os

log = logging.getLogger(__name__)


class Warming:
    """The fetches that `warm` has begun. ``print(warming)`` shows their progress.

    Fetching ends when all files are there, with `cancel`, or with this object. Fetched bytes stay
    in the caches.
    """

    def __init__(self, path: str, peers: Mapping[str, Any], refs: Mapping[str, Any]) -> None:
        self._path = path
        self._peers = peers
        self._refs = refs
        self._answers: dict[str, Any] = {}

    def wait(self) -> dict[str, int]:
        """Wait until every node has its files.

        Returns:
            For each node id of Ray, the bytes of its files in its cache.

        Raises:
            PrefetchFailed: A node could not fetch all of its files. The other nodes have theirs.
        """
        for name, ref in self._refs.items():
            if name not in self._answers:
                self._answers[name] = answer_of(ref)
        self.cancel()
        for name, answer in self._answers.items():
            if not isinstance(answer, tuple):
                raise PrefetchFailed(f"node {name}: {answer.message}")
        return {name: answer[0] for name, answer in self._answers.items()}

    def cancel(self) -> None:
        """Stop fetching. Fetched bytes stay in the caches."""
        _nodes.end(self._peers)

    def __str__(self) -> str:
        waiting = {ref: name for name, ref in self._refs.items() if name not in self._answers}
        for ref, name in _nodes.as_they_come(waiting, 0.0):
            self._answers[name] = answer_of(ref)
        failed = {n: a.message for n, a in self._answers.items() if not isinstance(a, tuple)}
        has = sum(a[0] for a in self._answers.values() if isinstance(a, tuple))
        lines = [
            f"warming {self._path}: {len(self._answers) - len(failed)} of {len(self._refs)} nodes "
            f"have their files, {size_text(has)}"
        ]
        lines += [f"node {name}: {message}" for name, message in failed.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<ckptfs.ray.Warming of {self._path} on {len(self._refs)} nodes>"


def warm(
    checkpoint: AnyCheckpoint | str,
    nodes: "Nodes | Mapping[str, Sequence[str]] | Mapping[str, Sequence[int]]" = "all",
    files: Sequence[str] = (),
    *,
    plan: "bool | str | os.PathLike[str] | Plan" = False,
) -> Warming:
    """Begin to fetch parts of a checkpoint into the caches of nodes, each node from the store.

    Use it if the nodes need different parts; `broadcast` costs less if all need the same. The
    function returns when every node has attached the checkpoint. It takes no resources from jobs.

        >>> warming = ckptfs.ray.warm(checkpoint, {node_a: ["rank-0/*"], node_b: ["rank-1/*"]})
        >>> warming.wait()  # returns when both have their files

    Args:
        checkpoint: A ``ckptfs.Checkpoint``, one of Ray's, or a URI.
        nodes: As in `broadcast`; or for each node id a list of globs, or with `plan` a list of the
            ranks that will run there.
        files: Globs on relative paths, the most urgent first, if `nodes` has none; empty for all
            files.
        plan: The reads of an earlier restore, to fetch in its order instead of globs: those of the
            node's ranks if `nodes` has them, otherwise all. Either a file, or the URI of a
            checkpoint with a plan (``ckptfs plan save``). True takes all plans that these nodes
            keep for the checkpoints beside this one (``as_directory(plan=True)``). If they have
            none yet, nothing is fetched, and the log says so.

    Raises:
        CkptfsError, ValueError: As in `broadcast`, also if only one node cannot attach the
            checkpoint.
        PlanError: `plan` does not exist or is not a plan.
        LimitExceeded: The plan is too long for a node.
        TypeError, ValueError: `nodes` or `files` do not fit `plan`.
    """
    filesystem, path = _nodes.place_of(checkpoint)
    needs = _needs_of(nodes, files, plan)
    if not isinstance(plan, bool | Plan):
        plan = read_plan(plan)
    peers = _nodes.start_peers(filesystem, path, _nodes.node_ids(list(needs)), 0, 1)
    try:
        _, failed = _nodes.join(peers)
        for name, failure in failed.items():
            error = BY_CODE.get(failure.code, DaemonError)
            raise error(f"node {name} cannot attach {path}: {failure.message}")
        if plan is False:
            wanted = {name: Wanted(list(globs)) for name, globs in needs.items()}
        else:
            plans = [plan] if isinstance(plan, Plan) else _kept(peers, path)
            wanted = {name: Wanted(plan=_part(plans, ranks)) for name, ranks in needs.items()}
        refs = {name: peer.prefetch.remote(wanted[name]) for name, peer in peers.items()}
        return Warming(path, peers, refs)
    except BaseException:
        _nodes.end(peers)
        raise


def _needs_of(nodes: Any, files: Sequence[str], plan: Any) -> dict[str, Any]:
    """The globs of each node, or its ranks with a plan; None for all ranks."""
    what, kind, everything = ("globs", str, ["*"]) if plan is False else ("ranks", int, None)
    if plan is not False and files:
        raise ValueError("files and plan exclude each other; leave one out")
    if not isinstance(nodes, Mapping):
        return dict.fromkeys(_nodes.node_ids(nodes), files or everything)
    for name, own in nodes.items():
        if isinstance(own, str) or not own or not all(isinstance(each, kind) for each in own):
            raise TypeError(f"node {name} must have a list of {what}, not {own!r}")
    return dict(nodes)


def _kept(peers: Mapping[str, Any], path: str) -> list[Plan]:
    """The plans that these nodes keep for the checkpoint, without damaged ones."""
    refs = {name: peer.kept_plan.remote() for name, peer in peers.items()}
    found: list[Plan] = []
    for name, ref in refs.items():
        answer = answer_of(ref)
        if isinstance(answer, Plan):
            found.append(answer)
        elif answer is not None:
            log.warning("node %s has no plan for %s: %s", name, path, answer.message)
    if not found:
        log.warning("no node has a plan for %s yet, so nothing is fetched ahead", path)
    return found


def _part(plans: Sequence[Plan], ranks: Sequence[int] | None) -> Plan:
    """The reads of these ranks; None for all ranks."""
    return joined(plans if ranks is None else [plan.of_ranks(ranks) for plan in plans])
