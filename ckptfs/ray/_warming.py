# Ray is not installed where the package is type-checked: its classes are of unknown type.
# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false
"""Nodes fetch what their ranks will read, each from the store, while the job is being scheduled."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptfs import _plans
from ckptfs._model.plan import Plan, Wanted, joined
from ckptfs.errors import BY_CODE, DaemonError, PrefetchFailed
from ckptfs.ray._nodes import Nodes, answer_of, end, join, node_ids, place_of, start_peers

if TYPE_CHECKING:
    import os

log = logging.getLogger(__name__)


class Warming:
    """What `warm` has begun. It ends when it is done, with `cancel`, or with this object."""

    def __init__(self, peers: Mapping[str, Any], refs: Mapping[str, Any]) -> None:
        self._peers = peers
        self._refs = refs

    def wait(self) -> dict[str, int]:
        """Return when every node has what it needs: bytes of it that it has now, by node id.

        Raises PrefetchFailed where a node could not fetch all of it; the others go on.
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
    nodes: "Nodes | Mapping[str, Sequence[str]] | Mapping[str, Sequence[int]]" = "all",
    files: Sequence[str] = (),
    *,
    plan: "bool | str | os.PathLike[str] | Plan" = False,
) -> Warming:
    """Begin to fetch of a checkpoint what nodes need into their caches, each from the store.

    For nodes that need different parts; what all of them need, `broadcast` brings for less. Returns
    when every node has attached it. What runs for it takes no resources from jobs.

    Args:
        checkpoint: A ``ckptfs.Checkpoint``, one of Ray's, or a URI.
        nodes: As of `broadcast`; or for each node id what that node needs: globs, or with `plan`
            the ranks that will be there.
        files: Globs on relative paths, in this order, where `nodes` has none; empty: everything.
        plan: Instead of globs, what a restore of an earlier checkpoint has read, in that order: for
            the node's ranks if `nodes` has them, or all of it. A file, or the URI of a checkpoint
            that has one (``ckptfs plan save``). True: what these nodes keep for the checkpoints
            beside this one (``as_directory(plan=True)``), together; where they have nothing yet,
            nothing is fetched, and the log says so.

    Raises as `broadcast`, also where only one of the nodes cannot attach it; and:
        PlanError: What `plan` names is none.
        LimitExceeded: It would be too long for a node.
        TypeError, ValueError: `nodes` or `files` do not go with `plan`.
    """
    filesystem, path = place_of(checkpoint)
    needs = _needs_of(nodes, files, plan)
    if not isinstance(plan, bool | Plan):
        plan = _plans.read(plan)
    peers = start_peers(filesystem, path, node_ids(list(needs)), 0, 1)
    try:
        _, failed = join(peers)
        for name, failure in failed.items():
            error = BY_CODE.get(failure.code, DaemonError)
            raise error(f"node {name} cannot attach {path}: {failure.message}")
        if plan is False:
            wanted = {name: Wanted(list(globs)) for name, globs in needs.items()}
        else:
            plans = [plan] if isinstance(plan, Plan) else _kept(peers, path)
            wanted = {name: Wanted(plan=_part(plans, ranks)) for name, ranks in needs.items()}
        return Warming(
            peers, {name: peer.prefetch.remote(wanted[name]) for name, peer in peers.items()}
        )
    except BaseException:
        end(peers)
        raise


def _needs_of(nodes: Any, files: Sequence[str], plan: Any) -> dict[str, Any]:
    """Globs of each node; or its ranks, None: all of them."""
    what, kind, everything = ("globs", str, ["*"]) if plan is False else ("ranks", int, None)
    if plan is not False and files:
        raise ValueError("a plan says what is fetched: leave files out")
    if not isinstance(nodes, Mapping):
        return dict.fromkeys(node_ids(nodes), files or everything)
    for name, own in nodes.items():
        if isinstance(own, str) or not own or not all(isinstance(each, kind) for each in own):
            raise TypeError(f"node {name} must have a list of {what}, not {own!r}")
    return dict(nodes)


def _kept(peers: Mapping[str, Any], path: str) -> list[Plan]:
    """The plans that these nodes keep for the checkpoint. One that is damaged is left out."""
    refs = {name: peer.kept_plan.remote() for name, peer in peers.items()}
    found: list[Plan] = []
    for name, ref in refs.items():
        answer = answer_of(ref)
        if isinstance(answer, Plan):
            found.append(answer)
        elif answer is not None:
            log.warning("node %s has no plan for %s: %s", name, path, answer.message)
    if not found:
        log.warning("no node keeps a plan for %s yet: nothing is fetched ahead", path)
    return found


def _part(plans: Sequence[Plan], ranks: Sequence[int] | None) -> Plan:
    """What these ranks read; None: all."""
    return joined(plans if ranks is None else [plan.of_ranks(ranks) for plan in plans])
