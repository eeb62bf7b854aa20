"""The checkpoint's own metadata (``.metadata.json``), the one file of an attachment that changes.

The daemon reads it on demand, and again when its copy is older than `_FRESH_S`, because other nodes
may change it, too. A change reads the store's version, replaces the file as a whole, and is shown
when the store has accepted it. Changes of one checkpoint wait for each other (``Metadata.lock`` in
this daemon, a lock file among the processes of one user). A new version of the file gets an inode
of its own, so open handles and cached blocks of the old version stay right.

After a failed change the daemon does not know which version the store has, so its copy counts as
old.

**Errors.** After an error the daemon does not ask the store again for `_PAUSE_S`. The pause doubles
with each further error, unless the error is temporary. If the listing does not have the file, a
denial means that the checkpoint has no metadata (see ``_store.metadata``), and the daemon asks the
store again after `_DENIED_S`.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, cast

import trio

from ckptfs._daemon.attachment.attachment import Attachment, Metadata
from ckptfs._daemon.attachment.inodes import Node, StaleInode, is_metadata
from ckptfs._daemon.offload import Offload
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
"""A program reads many attributes in a row, and one request has to be enough for all of them."""
_BYTES_MAX = 4 << 20
"""Longest file whose keys are shown. Parsing it blocks the event loop, and takes 20 times its
bytes."""
_PAUSE_S = 5.0
_PAUSE_S_MAX = 60.0
"""First and longest pause after an error, because programs read attributes many times a second."""
_DENIED_S = 60.0
"""After this time the daemon sees a file that another node has created since."""

Change = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(eq=False)
class MetadataKeeper:
    """Reads and changes metadata. All methods belong to the event loop.

    Attributes:
        deadline_s: Longest time for each call. The daemon may change it.
    """

    offload: Offload
    deadline_s: float

    async def values(self, attachment: Attachment, fresh_s: float = _FRESH_S) -> dict[str, Any]:
        """Keys and values; {} if the file is missing or not a JSON object. The daemon reads the
        file again if its copy is older than `fresh_s`.

        Raises:
            AccessDenied, StoreError: The store's answer, also noted at the attachment.
        """
        metadata = attachment.metadata
        with self._deadline(attachment):
            async with metadata.lock:
                if trio.current_time() - metadata.read_s > fresh_s:
                    await self._read(attachment)
                return metadata.values

    async def refresh(self, attachment: Attachment) -> None:
        """Read the store's version now. Errors are noted at the attachment."""
        attachment.metadata.read_s = -math.inf
        attachment.metadata.error = None  # the changing client has reached the store
        with contextlib.suppress(CkptfsError):
            await self.values(attachment)

    def listed_again(self, attachment: Attachment, manifest: Manifest) -> None:
        """Show the metadata file of a newer listing, while the rest of the attachment stays. The
        daemon reads the file on demand."""
        for file in manifest.files:
            if file.path == METADATA_NAME:
                _show_listed(attachment, file)
                break
        else:
            attachment.hide(METADATA_NAME)
        attachment.metadata.read_s = -math.inf

    async def before_absence(self, attachment: Attachment, parent: Node, name: bytes) -> None:
        """Look for new metadata before the daemon reports that `parent` has no `name`, because
        another node may have created it since."""
        if parent is attachment.snapshot.tree.root and name == METADATA_NAME.encode():
            with contextlib.suppress(CkptfsError):
                await self.values(attachment)

    async def before_open(self, attachment: Attachment, node: Node) -> None:
        """Check the metadata before an open of `node`.

        Raises StaleInode if the store has a newer version. Then the kernel looks the name up again,
        and opens that version.
        """
        if is_metadata(node):
            with contextlib.suppress(CkptfsError):  # without the store, the known version counts
                await self.values(attachment)
            if attachment.snapshot.tree.root.children.get(node.name) is not node:
                raise StaleInode(node.inode)

    async def change(self, attachment: Attachment, how: Change) -> None:
        """Replace the metadata by the result of `how`, which runs in a thread.

        Raises MetadataError, AccessDenied, StoreError, and what `how` raises.
        """
        metadata = attachment.metadata
        with self._deadline(attachment):
            async with metadata.lock:
                metadata.read_s = -math.inf  # old, also after an error
                raw, found = await self.offload.control(
                    _change, attachment.store, how, _is_listed(attachment)
                )
                self._apply(attachment, raw, found, is_new=True)

    async def _read(self, attachment: Attachment) -> None:
        metadata = attachment.metadata
        if metadata.error is not None and trio.current_time() < metadata.until_s:
            raise metadata.error
        try:
            raw, found = await self.offload.control(_read, attachment.store)
        except CkptfsError as error:
            if _is_listed(attachment) or not isinstance(error, AccessDenied):
                _pause(metadata, error)
                raise
            self._apply(attachment, None, None)
            metadata.read_s += _DENIED_S - _FRESH_S
        else:
            self._apply(attachment, raw, found)

    def _apply(
        self,
        attachment: Attachment,
        raw: bytes | None,
        found: ListedFile | None,
        *,
        is_new: bool = False,
    ) -> None:
        """Show the store's version, from its bytes and its listing. `is_new` says that no earlier
        listing can have this version."""
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
                    f"{_BYTES_MAX}, so its keys are not shown as attributes; ckptfs meta list "
                    "shows them"
                )
            values = stored.parse(raw, attachment.location.uri)
            if isinstance(values, dict):
                metadata.values = cast("dict[str, Any]", values)
        except MetadataError as error:
            attachment.note(error)

    @contextlib.contextmanager
    def _deadline(self, attachment: Attachment) -> Generator[None]:
        """Bound the time of a call, with its wait for the lock, and note its error."""
        metadata = attachment.metadata
        try:
            try:
                with trio.fail_after(self.deadline_s):
                    yield
            except trio.TooSlowError:
                raise StoreTimeout(
                    f"{METADATA_NAME} in {attachment.location.uri}: no answer of the store within "
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
    metadata.error = error
    can_pass = isinstance(error, StoreUnavailable)
    pause_s = _PAUSE_S if can_pass else max(_PAUSE_S, 2 * metadata.pause_s)
    metadata.pause_s = min(pause_s, _PAUSE_S_MAX)
    metadata.until_s = trio.current_time() + metadata.pause_s


def _is_listed(attachment: Attachment) -> bool:
    return METADATA_NAME.encode() in attachment.snapshot.tree.root.children


def _show_listed(attachment: Attachment, found: ListedFile) -> None:
    """Show the listed metadata file, unless its version is shown already."""
    node = attachment.snapshot.tree.root.children.get(METADATA_NAME.encode())
    if node is not None and not node.is_directory:
        shown = attachment.snapshot.listed[node.index]
        is_same = (shown.size, shown.mtime_ns // 10**9) == (found.size, found.mtime_ns // 10**9)
        if is_same and (shown.etag == found.etag or not shown.etag or not found.etag):
            return
    _show(attachment, found)


def _show(attachment: Attachment, found: ListedFile) -> None:
    node = attachment.snapshot.tree.root.children.get(METADATA_NAME.encode())
    if node is None or not node.is_directory:  # a directory has precedence, see `manifest`
        attachment.replace(found)


def _read(store: Store) -> tuple[bytes | None, ListedFile | None]:
    """Blocking. The metadata's bytes and listing."""
    raw = store.get(METADATA_NAME)
    return raw, store.find(METADATA_NAME) if raw is not None else None


def _change(store: Store, how: Change, is_listed: bool) -> tuple[bytes, ListedFile | None]:
    """Blocking. The bytes and the listing after the change."""
    return stored.change(store, how, is_listed), store.find(METADATA_NAME)
