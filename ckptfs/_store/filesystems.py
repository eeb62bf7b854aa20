# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""pyarrow and fsspec filesystems as objects: from a URI, wrapped, and without their wrappers."""

import os
import sys
from typing import Any

import msgspec
from pyarrow import fs as pafs

from ckptfs._model.location import Location
from ckptfs._model.stores import check_below, split_named
from ckptfs._model.uris import parse_place, scheme_of, shown_uri
from ckptfs._store import fsspec
from ckptfs._store.build import FileSystem, filesystem_for, fsspec_of
from ckptfs._store.kinds import KINDS
from ckptfs._store.lazyfs import UriHandler
from ckptfs._store.named import own_table
from ckptfs._store.namedfs import StoreHandler
from ckptfs._store.timed import ANSWER_S, within
from ckptfs.errors import LocationError


def filesystem_of(uri: str) -> tuple[FileSystem, str]:
    """The pyarrow filesystem and the path that `uri`, ``store:path`` or an absolute path (also with
    ``~``) names.

    No server is asked. The filesystem of an object store only knows the URI until it is used:
    `location_of` and `built`.

    Raises:
        LocationError: The scheme is unknown, the path is relative, or the URI is malformed.
    """
    if found := split_named(uri):
        check_below(*found)
        return pafs.PyFileSystem(StoreHandler(found[0])), found[1]
    text = os.path.expanduser(uri)
    if scheme_of(text) == "mock":  # pyarrow's own, for tests
        filesystem, path = pafs.FileSystem.from_uri(text)
        return filesystem, path.rstrip("/")
    location = parse_place(text)
    if location.kind == "local":
        return pafs.LocalFileSystem(), location.path
    if location.kind == "hdfs" or (location.options and location.kind == "hf"):
        return within(ANSWER_S, shown_uri(text), filesystem_for, location), location.path
    if location.kind in ("hf", "http"):
        package = KINDS[location.kind].package
        filesystem, _ = fsspec.filesystem_of(location.uri, shown_uri(text), package)
        return wrapped(filesystem), location.path
    return pafs.PyFileSystem(UriHandler(location)), location.path


def location_of(filesystem: FileSystem, path: str) -> Location | None:
    """The place of `path` on the filesystem of a URI, as far as the URI says it. None: another
    filesystem, which has to be described by its options."""
    handler = getattr(filesystem, "handler", None)
    if not isinstance(handler, UriHandler):
        return None
    return msgspec.structs.replace(handler.location, path=path.rstrip("/"))


def built(filesystem: FileSystem) -> FileSystem:
    """The filesystem that a URI stands for; any other one as it is.

    Raises LocationError where pyarrow has no such filesystem, and StoreError where Amazon has to be
    asked for the bucket's region, and does not answer.
    """
    handler = getattr(filesystem, "handler", None)
    return handler.filesystem if isinstance(handler, UriHandler) else filesystem


def type_name_of(filesystem: FileSystem) -> str:
    """The name of a filesystem's type, as of the one that a URI stands for."""
    handler = getattr(filesystem, "handler", None)
    is_of_uri = isinstance(handler, UriHandler)
    return handler.get_type_name() if is_of_uri else filesystem.type_name


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


def fsspec_name(filesystem: Any) -> str:
    """The class's name behind that of its package."""
    kind: type = type(filesystem)
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def refuse_secrets_in(url: str) -> None:
    """Raise LocationError for a URL that may hold some: paths are shown everywhere, and those of
    http are whole URLs."""
    userinfo, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    if at or "?" in url:
        shown = shown_uri(url.replace(f"{userinfo}{at}", "", 1))
        raise LocationError(
            f"{shown}: a URL with credentials or a query cannot be mounted; give "
            "an fsspec HTTPFileSystem with client_kwargs instead"
        )


def local_filesystem() -> FileSystem:
    """The local filesystem."""
    return pafs.LocalFileSystem()


def local_path_of(filesystem: FileSystem, path: str) -> str | None:
    """The local path that `path` on `filesystem` is, or None for a remote one."""
    filesystem, path = unwrapped(filesystem, path)
    return path if isinstance(filesystem, pafs.LocalFileSystem) else None
