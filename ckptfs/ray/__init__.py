"""ckptfs for Ray: checkpoints that mount instead of being downloaded, also on many nodes.

- Checkpoints that mount: `Checkpoint`, `install`, `MountCallback`; see ``_mounting``.
- A checkpoint for all nodes of a cluster for the price of one download: `broadcast`, and in Ray
  Train `RestoreCallback`; see ``_broadcast``. `warm` is for nodes that each need something else.
"""

from ckptfs.ray._broadcast import BroadcastReport as BroadcastReport
from ckptfs.ray._broadcast import NodeReport as NodeReport
from ckptfs.ray._broadcast import broadcast as broadcast
from ckptfs.ray._mounting import Checkpoint as Checkpoint
from ckptfs.ray._mounting import MountCallback as MountCallback
from ckptfs.ray._mounting import install as install
from ckptfs.ray._mounting import uninstall as uninstall
