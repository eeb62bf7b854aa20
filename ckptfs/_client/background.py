"""Uploads in the background, for a client: its daemon, and how a directory is handed over.

Only root's processes and those of the daemon's own user may have a daemon upload. Another user's
process uses the user's own daemon, and starts it if there is none.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from ckptfs._client import client
from ckptfs._client.connection import TRIES, Connection, connect_to
from ckptfs._config.load import load_config
from ckptfs._model.config import Config
from ckptfs._model.location import Location
from ckptfs._model.manifest import METADATA_NAME, fault_of_name, printable
from ckptfs._model.protocol.uploads import (
    STAGED_BYTES_MAX,
    AwaitUpload,
    BeginUpload,
    CommitUpload,
    FindUpload,
    StageFile,
)
from ckptfs._model.uploads import UploadOptions, UploadStatus
from ckptfs._os.write_all import write_all
from ckptfs._store.environment.draft import mount_namespace
from ckptfs._store.source import check_unchanged, files_in, names_below
from ckptfs.errors import CannotMount, CannotUpload, DaemonError, NoDaemon, NoUpload

_ANSWER_S = 600.0
"""Longest wait for an answer: for a piece of 64 MiB on a disk that others keep busy, or for the
removal of large files."""
_LEFT_OUT_BYTES_MAX = 512 << 10
"""Longest list of names in a request, half of the longest message."""
_LEFT_OUT_MAX = 10_000


class Accepted(NamedTuple):
    """The id of an upload, and the control socket of its daemon."""

    id: str
    socket: str


def connect(*, starts: bool, timeout_s: float = _ANSWER_S) -> Connection:
    """Connect to the daemon that uploads for this user, and start it if `starts`.

    Raises:
        NoDaemon: No daemon is running.
        CannotMount, ConfigError, DaemonError: No daemon could be started.
    """
    config = load_config()
    for own in (config, msgspec.structs.replace(config, node_socket="")):
        with contextlib.suppress(NoDaemon):
            connection = client.connect(own, timeout_s)
            if connection.is_owned:
                return connection
            connection.close()
    if not starts:
        raise NoDaemon(
            f"no ckptfs daemon of yours is running at {config.socket}; it begins with an upload or "
            "ckptfs mount"
        )
    connection = client.connect_or_start(msgspec.structs.replace(config, node_socket=""), timeout_s)
    if connection.is_owned:
        return connection
    connection.close()
    raise CannotMount(f"{config.socket} is another user's; set CKPTFS_SOCKET to a socket of yours")


def has_left() -> bool:
    """Whether the cache's directory has uploads, which a daemon takes over when it starts."""
    try:
        return any(Path(load_config().cache_dir, "uploads").iterdir())
    except OSError:
        return False


class Directory:
    """The files of a local directory that will be uploaded, as they are now.

    Args:
        top: The directory.
        include: Globs on relative paths; empty for all files.
        fault_of: Says why the store cannot hold a name.
        metadata: The content of ``.metadata.json``; None for that of the directory's file.

    Raises CheckpointNotFound, CheckpointIsFile, CannotUpload, AccessDenied.
    """

    def __init__(
        self,
        top: str,
        include: Sequence[str],
        fault_of: Callable[[str], str | None],
        metadata: bytes | None,
    ) -> None:
        self._top, self._include, self._fault_of = top, include, fault_of
        self._files = {file.path: file for file in files_in(top, include, fault_of)}
        self._metadata = metadata
        if metadata is not None:
            self._files.pop(METADATA_NAME, None)

    @property
    def files(self) -> int:
        """The number of the files."""
        return len(self._files) + (self._metadata is not None)

    @property
    def bytes(self) -> int:
        """The bytes of the files."""
        return sum(file.size for file in self._files.values()) + len(self._metadata or b"")

    def left_out(self) -> tuple[str, ...]:
        """The paths in the directory that `include` leaves out, which may be at the target. Raises
        CannotUpload if they are too many for a request."""
        if not self._include:
            return ()
        # No upload brings a name with a fault, and a request cannot have one that is no UTF-8.
        named = (path for path in names_below(self._top) if fault_of_name(path) is None)
        left = tuple(sorted(path for path in named if path not in self._files))
        size = sum(len(path.encode()) + 8 for path in left)
        if len(left) > _LEFT_OUT_MAX or size > _LEFT_OUT_BYTES_MAX:
            raise CannotUpload(
                f"{printable(self._top)}: include leaves {len(left)} files out, too many for an "
                "upload in the background; upload with wait=True"
            )
        return left

    def contents(self) -> Generator[tuple[str, int, int]]:
        """Path, size and descriptor of each file, which is the same before and after its use.

        Raises CannotUpload if the directory has changed in the end.
        """
        for file in self._files.values():
            with file.opened() as fd:
                yield file.path, file.size, fd
        if self._metadata is not None:
            fd = os.memfd_create("ckptfs-metadata", os.MFD_CLOEXEC)
            try:
                write_all(fd, self._metadata)
                yield METADATA_NAME, len(self._metadata), fd
            finally:
                os.close(fd)
        check_unchanged(self._files, self._top, self._include, self._fault_of)


def hand_over(
    directory: Directory,
    location: Location,
    options: UploadOptions,
    told: Callable[[int, int], None] | None,
) -> Accepted:
    """Have the daemon take a directory over and upload it. `told` is called with the bytes that the
    daemon has, and all bytes.

    Raises:
        CannotUpload: A file changed meanwhile, or the daemon's disk cannot have it.
        LimitExceeded: The files exceed the setting `upload_bytes_max`.
        CannotMount: No daemon can upload for this user.
        DaemonError, ConfigError, CacheError: The daemon's error.
    """
    begin = BeginUpload(
        location=location,
        files=directory.files,
        bytes=directory.bytes,
        options=options,
        namespace=mount_namespace() if location.kind == "local" else "",
    )
    for left in reversed(range(TRIES)):
        try:
            with connect(starts=True) as connection:
                upload = _begun(connection, begin)
                _stage(connection, upload, directory, told)
                return _accepted(connection, upload)
        except CannotMount as error:
            raise CannotMount(
                f"an upload in the background needs a daemon ({error}); upload with wait=True"
            ) from None
        except ConnectionResetError:  # the next daemon removes what this one has staged
            if not left:
                raise DaemonError(
                    "the ckptfs daemon ended while it took the files over; see its log"
                ) from None
    raise AssertionError("unreachable")


def _begun(connection: Connection, begin: BeginUpload) -> str:
    """The id of the upload, as soon as there is space for it."""
    while not (upload := connection.ask_once(begin).id):
        pass  # the reply comes after some seconds
    return upload


def _stage(
    connection: Connection,
    upload: str,
    directory: Directory,
    told: Callable[[int, int], None] | None,
) -> None:
    done, total = 0, directory.bytes
    for path, size, fd in directory.contents():
        for offset in range(0, max(1, size), STAGED_BYTES_MAX):
            length = min(STAGED_BYTES_MAX, size - offset)
            piece = StageFile(id=upload, path=path, size=size, offset=offset, length=length)
            connection.ask_once(piece, fd)
            done += length
            if told is not None:
                told(done, total)


def _accepted(connection: Connection, upload: str) -> Accepted:
    """Commit the upload. If the daemon dies meanwhile, the next one knows whether the upload was
    accepted. Raises ConnectionResetError if it was not."""
    try:
        while connection.ask_once(CommitUpload(id=upload)).upload.state == "staging":
            pass  # the reply comes after some seconds
    except ConnectionResetError:
        with contextlib.suppress(NoUpload), connect(starts=True) as another:
            another.ask(AwaitUpload(id=upload))
            return Accepted(upload, another.path)
        raise
    return Accepted(upload, connection.path)


class Staged(NamedTuple):
    """The files of an upload that is not done, and the function that connects to its daemon."""

    location: Location
    to: Callable[[Config, float | None], Connection]


@contextlib.contextmanager
def staged(location: Location) -> Generator[Staged | None]:
    """Find the newest upload to `location` that is not done; None if there is none. Its files stay
    for the length of the context, and as long as an attachment shows them. Raises as `connect`."""
    with connect(starts=True) as connection:
        found = connection.ask(FindUpload(location=location)).path

        def to_same(_: Config, timeout_s: float | None) -> Connection:
            return connect_to(connection.path, timeout_s or _ANSWER_S, connection.mount)

        yield Staged(Location("local", found), to_same) if found else None


@contextlib.contextmanager
def pending(location: Location, timeout_s: float | None = None) -> Generator[str]:
    """Attach the files of `staged`, and yield their directory in the mount; "" without any. Raises
    as ``client.leased``."""
    with contextlib.ExitStack() as lease:
        path = ""
        with staged(location) as found:
            if found is not None:
                attached = client.leased(found.location, timeout_s=timeout_s, to=found.to)
                path = lease.enter_context(attached)
        yield path


def state_of(accepted: Accepted, seconds: float = 0.0) -> UploadStatus:
    """The state of an upload when it has ended, or after `seconds`, at most 10. Raises NoUpload,
    DaemonError."""
    with to_daemon_of(accepted) as connection:
        return connection.ask(AwaitUpload(id=accepted.id, seconds=seconds)).upload


def to_daemon_of(accepted: Accepted) -> Connection:
    """Connect to the daemon of an upload, or to the one that has followed it, which this starts if
    necessary. Raises as `connect`."""
    with contextlib.suppress(NoDaemon):
        config = msgspec.structs.replace(load_config(), node_socket="", socket=accepted.socket)
        return client.connect(config, _ANSWER_S)
    return connect(starts=True)
