# Ray is not installed where the package is type-checked: its classes are of unknown type.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUntypedBaseClass=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false
"""Ray Train v2: the checkpoint that a run goes on from comes to all its nodes for one download."""

import logging
from collections.abc import Sequence
from typing import Any

import ray.train
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ReplicaGroupCallback, WorkerGroupCallback

from ckptfs.errors import CkptfsError
from ckptfs.ray._broadcast import broadcast
from ckptfs.ray._mounting import MountCallback

log = logging.getLogger(__name__)


class RestoreCallback(MountCallback, WorkerGroupCallback, ReplicaGroupCallback):
    """Brings the checkpoint to all nodes of a run before its workers begin, and lets them mount it.

    ``RunConfig(callbacks=[RestoreCallback()])``, or in the driver's environment
    ``RAY_TRAIN_CALLBACKS=ckptfs.ray.RestoreCallback``. It is also a `MountCallback`.

    Each time that workers are started, also after a failure, the checkpoint which
    ``ray.train.get_checkpoint()`` gives them is broadcast to their nodes; from a node that has it
    already it costs the store nothing. Where that fails, the log says why, and the workers read
    from the store.

    Args:
        checkpoint: What is broadcast where the run has no checkpoint of its own yet: a checkpoint
            or URI that the training function begins with.
        files: Globs; see ``broadcast``.
    """

    def __init__(self, checkpoint: Any = None, files: Sequence[str] = ()) -> None:
        self._checkpoint = checkpoint
        self._files = list(files)

    def after_execution_group_start(self, execution_group: Any) -> None:
        """Called by Ray in the controller, before the training function begins."""
        try:
            checkpoint = execution_group.execute_single(0, ray.train.get_checkpoint)
            if checkpoint is None:
                checkpoint = self._checkpoint
            if checkpoint is not None:
                workers = execution_group.get_workers()
                nodes = list(dict.fromkeys(worker.metadata.node_id for worker in workers))
                broadcast(checkpoint, nodes, self._files)
        except (CkptfsError, RayError, ValueError) as error:
            log.warning("the checkpoint is not broadcast, each node reads it itself: %s", error)
