"""The checkpoints below a directory that have metadata.

One listing finds the metadata files. Each file is small and costs a round trip, so many are read at
the same time.
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
"""The files that are read at the same time, each on a connection of its own."""
_AHEAD_MAX = 2 * THREADS
"""The most files that are being read, or were read before the caller asks for them."""
_FILES_MAX = 10_000_000
"""The most objects below the directory, which may hold many checkpoints."""
BYTES_MAX = 8 << 20
"""The largest metadata file that is read, because `_AHEAD_MAX` of them have to fit into memory."""
LEVELS_MAX = 100
"""The deepest accepted nesting, because functions that print or compare metadata are recursive."""


class Found(NamedTuple):
    """A checkpoint: its URI without secrets, which can be attached, and its metadata."""

    uri: str
    metadata: dict[str, Any]


def search(
    store: Store,
    location: Location,
    *,
    warn: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> Generator[Found]:
    """Find the directories with a ``.metadata.json``: the one of `store`, and those at any depth.

    Yields the checkpoints in the order of their paths, without those whose file was deleted before
    it was read. Raises as `Store.list`, AccessDenied and StoreError.

    `location` is that of `store`. `warn` is called with one line for each unusable metadata file,
    and `progress` with the number of files that were read, and of all.
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
            f"{METADATA_NAME} in {name} has {file.size} bytes; make it smaller than {BYTES_MAX}"
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
