"""ckptfs for Ray: checkpoints that mount instead of being downloaded, also on many nodes.

    >>> from ckptfs.ray import Checkpoint  # instead of ray.train.Checkpoint

Checkpoints that mount
    `Checkpoint` replaces Ray's class for the checkpoints that your code makes. For those that Ray
    makes, use `install` in one process, or `MountCallback` in all workers of a Ray Train run.
Many nodes
    `broadcast` brings a checkpoint to all nodes of a cluster for the price of one download.
    `RestoreCallback` does so before the workers of a Ray Train run begin. `warm` is for nodes that
    need different files.
Saving
    `upload` uploads what the workers of a Ray Train run report. Their nodes keep the bytes in their
    caches, and `RestoreCallback` takes them from there after a failure.

``ckptfs help ray`` shows the page about it.
"""

# Each name is loaded at its first use, because Ray Train takes seconds to import, and the actors of
# a broadcast do not need it.

from typing import TYPE_CHECKING

from ckptfs._os.lazy import lazy as _lazy

if TYPE_CHECKING:
    from ckptfs.ray._broadcast import broadcast
    from ckptfs.ray._broadcast_report import BroadcastReport, NodeReport
    from ckptfs.ray._mounting import Checkpoint, MountCallback, install, uninstall
    from ckptfs.ray._restoring import RestoreCallback
    from ckptfs.ray._uploading import upload
    from ckptfs.ray._warming import Warming, warm

_MODULES = {
    "_broadcast": ("broadcast",),
    "_broadcast_report": ("BroadcastReport", "NodeReport"),
    "_mounting": ("Checkpoint", "MountCallback", "install", "uninstall"),
    "_restoring": ("RestoreCallback",),
    "_uploading": ("upload",),
    "_warming": ("Warming", "warm"),
}
__all__ = ["BroadcastReport", "Checkpoint", "MountCallback", "NodeReport", "RestoreCallback"]
__all__ += ["Warming", "broadcast", "install", "uninstall", "upload", "warm"]

if not TYPE_CHECKING:  # otherwise a type checker would accept any name
    _homes = {name: f"ckptfs.ray.{home}" for home, names in _MODULES.items() for name in names}
    _load, __dir__ = _lazy("ckptfs.ray", _homes, __all__)

    def __getattr__(name):
        try:
            return _load(name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "ray":
                raise
            raise ModuleNotFoundError(
                f"ckptfs.ray.{name} needs Ray, which is not installed here; install it with "
                "pip install 'ray[train]'",
                name="ray",
            ) from None
