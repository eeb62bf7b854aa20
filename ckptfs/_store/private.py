# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Filesystems that cannot be described, on their way to a private daemon: as a pickle.

The only pickles in ckptfs. They go from a process to the child that it starts, through a pipe;
nothing that arrives on a socket, from a store or from a disk is ever unpickled.
"""

import pickle

from ckptfs._model.location import Location
from ckptfs._store.base import Store
from ckptfs._store.caller import store_on
from ckptfs._store.describe import NotDescribable
from ckptfs._store.filesystems import FileSystem, unwrapped
from ckptfs._store.resolve import OpenStore
from ckptfs.errors import LocationError


def dump(filesystem: FileSystem, because: NotDescribable) -> bytes:
    """The pickle of a filesystem of this process. Raises NotDescribable where there is none.

    Args:
        filesystem: Any filesystem.
        because: Why it was not described.
    """
    try:
        return pickle.dumps(filesystem)
    except Exception as error:  # whatever its __reduce__ does
        raise NotDescribable(f"{because}; nor can it be pickled ({error})") from None


def opener(pickled: bytes) -> OpenStore:
    """What takes the place of ``resolve.open_store`` in a private daemon.

    Raises:
        LocationError: It cannot be unpickled here.
    """
    try:
        filesystem: FileSystem = pickle.loads(pickled)
    except Exception as error:  # whatever its modules do
        raise LocationError(
            f"the filesystem cannot be unpickled in another process ({type(error).__name__}: "
            f"{error}); define its class in a module that can be imported"
        ) from None

    def open_store(location: Location, timeout_s: float) -> Store:
        return store_on(*unwrapped(filesystem, location.path), location.uri)

    return open_store
