"""One file of an attachment: its identity, and its state in parts.

Each part of a file's state is changed by one module, which its class names. All other modules only
read it.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import msgspec
import trio

from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._daemon.cache.object_dir import UNKNOWN, ObjectKey, Origin
from ckptfs._daemon.fetch.failed_reads import FailedReads
from ckptfs._daemon.usage.counters import Activity
from ckptfs._daemon.usage.procfs import name as name_of_process
from ckptfs._daemon.usage.procfs import process_of
from ckptfs._model.manifest import printable
from ckptfs._store.base import Pin, Store, TagOf
from ckptfs.errors import CkptfsError, NotAttached, ObjectChanged

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptfs._daemon.fetch.readahead import Readahead
    from ckptfs._daemon.usage.trace import Trace
    from ckptfs._model.formats.headers import Parts

log = logging.getLogger(__name__)

State = Literal["lazy", "fetching", "cached", "changed", "failing"]


def stamped(error: Exception) -> str:
    """The time and the text of an error, as the attribute `user.ckptfs.error` has them."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {error}"


@dataclass(eq=False, slots=True)
class Check:
    """One version check that several callers wait for.

    Attributes:
        done: The event that the check has ended.
        cancelled: Whether the check was cancelled, so that it says nothing about the version.
        error: The error of the check; None if the object is the pinned version.
    """

    done: trio.Event = field(default_factory=trio.Event)
    cancelled: bool = False
    error: CkptfsError | None = None


class FileVersion:
    """The version of a file that its attachment reads. `version_checks` changes it.

    Attributes:
        pin: The pinned version.
        trusted: Whether the store has confirmed `pin` since the checkpoint was attached.
        check_lock: The lock of the check that runs.
        next_check: The check that has not begun yet; None if no caller waits for one.
    """

    def __init__(self, pin: Pin, on_etag: "Callable[[str, TagOf], None] | None") -> None:
        self.pin = pin
        self.trusted = False
        self.check_lock = trio.Lock()
        self.next_check: Check | None = None
        self._on_etag = on_etag

    def pin_etag(self, etag: str, etag_of: TagOf = "answers") -> None:
        """Pin this ETag, which the store has named (see `Pin.etag_of`), and report a new one."""
        known = self.pin
        if etag_of == "listing":  # the object's own answers have confirmed it
            etag_of = "answers"
        self.pin = msgspec.structs.replace(known, etag=etag, etag_of=etag_of)
        is_new = etag != known.etag or (etag_of == "checks" and known.etag_of != etag_of)
        if is_new and self._on_etag is not None:
            self._on_etag(etag, etag_of)

    def restore(self, etag: str, etag_of: TagOf) -> None:
        """Pin the ETag that an earlier daemon has recorded."""
        self.pin = msgspec.structs.replace(self.pin, etag=etag, etag_of=etag_of)


class FileHealth:
    """The errors of a file. `RemoteFile.note` and `Retry` change it.

    Attributes:
        changed: Whether the object is another version now.
        failing: Whether the last request has failed.
        error: The time and the text of the last error, or "".
        cause: The text of the last temporary error that the store has answered with, or "".
    """

    def __init__(self, on_trouble: "Callable[[FileHealth], None] | None") -> None:
        self.changed = False
        self.failing = False
        self.error = ""
        self.cause = ""
        self._on_trouble = on_trouble

    def note(self, error: CkptfsError, *, is_cause: bool) -> bool:
        """Keep an error, and report what is new. Returns whether its text is new."""
        text = str(error)
        before = self.error.partition(" ")[2], self.changed, self.failing
        self.changed |= isinstance(error, ObjectChanged)
        self.failing = True
        self.error = stamped(error)
        if is_cause:
            self.cause = text
        if before != (text, self.changed, True):
            self._report()
        return before[0] != text

    def recovered(self) -> None:
        """The last error is over. `error` and `cause` keep their texts."""
        if self.failing or self.changed:
            self.failing = self.changed = False
            self._report()

    def restore(self, error: str, *, changed: bool, failing: bool) -> None:
        """Take over what an earlier daemon has recorded."""
        self.error, self.changed, self.failing = error, changed, failing

    def _report(self) -> None:
        if self._on_trouble is not None:
            self._on_trouble(self)


@dataclass(eq=False, slots=True)
class OpenState:
    """The parts of a file that exist while it is open. The `Fetcher` changes them.

    Attributes:
        count: The number of times that the file is open.
        entry: The blocks of the file in the cache; None while the file is closed.
        readahead: The readahead of the file; None while the file is closed.
    """

    count: int = 0
    entry: CachedObject | None = None
    readahead: "Readahead | None" = None


@dataclass(eq=False, slots=True)
class ReaderState:
    """The reads of programs from a file. `vfs` changes it.

    Attributes:
        served_bytes: The bytes that were handed to the kernel, which keeps them in its page cache
            while there is memory. More bytes than the file has mean that there was not enough.
        began_next: Whether this file's readers have caused a fetch of the file after it.
    """

    served_bytes: int = 0
    began_next: bool = False


@dataclass(eq=False, slots=True)
class FormatState:
    """The format of a file. `format_detection` changes it.

    The parts stay known when the file is closed, because the kernel may have kept the header in its
    page cache, and then never reads it again through the daemon.

    Attributes:
        head: The first bytes of the file, once the daemon has seen them.
        parts: The parts of the file; None while they are not known.
        is_final: Whether the daemon learns nothing more about the parts.
    """

    head: bytes = b""
    parts: "Parts | None" = None
    is_final: bool = False

    def reopened(self) -> None:
        """Look for unknown parts once more, because the file is opened again."""
        self.is_final = self.parts is not None


class RemoteFile:
    """One file of one attachment. While it is open it has blocks to read (`entry`).

    Attributes:
        key: The cache's name of the file.
        origin: What the cache says of the file's checkpoint.
        path: The path of the file in its checkpoint.
        size: The size of the file in bytes.
        user: The user that the file is shown to, if that user has limits; None for root and for the
            daemon's own user.
        activity: The counters of the file's checkpoint.
        trace: The trace of the file's reads; None for a file that is not read through the mount.
        index: The position of the file in its attachment.
        version: The pinned version.
        health: The errors.
        opened: The parts that exist while the file is open.
        reader: The reads of programs.
        format: The format.
        failed_reads: The reads that have just failed by their deadline. `vfs` adds to it.
        store: The store that the file is read from. `Attachment.use_store` replaces it.
        is_planned: Whether a plan says what will be read of the file, so that readahead need not
            guess it. `prefetch` sets it.
        flights: The number of the file's spans that are under way. `spans` counts them.
    """

    def __init__(
        self,
        store: Store,
        key: ObjectKey,
        pin: Pin,
        activity: Activity | None = None,
        user: int | None = None,
        origin: Origin = UNKNOWN,
        *,
        trace: "Trace | None" = None,
        index: int = -1,
        on_etag: "Callable[[str, TagOf], None] | None" = None,
        on_trouble: "Callable[[FileHealth], None] | None" = None,
    ) -> None:
        """`pin` is the version that the listing has named. `on_etag` is called with each ETag that
        it did not name, and `on_trouble` after each new error and after the end of an error."""
        self.key: Final = key
        self.origin: Final = origin
        self.path: Final = pin.path
        self.size: Final = pin.size
        self.user: Final = user
        self.activity: Final = activity or Activity()
        self.trace: Final = trace
        self.index: Final = index
        self.version: Final = FileVersion(pin, on_etag)
        self.health: Final = FileHealth(on_trouble)
        self.opened: Final = OpenState()
        self.reader: Final = ReaderState()
        self.format: Final = FormatState()
        self.failed_reads: Final = FailedReads()
        self.store = store
        self.is_planned = False
        self.flights = 0

    @property
    def name(self) -> str:
        """The path of the file, for messages."""
        return printable(self.path)

    @property
    def pin(self) -> Pin:
        """The pinned version."""
        return self.version.pin

    @property
    def entry(self) -> CachedObject:
        """The blocks of the file. Raises NotAttached while the file is closed."""
        entry = self.opened.entry
        if entry is None:
            raise NotAttached(
                f"{self.name} was closed, because its checkpoint is detached; attach it again"
            )
        return entry

    def learn_parts(self, parts: "Parts") -> None:
        """Use the parts of the file for its readahead from now on."""
        self.format.parts = parts
        if self.opened.readahead is not None:
            self.opened.readahead.learn_parts(parts)

    def note(self, error: CkptfsError, *, is_cause: bool = False) -> None:
        """Keep the error for the extended attributes, and log it if its text is new. `is_cause`
        says whether later timeouts name the error as their cause."""
        self.activity.failed(error)
        if self.health.note(error, is_cause=is_cause):
            about = {"event": "failing", "file": self.name, "checkpoint": self.store.name}
            log.warning("%s", error, extra={**about, "error": error.code})

    def note_reader(self, thread: int, error: Exception) -> None:
        """Keep the error of a read for the extended attributes, and log the process that has read.

        A page fault has no errno: the kernel ends the process by SIGBUS, so the process itself
        cannot say which file it was reading. `thread` is the thread that has read, as FUSE names
        it; 0 for a thread of another container.
        """
        health = self.health
        is_noted = health.changed or (health.failing and not isinstance(error, ObjectChanged))
        if isinstance(error, CkptfsError) and not is_noted:
            self.note(error)
        pid = process_of(thread) if thread else 0
        code = error.code if isinstance(error, CkptfsError) else "stale"
        reader = f"pid {pid} ({name_of_process(thread) or 'gone'})" if pid else "another container"
        about = {"event": "read-failed", "file": self.name, "checkpoint": self.store.name}
        text = f"{self.name} in {self.store.name}: a read by {reader} has failed ({code})"
        log.info("%s", text, extra={**about, "pid": pid, "error": code})

    def state(self, cached_bytes: int) -> State:
        """The value of the attribute `user.ckptfs.state`, if `cached_bytes` are on the disk."""
        if self.health.changed:
            return "changed"
        if self.health.failing:
            return "failing"
        if self.flights:
            return "fetching"
        return "cached" if cached_bytes == self.size else "lazy"
