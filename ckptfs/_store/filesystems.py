# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""pyarrow and fsspec filesystems as objects: from a URI, wrapped, and without their wrappers."""

import os
import sys
from typing import Any, TypeAlias

import pyarrow as pa
from pyarrow import fs as pafs

from ckptfs._model.manifest import printable
from ckptfs._model.stores import check_below, split_named
from ckptfs._store import fsspec
from ckptfs._store.arrow import advice_for, translate_error
from ckptfs._store.named import own_table
from ckptfs._store.namedfs import StoreHandler
from ckptfs._store.timed import ANSWER_S, within
from ckptfs.errors import LocationError, StoreTimeout

FileSystem: TypeAlias = Any
"""A pyarrow.fs.FileSystem. pyarrow has no type stubs, so outside this folder it is opaque."""


def filesystem_of(uri: str) -> tuple[FileSystem, str]:
    """The pyarrow filesystem and the path that `uri`, ``store:path`` or an absolute path (also with
    ``~``) names.

    Raises:
        LocationError: The scheme is unknown, the path is relative, or the URI is malformed.
        StoreError: The store was asked for the bucket's region.
    """
    if found := split_named(uri):
        check_below(*found)
        return pafs.PyFileSystem(StoreHandler(found[0])), found[1]
    text = os.path.expanduser(uri)
    shown = without_userinfo(text)
    scheme = text.partition("://")[0].lower()
    if "://" in text and scheme in fsspec.PACKAGES:
        if scheme.startswith("http"):
            refuse_secrets_in(text)
        filesystem, path = fsspec.filesystem_of(text, shown)
        return wrapped(filesystem), path
    try:
        filesystem, path = within(ANSWER_S, shown, pafs.FileSystem.from_uri, text)
    except StoreTimeout:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        cause = printable(str(error).replace(text, shown).partition("\n")[0])
        if "AWS Error" in cause or "Bucket '" in cause:  # it was asked for its region
            raise translate_error(error, shown) from None
        if "empty scheme" in cause:
            raise LocationError(
                f"{shown!r} is a relative path; use an absolute path or a URI"
            ) from None
        if "Unrecognized filesystem type" in cause:
            schemes = "s3://, gs://, abfss://, hdfs://, file://, hf://, az:// or https://"
            raise LocationError(
                f"{shown}: unknown scheme; use {schemes}, or give a filesystem"
            ) from None
        advice = advice_for(cause, "check the URI")
        raise LocationError(f"{shown}: {cause}; {advice}") from None
    return filesystem, path.rstrip("/") or path


def wrapped(filesystem: FileSystem) -> FileSystem:
    """A pyarrow filesystem as it is; an fsspec filesystem wrapped in one. Raises TypeError."""
    if isinstance(filesystem, pafs.FileSystem):
        return filesystem
    base = sys.modules.get("fsspec")
    if base is not None and isinstance(filesystem, base.AbstractFileSystem):
        if fsspec_name(filesystem) == "fsspec.LocalFileSystem":
            return pafs.LocalFileSystem()
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))
    raise TypeError(
        "filesystem must be a pyarrow.fs.FileSystem or an fsspec filesystem, not a "
        f"{type(filesystem).__name__}"
    )


def unwrapped(filesystem: FileSystem, path: str) -> tuple[FileSystem, str]:
    """What is below filesystems that only add a prefix to paths, and the path on it."""
    while True:
        inner = fsspec_of(filesystem)
        if isinstance(filesystem, pafs.SubTreeFileSystem):
            prefix, filesystem = filesystem.base_path, filesystem.base_fs
        elif inner is not None and fsspec_name(inner) == "fsspec.DirFileSystem":
            prefix, filesystem = inner.path, wrapped(inner.fs)
        elif inner is not None and fsspec_name(inner) == "fsspec.LocalFileSystem":
            return pafs.LocalFileSystem(), path
        else:
            return filesystem, path.rstrip("/") or path
        path = f"{prefix.rstrip('/')}/{path.lstrip('/')}"


def store_name_of(filesystem: FileSystem) -> str:
    """The name of the store that an unwrapped filesystem is; "": it is none."""
    handler = getattr(filesystem, "handler", None)
    return handler.name if isinstance(handler, StoreHandler) else ""


def is_lent(filesystem: FileSystem) -> bool:
    """Whether it is a store that only a daemon may know, and not this process's configuration."""
    name = store_name_of(unwrapped(filesystem, "")[0])
    return bool(name) and own_table(name) is None


def fsspec_of(filesystem: FileSystem) -> Any:
    """The fsspec filesystem in a wrapper of pyarrow, or None."""
    handler = getattr(filesystem, "handler", None)
    return handler.fs if isinstance(handler, pafs.FSSpecHandler) else None


def fsspec_name(filesystem: Any) -> str:
    """The class's name behind that of its package."""
    kind: type = type(filesystem)
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def refuse_secrets_in(url: str) -> None:
    """Raise LocationError for a URL that may hold some: paths are shown everywhere, and those of
    http are whole URLs."""
    userinfo, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    if at or "?" in url:
        shown = without_userinfo(url.replace(f"{userinfo}{at}", "", 1))
        raise LocationError(
            f"{shown}: a URL with credentials or a query cannot be mounted; give "
            "an fsspec HTTPFileSystem with client_kwargs instead"
        )


def without_userinfo(uri: str) -> str:
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
    filesystem, path = unwrapped(filesystem, path)
    return path if isinstance(filesystem, pafs.LocalFileSystem) else None
