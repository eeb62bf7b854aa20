"""Private daemons, for filesystems that no text can describe to the node's daemon.

The process that needs a private daemon starts it, and passes it the pickled filesystem through a
pipe. The daemon's workers read the filesystem (``ckptfs._workers``). Its socket, mount and cache
are in a scratch directory of its own. Forked children share the daemon. If no process has used it
for some seconds, it ends, and removes its directory.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Generator, Sequence

from ckptfs._client import client
from ckptfs._client.connection import Connection, connect_to
from ckptfs._client.start import run_keeper
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs.errors import CannotMount, CheckpointNotFound, LocationError, NoDaemon

sockets: dict[bytes, str] = {}
"""Sockets of daemons by pickled filesystem. A daemon may have ended."""
_lock = threading.Lock()


@contextlib.contextmanager
def leased(
    pickled: bytes, path: str, prefetch: Sequence[str], timeout_s: float | None
) -> Generator[str]:
    """As `client.leased`, by a private daemon, for a path on the pickled filesystem.

    Raises:
        CannotMount: Another process cannot use the filesystem, or does not see the path.
        StoreError, AccessDenied, CheckpointIsFile: The store's answer.
    """

    def connection(config: Config, timeout_s: float | None) -> Connection:
        return connect(pickled, config.attach_deadline_s + 10 if timeout_s is None else timeout_s)

    location = Location("private", path)
    with contextlib.ExitStack() as stack:
        try:
            lease = client.leased(location, prefetch=prefetch, timeout_s=timeout_s, to=connection)
            mounted = stack.enter_context(lease)
        except LocationError as error:
            raise CannotMount(f"cannot mount {path}: {error}") from None
        except CheckpointNotFound:  # the filesystem may be in the memory of this process
            raise CannotMount(
                f"cannot mount: another process does not see {path} on this filesystem"
            ) from None
        yield mounted


def connect(pickled: bytes, timeout_s: float) -> Connection:
    """Connect to the private daemon of a pickled filesystem, or start it."""
    with _lock:
        with contextlib.suppress(KeyError, NoDaemon):
            return connect_to(sockets[pickled], timeout_s)
        modules = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        # The filesystem may need any variable. The daemon stays in the job's cgroup, because only
        # this process and its children use it.
        environment = {**os.environ, "PYTHONPATH": modules}
        told = run_keeper(["--private"], environment, pickled)
        sockets[pickled] = told["socket"]
        return connect_to(told["socket"], timeout_s)
