"""Checkpoints of Ray that mount: a subclass of Ray's class, and a patch of its methods."""

# All workers of a node that enter `as_directory` share one attachment, also if each rank has its
# own checkpoint object (as after `report`), because an attachment belongs to the place.

from typing import Any

import ray.tune
from ray.train._checkpoint import Checkpoint as _RayCheckpoint
from ray.train.v2._internal.execution.callback import WorkerCallback

from ckptfs import checkpoint as _checkpoint

_METHODS = "as_directory", "to_directory", "get_metadata", "set_metadata", "update_metadata"
_originals: dict[str, Any] = {}


class Checkpoint(_checkpoint.Checkpoint, ray.tune.Checkpoint):
    """A ``ray.train.Checkpoint`` and ``ray.tune.Checkpoint`` that mounts instead of downloading.

        >>> from ckptfs.ray import Checkpoint  # in the place of ray.train.Checkpoint

    Ray accepts it in place of its own class, for example in ``report`` and
    ``resume_from_checkpoint``. Ray itself makes the checkpoints that it returns
    (``get_checkpoint``, ``Result.checkpoint``). These mount after `install`.
    """


def install() -> None:
    """Let every Ray checkpoint of this process mount, also those that Ray makes itself.

        >>> ckptfs.ray.install()
        >>> with result.checkpoint.as_directory() as path:  # made by Ray
        ...     model = load(path)

    The function replaces Ray's ``as_directory``, ``to_directory`` and the three metadata methods by
    those of ``ckptfs.Checkpoint``. Objects, classes and pickles stay Ray's. A second call does
    nothing.

    It has an effect only in the calling process. The processes that Ray starts need:

    - in Ray Train v2, `MountCallback`;
    - in Ray Tune, Ray Train v1, plain tasks and actors,
      ``ray.init(runtime_env={"worker_process_setup_hook": "ckptfs.ray.install"})``. Ray 2.60
      silently ignores the hook in ``RunConfig(worker_runtime_env=…)``.
    """
    for name in _METHODS:
        _originals.setdefault(name, getattr(_RayCheckpoint, name))
        setattr(_RayCheckpoint, name, getattr(_checkpoint.Checkpoint, name))


def uninstall() -> None:
    """Undo `install` in this process."""
    while _originals:
        setattr(_RayCheckpoint, *_originals.popitem())


class MountCallback(WorkerCallback):
    """Lets Ray's checkpoints mount in each worker of a Ray Train v2 run.

    Pass it to the run, ``RunConfig(callbacks=[MountCallback()])``, or name it in the driver's
    environment, ``RAY_TRAIN_CALLBACKS=ckptfs.ray.MountCallback``. It calls `install` in each worker
    before the training function begins.
    """

    def after_init_train_context(self) -> None:
        """Install the methods. Ray calls this in the worker."""
        install()
