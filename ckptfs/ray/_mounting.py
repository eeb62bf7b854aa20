# Ray is not installed where the package is type-checked: its classes are of unknown type.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUntypedBaseClass=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
"""ckptfs for Ray: checkpoints that mount instead of being downloaded.

Three ways, from the smallest change on:

- nothing in the code: Ray Train v2 takes ``RAY_TRAIN_CALLBACKS=ckptfs.ray.MountCallback`` from the
  environment of the driver;
- `install`, once per process, makes every ``ray.train.Checkpoint`` and ``ray.tune.Checkpoint`` of
  the process mount;
- `Checkpoint` instead of Ray's, for the checkpoints that you make yourself.

However many workers of a node enter ``as_directory``, also with checkpoint objects of their own
(each rank gets one after ``report``), they share one attachment: it belongs to the place and not to
the object.
"""

from typing import Any

import ray.tune
from ray.train._checkpoint import Checkpoint as _RayCheckpoint
from ray.train.v2._internal.execution.callback import WorkerCallback

from ckptfs import checkpoint as _checkpoint

_METHODS = (
    "as_directory",
    "to_directory",
    "get_metadata",
    "set_metadata",
    "update_metadata",
)
_originals: dict[str, Any] = {}


class Checkpoint(_checkpoint.Checkpoint, ray.tune.Checkpoint):
    """A ``ray.tune.Checkpoint``, hence a ``ray.train.Checkpoint``, that mounts.

    Can be given to ``report``, to ``resume_from_checkpoint`` and to whatever else takes Ray's. What
    Ray hands back (``get_checkpoint``, ``Result.checkpoint``) is made by Ray: see `install`.
    """


def install() -> None:
    """Let every Ray checkpoint of this process mount, also those that Ray makes itself.

    Ray's ``as_directory``, ``to_directory`` and the three metadata methods are replaced by those of
    ``ckptfs.Checkpoint``; objects, classes and pickles stay Ray's. Calling it again does nothing.

    It works in the process that calls it. For the processes that Ray starts:

    - Ray Train v2: `MountCallback`;
    - Ray Tune, Ray Train v1 and plain tasks and actors:
      ``ray.init(runtime_env={"worker_process_setup_hook": "ckptfs.ray.install"})``. The hook has to
      be in ``ray.init``: Ray 2.60 ignores it, without a word, in
      ``RunConfig(worker_runtime_env=…)``.
    """
    for name in _METHODS:
        _originals.setdefault(name, getattr(_RayCheckpoint, name))
        setattr(_RayCheckpoint, name, getattr(_checkpoint.Checkpoint, name))


def uninstall() -> None:
    """Undo `install`."""
    while _originals:
        setattr(_RayCheckpoint, *_originals.popitem())


class MountCallback(WorkerCallback):
    """Runs `install` in each worker of a Ray Train v2 run, before the training function.

    ``RunConfig(callbacks=[MountCallback()])``, or in the driver's environment
    ``RAY_TRAIN_CALLBACKS=ckptfs.ray.MountCallback``.
    """

    def after_init_train_context(self) -> None:
        """Called by Ray in the worker."""
        install()
