"""An attached checkpoint: its snapshot, who holds it, and the state of its files."""

import math
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from ckptfs._daemon.activity import Activity
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cachedir import ObjectKey, Origin
from ckptfs._daemon.records import EtagLearned, FileHidden, FileShown, PinSet, Record, unrecorded
from ckptfs._daemon.remote import RemoteFile, State, stamped
from ckptfs._daemon.trace import About, Trace
from ckptfs._daemon.tree import Node, Tree
from ckptfs._daemon.users import is_ours
from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile, Manifest
from ckptfs._store.base import Store, pin_of
from ckptfs.errors import CkptfsError, StoreUnavailable

if TYPE_CHECKING:
    from ckptfs._model.formats import Parts


class Metadata:
    """What is known of a checkpoint's own metadata (its file ``.metadata.json``).

    Attributes:
        raw: The file's bytes; None where there is none.
        values: The keys and values; empty if the file is no JSON object.
        shown: What `xattrs.shown_values` makes of them; None until somebody asks.
        read_s: When that was so (event loop time).
        error: What the store answered last time, if that was an error which can pass; `failed_s`:
            when.
        lock: Held by whoever reads or changes it at the store.
    """

    def __init__(self) -> None:
        self.raw: bytes | None = None
        self.values: dict[str, Any] = {}
        self.shown: tuple[dict[str, bytes], list[tuple[str, str]]] | None = None
        self.read_s = -math.inf
        self.error: StoreUnavailable | None = None
        self.failed_s = -math.inf
        self.lock = trio.Lock()


class Attachment:
    """One checkpoint of one user.

    Attributes:
        location: Where it is, without credentials.
        manifest: What it held when it was attached.
        name: Its directory inside the mount.
        origin: What the cache says of its files.
        listed: The manifest's files, and behind them newer versions (of the metadata file).
        digests: Cache digest of each of them.
        replaced: Positions of those that are no longer shown.
        files: The files that were opened so far, by position.
        size: Bytes of all files that it shows.
        metadata: What is known of the checkpoint's own metadata.
        format: As ``user.ckptfs.format`` says; "" until somebody asks.
        layouts: The parts of files as a ``.metadata`` beside them says, by position of that
            ``.metadata`` and the file's name; None while it is being read.
        activity: What happens in it.
        own_error: Time and text of the last error that is no file's, or "".
        directories: Open directory handles of its root, with the process that opened each.
        open_handles: How many other handles are open in it.
        clients: How many control connections hold it.
        background: What runs for it and ends with it; cancelled then.
        pinned: It stays until it is detached.
        attached_s: When, seconds since the epoch.
        idle_since_s: When its last holder went (event loop time).
        record: Writes down what the next daemon has to know.
        trace: How it is read; None until it is shown.
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
        attached_s: float = 0.0,
    ) -> None:
        self.ordinal = ordinal
        self.location = location
        self.store = store
        self.manifest = manifest
        self.listed = list(manifest.files)
        self.digests = digests
        self.replaced: set[int] = set()
        self.size = manifest.size
        self.format = ""
        self.metadata = Metadata()
        self.layouts: dict[int, dict[bytes, Parts] | None] = {}
        self.activity = Activity()
        self.own_error = ""
        self.uid = uid
        self.gid = gid
        self.attached_s = attached_s or time.time()
        self.tree = Tree(ordinal, manifest, int(self.attached_s * 1e9))
        # Users of one place have a directory each.
        self.name = location.directory
        if uid != os.geteuid():
            self.name += f"-{uid}"
        self.origin = Origin(location.directory, location.uri, location.path, manifest.size, uid)
        self.files: dict[int, RemoteFile] = {}
        self.directories: dict[int, int] = {}
        self.open_handles = 0
        self.clients = 0
        self.background: set[trio.CancelScope] = set()
        self.pinned = False
        self.idle_since_s = 0.0
        self.record: Record = unrecorded
        self.trace: Trace | None = None

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

    def about(self) -> About:
        """What its trace says of it."""
        at = self.location.uri, self.manifest.version, self.attached_s
        return About(*at, self.file_count, self.size)

    def file(self, index: int) -> RemoteFile:
        """The state of the file at that position of `listed`, kept from now on."""
        if known := self.files.get(index):
            return known
        file = self.files[index] = self.peek(index)
        file.on_etag = lambda etag: self.record(EtagLearned(index, etag))
        if self.trace is not None:
            file.trace = self.trace.of(index)
        return file

    def peek(self, index: int) -> RemoteFile:
        """The state of a file; that of one never opened is not kept."""
        if known := self.files.get(index):
            return known
        listed = self.listed[index]
        key = object_key(self.location, listed)
        user = None if is_ours(self.uid) else self.uid
        return RemoteFile(self.store, key, pin_of(listed), self.activity, user, self.origin)

    def use_store(self, store: Store) -> None:
        """Read with other credentials from now on."""
        if store is not self.store:
            self.store.close()
        self.store = store
        for file in self.files.values():
            file.store = store

    def pin(self, pinned: bool) -> None:
        """Have it stay until it is detached, or no longer."""
        if pinned != self.pinned:
            self.pinned = pinned
            self.record(PinSet(pinned))

    def shown(self) -> Iterator[tuple[int, ListedFile]]:
        """The files that it shows now, with their positions in `listed`."""
        return ((i, file) for i, file in enumerate(self.listed) if i not in self.replaced)

    @property
    def file_count(self) -> int:
        """How many files it shows."""
        return len(self.listed) - len(self.replaced)

    def replace(self, file: ListedFile) -> Node:
        """Show this version of a file of the root from now on. Open files stay what they are."""
        self.record(FileShown(file))
        self._hide(file.path)
        index = len(self.listed)
        if file.mtime_ns:
            file = msgspec.structs.replace(file, mtime_ns=_told_apart(file.mtime_ns, index))
        self.listed.append(file)
        self.digests.append(object_key(self.location, file).digest())
        self.size += file.size
        return self.tree.replace(file, index)

    def hide(self, path: str) -> None:
        """Show that file of the root, if there is one, no more. Open files stay what they are."""
        if path.encode() in self.tree.root.children:
            self.record(FileHidden(path))
            self._hide(path)

    def _hide(self, path: str) -> None:
        node = self.tree.remove(path)
        if node is not None:
            self.replaced.add(node.index)
            self.size -= node.size

    def note(self, error: CkptfsError) -> None:
        """Keep an error that is no file's where the attribute finds it."""
        self.own_error = stamped(error)

    def cached_bytes(self, cache: Cache) -> int:
        """Bytes of its files that are in the cache."""
        return sum(cache.stored_bytes(self.digests[i], file.size) for i, file in self.shown())

    def state(self, cached_bytes: int) -> State:
        """The most noteworthy state among its files."""
        states = {file.state(-1) for i, file in self.files.items() if i not in self.replaced}
        for state in ("changed", "failing", "fetching"):
            if state in states:
                return state
        return "cached" if cached_bytes == self.size else "lazy"

    @property
    def error(self) -> str:
        """The newest error, or ""; each begins with its time."""
        return max([self.own_error, *(file.error for file in self.files.values())])


def _told_apart(mtime_ns: int, serial: int) -> int:
    """Another time in the same second: a store's clock may tick in seconds, and the cache must not
    take one version for another, while `Store.confirm` compares seconds."""
    nudge = 1 + serial % 999
    return mtime_ns + (nudge if mtime_ns % 10**9 + nudge < 10**9 else -nudge)


def new_attachment(
    ordinal: int,
    location: Location,
    store: Store,
    manifest: Manifest,
    uid: int,
    gid: int,
    attached_s: float = 0.0,
) -> Attachment:
    """Blocking. An attachment, whose names are computed here."""
    public = msgspec.structs.replace(location, secrets={})
    digests = [object_key(public, file).digest() for file in manifest.files]
    return Attachment(ordinal, public, store, manifest, digests, uid, gid, attached_s)


def object_key(location: Location, file: ListedFile) -> ObjectKey:
    """The cache's name for an object of the checkpoint at `location`."""
    path = f"{location.path}/{file.path}"
    return ObjectKey(location.store_identity, path, file.size, file.mtime_ns)
