# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""Stores on filesystems of pyarrow or fsspec: a Location's, or one of this process."""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from ckptfs._model.location import Kind, Location
from ckptfs._store import fsspec
from ckptfs._store.arrow import ArrowStore, advice_for
from ckptfs._store.base import Store
from ckptfs._store.bounded import BoundedStore
from ckptfs._store.filesystems import (
    FileSystem,
    fsspec_of,
    store_name_of,
    wrapped,
)
from ckptfs._store.fsspec import FsspecStore
from ckptfs._store.http import HttpStore
from ckptfs._store.httpclient import HttpOptions
from ckptfs._store.local import LocalStore
from ckptfs._store.named import open_own
from ckptfs.errors import LocationError

_TIMEOUT_S = 3.0
"""As `Config.store_timeout_s`, for filesystems that are no daemon's."""


def open_on_filesystem(location: Location, options: Mapping[str, Any], timeout_s: float) -> Store:
    """The store at a location that is not S3, whose options and secrets are these.

    Raises LocationError.
    """
    if location.kind == "http":
        return _http_store(location, options, timeout_s)
    filesystem = _built(location, options, timeout_s)
    return store_on(filesystem, location.path, location.uri)


def _http_store(location: Location, options: Mapping[str, Any], timeout_s: float) -> Store:
    known = {name: options[name] for name in HttpOptions.__struct_fields__ if name in options}
    try:
        return HttpStore(location.path, location.uri, HttpOptions(**known), timeout_s)
    except (OSError, ValueError) as error:
        if isinstance(error, LocationError):
            raise
        raise LocationError(f"{location.uri}: {error}; check the options") from None


def filesystem_for(location: Location) -> FileSystem:
    """A pyarrow filesystem with the options and secrets of a location. Raises LocationError."""
    return _built(location, {**location.options, **location.secrets}, _TIMEOUT_S)


def _built(location: Location, options: Mapping[str, Any], timeout_s: float) -> FileSystem:
    try:
        return _BUILDERS[location.kind](options, timeout_s)
    except ImportError as error:
        needed = fsspec.PACKAGES.get(location.kind) or error.name
        raise LocationError(
            f"{location.uri}: the ckptfs daemon needs {needed}; install it where it runs"
        ) from None
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        cause = str(error).partition("\n")[0]
        advice = advice_for(cause, "check the options")
        raise LocationError(f"{location.uri}: {cause}; {advice}") from None


def store_on(filesystem: FileSystem, path: str, name: str) -> Store:
    """The store at `path` on an unwrapped filesystem; `name` is for messages."""
    if store := store_name_of(filesystem):
        return open_own(store, path.strip("/"), _TIMEOUT_S)
    if isinstance(filesystem, pafs.LocalFileSystem):
        return BoundedStore(LocalStore(path, name))
    inner = fsspec_of(filesystem)
    if inner is None:
        return BoundedStore(ArrowStore(filesystem, path, name))
    if (headers := fsspec.http_headers_of(inner)) is not None:
        return HttpStore(path, name, HttpOptions(headers), _TIMEOUT_S)
    return BoundedStore(FsspecStore(inner, path, name))


def _s3(options: Mapping[str, Any], _: float) -> FileSystem:
    return pafs.S3FileSystem(**options)


def _gcs(options: Mapping[str, Any], timeout_s: float) -> FileSystem:
    token: dict[str, Any] = {}
    if options.get("access_token"):  # whoever gave it brings another one in time
        token["credential_token_expiration"] = datetime.now(timezone.utc) + timedelta(days=1)
    # The default is 15 minutes of silent retries.
    return pafs.GcsFileSystem(**options, **token, retry_time_limit=timedelta(seconds=timeout_s))


def _azure(options: Mapping[str, Any], _: float) -> FileSystem:
    return pafs.AzureFileSystem(**options)


def _hdfs(options: Mapping[str, Any], _: float) -> FileSystem:
    return pafs.HadoopFileSystem(**options)


def _local(_options: Mapping[str, Any], _: float) -> FileSystem:
    return pafs.LocalFileSystem()


def _of_fsspec(protocol: str) -> Callable[[Mapping[str, Any], float], FileSystem]:
    return lambda options, timeout_s: wrapped(fsspec.build(protocol, options, timeout_s))


_BUILDERS: dict[Kind, Callable[[Mapping[str, Any], float], FileSystem]] = {
    "s3": _s3,
    "gcs": _gcs,
    "azure": _azure,
    "hdfs": _hdfs,
    "local": _local,
    "hf": _of_fsspec("hf"),
    "http": _of_fsspec("https"),
    "az": _of_fsspec("az"),
}
