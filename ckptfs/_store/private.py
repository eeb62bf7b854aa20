"""Pickles of filesystems that ckptfs cannot describe, for a private daemon.

These are the only pickles in ckptfs. They go from a process to its own child through a pipe, and
then to the workers of that daemon through memory. Only the workers unpickle them. ckptfs never
unpickles anything that arrives on a socket, from a store or from a disk.
"""

import pickle

from ckptfs._model.location import Location
from ckptfs._store.base import Store
from ckptfs._store.describe import NotDescribable
from ckptfs._store.filesystems import FileSystem, unwrapped
from ckptfs._store.in_process import store_on
from ckptfs._store.resolve import OpenStore
from ckptfs.errors import LocationError


def dump(filesystem: FileSystem, because: NotDescribable) -> bytes:
    """The pickle of a filesystem of this process. Raises NotDescribable if pickling fails.

    `because` is the reason why a location cannot describe it.
    """
    try:
        return pickle.dumps(filesystem)
    except Exception as error:  # whatever its __reduce__ does
        raise NotDescribable(f"{because}, and it cannot be pickled ({error})") from None


def opener(pickled: bytes) -> OpenStore:
    """The replacement of ``resolve.open_store`` in a worker of a private daemon. Raises
    LocationError if this process cannot unpickle the filesystem."""
    try:
        filesystem: FileSystem = pickle.loads(pickled)
    except Exception as error:  # whatever its modules do
        raise LocationError(
            f"the filesystem cannot be unpickled in another process ({type(error).__name__}: "
            f"{error}); define its class in a module that can be imported"
        ) from None

    def open_store(location: Location, timeout_s: float) -> Store:
        inner, path = unwrapped(filesystem, location.path)
        return store_on(inner, path, location.uri)

    return open_store
