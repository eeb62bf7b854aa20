"""An attached checkpoint: its snapshot, who holds it, and the state of its files."""

import time
from typing import TYPE_CHECKING

from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cachedir import ObjectKey
from ckptfs._daemon.fetch import RemoteFile, State
from ckptfs._daemon.tree import Tree
from ckptfs._model.location import Location
from ckptfs._model.manifest import Manifest
from ckptfs._store.base import Pin, Store

if TYPE_CHECKING:
    import trio


class Attachment:
    """One checkpoint of one user.

    Attributes:
        location: Where it is, without credentials.
        manifest: What it held when it was attached.
        name: Its directory inside the mount.
        digests: Cache digest of each file, in the manifest's order.
        files: The files that were opened so far, by position.
        directories: Open directory handles of its root, with the process that opened each.
        open_handles: How many other handles are open in it.
        clients: How many control connections hold it.
        prefetches: Those that are running; cancelled when it ends.
        pinned: It stays until it is detached.
        attached_s: When, seconds since the epoch.
        idle_since_s: When its last holder went (event loop time).
    """

    def __init__(
        self,
        ordinal: int,
        location: Location,
        store: Store,
        manifest: Manifest,
        digests: list[str],
        uid: int,
        gid: int,
    ) -> None:
        self.ordinal = ordinal
        self.location = location
        self.store = store
        self.manifest = manifest
        self.digests = digests
        self.uid = uid
        self.gid = gid
        self.attached_s = time.time()
        self.tree = Tree(ordinal, manifest, int(self.attached_s * 1e9))
        self.name = f"{location.name}-{location.digest}"
        self.files: dict[int, RemoteFile] = {}
        self.directories: dict[int, int] = {}
        self.open_handles = 0
        self.clients = 0
        self.prefetches: set[trio.CancelScope] = set()
        self.pinned = False
        self.idle_since_s = 0.0

    @property
    def in_use(self) -> bool:
        """Whether anybody uses it now."""
        return bool(self.directories or self.open_handles or self.clients)

    @property
    def held(self) -> bool:
        """Whether it has to stay."""
        return self.in_use or self.pinned

    @property
    def key(self) -> tuple[int, str]:
        """Equal for attachments that can be shared: the same user and the same place."""
        return self.uid, self.location.identity

    def file(self, index: int) -> RemoteFile:
        """The state of the file at that position of the manifest, kept from now on."""
        return self.files.setdefault(index, self.peek(index))

    def peek(self, index: int) -> RemoteFile:
        """The state of a file; that of one never opened is not kept."""
        if known := self.files.get(index):
            return known
        listed = self.manifest.files[index]
        pin = Pin(listed.path, listed.size, listed.mtime_ns)
        return RemoteFile(self.store, object_key(self.location, pin), pin)

    def use_store(self, store: Store) -> None:
        """Read with other credentials from now on."""
        self.store = store
        for file in self.files.values():
            file.store = store

    def cached_bytes(self, cache: Cache) -> int:
        """Bytes of its files that are in the cache."""
        sizes = zip(self.digests, self.manifest.files, strict=True)
        return sum(cache.stored_bytes(digest, file.size) for digest, file in sizes)

    def state(self, cached_bytes: int) -> State:
        """The most noteworthy state among its files."""
        states = {file.state(-1) for file in self.files.values()}
        for state in ("changed", "failing", "fetching"):
            if state in states:
                return state
        return "cached" if cached_bytes == self.manifest.size else "lazy"

    @property
    def error(self) -> str:
        """The newest error of its files, or ""; each begins with its time."""
        return max((file.error for file in self.files.values()), default="")


def object_key(location: Location, pin: Pin) -> ObjectKey:
    """The cache's name for an object of the checkpoint at `location`."""
    path = f"{location.path}/{pin.path}"
    return ObjectKey(location.store_identity, path, pin.size, pin.mtime_ns)
