# fsspec and the packages of its protocols are optional, and have no type stubs.
# pyright: reportMissingTypeStubs=false, reportMissingImports=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportPrivateUsage=false
"""A Store over an fsspec filesystem, and the URIs that only fsspec knows.

Not through pyarrow's wrapper: that hides the ETag, and reads through a file object with a cache of
its own. Here a read is one ranged request (`cat_file`), and a version is what `info` says. fsspec
filesystems may be called from any thread; what they raise depends on the protocol's package.

http lists what the links of an index page name, percent-encoded as they are there.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from ckptfs._model.manifest import ListedFile, Listing, Skipped, printable
from ckptfs._store.base import Pin, changed, check_count, is_file, not_found
from ckptfs.errors import (
    AccessDenied,
    CkptfsError,
    LocationError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

_THREADS = 16
_ETAGS = ("etag", "ETag", "blob_id", "generation", "checksum")
_TIMES = (
    "mtime",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "modified",
    "updated",
    "created",
)
"""Names under which `info` has a version or a time: http, s3fs, adlfs, gcsfs, huggingface_hub,
local."""


def filesystem_of(uri: str, shown: str, package: str) -> tuple[Any, str]:
    """The fsspec filesystem and the path that `uri` names.

    Args:
        uri: Of a scheme that the caller has checked: fsspec knows some that read or run what the
            URI names. May hold credentials.
        shown: The same without them, for messages.
        package: What has to be installed for it.

    Raises:
        LocationError: A package is missing, or the URI is malformed.
    """
    scheme = uri.partition("://")[0].lower()
    try:
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(uri)
    except ImportError:
        raise LocationError(
            f"{shown}: {scheme}:// needs a package that is not installed; pip install {package}"
        ) from None
    except Exception as error:  # each package has its own
        cause = printable(str(error).replace(uri, shown).partition("\n")[0])
        raise LocationError(f"{shown}: {cause or type(error).__name__}; check the URI") from None
    return filesystem, path.rstrip("/")


def build(protocol: str, options: Mapping[str, Any], timeout_s: float) -> Any:
    """An fsspec filesystem from a location's options; one of its own, which remembers no listings.

    Args:
        protocol: One that fsspec knows.
        options: Checked by the caller.
        timeout_s: Longest connect and longest silence, where the protocol's package has a place for
            it (http).

    Raises ImportError, ValueError.
    """
    from fsspec import filesystem  # pyright: ignore[reportAttributeAccessIssue]

    own: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol == "https":
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        own["client_kwargs"] = {"timeout": timeout}
    return filesystem(protocol, **options, **own)


_OF_HTTP = frozenset(
    [
        "block_size",
        "cache_options",
        "cache_type",
        "encoded",
        "listings_expiry_time",
        "max_paths",
        "same_scheme",
        "simple_links",
        "size_policy",
        "skip_instance_cache",
        "use_listings_cache",
    ]
)
"""Options of an HTTPFileSystem that say how fsspec caches and reads, and not what."""


def http_headers_of(filesystem: Any) -> dict[str, str] | None:
    """The headers with which an fsspec HTTPFileSystem asks for everything; None: it is another
    filesystem, or one that does more than that with its requests."""
    kind = type(filesystem)
    if f"{kind.__module__}.{kind.__name__}" != "fsspec.implementations.http.HTTPFileSystem":
        return None
    options = dict(filesystem.storage_options)
    client = options.pop("client_kwargs", None) or {}
    given = {k: v for k, v in (*client.items(), *options.items()) if k not in _OF_HTTP}
    given.pop("timeout", None)
    headers = given.pop("headers", None) or {}
    login = given.pop("auth", None)
    if given or filesystem.storage_args or not isinstance(headers, Mapping):
        return None
    if login is not None:
        if not callable(getattr(login, "encode", None)):
            return None
        headers = {**headers, "Authorization": login.encode()}
    return {str(name): str(value) for name, value in headers.items()}


class FsspecStore:
    """The directory `root` of an fsspec filesystem; `name`, its URI, is for messages."""

    gives_up = False

    def __init__(self, filesystem: Any, root: str, name: str) -> None:
        from fsspec.spec import AbstractFileSystem

        self._fs = filesystem
        self._root = str(filesystem._strip_protocol(root)).rstrip("/")
        self.name = name
        # Where a read goes through fsspec's file object, its buffer would read on for 5 MiB.
        by_file = getattr(filesystem.cat_file, "__func__", None) is AbstractFileSystem.cat_file
        self._unbuffered = {"cache_type": "none"} if by_file else {}

    def list(self, files_max: int) -> Listing:
        """See Store.list."""
        try:
            self._fs.invalidate_cache()
            found = self._find()
            if not found and self._fs.info(self._root)["type"] != "directory":
                raise is_file(self.name)
            check_count(self.name, len(found), files_max)
            self._add_sizes(found)
        except FileNotFoundError as error:
            _raise_disguised(error, self.name)
            raise not_found(self.name) from None
        except Exception as error:
            raise _translated(error, self.name) from error
        return self._listing(found)

    def _find(self) -> dict[str, dict[str, Any]]:
        """Everything below the root, by full path."""
        from fsspec.asyn import AsyncFileSystem
        from fsspec.spec import AbstractFileSystem

        kind = type(self._fs)
        if kind.find is AbstractFileSystem.find and (
            not self._fs.async_impl or kind._find is AsyncFileSystem._find
        ):
            return self._walk()
        found: dict[str, dict[str, Any]] = self._fs.find(self._root, withdirs=True, detail=True)
        return {path: info for path, info in found.items() if self._relative(path)}

    def _walk(self) -> dict[str, dict[str, Any]]:
        """What fsspec's own `find` does, which leaves out a directory that cannot be listed."""
        found: dict[str, dict[str, Any]] = {}
        directories = [self._root]
        while directories:
            directory = directories.pop()
            try:
                listed: list[dict[str, Any]] = self._fs.ls(directory, detail=True)
            except FileNotFoundError as error:
                _raise_disguised(error, self.name)
                if directory == self._root:
                    raise
                del found[directory]  # it is gone, or was a dead link
                continue
            for info in listed:
                path = str(info["name"]).rstrip("/")
                # An index page of http lists itself, and links that sort it.
                if not self._relative(path) or path in found or self._is_link_within(path):
                    continue
                found[path] = info
                if info["type"] == "directory":
                    directories.append(path)
        return found

    def _is_link_within(self, path: str) -> bool:
        return self._root.startswith(("http://", "https://")) and ("?" in path or "#" in path)

    def _add_sizes(self, found: dict[str, dict[str, Any]]) -> None:
        """Ask for the sizes that the listing does not have (http: an index page has names only)."""
        unknown = [p for p, i in found.items() if i["type"] == "file" and i.get("size") is None]
        if unknown:
            with ThreadPoolExecutor(_THREADS, "ckptfs-sizes") as pool:
                for path, info in zip(unknown, pool.map(self._info, unknown), strict=True):
                    found[path] = info

    def _info(self, path: str) -> dict[str, Any]:
        try:
            return self._fs.info(path)
        except FileNotFoundError as error:  # it is gone, or was a dead link
            _raise_disguised(error, f"{printable(self._relative(path))} in {self.name}")
            return {"type": "file"}

    def _listing(self, found: dict[str, dict[str, Any]]) -> Listing:
        files: list[ListedFile] = []
        directories: list[str] = []
        skipped: list[Skipped] = []
        for full, info in found.items():
            path, size = self._relative(full), info.get("size")
            if info["type"] == "directory":
                directories.append(path)
            elif info["type"] != "file":
                skipped.append(Skipped(printable(path), "it is neither a file nor a directory"))
            elif not isinstance(size, int):
                skipped.append(Skipped(printable(path), "the store does not know its size"))
            else:
                files.append(ListedFile(path, size, _mtime_ns(info)))
        return Listing(files, directories, skipped)

    def _relative(self, full: str) -> str:
        return full[len(self._root) :].strip("/")

    def confirm(self, pin: Pin) -> Pin:
        """See Store.confirm."""
        info = self._info_now(pin.path)
        if info is None:
            raise changed(self.name, pin, "it was deleted")
        if info["type"] != "file":
            raise changed(self.name, pin, "it is no file any more")
        if info.get("size") != pin.size:
            raise changed(self.name, pin, f"{pin.size} bytes became {info.get('size')}")
        mtime_ns = _mtime_ns(info)
        if pin.mtime_ns and mtime_ns and mtime_ns // 10**9 != pin.mtime_ns // 10**9:
            raise changed(self.name, pin, "it was written again")
        etag = next((str(info[name]) for name in _ETAGS if info.get(name)), "")
        if pin.etag and etag != pin.etag:
            raise changed(self.name, pin, f"ETag {pin.etag} became {etag or 'none'}")
        return msgspec.structs.replace(pin, etag=etag)

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        """See Store.read_into."""
        path, end = f"{self._root}/{pin.path}", offset + len(buffer)
        try:
            data: bytes = self._fs.cat_file(path, start=offset, end=end, **self._unbuffered)
        except FileNotFoundError:
            raise changed(self.name, pin, "it was deleted") from None
        except Exception as error:
            if _status_of(error) == 416:
                raise changed(self.name, pin, "it became shorter") from None
            raise _translated(error, f"{printable(pin.path)} in {self.name}") from error
        if len(data) < len(buffer):
            raise changed(self.name, pin, f"it ends at byte {offset + len(data)} of {pin.size}")
        if len(data) > len(buffer):
            raise StoreError(
                f"{printable(pin.path)} in {self.name}: the server does not know ranges; copy the "
                "checkpoint to a store that does"
            )
        buffer[:] = data
        return False

    def get(self, path: str) -> bytes | None:
        """See Store.get."""
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{path}"))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _translated(error, f"{printable(path)} in {self.name}") from error

    def put(self, path: str, data: bytes) -> None:
        """See Store.put."""
        try:
            self._fs.pipe_file(f"{self._root}/{path}", data)
        except FileNotFoundError:
            raise not_found(self.name) from None
        except NotImplementedError:
            raise AccessDenied(f"{self.name} cannot be written to: {self._fs.protocol}") from None
        except Exception as error:
            raise _translated(error, f"{printable(path)} in {self.name}") from error

    def find(self, path: str) -> ListedFile | None:
        """See Store.find."""
        info = self._info_now(path)
        if info is None or info["type"] != "file":
            return None
        return ListedFile(path, info["size"], _mtime_ns(info))

    def _info_now(self, path: str) -> dict[str, Any] | None:
        """What the store says of an object now; None where there is none."""
        full = f"{self._root}/{path}"
        try:
            self._fs.invalidate_cache(self._fs._parent(full))
            return self._fs.info(full)
        except FileNotFoundError as error:
            _raise_disguised(error, f"{printable(path)} in {self.name}")
            return None
        except Exception as error:
            raise _translated(error, f"{printable(path)} in {self.name}") from error

    def close(self) -> None:
        """Nothing is kept."""


def _mtime_ns(info: Mapping[str, Any]) -> int:
    value = next((info[name] for name in _TIMES if info.get(name)), None)
    if isinstance(value, str):
        try:
            in_header = "," in value  # RFC 9110, section 5.6.7
            value = parsedate_to_datetime(value) if in_header else datetime.fromisoformat(value)
        except ValueError:
            return 0
    if isinstance(value, datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
        return int(aware.timestamp()) * 10**9
    return int(value * 10**9) if isinstance(value, int | float) else 0


def _status_of(error: BaseException) -> int:
    """The HTTP status that an exception of aiohttp, requests, httpx or azure carries, else 0."""
    response = getattr(error, "response", None)
    for holder, name in ((error, "status"), (error, "status_code"), (response, "status_code")):
        status = getattr(holder, name, None)
        if isinstance(status, int):
            return status
    return 0


def _translated(error: Exception, what: str) -> CkptfsError:
    """The exception of ours that says what the `error` of an fsspec package means for `what`."""
    if isinstance(error, CkptfsError):
        return error
    status = _status_of(error)
    cause = printable(str(error).partition("\n")[0]) or type(error).__name__
    if isinstance(error, PermissionError) or status in (401, 403):
        return AccessDenied(f"{what}: access denied ({cause}); check credentials and permissions")
    if isinstance(error, TimeoutError) or "imeout" in type(error).__name__ or status == 408:
        return StoreTimeout(f"{what}: the store did not answer ({cause}); check the endpoint")
    overloaded = (status >= 500 and status != 501) or status == 429
    if isinstance(error, ConnectionError) or overloaded:
        return StoreUnavailable(f"{what}: cannot reach the store ({cause}); check the endpoint")
    if "Connect" in type(error).__name__ or "Disconnected" in type(error).__name__:
        return StoreUnavailable(f"{what}: cannot reach the store ({cause}); check the endpoint")
    return StoreError(f"{what}: {cause}")


def _raise_disguised(error: FileNotFoundError, what: str) -> None:
    """Raise what http's `info` hides: it calls every failure a missing file."""
    cause = error.__cause__
    if isinstance(cause, Exception) and "NotFound" not in type(cause).__name__:
        translated = _translated(cause, what)
        if isinstance(translated, AccessDenied | StoreUnavailable):
            raise translated from cause
