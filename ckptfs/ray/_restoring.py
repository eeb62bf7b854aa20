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
    ``ray.train.get_checkpoint()`` to their nodes. Blocks that these nodes, or other living nodes on
    which the run had workers, have in their caches do not come from the store. If a broadcast
    fails, the log says why, and the workers read from the store.

    Args:
        checkpoint: The checkpoint or URI to broadcast while the run has no checkpoint of its own.
        files: Globs; see ``broadcast``.
    """

    def __init__(
        self, checkpoint: AnyCheckpoint | str | None = None, files: Sequence[str] = ()
    ) -> None:
        self._checkpoint = checkpoint
        self._files = list(files)
        self._ran_on: set[str] = set()  # the nodes that have had workers

    def after_execution_group_start(self, execution_group: Any) -> None:
        """Called by Ray in the controller, before the training function begins."""
        workers = execution_group.get_workers()
        nodes = list(dict.fromkeys(worker.metadata.node_id for worker in workers))
        earlier = self._ran_on.difference(nodes)
        self._ran_on.update(nodes)
        try:
            checkpoint = execution_group.execute_single(0, ray.train.get_checkpoint)
            if checkpoint is None:
                checkpoint = self._checkpoint
            if checkpoint is not None:
                report = broadcast(checkpoint, nodes, self._files, sources=earlier)
                log.info("restoring: %s", report)
        except (CkptfsError, RayError, ValueError) as error:
            log.warning("cannot broadcast the checkpoint; each node reads the store: %s", error)
