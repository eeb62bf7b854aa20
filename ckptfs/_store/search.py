"""The checkpoints below a directory: those that have metadata, and what it says.

One listing finds the metadata files. Each has some bytes only, and costs a round trip, so many are
read at the same time.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

from ckptfs._model.location import Location
from ckptfs._model.manifest import METADATA_NAME, ListedFile, fault_of_name, printable
from ckptfs._store import metadata
from ckptfs._store.base import Store
from ckptfs.errors import MetadataError

THREADS = 32
"""Files that are read at the same time, each on a connection of its own."""
_AHEAD_MAX = 2 * THREADS
"""Files that are being read, or read and not yet asked for."""
_FILES_MAX = 10_000_000
"""Most objects below the directory, which holds many checkpoints."""
BYTES_MAX = 8 << 20
"""Largest metadata file that is read: `_AHEAD_MAX` of them have to fit into memory."""
LEVELS_MAX = 100
"""Deepest nesting that is accepted: what prints or compares metadata is recursive."""


class Found(NamedTuple):
    """A checkpoint.

    Attributes:
        uri: Without secrets; can be attached.
        metadata: Its metadata.
    """

    uri: str
    metadata: dict[str, Any]


def search(
    store: Store,
    location: Location,
    *,
    warn: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> Generator[Found]:
    """Find the directories that hold a ``.metadata.json``: of `store` itself, and at any depth.

    Args:
        store: The directory.
        location: Where that is.
        warn: Called with one line for each metadata file that cannot be used, and is left out.
        progress: Called with the number of files that were read, and that of all.

    Yields:
        The checkpoints, in the order of their paths. A file that is deleted before it is read is
        none.

    Raises:
        CheckpointNotFound, CheckpointIsFile, LimitExceeded, AccessDenied, StoreError: The store's
            answer, to the listing or to any other request.
    """
    listing = store.list(_FILES_MAX)
    files: list[ListedFile] = []
    for file in sorted(listing.files, key=lambda file: file.path):
        if file.path.rpartition("/")[2] != METADATA_NAME:
            continue
        if fault := fault_of_name(file.path):
            warn(f"{printable(file.path)} in {location.uri} is left out: {fault}")
        else:
            files.append(file)

    def read(file: ListedFile) -> Found | MetadataError | None:
        directory = file.path.rpartition("/")[0]
        uri = location.below(directory).uri
        try:
            stored = _read(store, file, printable(uri))
        except MetadataError as error:
            return error
        return None if stored is None else Found(uri, stored)

    pool = ThreadPoolExecutor(THREADS, "ckptfs-search")
    try:
        for done, result in enumerate(_in_order(pool, read, files), 1):
            if progress is not None:
                progress(done, len(files))
            if isinstance(result, MetadataError):
                warn(str(result))
            elif result is not None:
                yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor,
    read: Callable[[ListedFile], Found | MetadataError | None],
    files: Iterable[ListedFile],
) -> Generator[Found | MetadataError | None]:
    """The results, in the order of `files`."""
    running: deque[Future[Found | MetadataError | None]] = deque()
    for file in files:
        running.append(pool.submit(read, file))
        if len(running) == _AHEAD_MAX:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _read(store: Store, file: ListedFile, name: str) -> dict[str, Any] | None:
    if file.size > BYTES_MAX:
        raise MetadataError(
            f"{METADATA_NAME} in {name} has {file.size} bytes; at most {BYTES_MAX} are read"
        )
    raw = store.get(file.path)
    if raw is None:
        return None
    value = metadata.parse(raw, name)
    if not isinstance(value, dict):
        raise MetadataError(
            f"{METADATA_NAME} in {name} holds a {type(value).__name__} and not an object; correct "
            "the file"
        )
    if _is_deeper(value, LEVELS_MAX):
        raise MetadataError(
            f"{METADATA_NAME} in {name} is nested deeper than {LEVELS_MAX} levels; correct the file"
        )
    return cast("dict[str, Any]", value)


def _is_deeper(value: Any, levels: int) -> bool:
    level: list[Any] = [value]
    for _ in range(levels):
        children = (child for parent in level for child in _children(parent))
        level = [child for child in children if isinstance(child, dict | list)]
    return bool(level)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return cast("dict[str, Any]", value).values()
    return cast("list[Any]", value)
