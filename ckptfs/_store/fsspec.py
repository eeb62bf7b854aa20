# fsspec and the packages of its protocols are optional, and have no type stubs.
# pyright: reportMissingTypeStubs=false, reportMissingImports=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportPrivateUsage=false
"""A Store over an fsspec filesystem, and the URIs that only fsspec knows.

The store does not use pyarrow's wrapper, because that hides the ETag and reads through a file
object with a cache of its own. Here a read is one ranged request (`cat_file`), and `info` has the
version. Any thread may call an fsspec filesystem. Its exceptions depend on the protocol's package.

The http filesystem lists the links of an index page, percent-encoded as in the page. This module
decodes them. `http.HttpStore` reads most http locations, except filesystems with sessions of their
own.

Files of Hugging Face are read from the commit that was current when the store was listed, so a
branch that moves changes nothing. Only the metadata file is read from the branch, so it may change.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import msgspec

from ckptfs._model.manifest import METADATA_NAME, ListedFile, Listing, Skipped, printable
from ckptfs._store import huggingface
from ckptfs._store.base import Pin, changed, check_count, check_version, is_file, not_found
from ckptfs._store.fsspec_errors import hint_for, raise_disguised, status_of, translated
from ckptfs._store.timestamps import wait_until_settled
from ckptfs._store.transport.tls import NETWORK
from ckptfs._store.versions import time_ns_in
from ckptfs.errors import AccessDenied, CheckpointNotFound, LocationError, StoreError

if TYPE_CHECKING:
    from fsspec.spec import AbstractFileSystem as AbstractFileSystem

_THREADS = 16
_EPOCH = datetime.fromtimestamp(0, timezone.utc)
_ETAGS = (
    "generation",
    "etag",
    "ETag",
    "blob_id",
    "checksum",
    "md5Hash",
    "content_md5",
    "sha256",
    "xet_hash",
)
_TIMES = (
    "mtime",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "modified",
    "updated",
    "created",
)
"""The keys of a version or a time in `info` of http, s3fs, adlfs, gcsfs, huggingface_hub and the
local filesystem."""


def filesystem_of(uri: str, shown: str, package: str) -> tuple[Any, str]:
    """The fsspec filesystem and the path that `uri` names.

    The caller has checked the scheme, because fsspec knows schemes that read or run what a URI
    names. `shown` is the URI without credentials, for messages. Raises LocationError if the URI is
    malformed, or one of the packages of `package` is missing.
    """
    scheme = uri.partition("://")[0].lower()
    try:
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(uri)
    except ImportError:
        raise LocationError(
            f"{shown}: a package for {scheme}:// is not installed; pip install {package}"
        ) from None
    except Exception as error:  # each package has its own
        cause = printable(str(error).replace(uri, shown).partition("\n")[0])
        raise LocationError(f"{shown}: {cause or type(error).__name__}; check the URI") from None
    return filesystem, path.rstrip("/")


def build(protocol: str, options: Mapping[str, Any], timeout_s: float) -> Any:
    """A new fsspec filesystem from a location's options, which remembers no listings.

    The caller has checked the options. `timeout_s` is the longest connect and silence, if the
    package of the protocol has an option for it (http). Raises ImportError, ValueError.
    """
    from fsspec import filesystem  # pyright: ignore[reportAttributeAccessIssue]

    network = {name: value for name, value in options.items() if name in NETWORK}
    own: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol == "hf":
        huggingface.use_network(network)
    elif network:
        names = ", ".join(sorted(network))
        raise ValueError(f"fsspec's filesystem of {protocol}:// has no place for {names}")
    if protocol == "https":
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        own["client_kwargs"] = {"timeout": timeout}
    known = {name: value for name, value in options.items() if name not in network}
    return filesystem(protocol, **known, **own)


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
"""Options of an HTTPFileSystem that say how fsspec caches and reads, and not what it reads."""


def http_headers_of(filesystem: Any) -> dict[str, str] | None:
    """The headers of all requests of an fsspec HTTPFileSystem. None for another filesystem, or if
    its options change more than the headers of its requests."""
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

    def __init__(self, filesystem: Any, root: str, name: str) -> None:
        from fsspec.spec import AbstractFileSystem

        self._fs = filesystem
        self._root = str(filesystem._strip_protocol(root)).rstrip("/")
        self._pinned_root = self._root
        self.name = name
        self._is_http = self._root.startswith(("http://", "https://"))
        self._is_hub = any(
            kind.__module__.partition(".")[0] == "huggingface_hub"
            for kind in type(filesystem).__mro__
        )
        # A read through fsspec's file object would fetch another 5 MiB for the object's buffer.
        by_file = getattr(filesystem.cat_file, "__func__", None) is AbstractFileSystem.cat_file
        self._with_range: dict[str, Any] = {"cache_type": "none"} if by_file else {}
        if self._is_http:
            given: dict[str, str] = (getattr(filesystem, "kwargs", None) or {}).get("headers") or {}
            self._with_range["headers"] = {**given, "Accept-Encoding": "identity"}

    def list(self, files_max: int) -> Listing:
        try:
            self._fs.invalidate_cache()
            if self._is_hub:
                self._pinned_root = huggingface.pinned(self._fs, self._root)
            found = self._find()
            if not found and self._fs.info(self._pinned_root)["type"] != "directory":
                raise is_file(self.name)
            check_count(self.name, len(found), files_max)
            self._add_sizes(found)
            return self._listing(found)
        except FileNotFoundError as error:
            if isinstance(error, CheckpointNotFound):
                raise
            raise_disguised(error, self.name)
            hint = hint_for(error)
            if hint:
                raise CheckpointNotFound(f"{self.name} does not exist{hint}") from error
            raise not_found(self.name) from None
        except Exception as error:
            if status_of(error) == 404:
                raise not_found(self.name) from error
            raise translated(error, self.name) from error

    def _find(self) -> dict[str, dict[str, Any]]:
        """Everything below the root, by full path."""
        from fsspec.asyn import AsyncFileSystem
        from fsspec.spec import AbstractFileSystem

        kind = type(self._fs)
        if kind.find is AbstractFileSystem.find and (
            not self._fs.async_impl or kind._find is AsyncFileSystem._find
        ):
            return self._walk()
        found: Any = self._fs.find(self._pinned_root, withdirs=True, detail=True)
        if not isinstance(found, Mapping):  # adlfs, of a file
            raise is_file(self.name)
        listed: dict[str, dict[str, Any]] = dict(found)
        return {path: info for path, info in listed.items() if self._below(path)}

    def _walk(self) -> dict[str, dict[str, Any]]:
        """The same as fsspec's own `find`, which would leave out a directory that it cannot
        list."""
        found: dict[str, dict[str, Any]] = {}
        directories = [self._pinned_root]
        while directories:
            directory = directories.pop()
            try:
                listed: list[dict[str, Any]] = self._fs.ls(directory, detail=True)
            except FileNotFoundError as error:
                raise_disguised(error, self.name)
                if directory == self._pinned_root:
                    raise
                del found[directory]  # it was deleted, or was a dead link
                continue
            for info in listed:
                path = str(info["name"]).rstrip("/")
                # An index page of http lists itself, and links that sort it.
                is_within = self._is_http and ("?" in path or "#" in path)
                if path in found or is_within or not self._below(path):
                    continue
                found[path] = info
                if info["type"] == "directory":
                    directories.append(path)
        return found

    def _add_sizes(self, found: dict[str, dict[str, Any]]) -> None:
        """Ask for sizes that the listing does not have (an index page of http has names only)."""
        unknown = [p for p, i in found.items() if i["type"] == "file" and i.get("size") is None]
        if unknown:
            with ThreadPoolExecutor(_THREADS, "ckptfs-sizes") as pool:
                for path, info in zip(unknown, pool.map(self._info, unknown), strict=True):
                    found[path] = info

    def _info(self, path: str) -> dict[str, Any]:
        try:
            return self._fs.info(path)
        except FileNotFoundError as error:  # it was deleted, or was a dead link
            raise_disguised(error, f"{printable(self._relative(path))} in {self.name}")
            return {"type": "file"}

    def _listing(self, found: dict[str, dict[str, Any]]) -> Listing:
        files: list[ListedFile] = []
        directories: list[str] = []
        skipped: list[Skipped] = []
        for full, info in found.items():
            path, size = self._relative(full), info.get("size")
            is_marker = info["type"] == "file" and path.endswith("/") and not size
            if info["type"] == "directory" or is_marker:
                directories.append(path.removesuffix("/"))
            elif info["type"] != "file":
                skipped.append(Skipped(printable(path), "it is neither a file nor a directory"))
            elif self._is_http and "%2f" in full.lower():
                skipped.append(Skipped(printable(path), "the name holds a slash"))
            elif not isinstance(size, int):
                skipped.append(Skipped(printable(path), "the store does not know its size"))
            else:
                etag = _etag_of(info) if self._is_hub else ""
                files.append(ListedFile(path, size, _mtime_ns(info), etag))
        return Listing(files, directories, skipped)

    def _below(self, full: str) -> str:
        """The part of a path that follows the root; "" for the root itself, and for a link of an
        index page that leads elsewhere. Raises StoreError if a listing has other paths."""
        root = self._pinned_root
        if full.startswith(f"{root}/"):
            return full[len(root) + 1 :]
        if full.rstrip("/") == root or self._is_http:
            return ""
        raise StoreError(
            f"{self.name}: its listing has {printable(full)}, which is not below it; check the path"
        )

    def _relative(self, full: str) -> str:
        below = self._below(full)
        return unquote(below, errors="surrogateescape") if self._is_http else below

    def _full(self, path: str) -> str:
        root = self._root if path == METADATA_NAME else self._pinned_root
        return f"{root}/{quote(path, errors='surrogateescape') if self._is_http else path}"

    def confirm(self, pin: Pin) -> Pin:
        info = self._or_none(pin.path, self._fs.info)
        if info is None:
            raise changed(self.name, pin, "it was deleted")
        if info["type"] != "file":
            raise changed(self.name, pin, "it is not a file any more")
        if info.get("contentEncoding"):  # gcsfs decodes what it reads
            raise StoreError(
                f"{self._what(pin.path)} is stored with Content-Encoding "
                f"{printable(str(info['contentEncoding']))}, so gcsfs cannot read parts of it; "
                "attach it as gs://, or store it without that encoding"
            )
        etag = _etag_of(info)
        check_version(self.name, pin, info.get("size"), _mtime_ns(info), etag)
        return msgspec.structs.replace(pin, etag=etag)

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        path, end = self._full(pin.path), offset + len(buffer)
        if not pin.etag:  # only the time tells versions apart
            wait_until_settled(pin.mtime_ns)
        try:
            data: bytes = self._fs.cat_file(path, start=offset, end=end, **self._with_range)
        except FileNotFoundError as error:
            raise_disguised(error, self._what(pin.path))
            raise changed(self.name, pin, "it was deleted") from None
        except Exception as error:
            if status_of(error) in (404, 416):
                how = "it was deleted" if status_of(error) == 404 else "it became shorter"
                raise changed(self.name, pin, how) from None
            raise translated(error, self._what(pin.path)) from error
        if len(data) < len(buffer):
            raise changed(self.name, pin, f"it ends at byte {offset + len(data)} of {pin.size}")
        if len(data) > len(buffer):
            raise StoreError(
                f"{printable(pin.path)} in {self.name}: the server cannot send a part of a file; "
                "copy the checkpoint to a store that supports range requests"
            )
        buffer[:] = data
        return False

    def get(self, path: str) -> bytes | None:
        data: Any = self._or_none(path, self._fs.cat_file)
        return None if data is None else bytes(data)

    def put(self, path: str, data: bytes) -> None:
        try:
            self._fs.pipe_file(self._full(path), data)
        except FileNotFoundError:
            raise not_found(self.name) from None
        except NotImplementedError:
            raise AccessDenied(
                f"{self.name}: fsspec's filesystem of {self._fs.protocol} cannot write; change the "
                "file with another program"
            ) from None
        except Exception as error:
            if status_of(error) == 404:
                raise not_found(self.name) from error
            raise translated(error, self._what(path)) from error

    def find(self, path: str) -> ListedFile | None:
        info = self._or_none(path, self._fs.info)
        if info is None or info["type"] != "file":
            return None
        return ListedFile(path, info["size"], _mtime_ns(info))

    def _or_none(self, path: str, call: Callable[[str], Any]) -> Any:
        """The result of `call` for the current object; None if there is no such object."""
        full = self._full(path)
        try:
            self._fs.invalidate_cache(self._fs._parent(full))
            return call(full)
        except FileNotFoundError as error:
            raise_disguised(error, self._what(path))
            return None
        except Exception as error:
            if status_of(error) == 404:
                return None
            raise translated(error, self._what(path)) from error

    def close(self) -> None:
        """Do nothing, because the store keeps nothing open."""

    def _what(self, path: str) -> str:
        return f"{printable(path)} in {self.name}"


def _etag_of(info: Mapping[str, Any]) -> str:
    """The version in `info`, as text; "" if it has none."""
    etag = next((str(info[name]) for name in _ETAGS if info.get(name)), "")
    if not etag and info.get("ino") and "mtime" in info:  # fsspec's local files
        etag = "-".join(str(info.get(name)) for name in ("ino", "size", "mtime", "created"))
    return etag


def _mtime_ns(info: Mapping[str, Any]) -> int:
    value = next((info[name] for name in _TIMES if info.get(name)), None)
    if isinstance(value, str):
        return time_ns_in(value)
    if isinstance(value, datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
        return (aware - _EPOCH) // timedelta(microseconds=1) * 1000
    return int(value * 10**9) if isinstance(value, int | float) else 0
