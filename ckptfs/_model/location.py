"""The location of a checkpoint: a filesystem's kind and options, and a path on it.

Clients send a location to the daemon instead of a pickled filesystem. Its identity is public.
Credentials travel beside it in `secrets`, and exist only in memory. They are never part of `repr`,
URIs, digests or stored data.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import unquote

import msgspec

from ckptfs._model.kinds import KINDS, Kind, http_url, quoted

# Checked where a location arrives from another process. S3's keys have 1,024 bytes at most, and
# session tokens some thousands.
_Name = Annotated[str, msgspec.Meta(max_length=64)]
_Text = Annotated[str, msgspec.Meta(max_length=16_384)]
_FEW = msgspec.Meta(max_length=32)

_IN_AUTHORITY = ("account_name", "host", "port")


class StoreRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The named store whose credentials a location uses, and the store's own path."""

    name: str
    root: str


class Location(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True, omit_defaults=True
):
    """A directory on a described filesystem.

    Derived values are computed once, because they are needed for every file.

    Attributes:
        kind: The type of filesystem.
        path: The path on it without scheme or trailing slash, such as ``bucket/run/checkpoint``.
        options: The public constructor options, which are checked where the filesystem is built.
        secrets: The credentials among its options. Never printed, hashed or stored.
        store: The named store of the location. Only a daemon sets it, after it has looked up the
            name: see ``ckptfs._daemon.control.named_stores``.
        implied: The names of options from the caller's environment instead of the URI or the
            filesystem. `uri` omits them, because the environment gives them again.
    """

    kind: Kind
    path: Annotated[str, msgspec.Meta(max_length=8192)]
    options: Annotated[Mapping[_Name, _Text | int | float | bool], _FEW] = {}
    secrets: Annotated[dict[_Name, _Text], _FEW] = {}
    store: StoreRef | None = None
    implied: Annotated[tuple[_Name, ...], _FEW] = ()

    def __repr__(self) -> str:
        return f"Location({self.uri!r})"

    @functools.cached_property
    def identity(self) -> str:
        """Text that is equal for two locations exactly when they name the same directory."""
        path = http_url(self.path) if self.kind == "http" else self.path
        store = KINDS[self.kind].identity(self.options)
        return json.dumps([self.kind, store, path], sort_keys=True)

    @functools.cached_property
    def store_identity(self) -> str:
        """The `identity` without the path, which is equal for locations in the same store."""
        return msgspec.structs.replace(self, path="").identity

    @functools.cached_property
    def digest(self) -> str:
        """12 hex digits of the identity's hash, for the directory's name in the mount."""
        return hashlib.blake2b(self.identity.encode(), digest_size=6).hexdigest()

    @property
    def name(self) -> str:
        """The checkpoint's own name: its last path component, made safe for a file name."""
        last = self.path.rstrip("/").rsplit("/", 1)[-1]
        if self.kind == "http":
            last = unquote(last)
        safe = re.sub(r"[^A-Za-z0-9._+=@-]", "_", last)
        return safe[:100].lstrip(".") or "checkpoint"

    @property
    def directory(self) -> str:
        """The name of its directory in the mount, for one user: name and digest."""
        return f"{self.name}-{self.digest}"

    def below(self, path: str) -> "Location":
        """The location of a decoded relative path below this one; this one for ""."""
        if not path:
            return self
        text = quoted(path) if self.kind == "http" else path
        return msgspec.structs.replace(self, path=f"{self.path.rstrip('/')}/{text}")

    @property
    def uri(self) -> str:
        """A URI without secrets that names this directory and can be attached again."""
        if self.store is not None:
            return f"{self.store.name}:{self.path[len(self.store.root) :].lstrip('/')}"
        left_out = set(self.implied) - set(_IN_AUTHORITY)
        shown = {name: value for name, value in self.options.items() if name not in left_out}
        return KINDS[self.kind].uri(self.path, shown)
