"""ckptfs: mount remote checkpoints as local directories instead of copying them.

`Checkpoint` is loaded when it is first used: the daemon's processes and the command line, which
also import this package, need no pyarrow.
"""

from typing import TYPE_CHECKING, Any

from ckptfs.errors import AccessDenied as AccessDenied
from ckptfs.errors import AgeError as AgeError
from ckptfs.errors import Busy as Busy
from ckptfs.errors import CacheError as CacheError
from ckptfs.errors import CannotMount as CannotMount
from ckptfs.errors import CheckpointIsFile as CheckpointIsFile
from ckptfs.errors import CheckpointNotFound as CheckpointNotFound
from ckptfs.errors import CkptfsError as CkptfsError
from ckptfs.errors import ConfigError as ConfigError
from ckptfs.errors import DaemonError as DaemonError
from ckptfs.errors import ExpressionError as ExpressionError
from ckptfs.errors import LimitExceeded as LimitExceeded
from ckptfs.errors import LocationError as LocationError
from ckptfs.errors import MetadataError as MetadataError
from ckptfs.errors import MetadataNotDict as MetadataNotDict
from ckptfs.errors import NoDaemon as NoDaemon
from ckptfs.errors import NotAttached as NotAttached
from ckptfs.errors import ObjectChanged as ObjectChanged
from ckptfs.errors import PlanError as PlanError
from ckptfs.errors import PrefetchFailed as PrefetchFailed
from ckptfs.errors import ProtocolError as ProtocolError
from ckptfs.errors import RateError as RateError
from ckptfs.errors import RightsNotLent as RightsNotLent
from ckptfs.errors import SizeError as SizeError
from ckptfs.errors import StoreError as StoreError
from ckptfs.errors import StoreNotAllowed as StoreNotAllowed
from ckptfs.errors import StoreTimeout as StoreTimeout
from ckptfs.errors import StoreUnavailable as StoreUnavailable
from ckptfs.errors import UnknownStore as UnknownStore

if TYPE_CHECKING:
    from ckptfs.checkpoint import Checkpoint as Checkpoint


def __getattr__(name: str) -> Any:
    if name == "Checkpoint":
        from ckptfs.checkpoint import Checkpoint

        return Checkpoint
    raise AttributeError(f"module 'ckptfs' has no attribute {name!r}")
