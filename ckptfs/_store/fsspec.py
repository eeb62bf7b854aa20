# fsspec and the packages of its protocols are optional, and have no type stubs.
# pyright: reportMissingTypeStubs=false, reportMissingImports=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportPrivateUsage=false
"""A Store over an fsspec filesystem, and the URIs that only fsspec knows.

Not through pyarrow's wrapper: that hides the ETag, and reads through a file object with a cache of
its own. Here a read is one ranged request (`cat_file`), and a version is what `info` says. fsspec
filesystems may be called from any thread; what they raise depends on the protocol's package.

http lists what the links of an index page name, percent-encoded as they are there. Here they are
decoded. (Most http is read by `http.HttpStore`; what is left are filesystems with sessions of their
own.)

Files of Hugging Face are read from the commit that was current when the store was listed, so that a
branch that moves changes nothing. The metadata file is the exception: it may change.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, unquote

import msgspec

from ckptfs._model.manifest import METADATA_NAME, ListedFile, Listing, Skipped, printable
from ckptfs._store import hub
from ckptfs._store.base import Pin, changed, check_count, is_file, not_found
from ckptfs._store.fsspecerrors import hint_for, raise_disguised, status_of, translated
from ckptfs._store.settling import is_same_time, wait_until_settled
from ckptfs.errors import AccessDenied, CheckpointNotFound, LocationError, StoreError

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

    network = {name: value for name, value in options.items() if name in hub.NETWORK}
    own: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol == "hf":
        hub.use_network(network)
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
        self._pinned_root = self._root
        self.name = name
        self._is_http = self._root.startswith(("http://", "https://"))
        self._is_hub = any(
            kind.__module__.partition(".")[0] == "huggingface_hub"
            for kind in type(filesystem).__mro__
        )
        # Where a read goes through fsspec's file object, its buffer would read on for 5 MiB.
        by_file = getattr(filesystem.cat_file, "__func__", None) is AbstractFileSystem.cat_file
        self._with_range: dict[str, Any] = {"cache_type": "none"} if by_file else {}
        if self._is_http:
            given: dict[str, str] = (getattr(filesystem, "kwargs", None) or {}).get("headers") or {}
            self._with_range["headers"] = {**given, "Accept-Encoding": "identity"}

    def list(self, files_max: int) -> Listing:
        """See Store.list."""
        try:
            self._fs.invalidate_cache()
            if self._is_hub:
                self._pinned_root = hub.pinned(self._fs, self._root)
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
        """What fsspec's own `find` does, which leaves out a directory that cannot be listed."""
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
                del found[directory]  # it is gone, or was a dead link
                continue
            for info in listed:
                path = str(info["name"]).rstrip("/")
                # An index page of http lists itself, and links that sort it.
                if path in found or self._is_link_within(path) or not self._below(path):
                    continue
                found[path] = info
                if info["type"] == "directory":
                    directories.append(path)
        return found

    def _is_link_within(self, path: str) -> bool:
        return self._is_http and ("?" in path or "#" in path)

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
        """What follows the root in a path; "": it is the root itself, or an index page's link to
        elsewhere. Raises StoreError where a listing has other paths."""
        root = self._pinned_root
        if full.startswith(f"{root}/"):
            return full[len(root) + 1 :]
        if full.rstrip("/") == root or self._is_http:
            return ""
        raise StoreError(
            f"{self.name}: the listing has {printable(full)}, which is not below it; check the path"
        )

    def _relative(self, full: str) -> str:
        below = self._below(full)
        return unquote(below, errors="surrogateescape") if self._is_http else below

    def _full(self, path: str) -> str:
        root = self._root if path == METADATA_NAME else self._pinned_root
        return f"{root}/{quote(path, errors='surrogateescape') if self._is_http else path}"

    def confirm(self, pin: Pin) -> Pin:
        """See Store.confirm."""
        info = self._info_now(pin.path)
        if info is None:
            raise changed(self.name, pin, "it was deleted")
        if info["type"] != "file":
            raise changed(self.name, pin, "it is no file any more")
        if info.get("size") != pin.size:
            raise changed(self.name, pin, f"{pin.size} bytes became {info.get('size')}")
        if info.get("contentEncoding"):  # gcsfs decodes what it reads
            raise StoreError(
                f"{self._what(pin.path)} is stored with Content-Encoding "
                f"{printable(str(info['contentEncoding']))}, and cannot be read in parts; attach "
                "it as gs://, or store it without"
            )
        etag = _etag_of(info)
        if pin.etag:
            if etag != pin.etag:
                raise changed(self.name, pin, f"ETag {pin.etag} became {etag or 'none'}")
        else:
            mtime_ns = _mtime_ns(info)
            if pin.mtime_ns and mtime_ns and not is_same_time(mtime_ns, pin.mtime_ns):
                raise changed(self.name, pin, "it was written again")
        return msgspec.structs.replace(pin, etag=etag)

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        """See Store.read_into."""
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
                f"{printable(pin.path)} in {self.name}: the server does not know ranges; copy the "
                "checkpoint to a store that does"
            )
        buffer[:] = data
        return False

    def get(self, path: str) -> bytes | None:
        """See Store.get."""
        full = self._full(path)
        try:
            self._fs.invalidate_cache(self._fs._parent(full))
            return bytes(self._fs.cat_file(full))
        except FileNotFoundError as error:
            raise_disguised(error, self._what(path))
            return None
        except Exception as error:
            if status_of(error) == 404:
                return None
            raise translated(error, self._what(path)) from error

    def put(self, path: str, data: bytes) -> None:
        """See Store.put."""
        try:
            self._fs.pipe_file(self._full(path), data)
        except FileNotFoundError:
            raise not_found(self.name) from None
        except NotImplementedError:
            raise AccessDenied(f"{self.name} cannot be written to: {self._fs.protocol}") from None
        except Exception as error:
            if status_of(error) == 404:
                raise not_found(self.name) from error
            raise translated(error, self._what(path)) from error

    def find(self, path: str) -> ListedFile | None:
        """See Store.find."""
        info = self._info_now(path)
        if info is None or info["type"] != "file":
            return None
        return ListedFile(path, info["size"], _mtime_ns(info))

    def _info_now(self, path: str) -> dict[str, Any] | None:
        """What the store says of an object now; None where there is none."""
        full = self._full(path)
        try:
            self._fs.invalidate_cache(self._fs._parent(full))
            return self._fs.info(full)
        except FileNotFoundError as error:
            raise_disguised(error, self._what(path))
            return None
        except Exception as error:
            if status_of(error) == 404:
                return None
            raise translated(error, self._what(path)) from error

    def close(self) -> None:
        """Nothing is kept."""

    def _what(self, path: str) -> str:
        return f"{printable(path)} in {self.name}"


def _etag_of(info: Mapping[str, Any]) -> str:
    """What `info` says of a version, as text; "": nothing."""
    etag = next((str(info[name]) for name in _ETAGS if info.get(name)), "")
    if not etag and info.get("ino") and "mtime" in info:  # fsspec's local files
        etag = "-".join(str(info.get(name)) for name in ("ino", "size", "mtime", "created"))
    return etag


def _mtime_ns(info: Mapping[str, Any]) -> int:
    value = next((info[name] for name in _TIMES if info.get(name)), None)
    if isinstance(value, str):
        try:
            in_header = "," in value  # RFC 9110, section 5.6.7
            iso = value.replace("Z", "+00:00")  # which Python 3.10 does not know
            value = parsedate_to_datetime(value) if in_header else datetime.fromisoformat(iso)
        except ValueError:
            return 0
    if isinstance(value, datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
        return (aware - _EPOCH) // timedelta(microseconds=1) * 1000
    return int(value * 10**9) if isinstance(value, int | float) else 0
