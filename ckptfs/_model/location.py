"""Where a checkpoint is: a filesystem's kind and options, and a path on it.

A location is what crosses the control socket instead of a pickled filesystem. What identifies it is
public; credentials travel beside it in `secrets`, live in memory only, and are left out of `repr`,
URIs, digests and everything that is stored.
"""

import functools
import hashlib
import json
import re
from typing import Annotated, Literal
from urllib.parse import quote, urlencode

import msgspec

Kind = Literal["s3", "gcs", "azure", "hdfs", "local", "hf", "http", "az", "private", "named"]
"""Types of filesystems. `hf`, `http` and `az` are fsspec's; `private` is one that is not described:
a private daemon has the filesystem itself; `named` is a store that the daemon is to look up."""
Option = str | int | float | bool

# Checked where a location arrives from another process. S3's keys have 1,024 bytes at most, and
# session tokens some thousands.
_Name = Annotated[str, msgspec.Meta(max_length=64)]
_Text = Annotated[str, msgspec.Meta(max_length=16_384)]
_FEW = msgspec.Meta(max_length=32)

_SCHEMES: dict[Kind, str] = {  # not of http, whose paths are whole URLs
    "s3": "s3",
    "gcs": "gs",
    "azure": "abfss",
    "hdfs": "hdfs",
    "local": "file",
    "hf": "hf",
    "az": "az",
    "private": "private",
    "named": "",
}

# Options that tell one store from another of the same kind. A region or a timeout does not.
_IDENTITY: dict[Kind, tuple[str, ...]] = {
    "s3": ("endpoint_override", "scheme"),
    "gcs": ("endpoint_override", "scheme"),
    "azure": ("account_name", "blob_storage_authority", "dfs_storage_authority"),
    "hdfs": ("host", "port"),
    "local": (),
    "hf": ("endpoint",),
    "http": (),
    "az": ("account_name",),
    "private": (),
    "named": ("store",),
}


class StoreRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named store, by whose credentials a location is read, and its own path."""

    name: str
    root: str


class Location(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """A directory on a described filesystem.

    What follows from the fields is computed once: it is asked for with every file.

    Attributes:
        kind: The type of filesystem.
        path: Path on it, without leading scheme or trailing slash, e.g. ``bucket/run/checkpoint``.
        options: Public constructor options of the filesystem (allow-listed where it is built).
        secrets: Credentials among its options. Never printed, hashed or stored.
        store: The named store that it lies in. Only a daemon itself says so, of what it has looked
            up: see ``ckptfs._daemon.stores``.
    """

    kind: Kind
    path: Annotated[str, msgspec.Meta(max_length=8192)]
    options: Annotated[dict[_Name, _Text | int | float | bool], _FEW] = {}
    secrets: Annotated[dict[_Name, _Text], _FEW] = {}
    store: StoreRef | None = None

    def __repr__(self) -> str:
        return f"Location({self.uri!r})"

    @functools.cached_property
    def identity(self) -> str:
        """Text that is equal for two locations exactly when they name the same directory."""
        options = {name: self.options.get(name, "") for name in _IDENTITY[self.kind]}
        return json.dumps([self.kind, options, self.path], sort_keys=True)

    @functools.cached_property
    def store_identity(self) -> str:
        """Like `identity`, without the path: equal for locations in the same store."""
        return msgspec.structs.replace(self, path="").identity

    @functools.cached_property
    def digest(self) -> str:
        """12 hex digits of the identity's hash; part of the directory name inside the mount."""
        return hashlib.blake2b(self.identity.encode(), digest_size=6).hexdigest()

    @property
    def name(self) -> str:
        """The checkpoint's own name: its last path component, made safe for a file name."""
        safe = re.sub(r"[^A-Za-z0-9._+=@-]", "_", self.path.rstrip("/").rsplit("/", 1)[-1])
        return safe[:100].lstrip(".") or "checkpoint"

    @property
    def directory(self) -> str:
        """Its directory in the mount, for one user: name and digest."""
        return f"{self.name}-{self.digest}"

    @property
    def uri(self) -> str:
        """A URI without secrets, that names this directory and can be attached again."""
        if self.store is not None:
            return f"{self.store.name}:{self.path[len(self.store.root) :].lstrip('/')}"
        if self.kind == "named":
            return f"{self.options.get('store', '')}:{self.path}"
        if self.kind == "local":
            return "file://" + quote(self.path)
        if self.kind == "http":
            return self.path
        if self.kind in ("hf", "az"):  # fsspec does not decode what is quoted
            return f"{_SCHEMES[self.kind]}://{self.path}"
        path = quote(self.path)
        query: dict[str, Option] = {}
        if self.kind == "azure":
            container, _, rest = path.partition("/")
            authority = self.options.get("dfs_storage_authority", ".dfs.core.windows.net")
            path = f"{container}@{self.options.get('account_name', '')}{authority}/{rest}"
        elif self.kind == "hdfs":
            path = f"{self.options.get('host', '')}:{self.options.get('port', 0)}{path}"
        else:
            names = ("endpoint_override", "scheme", "region")
            query = {name: self.options[name] for name in names if self.options.get(name)}
            if query.get("scheme") == "https":
                del query["scheme"]
        return f"{_SCHEMES[self.kind]}://{path}" + ("?" + urlencode(query) if query else "")
