"""Recognition: what parts an open file has, by what is in the files, for its readahead.

`Recogniser.look` is called before each access to a file until everything is known. It waits for
nothing: it looks at what is there, and starts a task for what has to be fetched first (behind what
readers wait for). Until that has ended, the file is read as one that nobody knows.

- safetensors: the header, as soon as the reader has it.
- torch.distributed.checkpoint: the ``.metadata`` in the file's directory, once per attachment, when
  it or a larger file beside it is read; only its beginning if it is something else.
- zip archives (torch.save, numpy.savez): when the file's beginning is there and says so, its end,
  where the central directory is. Later than the ``.metadata``, because the files of
  torch.distributed.checkpoint are archives one after the other, and their end says nothing.

What cannot be fetched or makes no sense is not asked for again before the file is opened again (the
``.metadata``: in this attachment); errors are noted at the files.
"""

import logging
import os
from collections.abc import Awaitable, Callable

import trio

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.layouts import bytes_of, of_metadata
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.remote import RemoteFile
from ckptfs._daemon.slots import Priority
from ckptfs._daemon.tree import Node
from ckptfs._model import dcp, formats
from ckptfs._model.blocks import BLOCK_BYTES, blocks_of
from ckptfs._model.formats import Parts
from ckptfs.errors import CkptfsError

log = logging.getLogger(__name__)

_SMALL_BYTES = 4 * BLOCK_BYTES
"""Files that are not larger gain nothing: readahead trusts in a part after three blocks of it."""
_HEAD_BYTES = formats.SAFETENSORS_PREFIX_BYTES + 1
"""Enough to tell the formats apart."""
_HOLD_S = 10.0
"""How long the beginning of the next file stays in memory where nobody opens it, if nothing else
needs that memory. From the disk it would come back 1 MiB at a time, and be checked."""


class Recogniser:
    """Teaches the readahead of open files. Its tasks run in `nursery`."""

    def __init__(self, fetcher: Fetcher, offload: Offload, nursery: trio.Nursery) -> None:
        self._fetcher = fetcher
        self._offload = offload
        self._nursery = nursery

    def look(self, attachment: Attachment, node: Node) -> None:
        """Learn about the open file of `node` what can be learned by now.

        Ends the validity of what `Fetcher.read_now` returned.
        """
        file = attachment.file(node.index)
        if node.name == dcp.NAME:
            self._layout_beside(attachment, node)
            file.recognised = True
            return
        is_large = node.size > _SMALL_BYTES
        layout = self._layout_beside(attachment, node) if is_large else {}
        if layout and (parts := layout.get(node.name)):
            file.learn_parts(parts)
            file.recognised = True
            return
        self.look_at_head(file)
        if file.head.startswith(formats.ZIP_MAGIC) and layout is not None:
            if is_large:
                self._start(attachment, file, lambda: self._learn_zip(file))
            file.recognised = True

    def begin_next(self, attachment: Attachment, node: Node) -> None:
        """Fetch the beginning of the file after that of `node`, of the same kind: files are being
        read as a whole, one after the other, and this one is asked for to its end."""
        if node.parent is None:
            return
        suffix = os.path.splitext(node.name)[1]
        if not suffix:
            return
        later = (
            child
            for child in node.parent.children.values()
            if child.name > node.name and child.size and child.name.endswith(suffix)
        )
        following = min(later, key=lambda child: child.name, default=None)
        if following is None:
            return
        file = attachment.file(following.index)
        length = min(following.size, self._fetcher.window_bytes_max)
        if length:
            self._start(attachment, file, lambda: self._begin(file, length))

    async def _begin(self, file: RemoteFile, length: int) -> None:
        await self._fetcher.fetch(file, blocks_of(0, length), Priority.READAHEAD)
        await trio.sleep(_HOLD_S)  # the memory of a file that nobody has open is given up

    def look_at_head(self, file: RemoteFile) -> None:
        """Learn what can be learned from an open file's header, if that is there.

        To be called before a file is closed, too: the kernel may never ask for the header again.
        Ends the validity of what `Fetcher.read_now` returned.
        """
        size = file.pin.size
        if not file.head:
            head = self._fetcher.read_now(file, 0, min(_HEAD_BYTES, size))
            if head is None:
                return
            file.head = b"".join(head)
        if length := formats.safetensors_header_length(file.head, size):
            header = self._fetcher.read_now(file, 0, length)
            if header is None:
                return
            if parts := formats.safetensors_parts(b"".join(header), size):
                file.learn_parts(parts)
        file.recognised = not file.head.startswith(formats.ZIP_MAGIC)

    def _layout_beside(self, attachment: Attachment, node: Node) -> dict[bytes, Parts] | None:
        """What the ``.metadata`` in the directory of `node` says; None: that is not known yet."""
        directory = node.parent
        metadata = directory.children.get(dcp.NAME) if directory is not None else None
        if directory is None or metadata is None or not 0 < metadata.size <= dcp.BYTES_MAX:
            return {}
        if metadata.index not in attachment.layouts:
            attachment.layouts[metadata.index] = None
            file = attachment.file(metadata.index)
            self._start(
                attachment, file, lambda: self._learn_layout(attachment, file, metadata, directory)
            )
        return attachment.layouts[metadata.index]

    def _start(
        self, attachment: Attachment, file: RemoteFile, learn: Callable[[], Awaitable[None]]
    ) -> None:
        """Run `learn`, with the file open, until it or the attachment ends."""
        scope = trio.CancelScope()
        attachment.background.add(scope)
        self._nursery.start_soon(self._run, attachment, file, learn, scope)

    async def _run(
        self,
        attachment: Attachment,
        file: RemoteFile,
        learn: Callable[[], Awaitable[None]],
        scope: trio.CancelScope,
    ) -> None:
        try:
            with scope, self._fetcher.opened(file):
                await learn()
        except CkptfsError:
            pass  # noted at the file
        except Exception:  # it must not take the daemon with it
            log.exception("unexpected error while looking into %s", file.pin.path)
        finally:
            attachment.background.discard(scope)

    async def _learn_layout(
        self, attachment: Attachment, file: RemoteFile, metadata: Node, directory: Node
    ) -> None:
        def size_of(name: bytes) -> int:
            node = directory.children.get(name)
            return -1 if node is None or node.is_directory else node.size

        found: dict[bytes, Parts] = {}
        try:
            found = await of_metadata(
                self._fetcher, self._offload, file, dcp.parts_by_file, size_of
            )
        finally:
            attachment.layouts[metadata.index] = found

    async def _learn_zip(self, file: RemoteFile) -> None:
        size = file.pin.size
        start = max(0, size - formats.ZIP_END_BYTES)
        end = b"".join(await bytes_of(self._fetcher, file, start, size))
        where = formats.zip_directory_range(end, size)
        if not where:
            return
        raw = await bytes_of(self._fetcher, file, where.start, where.stop)
        parts = await self._offload.compute(formats.zip_parts, b"".join(raw), where.start)
        if parts:
            file.learn_parts(parts)
