"""Private daemons: for filesystems that cannot be described to the node's daemon.

A private daemon is a daemon like any other, with its socket, mount and cache in a scratch directory
of its own, started by the process that needs it, which hands it the pickled filesystem through a
pipe. The daemon's workers read it (``ckptfs._workers``). Children that are forked share it. It ends
itself when nobody has used it for some seconds, and takes its directory with it.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Generator, Sequence

from ckptfs import _client, _connection
from ckptfs._connection import Connection
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs.errors import CannotMount, CheckpointNotFound, LocationError, NoDaemon

_sockets: dict[bytes, str] = {}
"""Socket of the daemon that serves a pickled filesystem. It may have ended."""
_lock = threading.Lock()


@contextlib.contextmanager
def leased(
    pickled: bytes, path: str, prefetch: Sequence[str], timeout_s: float | None
) -> Generator[str]:
    """`_client.leased`, by a private daemon.

    Args:
        pickled: The filesystem.
        path: The checkpoint's path on it.
        prefetch: Globs.
        timeout_s: Longest wait for the daemon's answer.

    Raises:
        CannotMount: The filesystem cannot be used, or shows nothing there, in another process.
        StoreError, AccessDenied, CheckpointIsFile: The store's answer.
    """

    def connection(config: Config, timeout_s: float | None) -> Connection:
        return _connect(pickled, config.attach_deadline_s + 10 if timeout_s is None else timeout_s)

    location = Location("private", path)
    with contextlib.ExitStack() as stack:
        try:
            lease = _client.leased(location, prefetch=prefetch, timeout_s=timeout_s, to=connection)
            mounted = stack.enter_context(lease)
        except LocationError as error:
            raise CannotMount(f"cannot mount {path}: {error}") from None
        except CheckpointNotFound:  # it may live in the memory of this process
            raise CannotMount(
                f"cannot mount: another process does not see {path} on this filesystem"
            ) from None
        yield mounted


def _connect(pickled: bytes, timeout_s: float) -> Connection:
    with _lock:
        with contextlib.suppress(KeyError, NoDaemon):
            return _connection.connect_to(_sockets[pickled], timeout_s)
        modules = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        told = _client.run_keeper(["--private"], {"PYTHONPATH": modules}, pickled)
        _sockets[pickled] = told["socket"]
        return _connection.connect_to(told["socket"], timeout_s)
