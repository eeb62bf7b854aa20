"""One file of an attachment, as it is at the store: its pinned version, and what became of it."""

import logging
import time
from typing import TYPE_CHECKING, Literal

import msgspec
import trio

from ckptfs._daemon.activity import Activity
from ckptfs._daemon.cached import CachedObject
from ckptfs._daemon.cachedir import UNKNOWN, ObjectKey, Origin
from ckptfs._model.manifest import printable
from ckptfs._store.base import Pin, Store, TagOf
from ckptfs.errors import CkptfsError, NotAttached, ObjectChanged

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptfs._daemon.readahead import Readahead
    from ckptfs._daemon.trace import Trace
    from ckptfs._model.formats import Parts

log = logging.getLogger(__name__)

State = Literal["lazy", "fetching", "cached", "changed", "failing"]


def stamped(error: Exception) -> str:
    """Time and text of an error, as the attribute `user.ckptfs.error` has it."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {error}"


class Check:
    """A version check that has not begun yet, or its outcome."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.cancelled = False
        self.error: CkptfsError | None = None


class RemoteFile:
    """One file of one attachment. It has blocks to read (`entry`) while it is open.

    Attributes:
        activity: What happens in its checkpoint.
        pin: The pinned version.
        origin: What it is cached for.
        trusted: Whether `pin` was confirmed by the store since it was attached.
        changed: The object is another version by now.
        error: Time and text of the last error, or "".
        cause: Text of the last answer of the store that was an error which can pass, or "".
        user: One of the other users, to whom it is shown; None: root or the daemon's own.
        served_bytes: How much of it was handed to the kernel, which keeps it in its page cache as
            long as there is memory: more than the size means that there was not.
        flights: How many spans of it are under way.
        check_lock: Held while its version is checked; `next_check`: who waits for the next check.
        readahead: While it is open.
        head: Its first bytes, where they were seen; `parts`: what it consists of, where that is
            known. Both stay when it is closed: the kernel may have kept what it read.
        handed_on: The file after it was begun because of it.
        recognised: Nothing more is to be learned about its parts (see `recognise`).
        is_planned: A plan says what will be read of it: nobody has to guess.
        trace: Where it is noted how it is read; None for one that nobody reads through the mount.
        index: Its position in the trace's attachment.
    """

    def __init__(
        self,
        store: Store,
        key: ObjectKey,
        pin: Pin,
        activity: Activity | None = None,
        user: int | None = None,
        origin: Origin = UNKNOWN,
    ) -> None:
        self.user = user
        self.activity = activity or Activity()
        self.store = store
        self.key = key
        self.pin = pin
        self.origin = origin
        self.trusted = False
        self.changed = False
        self.failing = False
        self.error = ""
        self.cause = ""
        self.served_bytes = 0
        self.opens = 0
        self.flights = 0
        self.check_lock = trio.Lock()
        self.next_check: Check | None = None
        self.readahead: Readahead | None = None
        self.handed_on = False
        self.head = b""
        self.parts: Parts | None = None
        self.recognised = False
        self.is_planned = False
        self.trace: Trace | None = None
        self.index = -1
        self._entry: CachedObject | None = None
        self.on_etag: Callable[[str, TagOf], None] | None = None  # told what no listing says
        self.on_trouble: Callable[[], None] = lambda: None  # told of other errors, or their end

    def pin_etag(self, etag: str, etag_of: TagOf = "answers") -> None:
        """The pinned version turned out to have this ETag; see `Pin.etag_of`."""
        known = self.pin
        if etag_of == "listing":  # the object's own answers have confirmed it
            etag_of = "answers"
        self.pin = msgspec.structs.replace(known, etag=etag, etag_of=etag_of)
        is_news = etag != known.etag or (etag_of == "checks" and known.etag_of != etag_of)
        if is_news and self.on_etag is not None:
            self.on_etag(etag, etag_of)

    @property
    def name(self) -> str:
        """Its path, for messages."""
        return printable(self.pin.path)

    @property
    def entry(self) -> CachedObject:
        """Its blocks; only while the file is open."""
        if self._entry is None:
            raise NotAttached(f"{self.name} was closed: its checkpoint is detached")
        return self._entry

    @entry.setter
    def entry(self, entry: CachedObject | None) -> None:
        self._entry = entry

    def learn_parts(self, parts: "Parts") -> None:
        """Take in what the file consists of."""
        self.parts = parts
        if self.readahead is not None:
            self.readahead.learn_parts(parts)

    def note(self, error: CkptfsError) -> None:
        """Keep the error where the attributes find it, and log it where it is new."""
        self.activity.failed(error)
        said = self.error.partition(" ")[2], self.changed, self.failing
        self.changed |= isinstance(error, ObjectChanged)
        self.failing = True
        self.error = stamped(error)
        if str(error) != said[0]:
            about = {"event": "failing", "file": self.name, "checkpoint": self.store.name}
            log.warning("%s", error, extra={**about, "error": error.code})
        if (str(error), self.changed, True) != said:
            self.on_trouble()

    def is_well(self) -> None:
        """What was noted last is over; the attribute goes on saying what it was."""
        if self.failing or self.changed:
            self.failing = self.changed = False
            self.on_trouble()

    def state(self, cached_bytes: int) -> State:
        """What the attribute `user.ckptfs.state` says, where `cached_bytes` of it are on disk."""
        if self.changed:
            return "changed"
        if self.failing:
            return "failing"
        if self.flights:
            return "fetching"
        return "cached" if cached_bytes == self.pin.size else "lazy"
