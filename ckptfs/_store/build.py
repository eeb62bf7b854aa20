# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Filesystems of pyarrow and fsspec that are built from a Location, and the stores on them."""

from typing import Any, TypeAlias

import pyarrow as pa
from pyarrow import fs as pafs

from ckptfs._model.location import Location
from ckptfs._store import fsspec
from ckptfs._store.arrow import ArrowStore, advice_for
from ckptfs._store.base import Store
from ckptfs._store.environment.resolve import connected
from ckptfs._store.fsspec import FsspecStore
from ckptfs._store.http.resolve import open_directory
from ckptfs._store.kinds import KINDS
from ckptfs._store.local import LocalStore
from ckptfs._store.wrappers import BoundedStore
from ckptfs.errors import LocationError

FileSystem: TypeAlias = Any
"""A pyarrow.fs.FileSystem. pyarrow has no type stubs, so outside this folder it is opaque."""
TIMEOUT_S = 3.0
"""As `Config.store_timeout_s`, for filesystems outside of a daemon."""


def open_on_filesystem(location: Location, timeout_s: float) -> Store:
    """The store at a location that a library reads. Raises LocationError."""
    return plain_store(filesystem_for(location, timeout_s), location.path, location.uri)


def filesystem_for(location: Location, timeout_s: float = TIMEOUT_S) -> FileSystem:
    """A pyarrow filesystem with the options and secrets of a location. Raises LocationError."""
    try:
        return KINDS[location.kind].build({**location.options, **location.secrets}, timeout_s)
    except ImportError as error:
        needed = KINDS[location.kind].package or error.name
        raise LocationError(
            f"{location.uri}: the ckptfs daemon needs {needed}; install it where it runs"
        ) from None
    except LocationError as error:
        raise LocationError(f"{location.uri}: {error}") from None
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        cause = f"{error}".partition("\n")[0]
        advice = advice_for(cause, "check the options")
        raise LocationError(f"{location.uri}: {cause}; {advice}") from None


def plain_store(filesystem: FileSystem, path: str, name: str) -> Store:
    """The store at `path` on a filesystem of pyarrow or fsspec itself; `name` is for messages."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        return BoundedStore(LocalStore(path, name))
    inner = fsspec_of(filesystem)
    if inner is None:
        return BoundedStore(ArrowStore(filesystem, path, name))
    if (headers := fsspec.http_headers_of(inner)) is not None:
        place = connected(Location("http", path))
        options = {**place.options, **place.secrets, "headers": headers}
        return open_directory(place, options, TIMEOUT_S)
    return BoundedStore(FsspecStore(inner, path, name))


def fsspec_of(filesystem: FileSystem) -> Any:
    """The fsspec filesystem in a wrapper of pyarrow, or None."""
    handler = getattr(filesystem, "handler", None)
    return handler.fs if isinstance(handler, pafs.FSSpecHandler) else None
