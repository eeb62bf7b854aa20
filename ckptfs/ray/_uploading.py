"""Ray Train v2: ckptfs uploads what the workers report, to the storage of the run."""

from typing import cast

import ray.train
from ray.train.v2._internal.execution.context import is_managed_checkpoint

from ckptfs._store.filesystems import local_path_of
from ckptfs._upload import upload as _upload
from ckptfs.errors import LocationError
from ckptfs.ray._nodes import RayCheckpoint


def upload(
    checkpoint: RayCheckpoint, checkpoint_dir_name: str, *, overwrite: bool = False
) -> RayCheckpoint:
    """Upload a reported checkpoint as `ckptfs.upload` does: in parallel, verified, and into the
    cache of this node. Pass it to Ray Train:

        >>> ray.train.report(metrics, checkpoint, checkpoint_upload_fn=ckptfs.ray.upload)

    It fits Ray's modes SYNC and ASYNC. The checkpoint comes to the place where Ray would persist
    it. Ranks that report parts of one checkpoint merge, also on one node: each uploads its own
    files. Two ranks may upload the same small file if it has the same bytes. The
    ``.metadata.json`` is that of the rank that has finished last, as with Ray.

    Args:
        checkpoint: The local checkpoint of this rank.
        checkpoint_dir_name: The name of its directory in the storage, from Ray.
        overwrite: Whether other content at that place is replaced:
            ``functools.partial(ckptfs.ray.upload, overwrite=True)``. A run that fails and reports
            the same `checkpoint_dir_name` again needs it, unless its files have the same bytes.

    Returns:
        The persisted checkpoint, of Ray's own class.

    Raises:
        LocationError: The checkpoint is not local, or its target is outside of the run's storage.
        TargetExists: The checkpoint has a file of the same name with other content already.
        CkptfsError: As `ckptfs.upload`. Ray Train then counts the worker as failed.
        RuntimeError: This node does not share the storage of the run.
    """
    directory = local_path_of(checkpoint.filesystem, checkpoint.path)
    if directory is None:
        raise LocationError(
            f"{checkpoint.path} is not a local directory; report it with "
            "checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD"
        )
    storage = ray.train.get_context().get_storage()
    path = storage.build_checkpoint_path_from_name(checkpoint_dir_name)
    target = ray.train.Checkpoint(path, storage.storage_filesystem)
    if not is_managed_checkpoint(storage, target):
        raise LocationError(
            f"{path} is outside of the run's storage ({storage.experiment_fs_path}); choose "
            "another checkpoint_dir_name"
        )
    storage._check_validation_file()  # pyright: ignore[reportPrivateUsage] - as Ray's own upload
    _upload(directory, target, merge=True, overwrite=overwrite)
    return cast("RayCheckpoint", target)
