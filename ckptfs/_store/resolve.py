# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""Location, or a filesystem of this process -> Store."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeAlias

import msgspec
import pyarrow as pa
from pyarrow import fs as pafs

from ckptfs._model.location import Kind, Location
from ckptfs._store import fsspec
from ckptfs._store.arrow import ArrowStore
from ckptfs._store.awskeys import keys_for
from ckptfs._store.base import Store
from ckptfs._store.describe import DESCRIPTIONS, describe
from ckptfs._store.filesystems import FileSystem, fsspec_of, unwrapped, wrapped
from ckptfs._store.fsspec import FsspecStore
from ckptfs._store.s3 import S3Store
from ckptfs._store.s3client import S3Client
from ckptfs._store.s3options import S3Options
from ckptfs.errors import LocationError

OpenStore: TypeAlias = Callable[[Location, float], Store]
"""The type of `open_store`."""


def open_store(location: Location, timeout_s: float) -> Store:
    """The store at `location`. Opens no connection.

    Args:
        location: Checked here against the allow-list: it may come from another process.
        timeout_s: Longest connect, and longest silence within a request.

    Raises:
        LocationError: An option that is not on the list, or of a wrong type.
    """
    description = DESCRIPTIONS.get(location.kind)
    if description is None:
        raise LocationError(f"{location.uri} can be read by a private daemon only")
    unknown = (
        location.options.keys() - description.public | location.secrets.keys() - description.secret
    )
    if unknown:
        raise LocationError(f"{location.uri}: unknown options {', '.join(sorted(unknown))}")
    options = {**location.options, **location.secrets}
    try:
        if location.kind == "s3":
            return _s3_store(location, msgspec.convert(options, S3Options), timeout_s)
        filesystem = _BUILDERS[location.kind](options, timeout_s)
    except ImportError as error:
        needed = fsspec.PACKAGES.get(location.kind) or error.name
        raise LocationError(
            f"{location.uri}: the ckptfs daemon needs {needed}; install it where it runs"
        ) from None
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        cause = str(error).partition("\n")[0]
        raise LocationError(f"{location.uri}: {cause}; check the options") from None
    return store_on(filesystem, location.path, location.uri)


def store_of(filesystem: FileSystem, path: str) -> Store:
    """The store at `path` on a filesystem of this very process, of whatever type."""
    return store_on(*unwrapped(filesystem, path), name_of(filesystem, path))


def store_on(filesystem: FileSystem, path: str, name: str) -> Store:
    """The store at `path` on an unwrapped filesystem; `name` is for messages."""
    inner = fsspec_of(filesystem)
    return ArrowStore(filesystem, path, name) if inner is None else FsspecStore(inner, path, name)


def name_of(filesystem: FileSystem, path: str) -> str:
    """A name for messages: the URI where there is one."""
    try:
        return describe(filesystem, path).uri
    except LocationError:
        return f"{filesystem.type_name}:{path}"


def _s3_store(location: Location, options: S3Options, timeout_s: float) -> Store:
    bucket, _, prefix = location.path.partition("/")
    client = S3Client(bucket, options, keys_for(options, location.uri), timeout_s)
    return S3Store(client, prefix, location.uri)


def _gcs(options: Mapping[str, Any], timeout_s: float) -> FileSystem:
    # The default is 15 minutes of silent retries.
    return pafs.GcsFileSystem(**options, retry_time_limit=timedelta(seconds=timeout_s))


def _azure(options: Mapping[str, Any], _: float) -> FileSystem:
    return pafs.AzureFileSystem(**options)


def _hdfs(options: Mapping[str, Any], _: float) -> FileSystem:
    return pafs.HadoopFileSystem(**options)


def _local(_options: Mapping[str, Any], _: float) -> FileSystem:
    return pafs.LocalFileSystem()


def _of_fsspec(protocol: str) -> Callable[[Mapping[str, Any], float], FileSystem]:
    return lambda options, timeout_s: wrapped(fsspec.build(protocol, options, timeout_s))


_BUILDERS: dict[Kind, Callable[[Mapping[str, Any], float], FileSystem]] = {
    "gcs": _gcs,
    "azure": _azure,
    "hdfs": _hdfs,
    "local": _local,
    "hf": _of_fsspec("hf"),
    "http": _of_fsspec("https"),
    "az": _of_fsspec("az"),
}
