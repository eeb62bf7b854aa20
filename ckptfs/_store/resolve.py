# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""URI or pyarrow filesystem -> Location -> Store.

A filesystem is described by the options in its ``__reduce__``, never pickled: only the types and
options listed here cross the process border, so nothing that arrives can name code to run.
"""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
from pyarrow import fs as pafs

from ckptfs._model.location import Kind, Location, Option
from ckptfs._model.manifest import printable
from ckptfs._store.arrow import ArrowStore, translate_error
from ckptfs._store.base import Store
from ckptfs.errors import LocationError

FileSystem: TypeAlias = Any
"""A pyarrow.fs.FileSystem. pyarrow has no type stubs, so outside this folder it is opaque."""


class _Description(NamedTuple):
    """Which constructor options of a filesystem type cross the border."""

    type_name: str
    public: frozenset[str]
    secret: frozenset[str]


_DESCRIPTIONS: dict[Kind, _Description] = {
    "s3": _Description(
        "S3FileSystem",
        frozenset(
            [
                "anonymous",
                "region",
                "scheme",
                "endpoint_override",
                "role_arn",
                "session_name",
                "external_id",
                "load_frequency",
                "force_virtual_addressing",
                "tls_ca_file_path",
            ]
        ),
        frozenset({"access_key", "secret_key", "session_token"}),
    ),
    "gcs": _Description(
        "GcsFileSystem",
        frozenset(
            ["anonymous", "scheme", "endpoint_override", "target_service_account", "project_id"]
        ),
        frozenset({"access_token"}),
    ),
    "azure": _Description(
        "AzureFileSystem",
        frozenset(
            [
                "account_name",
                "blob_storage_authority",
                "blob_storage_scheme",
                "dfs_storage_authority",
                "dfs_storage_scheme",
                "client_id",
                "tenant_id",
            ]
        ),
        frozenset({"account_key", "client_secret", "sas_token"}),
    ),
    "hdfs": _Description("HadoopFileSystem", frozenset({"host", "port", "user"}), frozenset()),
    "local": _Description("LocalFileSystem", frozenset(), frozenset()),
}

# Environment variables of the AWS SDK that stand in for constructor options. The caller's must win
# over the daemon's, which may have been started from another shell.
_AWS_ENVIRONMENT = {
    "access_key": "AWS_ACCESS_KEY_ID",
    "secret_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}


def filesystem_of(uri: str) -> tuple[FileSystem, str]:
    """The pyarrow filesystem and the path that `uri` (or an absolute path, also with ``~``) names.

    Raises:
        LocationError: The scheme is unknown, the path is relative, or the URI is malformed.
    """
    text = str(Path(uri).expanduser()) if uri.startswith("~") else uri
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        shown = _without_userinfo(text)
        cause = printable(str(error).replace(text, shown).partition("\n")[0])
        if "AWS Error" in cause or "Bucket '" in cause:  # it was asked for its region
            raise translate_error(error, shown) from None
        if "empty scheme" in cause:
            raise LocationError(
                f"{shown!r} is a relative path; use an absolute path or a URI"
            ) from None
        if "Unrecognized filesystem type" in cause:
            schemes = "s3://, gs://, abfss://, hdfs:// or file://"
            raise LocationError(f"{shown}: unknown scheme; use {schemes}") from None
        raise LocationError(f"{shown}: {cause}; check the URI") from None
    return filesystem, path.rstrip("/") or path


def describe(
    filesystem: FileSystem, path: str, environ: Mapping[str, str] = os.environ
) -> Location:
    """The location of `path` on `filesystem`.

    Raises:
        LocationError: The filesystem is of a type that cannot be described by plain options.
    """
    path = path.rstrip("/")
    while isinstance(filesystem, pafs.SubTreeFileSystem):
        path = f"{filesystem.base_path.rstrip('/')}/{path.lstrip('/')}".rstrip("/")
        filesystem = filesystem.base_fs
    name = type(filesystem).__name__
    kinds: dict[str, Kind] = {d.type_name: k for k, d in _DESCRIPTIONS.items()}
    kind = kinds.get(name)
    if kind is None:
        known = ", ".join(d.type_name for d in _DESCRIPTIONS.values())
        raise LocationError(f"a {name.lstrip('_')} cannot be mounted; use one of {known}")
    if not path and kind in ("s3", "gcs", "azure"):
        raise LocationError(f"a {name} without a path names no checkpoint; add a bucket and a path")
    arguments: dict[str, Any] = {}
    if kind != "local":
        arguments = filesystem.__reduce__()[1][0]
    if kind == "hdfs":
        arguments = {k: arguments.get(k) for k in ("host", "port", "user")}
    proxy = arguments.get("proxy_options")
    if proxy and proxy.get("host"):
        raise LocationError(f"a {name} with proxy_options cannot be mounted; use the environment")
    given = {k: v for k, v in arguments.items() if v not in (None, "")}
    options: dict[str, Option] = {
        k: v for k, v in given.items() if k in _DESCRIPTIONS[kind].public and v is not False
    }
    secrets: dict[str, str] = {k: v for k, v in given.items() if k in _DESCRIPTIONS[kind].secret}
    if kind == "s3" and not secrets and not options.get("anonymous"):
        secrets = {k: environ[v] for k, v in _AWS_ENVIRONMENT.items() if environ.get(v)}
    if kind == "s3" and not options.get("region"):
        region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
        options |= {"region": region} if region else {}
    return Location(kind, path, options, secrets)


def open_store(location: Location, timeout_s: float) -> Store:
    """The store at `location`. Opens no connection.

    Args:
        location: Checked here against the allow-list: it may come from another process.
        timeout_s: Longest connect, and longest silence within a request.

    Raises:
        LocationError: An option that is not on the list, or of a wrong type.
    """
    description = _DESCRIPTIONS[location.kind]
    unknown = (
        location.options.keys() - description.public | location.secrets.keys() - description.secret
    )
    if unknown:
        raise LocationError(f"{location.uri}: unknown options {', '.join(sorted(unknown))}")
    try:
        filesystem = _BUILDERS[location.kind]({**location.options, **location.secrets}, timeout_s)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        cause = str(error).partition("\n")[0]
        raise LocationError(f"{location.uri}: {cause}; check the options") from None
    return ArrowStore(filesystem, location.path, location.uri)


def store_of(filesystem: FileSystem, path: str) -> Store:
    """The store at `path` on a filesystem of this very process, of whatever type."""
    try:
        name = describe(filesystem, path).uri
    except LocationError:
        name = f"{filesystem.type_name}:{path}"
    return ArrowStore(filesystem, path, name)


def _s3(options: Mapping[str, Any], timeout_s: float) -> FileSystem:
    # Two attempts, because the SDK also meets connections that the server closed while idle; longer
    # outages are the business of `fetch`, which knows the deadline.
    return pafs.S3FileSystem(
        **options,
        connect_timeout=timeout_s,
        request_timeout=timeout_s,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=2),
    )


def _gcs(options: Mapping[str, Any], timeout_s: float) -> FileSystem:
    # The default is 15 minutes of silent retries.
    return pafs.GcsFileSystem(**options, retry_time_limit=timedelta(seconds=timeout_s))


def _azure(options: Mapping[str, Any], _: float) -> FileSystem:
    return pafs.AzureFileSystem(**options)


def _hdfs(options: Mapping[str, Any], _: float) -> FileSystem:
    return pafs.HadoopFileSystem(**options)


def _local(_options: Mapping[str, Any], _: float) -> FileSystem:
    return pafs.LocalFileSystem()


_BUILDERS: dict[Kind, Callable[[Mapping[str, Any], float], FileSystem]] = {
    "s3": _s3,
    "gcs": _gcs,
    "azure": _azure,
    "hdfs": _hdfs,
    "local": _local,
}


def _without_userinfo(uri: str) -> str:
    """`uri` with what looks like ``key:secret@`` hidden and without its query, for messages."""
    scheme, separator, rest = uri.partition("://")
    # The last "@": a secret that was not percent-encoded may hold any character.
    userinfo, at, host = rest.rpartition("@")
    shown = f"***@{host}" if at and ":" in userinfo else rest
    return printable(f"{scheme}{separator}{shown.partition('?')[0]}")


def local_filesystem() -> FileSystem:
    """The local filesystem."""
    return pafs.LocalFileSystem()


def local_path_of(filesystem: FileSystem, path: str) -> str | None:
    """The local path that `path` on `filesystem` is, or None for a remote one."""
    while isinstance(filesystem, pafs.SubTreeFileSystem):
        path = f"{filesystem.base_path.rstrip('/')}/{path.lstrip('/')}"
        filesystem = filesystem.base_fs
    return path if isinstance(filesystem, pafs.LocalFileSystem) else None
