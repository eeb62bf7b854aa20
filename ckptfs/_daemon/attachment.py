"""An attached checkpoint: its snapshot, who holds it, and the state of its files."""

import gc
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from ckptfs._daemon.activity import Activity
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cachedir import Origin
from ckptfs._daemon.records import (
    OWN,
    EtagLearned,
    FileHidden,
    FileShown,
    PinSet,
    Record,
    Trouble,
    unrecorded,
)
from ckptfs._daemon.remote import RemoteFile, State, stamped
from ckptfs._daemon.snapshot import Snapshot
from ckptfs._daemon.trace import About, Trace
from ckptfs._daemon.tree import Node, Tree
from ckptfs._daemon.users import cache_scope, is_ours
from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile, Manifest
from ckptfs._store.base import Store, pin_of
from ckptfs.errors import CkptfsError

if TYPE_CHECKING:
    from ckptfs._model.formats import Parts


class Metadata:
    """What is known of a checkpoint's own metadata (its file ``.metadata.json``).

    Attributes:
        raw: The file's bytes; None where there is none.
        values: The keys and values; empty if the file is no JSON object.
        shown: What `xattrs.shown_values` makes of them; None until somebody asks.
        read_s: When that was so (event loop time).
        error: The store's last answer, if that was an error.
        noted: The last error that the log and the attribute have.
        pause_s: How long the store is not asked again after `error`; `until_s`: until when.
        lock: Held by whoever reads or changes it at the store.
    """

    def __init__(self) -> None:
        self.raw: bytes | None = None
        self.values: dict[str, Any] = {}
        self.shown: tuple[dict[str, bytes], list[tuple[str, str]]] | None = None
        self.read_s = -math.inf
        self.error: CkptfsError | None = None
        self.noted: CkptfsError | None = None
        self.pause_s = 0.0
        self.until_s = -math.inf
        self.lock = trio.Lock()


class Attachment:
    """One checkpoint of one user.

    Attributes:
        location: Where it is, without credentials.
        cache_scope: Of its cached bytes (see `users`).
        manifest: What it held when it was attached.
        name: Its directory inside the mount.
        origin: What the cache says of its files.
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
        uid: int,
        gid: int,
        attached_s: float = 0.0,
        since: "Callable[[Attachment], None]" = lambda _: None,
        cache_scope: str = "",
    ) -> None:
        self.cache_scope = cache_scope
        self.ordinal = ordinal
        self.location = location
        self.store = store
        self.manifest = manifest
        self.format = ""
        self.metadata = Metadata()
        self.layouts: dict[int, dict[bytes, Parts] | None] = {}
        self.activity = Activity()
        self.own_error = ""
        self.uid = uid
        self.gid = gid
        self.attached_s = attached_s or time.time()
        self._snapshot: Snapshot | None = None
        self._since = since
        # Users of one place have a directory each.
        self.name = location.directory
        if uid != os.geteuid():
            self.name += f"-{uid}"
        self.origin = Origin(location.directory, location.uri, location.path, manifest.size, uid)
        self._files: dict[int, RemoteFile] = {}
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
        return About(*at, len(self.manifest.files), self.manifest.size)

    @property
    def snapshot(self) -> Snapshot:
        """What it shows; made when it is first needed, which takes 2 ms for 1,000 files."""
        if self._snapshot is None:
            with _uncollected():
                self._snapshot = Snapshot(
                    self.ordinal,
                    self.location,
                    self.manifest,
                    self.attached_s,
                    self.cache_scope,
                )
            self._since(self)
        return self._snapshot

    @property
    def tree(self) -> Tree:
        """Its inodes."""
        return self.snapshot.tree

    @property
    def listed(self) -> list[ListedFile]:
        """The manifest's files, and behind them newer versions (of the metadata file)."""
        return self.snapshot.listed

    @property
    def size(self) -> int:
        """Bytes of all files that it shows."""
        return self.snapshot.size

    @property
    def files(self) -> dict[int, RemoteFile]:
        """The files that were opened so far, by position in `listed`."""
        _ = self.snapshot  # some may have been recorded
        return self._files

    def file(self, index: int) -> RemoteFile:
        """The state of the file at that position of `listed`, kept from now on."""
        if known := self.files.get(index):
            return known
        file = self.files[index] = self.peek(index)
        file.on_etag = lambda etag, of: self.record(EtagLearned(index, etag, of))
        file.trace, file.index = self.trace, index
        file.on_trouble = lambda: self.record(
            Trouble(index, file.error, changed=file.changed, failing=file.failing)
        )
        return file

    def peek(self, index: int) -> RemoteFile:
        """The state of a file; that of one never opened is not kept."""
        if known := self.files.get(index):
            return known
        pin, key = pin_of(self.listed[index]), self.snapshot.key(index)
        user = None if is_ours(self.uid) else self.uid
        return RemoteFile(self.store, key, pin, self.activity, user, self.origin)

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
        return self.snapshot.shown()

    @property
    def file_count(self) -> int:
        """How many files it shows."""
        return len(self.listed) - len(self.snapshot.replaced)

    def replace(self, file: ListedFile) -> Node:
        """Show this version of a file of the root from now on. Open files stay what they are."""
        self.record(FileShown(file))
        return self.snapshot.replace(file)

    def hide(self, path: str) -> None:
        """Show that file of the root, if there is one, no more. Open files stay what they are."""
        if path.encode() in self.tree.root.children:
            self.record(FileHidden(path))
            self.snapshot.hide(path)

    def note(self, error: CkptfsError) -> None:
        """Keep an error that is no file's where the attribute finds it."""
        self.own_error = stamped(error)
        self.record(Trouble(OWN, self.own_error))

    def cached_bytes(self, cache: Cache) -> int:
        """Bytes of its files that are in the cache."""
        digest = self.snapshot.digest
        return sum(cache.stored_bytes(digest(i), file.size) for i, file in self.shown())

    def state(self, cached_bytes: int) -> State:
        """The most noteworthy state among its files."""
        replaced = self.snapshot.replaced
        states = {file.state(-1) for i, file in self.files.items() if i not in replaced}
        for state in ("changed", "failing", "fetching"):
            if state in states:
                return state
        return "cached" if cached_bytes == self.size else "lazy"

    @property
    def error(self) -> str:
        """The newest error, or ""; each begins with its time."""
        return max([self.own_error, *(file.error for file in self.files.values())])


def new_attachment(
    ordinal: int, location: Location, store: Store, manifest: Manifest, uid: int, gid: int
) -> Attachment:
    """Blocking. An attachment at `location`, whose names are computed here."""
    public = msgspec.structs.replace(location, secrets={})
    scope = cache_scope(uid, location)
    attachment = Attachment(ordinal, public, store, manifest, uid, gid, cache_scope=scope)
    attachment.snapshot.digests()
    return attachment


@contextmanager
def _uncollected() -> Generator[None]:
    """Without the garbage collector, which looks again and again at so many new objects: half of
    the time that they take."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
