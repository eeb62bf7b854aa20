"""Mount remote checkpoints as local directories instead of copying them.

    >>> from ckptfs import Checkpoint
    >>> with Checkpoint("s3://bucket/run7/checkpoint_000100").as_directory() as path:
    ...     model = load(path)  # fetches only the bytes that it reads

`Checkpoint`
    A directory of files in a store. `Checkpoint.as_directory` mounts it, `Checkpoint.to_directory`
    copies it, and `Checkpoint.get_metadata` and its siblings read and write its metadata.
`upload`
    A local directory, uploaded as a checkpoint: in parallel, and verified. Also in the background,
    as a `BackgroundUpload`.
`mount`
    The same directory, for longer than a ``with`` block, for example in a notebook.
`explain`
    The reason of a failed read of a mounted checkpoint, for an exception or a path.
`ckptfs.xattrs`
    State and metadata of a mounted checkpoint, for code that has only a path.
`ckptfs.ray`
    Checkpoints of Ray that mount, also on many nodes (needs Ray).
`CkptfsError`
    The base class of all errors. Many of them are builtin ones, too, such as FileNotFoundError.

At DEBUG, the logger ``ckptfs`` reports which daemon serves a checkpoint, whether the checkpoint was
mounted or copied and why, its path, and the time that this took:

    >>> logging.basicConfig()
    >>> logging.getLogger("ckptfs").setLevel("DEBUG")

``ckptfs help`` in a shell lists the other pages.
"""

# Names that need more than the standard library are loaded at their first use, because the daemon's
# processes and the command line also import this package, and do not need pyarrow.

from typing import TYPE_CHECKING

from ckptfs import errors as errors
from ckptfs._os.lazy import lazy as _lazy
from ckptfs.errors import *  # noqa: F403

if TYPE_CHECKING:
    from ckptfs import ray as ray
    from ckptfs import xattrs
    from ckptfs._background_upload import BackgroundUpload
    from ckptfs._client.failures import explain
    from ckptfs._handle import MountedCheckpoint, mount
    from ckptfs._upload import upload
    from ckptfs.checkpoint import Checkpoint

    __version__: str

# Not `ray`: a star import would hide Ray itself.
__all__ = ["BackgroundUpload", "Checkpoint", "MountedCheckpoint", "explain", "mount", "upload"]
__all__ += ["xattrs"]
__all__ += errors.__all__

if not TYPE_CHECKING:  # otherwise a type checker would accept any name
    _load, __dir__ = _lazy(
        "ckptfs",
        {
            "BackgroundUpload": "ckptfs._background_upload",
            "Checkpoint": "ckptfs.checkpoint",
            "MountedCheckpoint": "ckptfs._handle",
            "explain": "ckptfs._client.failures",
            "mount": "ckptfs._handle",
            "ray": "ckptfs.ray",
            "upload": "ckptfs._upload",
            "xattrs": "ckptfs.xattrs",
        },
        [*__all__, "__version__", "errors", "ray"],
    )

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version  # it reads files, and few programs need it

            return version("ckptfs")
        return _load(name)
