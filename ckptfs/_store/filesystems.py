# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""pyarrow and fsspec filesystems as objects: from a URI, wrapped, and without their wrappers."""

import os
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from pyarrow import fs as pafs

from ckptfs._model.location import Location
from ckptfs._model.named_store import check_below, split_named
from ckptfs._model.uris import parse_place, scheme_of, shown_uri
from ckptfs._store import fsspec
from ckptfs._store.build import FileSystem, filesystem_for, fsspec_of
from ckptfs._store.kinds import KINDS
from ckptfs._store.lazy_filesystem import StoreHandler, UriHandler
from ckptfs._store.named import own_table
from ckptfs._store.wrappers import ANSWER_S, within
from ckptfs.errors import LocationError

if TYPE_CHECKING:
    from ckptfs._store.fsspec import AbstractFileSystem

ArrowFileSystem: TypeAlias = pafs.FileSystem
"""The type of a checkpoint's filesystem in the public API."""
GivenFileSystem: TypeAlias = "pafs.FileSystem | AbstractFileSystem"
"""The type of a filesystem that a user may give to a checkpoint."""


def filesystem_of(uri: str) -> tuple[FileSystem, str]:
    """The pyarrow filesystem and the path on it. Raises LocationError for an unknown scheme, a
    relative path or a malformed URI.

    `uri` is a URI, ``store:path``, or an absolute path, which may begin with ``~``. The function
    asks no server. The filesystem of an object store only knows its URI until its first use (see
    `location_of` and `built`).
    """
    if found := split_named(uri):
        name, below = found
        check_below(name, below)
        return pafs.PyFileSystem(StoreHandler(name)), below
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
    """The location of `path` on the filesystem of a URI, as far as the URI says it. None for
    another filesystem, which has to be described by its options."""
    handler = getattr(filesystem, "handler", None)
    if not isinstance(handler, UriHandler):
        return None
    return msgspec.structs.replace(handler.location, path=path.rstrip("/"))


def built(filesystem: FileSystem) -> FileSystem:
    """The real filesystem of a URI; another filesystem as it is.

    Raises LocationError if pyarrow has no such filesystem, and StoreError if Amazon does not answer
    the question for the bucket's region.
    """
    handler = getattr(filesystem, "handler", None)
    return handler.filesystem if isinstance(handler, UriHandler) else filesystem


def type_name_of(filesystem: FileSystem) -> str:
    """The name of a filesystem's type; for the filesystem of a URI, that of the real one."""
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
    """The filesystem below those that only add a prefix to paths, and the path on it."""
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
    """The name of the store if an unwrapped filesystem is a named store, else ""."""
    handler = getattr(filesystem, "handler", None)
    return handler.name if isinstance(handler, StoreHandler) else ""


def is_daemon_only(filesystem: FileSystem) -> bool:
    """Whether it is a named store that is not in this process's configuration, so that only a
    daemon may know it."""
    name = store_name_of(unwrapped(filesystem, "")[0])
    return bool(name) and own_table(name) is None


def fsspec_name(filesystem: Any) -> str:
    """The name of the class after the name of its package."""
    kind: type = type(filesystem)
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def refuse_secrets_in(url: str) -> None:
    """Raise LocationError for a URL that may contain credentials, because the path of an http
    location is the whole URL, and ckptfs shows paths everywhere."""
    userinfo, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    if at or "?" in url:
        shown = shown_uri(url.replace(f"{userinfo}{at}", "", 1))
        raise LocationError(
            f"{shown}: ckptfs cannot mount a URL with credentials or a query; give an fsspec "
            "HTTPFileSystem with client_kwargs instead"
        )


def local_filesystem() -> FileSystem:
    """The local filesystem."""
    return pafs.LocalFileSystem()


def local_path_of(filesystem: FileSystem, path: str) -> str | None:
    """The local path of `path` on `filesystem`; None for a remote filesystem."""
    filesystem, path = unwrapped(filesystem, path)
    return path if isinstance(filesystem, pafs.LocalFileSystem) else None
