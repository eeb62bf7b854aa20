"""An attached checkpoint: its snapshot, its leases, and the state of its files."""

import gc
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from ckptfs._daemon.attachment.inodes import Node
from ckptfs._daemon.attachment.journal import (
    OWN,
    EtagLearned,
    FileHidden,
    FileShown,
    Made,
    PinSet,
    Record,
    Trouble,
    unrecorded,
)
from ckptfs._daemon.attachment.leases import Leases
from ckptfs._daemon.attachment.snapshot import Snapshot
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.object_dir import Origin
from ckptfs._daemon.fetch.remote_file import RemoteFile, State, stamped
from ckptfs._daemon.quotas import cache_scope, is_ours, saved_scope
from ckptfs._daemon.usage.counters import Activity
from ckptfs._daemon.usage.trace import About, Key, Trace
from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile, Manifest
from ckptfs._model.volume import Volume
from ckptfs._store.base import Store, pin_of
from ckptfs.errors import CkptfsError

if TYPE_CHECKING:
    from ckptfs._model.formats.headers import Parts


class Metadata:
    """The daemon's copy of a checkpoint's own metadata (its file ``.metadata.json``).

    Attributes:
        raw: The file's bytes; None if the store has no such file.
        values: The keys and values; empty if the file is not a JSON object.
        shown: The result of `xattrs.shown_values` for `values`; None until it is needed.
        read_s: When the daemon last read the file (event loop time).
        error: The store's last answer, if that was an error.
        noted: The last error that the log and the attribute have.
        pause_s: Pause after `error`, in which the daemon does not ask the store.
        until_s: End of that pause.
        lock: Taken while the daemon reads or changes the file at the store.
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
    """One checkpoint of one user, or of one volume.

    Args:
        ordinal: The upper half of its inode numbers.
        made: The checkpoint, its manifest, and the user. The attachment does not keep the
            credentials of `made.location`.
        store: Reads the files.
        replay: Brings a new snapshot up to date, after another daemon.

    Attributes:
        location: The checkpoint's location, without credentials.
        cache_scope: Suffix of the store in the cache's keys, see `quotas.cache_scope` and
            `quotas.saved_scope`.
        manifest: The checkpoint's files when it was attached.
        attached_s: When that was, in seconds since the epoch.
        volume: The volume that it is for, or None.
        name: The path of its directory in the mount. Users and volumes of one place have a
            directory each.
        origin: The cache's record of where its files come from.
        leases: The reasons why it stays.
        metadata: The checkpoint's own metadata.
        format: Value of ``user.ckptfs.format``; "" until it is needed.
        layouts: Parts of files according to the ``.metadata`` beside them, by the position of that
            ``.metadata`` and the file's name; None while the daemon reads it.
        activity: Its counters.
        own_error: Time and text of the last error that concerns no single file, or "".
        background: Tasks that run for it. They are cancelled at its end.
        kept: Number of prefetches that keep a file in the cache (`retention`), by position.
        stays: Positions of files that are complete in the cache and stay until its end.
        record: Writes events for the next daemon.
        trace: The trace of its reads; None until it is shown.
    """

    def __init__(
        self,
        ordinal: int,
        made: Made,
        store: Store,
        replay: "Callable[[Attachment], None]" = lambda _: None,
    ) -> None:
        self.ordinal = ordinal
        scope_of = saved_scope if made.has_saved else cache_scope
        self.cache_scope = scope_of(made.uid, made.location, made.volume)
        self.location = msgspec.structs.replace(made.location, secrets={})
        self.manifest = made.manifest
        self.uid = made.uid
        self.gid = made.gid
        self.volume = made.volume
        self.attached_s = made.attached_s
        self.store = store
        self.name = self.location.directory
        if self.volume is not None:
            self.name = self.volume.name
        elif self.uid != os.geteuid():
            self.name += f"-{self.uid}"
        self.origin = Origin(
            self.location.directory,
            self.location.uri,
            self.location.path,
            self.manifest.size,
            self.uid,
        )
        self.leases = Leases()
        self.metadata = Metadata()
        self.format = ""
        self.layouts: dict[int, dict[bytes, Parts] | None] = {}
        self.activity = Activity()
        self.own_error = ""
        self.background: set[trio.CancelScope] = set()
        self.kept: Counter[int] = Counter()
        self.stays: set[int] = set()
        self.record: Record = unrecorded
        self.trace: Trace | None = None
        self._snapshot: Snapshot | None = None
        self._replay = replay
        self._files: dict[int, RemoteFile] = {}

    @property
    def key(self) -> Key:
        """Equal for attachments that can be shared: the same user, place and volume."""
        return key_of(self.uid, self.location, self.volume)

    def about(self) -> About:
        """The head of its trace."""
        return About(
            uri=self.location.uri,
            version=self.manifest.version,
            attached_s=self.attached_s,
            file_count=len(self.manifest.files),
            size=self.manifest.size,
        )

    @property
    def snapshot(self) -> Snapshot:
        """The files that it shows. They are built at the first access, in 2 ms for 1,000 files."""
        if self._snapshot is None:
            with _uncollected():
                self._snapshot = Snapshot(
                    self.ordinal, self.location, self.manifest, self.attached_s, self.cache_scope
                )
            self._replay(self)
        return self._snapshot

    @property
    def files(self) -> dict[int, RemoteFile]:
        """The files that were opened so far, by position in `snapshot.listed`."""
        _ = self.snapshot  # an earlier daemon may have recorded some
        return self._files

    def file(self, index: int) -> RemoteFile:
        """The state of the file at that position of `snapshot.listed`, kept from now on."""
        if known := self.files.get(index):
            return known
        self.files[index] = file = self.peek(index)
        return file

    def peek(self, index: int) -> RemoteFile:
        """The state of a file, which is kept only if the file was opened before."""
        if known := self.files.get(index):
            return known
        return RemoteFile(
            self.store,
            self.snapshot.key(index),
            pin_of(self.snapshot.listed[index]),
            self.activity,
            None if is_ours(self.uid) else self.uid,
            self.origin,
            trace=self.trace,
            index=index,
            on_etag=lambda etag, etag_of: self.record(EtagLearned(index, etag, etag_of)),
            on_trouble=lambda health: self.record(
                Trouble(index, health.error, changed=health.changed, failing=health.failing)
            ),
        )

    def use_store(self, store: Store) -> None:
        """Read with other credentials from now on."""
        if store is not self.store:
            self.store.close()
        self.store = store
        for file in self.files.values():
            file.store = store

    def pin(self, pinned: bool) -> None:
        """Keep it until a user detaches it, or no longer."""
        if pinned != self.leases.pinned:
            self.leases.pinned = pinned
            self.record(PinSet(pinned))

    def replace(self, file: ListedFile) -> Node:
        """Show this version of a file of the root from now on. Open files keep their version."""
        self.record(FileShown(file))
        return self.snapshot.replace(file)

    def hide(self, path: str) -> None:
        """Hide a file of the root, if the snapshot has it. Open files stay readable."""
        if path.encode() in self.snapshot.tree.root.children:
            self.record(FileHidden(path))
            self.snapshot.hide(path)

    def note(self, error: CkptfsError) -> None:
        """Keep an error that concerns no single file for the attribute."""
        self.own_error = stamped(error)
        self.record(Trouble(OWN, self.own_error))

    def cached_bytes(self, cache: Cache) -> int:
        """Bytes of its files that are in the cache."""
        digest = self.snapshot.digest
        return sum(cache.stored_bytes(digest(i)) for i, _ in self.snapshot.shown())

    def state(self, cached_bytes: int) -> State:
        """The most noteworthy state among its files."""
        replaced = self.snapshot.replaced
        states = {file.state(-1) for i, file in self.files.items() if i not in replaced}
        for state in ("changed", "failing", "fetching"):
            if state in states:
                return state
        return "cached" if cached_bytes == self.snapshot.size else "lazy"

    @property
    def error(self) -> str:
        """The newest error, or "". Each error begins with its time."""
        return max([self.own_error, *(file.health.error for file in self.files.values())])


def key_of(uid: int, location: Location, volume: Volume | None = None) -> Key:
    """The `Attachment.key` of a user's attachment of that place, for a volume if there is one."""
    return uid, location.identity, "" if volume is None else volume.id


def new_attachment(
    ordinal: int,
    location: Location,
    store: Store,
    manifest: Manifest,
    uid: int,
    gid: int,
    *,
    volume: Volume | None = None,
    has_saved: bool = False,
) -> Attachment:
    """Blocking. A new attachment of the checkpoint at `location`, with the digests of its files."""
    made = Made(location, manifest, uid, gid, time.time(), has_saved, volume)
    attachment = Attachment(ordinal, made, store)
    attachment.snapshot.digests()
    return attachment


@contextmanager
def _uncollected() -> Generator[None]:
    """Stop the garbage collector. It would visit the many new objects again and again, which takes
    half of the time that they need."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
