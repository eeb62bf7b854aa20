"""Format detection: learns the parts of files from their content, for their readahead.

`Vfs` calls `FormatDetector.detect` before each read of a file until its parts are known. The call
waits for nothing. It looks at the bytes that the daemon has, and starts a task for bytes that have
to be fetched first, with a lower priority than reads. Until that task has ended, the readahead
treats the file as one of an unknown format.

- safetensors: the parts follow from the header, as soon as the daemon has it.
- torch.distributed.checkpoint: the parts follow from the ``.metadata`` in the file's directory. The
  detector reads it once per attachment, when a program reads it or a larger file beside it. If it
  is in another format, the detector reads only its beginning.
- Zip archives (torch.save, numpy.savez): the beginning tells the format, and the end has the
  central directory. The ``.metadata`` has precedence, because the files of
  torch.distributed.checkpoint are several archives in a row, and their end says nothing.

If bytes cannot be fetched or make no sense, the detector does not ask for them again before the
next open of the file, and not for the ``.metadata`` in this attachment. Errors are noted at the
files.

`tensors_of` and `of_metadata` read the same headers through the cache for other callers.
"""

import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.inodes import Node
from ckptfs._daemon.fetch.fetcher import Fetcher
from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.fetch.scheduler import Priority
from ckptfs._daemon.offload import Offload
from ckptfs._model.blocks import BLOCK_BYTES, blocks_of
from ckptfs._model.formats import dcp, headers
from ckptfs._model.formats.headers import Parts, Tensor
from ckptfs._model.formats.tensors import Layout, layout
from ckptfs.errors import CkptfsError

log = logging.getLogger(__name__)

_SMALL_BYTES = 4 * BLOCK_BYTES
"""Smaller files gain nothing, because readahead trusts a part only after three blocks of it."""
_HEAD_BYTES = headers.SAFETENSORS_PREFIX_BYTES + 1
"""Enough to tell the formats apart."""
_HOLD_S = 10.0
"""How long the beginning of the next file stays in memory without an open, unless that memory is
needed. From the disk it would come back 1 MiB at a time, with a check of each block."""
_PAUSE_S = 0.0005
"""How long parsing releases the interpreter's lock, each time that it has held it for as long."""
T = TypeVar("T")


@dataclass(eq=False)
class FormatDetector:
    """Teaches the readahead of open files. Its tasks run in `nursery`."""

    fetcher: Fetcher
    offload: Offload
    nursery: trio.Nursery

    def detect(self, attachment: Attachment, node: Node) -> None:
        """Learn as much about the open file of `node` as is possible without waiting.

        Ends the validity of what `Fetcher.read_now` returned.
        """
        file = attachment.file(node.index)
        if node.name == dcp.NAME:
            self._layout_beside(attachment, node)
            file.format.is_final = True
            return
        is_large = node.size > _SMALL_BYTES
        layout = self._layout_beside(attachment, node) if is_large else {}
        if layout and (parts := layout.get(node.name)):
            file.learn_parts(parts)
            file.format.is_final = True
            return
        self.detect_by_head(file)
        if file.format.head.startswith(headers.ZIP_MAGIC) and layout is not None:
            if is_large:
                self._start(attachment, file, lambda: self._learn_zip(file))
            file.format.is_final = True

    def detect_by_head(self, file: RemoteFile) -> None:
        """Learn from an open file's header, if the daemon has its bytes.

        `Vfs` calls this before it closes a file, too, because the kernel may never ask for the
        header again. Ends the validity of what `Fetcher.read_now` returned.
        """
        size = file.size
        if not file.format.head:
            head = self.fetcher.read_now(file, 0, min(_HEAD_BYTES, size))
            if head is None:
                return
            file.format.head = b"".join(head)
        if length := headers.safetensors_header_length(file.format.head, size):
            header = self.fetcher.read_now(file, 0, length)
            if header is None:
                return
            if parts := headers.safetensors_parts(b"".join(header), size):
                file.learn_parts(parts)
        file.format.is_final = not file.format.head.startswith(headers.ZIP_MAGIC)

    def fetch_next_head(self, attachment: Attachment, node: Node) -> None:
        """Fetch the beginning of the file after that of `node`, of the same kind.

        `Vfs` calls this when a program has read a file to its end, because it will most likely read
        the next one, too.
        """
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
        length = min(following.size, self.fetcher.window_bytes_max)
        if length:
            self._start(attachment, file, lambda: self._fetch_head(file, length))

    async def _fetch_head(self, file: RemoteFile, length: int) -> None:
        await self.fetcher.fetch(file, blocks_of(0, length), Priority.READAHEAD)
        await trio.sleep(_HOLD_S)  # a file that is not open loses its memory

    def _layout_beside(self, attachment: Attachment, node: Node) -> dict[bytes, Parts] | None:
        """Parts of files, according to the ``.metadata`` in the directory of `node`. None while the
        daemon reads it."""
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
        self.nursery.start_soon(self._run, attachment, file, learn, scope)

    async def _run(
        self,
        attachment: Attachment,
        file: RemoteFile,
        learn: Callable[[], Awaitable[None]],
        scope: trio.CancelScope,
    ) -> None:
        try:
            with scope, self.fetcher.opened(file):
                await learn()
        except CkptfsError:
            pass  # noted at the file
        except Exception:  # it must not end the daemon
            log.exception("unexpected error while detecting the format of %s", file.path)
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
            found = await of_metadata(self.fetcher, self.offload, file, dcp.parts_by_file, size_of)
        finally:
            attachment.layouts[metadata.index] = found

    async def _learn_zip(self, file: RemoteFile) -> None:
        size = file.size
        start = max(0, size - headers.ZIP_END_BYTES)
        end = b"".join(await _bytes_of(self.fetcher, file, start, size))
        where = headers.zip_directory_range(end, size)
        if not where:
            return
        raw = await _bytes_of(self.fetcher, file, where.start, where.stop)
        parts = await self.offload.compute(headers.zip_parts, b"".join(raw), where.start)
        if parts:
            file.learn_parts(parts)


async def tensors_of(fetcher: Fetcher, offload: Offload, file: RemoteFile) -> list[Tensor]:
    """The tensors of an open file. Raises what `Fetcher.read` raises."""
    asking = layout(file.size)
    try:
        start, stop = next(asking)
        while True:
            data = b"".join(await _bytes_of(fetcher, file, start, stop))
            found = await offload.compute(_sent, asking, data)
            if not isinstance(found, tuple):
                return found
            start, stop = found
    except StopIteration:
        return []


async def of_metadata(
    fetcher: Fetcher,
    offload: Offload,
    file: RemoteFile,
    parse: Callable[[bytes, dcp.SizeOf, Callable[[], None]], dict[bytes, T]],
    size_of: dcp.SizeOf,
) -> dict[bytes, T]:
    """Result of `parse` for an open ``.metadata``, by the names of the files beside it; {} if the
    file is not that of torch.distributed.checkpoint. Raises what `Fetcher.read` raises.

    `parse` is ``dcp.parts_by_file`` or ``dcp.tensors_by_file``. It runs in a thread, and calls
    `size_of` for the size of a file beside the ``.metadata``.
    """
    size = file.size
    if not 0 < size <= dcp.BYTES_MAX:
        return {}
    head = await _bytes_of(fetcher, file, 0, min(dcp.HEAD_BYTES, size))
    if not dcp.is_metadata(b"".join(head)):
        return {}
    raw = await _bytes_of(fetcher, file, 0, size)
    return await offload.compute(
        lambda: parse(b"".join(raw), size_of, lambda: time.sleep(_PAUSE_S))
    )


async def _bytes_of(fetcher: Fetcher, file: RemoteFile, start: int, stop: int) -> list[bytes]:
    """The bytes [start, stop) of an open file, in pieces. Raises what `Fetcher.read` raises."""
    blocks = blocks_of(start, stop - start)
    await fetcher.fetch(file, blocks, Priority.READAHEAD)
    pieces: list[bytes] = []
    for index in blocks:
        first = max(start, index * BLOCK_BYTES)
        last = min(stop, (index + 1) * BLOCK_BYTES)
        pieces += map(bytes, await fetcher.read(file, first, last - first))
    return pieces


def _sent(asking: Layout, data: bytes) -> tuple[int, int] | list[Tensor]:
    """The next range, or the result. Blocking, because a header can be long."""
    try:
        return asking.send(data)
    except StopIteration as found:
        return found.value
