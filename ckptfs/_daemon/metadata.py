"""The checkpoint's own metadata (``.metadata.json``): the one thing of an attachment that changes.

It is read when somebody asks for it, and again when what is known is older than `_FRESH_S`: others
may change it, too. A change reads what the store has, replaces the file as a whole, and is shown
when the store has taken it; changes of one checkpoint wait for each other (``Metadata.lock`` in
this daemon, a lock file among the processes of one user). A new version of the file gets an inode
of its own, so nothing that is open or cached of the old one is wrong.

After a change that failed the daemon does not know which version the store has, so what it knows
counts as old.

**Errors.** After an error the store is not asked again for `_PAUSE_S`, and for twice as long after
each further error, unless it is one that can pass. A denial counts as "there is none" where the
listing does not have the file (see ``_store.metadata``), and the store is asked again after
`_DENIED_S`.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Generator
from typing import Any, cast

import trio

from ckptfs._daemon.attachment import Attachment, Metadata
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.tree import Node
from ckptfs._daemon.vfs import StaleInode, is_metadata
from ckptfs._model.manifest import METADATA_NAME, ListedFile, Manifest
from ckptfs._store import metadata as stored
from ckptfs._store.base import Store
from ckptfs.errors import (
    AccessDenied,
    CkptfsError,
    MetadataError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

log = logging.getLogger(__name__)

_FRESH_S = 1.0
"""As many attributes are read one after the other, one request has to do for all of them."""
_BYTES_MAX = 4 << 20
"""Longest file whose keys are shown: parsing holds up everybody, and takes 20 times its bytes."""
_PAUSE_S = 5.0
_PAUSE_S_MAX = 60.0
"""First and longest pause after an error: programs look at attributes many times a second."""
_DENIED_S = 60.0
"""A file that other nodes make meanwhile is seen after that."""

Change = Callable[[dict[str, Any]], dict[str, Any]]


class MetadataKeeper:
    """Reads and changes metadata. All methods belong to the event loop.

    `deadline_s`: Longest time for each; can be changed.
    """

    def __init__(self, offload: Offload, deadline_s: float) -> None:
        self._offload = offload
        self.deadline_s = deadline_s

    async def values(self, attachment: Attachment) -> dict[str, Any]:
        """Keys and values; {} where there are none, or where the file is no JSON object.

        Raises AccessDenied, StoreError: The store's answer, also noted at the attachment.
        """
        metadata = attachment.metadata
        with self._deadline(attachment):
            async with metadata.lock:
                if trio.current_time() - metadata.read_s > _FRESH_S:
                    await self._read(attachment)
                return metadata.values

    async def refresh(self, attachment: Attachment) -> None:
        """Read what the store has now. Errors are noted at the attachment."""
        attachment.metadata.read_s = -math.inf
        attachment.metadata.error = None  # the client that has changed it has reached the store
        with contextlib.suppress(CkptfsError):
            await self.values(attachment)

    def listed_again(self, attachment: Attachment, manifest: Manifest) -> None:
        """The store was listed once more, while the rest of the attachment stays: show the metadata
        file as it is in `manifest`, and read it when somebody asks."""
        for file in manifest.files:
            if file.path == METADATA_NAME:
                _show_listed(attachment, file)
                break
        else:
            attachment.hide(METADATA_NAME)
        attachment.metadata.read_s = -math.inf

    async def before_absence(self, attachment: Attachment, parent: Node, name: bytes) -> None:
        """To be called before it is said that `parent` has no `name`: others may have made the
        metadata since."""
        if parent is attachment.tree.root and name == METADATA_NAME.encode():
            with contextlib.suppress(CkptfsError):
                await self.values(attachment)

    async def before_open(self, attachment: Attachment, node: Node) -> None:
        """To be called before the file of `node` is opened.

        Raises StaleInode if it is the metadata and no longer what the store has: the kernel then
        looks the name up again, and opens the new version.
        """
        if is_metadata(node):
            with contextlib.suppress(CkptfsError):  # then the version that is known has to do
                await self.values(attachment)
            if attachment.tree.root.children.get(node.name) is not node:
                raise StaleInode(node.inode)

    async def change(self, attachment: Attachment, how: Change) -> None:
        """Replace the metadata by what `how` (called in a thread) makes of it.

        Raises MetadataError, AccessDenied, StoreError, and what `how` raises.
        """
        metadata = attachment.metadata
        with self._deadline(attachment):
            async with metadata.lock:
                metadata.read_s = -math.inf  # old, whatever happens
                raw, found = await self._offload.control(
                    _change, attachment.store, how, _is_listed(attachment)
                )
                self._take(attachment, raw, found, is_new=True)

    async def _read(self, attachment: Attachment) -> None:
        metadata = attachment.metadata
        if metadata.error is not None and trio.current_time() < metadata.until_s:
            raise metadata.error
        try:
            raw, found = await self._offload.control(_read, attachment.store)
        except CkptfsError as error:
            if _is_listed(attachment) or not isinstance(error, AccessDenied):
                _pause(metadata, error)
                raise
            self._take(attachment, None, None)
            metadata.read_s += _DENIED_S - _FRESH_S
        else:
            self._take(attachment, raw, found)

    def _take(
        self,
        attachment: Attachment,
        raw: bytes | None,
        found: ListedFile | None,
        *,
        is_new: bool = False,
    ) -> None:
        """Show what the store has: the file's bytes and listing. `is_new`: a version that nobody
        can have listed before."""
        metadata = attachment.metadata
        metadata.read_s = trio.current_time()
        metadata.error, metadata.pause_s = None, 0.0
        if raw is None:
            attachment.hide(METADATA_NAME)
        elif found is not None and (is_new or metadata.raw not in (None, raw)):
            _show(attachment, found)
        elif found is not None:
            _show_listed(attachment, found)
        if raw == metadata.raw:
            return
        metadata.raw = raw
        metadata.values, metadata.shown = {}, None
        try:
            if raw is not None and len(raw) > _BYTES_MAX:
                raise MetadataError(
                    f"{METADATA_NAME} in {attachment.location.uri} has {len(raw)} bytes, more than "
                    f"{_BYTES_MAX}: its keys are no attributes"
                )
            values = stored.parse(raw, attachment.location.uri)
            if isinstance(values, dict):
                metadata.values = cast("dict[str, Any]", values)
        except MetadataError as error:
            attachment.note(error)

    @contextlib.contextmanager
    def _deadline(self, attachment: Attachment) -> Generator[None]:
        """For all of it, also for waiting until others have ended theirs; errors are noted."""
        metadata = attachment.metadata
        try:
            try:
                with trio.fail_after(self.deadline_s):
                    yield
            except trio.TooSlowError:
                raise StoreTimeout(
                    f"{METADATA_NAME} in {attachment.location.uri}: no answer within "
                    f"{self.deadline_s:g} s; try again"
                ) from None
        except CkptfsError as error:
            if error is not metadata.noted:
                if isinstance(error, StoreError | AccessDenied) and str(error) != str(
                    metadata.noted
                ):
                    log.warning("%s", error)
                metadata.noted = error
                attachment.note(error)
                if isinstance(error, StoreUnavailable) and error is not metadata.error:
                    _pause(metadata, error)  # a change, or a read that took too long
            raise


def _pause(metadata: Metadata, error: CkptfsError) -> None:
    """Do not ask the store again for a while."""
    metadata.error = error
    can_pass = isinstance(error, StoreUnavailable)
    pause_s = _PAUSE_S if can_pass else max(_PAUSE_S, 2 * metadata.pause_s)
    metadata.pause_s = min(pause_s, _PAUSE_S_MAX)
    metadata.until_s = trio.current_time() + metadata.pause_s


def _is_listed(attachment: Attachment) -> bool:
    """Whether the metadata file is among those that are shown."""
    return METADATA_NAME.encode() in attachment.tree.root.children


def _show_listed(attachment: Attachment, found: ListedFile) -> None:
    """Show the metadata file as the store lists it, if it is another version than the shown one."""
    node = attachment.tree.root.children.get(METADATA_NAME.encode())
    if node is not None and not node.is_directory:
        shown = attachment.listed[node.index]
        is_same = (shown.size, shown.mtime_ns // 10**9) == (found.size, found.mtime_ns // 10**9)
        if is_same and (shown.etag == found.etag or not shown.etag or not found.etag):
            return
    _show(attachment, found)


def _show(attachment: Attachment, found: ListedFile) -> None:
    node = attachment.tree.root.children.get(METADATA_NAME.encode())
    if node is None or not node.is_directory:  # a directory comes first: see `manifest`
        attachment.replace(found)


def _read(store: Store) -> tuple[bytes | None, ListedFile | None]:
    """Blocking."""
    raw = store.get(METADATA_NAME)
    return raw, store.find(METADATA_NAME) if raw is not None else None


def _change(store: Store, how: Change, is_listed: bool) -> tuple[bytes, ListedFile | None]:
    """Blocking."""
    return stored.change(store, how, is_listed), store.find(METADATA_NAME)
