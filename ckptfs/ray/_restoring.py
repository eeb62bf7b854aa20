"""Ray Train v2: all nodes of a run get the checkpoint from which it continues, for one download."""

import logging
from collections.abc import Sequence
from typing import Any

import ray.train
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ReplicaGroupCallback, WorkerGroupCallback

from ckptfs.errors import CkptfsError
from ckptfs.ray._broadcast import broadcast
from ckptfs.ray._mounting import MountCallback
from ckptfs.ray._nodes import AnyCheckpoint

log = logging.getLogger(__name__)


class RestoreCallback(MountCallback, WorkerGroupCallback, ReplicaGroupCallback):
    """Brings the checkpoint to all nodes of a run before its workers begin, and lets them mount it.

    ``RunConfig(callbacks=[RestoreCallback()])``, or in the driver's environment
    ``RAY_TRAIN_CALLBACKS=ckptfs.ray.RestoreCallback``. It is also a `MountCallback`.

    Each time Ray starts workers, also after a failure, the callback broadcasts the checkpoint of
    ``ray.train.get_checkpoint()`` to their nodes. If a node has it already, the store is not read.
    If a broadcast fails, the log says why, and the workers read from the store.

    Args:
        checkpoint: The checkpoint or URI to broadcast while the run has no checkpoint of its own.
        files: Globs; see ``broadcast``.
    """

    def __init__(
        self, checkpoint: AnyCheckpoint | str | None = None, files: Sequence[str] = ()
    ) -> None:
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
                log.info("restoring: %s", broadcast(checkpoint, nodes, self._files))
        except (CkptfsError, RayError, ValueError) as error:
            log.warning("cannot broadcast the checkpoint; each node reads the store: %s", error)
