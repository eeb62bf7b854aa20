"""ckptfs for Ray: checkpoints that mount instead of being downloaded, also on many nodes.

- Checkpoints that mount: `Checkpoint`, `install`, `MountCallback`; see ``_mounting``.
- A checkpoint for all nodes of a cluster for the price of one download: `broadcast`, and in Ray
  Train `RestoreCallback`; see ``_broadcast``. `warm` is for nodes that read from the store each for
  itself.

Each name is loaded when it is first used: Ray Train takes seconds, and the actors of a broadcast do
without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptfs.ray._broadcast import BroadcastReport as BroadcastReport
    from ckptfs.ray._broadcast import NodeReport as NodeReport
    from ckptfs.ray._broadcast import broadcast as broadcast
    from ckptfs.ray._mounting import Checkpoint as Checkpoint
    from ckptfs.ray._mounting import MountCallback as MountCallback
    from ckptfs.ray._mounting import install as install
    from ckptfs.ray._mounting import uninstall as uninstall
    from ckptfs.ray._restoring import RestoreCallback as RestoreCallback
    from ckptfs.ray._warming import Warming as Warming
    from ckptfs.ray._warming import warm as warm

_HOMES = {
    "BroadcastReport": "_broadcast",
    "Checkpoint": "_mounting",
    "MountCallback": "_mounting",
    "NodeReport": "_broadcast",
    "RestoreCallback": "_restoring",
    "Warming": "_warming",
    "broadcast": "_broadcast",
    "install": "_mounting",
    "uninstall": "_mounting",
    "warm": "_warming",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ckptfs.ray.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ckptfs.ray' has no attribute {name!r}")
