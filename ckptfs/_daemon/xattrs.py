"""Extended attributes: what is stated about checkpoints and files, what can be set, and actions.

Names and meaning stand in ``ckptfs._model.attributes``. Values that need the store (metadata, a
file's header) are read when they are asked for; the names of a file's attributes need at most the
metadata, and a store that does not answer makes that list shorter, not an error.
"""

import contextlib
import glob
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
import trio

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.fetch import Fetcher
from ckptfs._daemon.metadata import MetadataKeeper
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.tree import MOUNT_ROOT, Node
from ckptfs._daemon.vfs import Vfs, VfsError
from ckptfs._model import attributes as names
from ckptfs._model import formats
from ckptfs._model.location import Location
from ckptfs._model.manifest import printable
from ckptfs._model.plan import Wanted
from ckptfs.errors import Busy, CacheError, CkptfsError

_FORMAT_WAIT_S = 5.0
"""Longest wait for the header of a file that may be a zip archive."""
_CLOSE_WAIT_S = 2.0
"""Longest wait for fetches of a file that nobody has open any more, before it is dropped."""
_HEADER_BYTES_MAX = 8 << 20
"""Longest header whose tensors are an attribute: some 80,000. Decoded it can take fifty times as
much memory, and of the list 64 KiB are shown."""
_STATED_BYTES_MAX = 1024
"""More than the names of what ckptfs states take in a list of names."""

Value = Callable[[], Awaitable[str]]
"""Makes the text of an attribute; "": the file has none."""


class NoAttribute(VfsError):
    """The file has no such extended attribute."""


class AttributeStated(VfsError):
    """The attribute is one that ckptfs itself states."""


class NotSupported(VfsError):
    """There cannot be such an attribute."""


class InvalidValue(VfsError):
    """The value is no text, or too deeply nested."""


class NotPermitted(VfsError):
    """The checkpoint is another user's."""


class Xattrs:
    """The extended attributes of all files in the mount.

    Args:
        vfs: Knows the inodes.
        fetcher: Reads headers.
        cache: Asked for what is cached.
        offload: Deletes what is dropped from the cache.
        metadata: The checkpoints' own metadata.
        prefetch: Begins to fetch files of an attachment.
    """

    def __init__(
        self,
        vfs: Vfs,
        fetcher: Fetcher,
        cache: Cache,
        offload: Offload,
        metadata: MetadataKeeper,
        prefetch: Callable[[Attachment, Wanted], object],
    ) -> None:
        self._vfs = vfs
        self._fetcher = fetcher
        self._cache = cache
        self._offload = offload
        self._metadata = metadata
        self._prefetch = prefetch

    # -- reading

    async def get(self, inode: int, name: str) -> bytes:
        """The value of an extended attribute. Raises NoAttribute, StaleInode, and for metadata
        what `MetadataKeeper.values` raises."""
        if inode == MOUNT_ROOT:
            raise NoAttribute(name)
        attachment, node = self._vfs.find(inode)
        if name.startswith(names.META_PREFIX):
            if node is not attachment.tree.root:
                raise NoAttribute(name)
            await self._metadata.values(attachment)
            text = _shown(attachment)[0].get(name)
            if text is None:
                raise NoAttribute(name)
            return text
        value = self._stated(attachment, node).get(name)
        raw = (await value()).encode() if value is not None else b""
        if not raw:
            raise NoAttribute(name)
        if len(raw) > names.VALUE_BYTES_MAX:  # cut at a line: these are lists
            raw = raw[: names.VALUE_BYTES_MAX].rpartition(b"\n")[0]
        return raw

    async def list(self, inode: int, uid: int) -> "list[str]":
        """Names of the attributes that the file has now. Other users see none: the kernel asks for
        no permission to list, and the keys of the metadata are nobody else's business."""
        if inode == MOUNT_ROOT:
            return []
        attachment, node = self._vfs.find(inode)
        if uid not in (0, attachment.uid):
            return []
        stated = self._stated(attachment, node)
        unsure = (names.ERROR, names.SKIPPED, names.ETAG, names.MTIME)  # and cheap to look at
        found = [n for n, value in stated.items() if n not in unsure or await value()]
        if node is attachment.tree.root:
            await self._refresh(attachment)
            found += _shown(attachment)[0]
        return found

    async def _refresh(self, attachment: Attachment) -> None:
        """Where the store does not answer, the metadata stays what was known."""
        with contextlib.suppress(CkptfsError):  # noted at the attachment
            await self._metadata.values(attachment)

    def _stated(self, attachment: Attachment, node: Node) -> dict[str, Value]:
        uri = _uri(attachment.location, node)
        origin = {names.URI: _is(uri), names.ORIGIN: _is(uri)}
        if node is attachment.tree.root:
            return origin | self._of_root(attachment)
        return origin if node.is_directory else origin | self._of_file(attachment, node)

    def _of_root(self, attachment: Attachment) -> dict[str, Value]:
        manifest = attachment.manifest
        holders = sorted(set(attachment.directories.values()))

        async def skipped() -> str:
            await self._refresh(attachment)
            hidden = _shown(attachment)[1]
            listed = [f"{s.name}\t{s.reason}\n" for s in manifest.skipped]
            return "".join(listed + [f"{key}\t{reason}\n" for key, reason in hidden])

        async def state() -> str:
            return attachment.state(attachment.cached_bytes(self._cache))

        async def cached() -> str:
            return str(attachment.cached_bytes(self._cache))

        async def attached() -> str:
            since = round(attachment.attached_s, 3)
            told = {"since": since, "holders": holders, "pinned": attachment.pinned}
            return json.dumps(told)

        async def format_() -> str:
            return await self._format(attachment)

        return {
            names.ID: _is(attachment.location.digest),
            names.VERSION: _is(manifest.version),
            names.SIZE: _is(str(attachment.size)),
            names.FILES: _is(str(attachment.file_count)),
            names.CACHED: cached,
            names.STATE: state,
            names.ERROR: _is(attachment.error),
            names.SKIPPED: skipped,
            names.ATTACHED: attached,
            names.FORMAT: format_,
        }

    def _of_file(self, attachment: Attachment, node: Node) -> dict[str, Value]:
        file = attachment.peek(node.index)
        cached_bytes = self._cache.stored_bytes(attachment.snapshot.digest(node.index), node.size)
        etag = file.pin.etag.strip('"')
        mtime = f"{file.pin.mtime_ns // 10**9}.{file.pin.mtime_ns % 10**9:09}"

        async def tensors() -> str:
            lines = (msgspec.json.encode(t).decode() for t in await self._tensors(attachment, node))
            return "".join(f"{line}\n" for line in lines)

        found = {
            names.VERSION: _is(etag or f"{file.pin.size}-{file.pin.mtime_ns}"),
            names.SIZE: _is(str(node.size)),
            names.CACHED: _is(str(cached_bytes)),
            names.STATE: _is(file.state(cached_bytes)),
            names.ERROR: _is(file.error),
            names.ETAG: _is(etag),
            names.MTIME: _is(mtime if file.pin.mtime_ns else ""),
        }
        return found | ({names.TENSORS: tensors} if node.name.endswith(b".safetensors") else {})

    # -- what stands in headers

    async def _format(self, attachment: Attachment) -> str:
        if not attachment.format:
            files = {file.path: index for index, file in attachment.shown()}
            found, to_check = await self._offload.disk(formats.format_of, files)
            if to_check:
                head = None
                with trio.move_on_after(_FORMAT_WAIT_S), contextlib.suppress(CkptfsError):
                    head = await self._head(attachment, files[to_check], len(formats.ZIP_MAGIC))
                if head is None:
                    return "unknown"  # for now; the cause is noted at the file
                found = found if head == formats.ZIP_MAGIC else "unknown"
            attachment.format = found
        return attachment.format

    async def _tensors(self, attachment: Attachment, node: Node) -> "list[formats.Tensor]":
        prefix_bytes = formats.SAFETENSORS_PREFIX_BYTES + 1
        prefix = await self._head(attachment, node.index, prefix_bytes)
        if len(prefix) < prefix_bytes:
            return []
        length = formats.safetensors_header_length(prefix, node.size, _HEADER_BYTES_MAX)
        if not length:
            return []
        head = await self._head(attachment, node.index, length)
        return await self._offload.compute(formats.safetensors_tensors, head)

    async def _head(self, attachment: Attachment, index: int, length: int) -> bytes:
        """The first bytes of a file, fewer than `length` if it is shorter."""
        file = attachment.file(index)
        length = min(length, file.pin.size)
        if not length:
            return b""
        with self._fetcher.opened(file):
            return b"".join(await self._fetcher.read(file, 0, length))

    # -- writing

    async def set(self, inode: int, name: str, value: bytes, uid: int) -> None:
        """Set an attribute of the metadata, or do what an action says.

        Raises AttributeStated, NotSupported, NotPermitted, InvalidValue, StaleInode, Busy,
        CacheError, and what `MetadataKeeper.change` raises.
        """
        attachment, node = self._writable(inode, name, uid)
        if name == names.PREFETCH:
            self._prefetch(attachment, Wanted([_glob_of(node)]))
        elif name == names.EVICT:
            await self._evict(attachment, node)
        else:
            key, new = self._key(attachment, node, name), _parsed(value)
            try:
                await self._metadata.change(attachment, lambda values: {**values, key: new})
            except RecursionError:
                raise InvalidValue("too deeply nested") from None

    async def remove(self, inode: int, name: str, uid: int) -> None:
        """Remove a key of the metadata. Raises NoAttribute, and what `set` raises."""
        attachment, node = self._writable(inode, name, uid)
        if name in (names.PREFETCH, names.EVICT):
            raise NoAttribute(name)
        key = self._key(attachment, node, name)

        def without(values: dict[str, Any]) -> dict[str, Any]:
            if key not in values:
                raise NoAttribute(name)
            return {k: v for k, v in values.items() if k != key}

        await self._metadata.change(attachment, without)

    def _writable(self, inode: int, name: str, uid: int) -> tuple[Attachment, Node]:
        if name in names.STATED:
            raise AttributeStated(name)
        known = name in (names.PREFETCH, names.EVICT) or name.startswith(names.META_PREFIX)
        if inode == MOUNT_ROOT or not known:
            raise NotSupported(name)
        attachment, node = self._vfs.find(inode)
        if uid not in (0, attachment.uid):
            raise NotPermitted(name)
        return attachment, node

    def _key(self, attachment: Attachment, node: Node, name: str) -> str:
        key = name[len(names.META_PREFIX) :]
        if node is not attachment.tree.root or not key:
            raise NotSupported(name)
        return key

    async def _evict(self, attachment: Attachment, node: Node) -> None:
        for index in _files_below(node):
            digest = attachment.snapshot.digest(index)
            path = printable(attachment.listed[index].path)
            if not await self._is_closed(attachment, index):
                error = Busy(f"{path} is open or being fetched; close it to drop it from the cache")
                attachment.note(error)
                raise error
            try:
                folder = self._cache.evict(digest)
            except OSError as refused:
                error = CacheError(
                    f"{path} cannot be dropped from the cache: {refused.strerror}; check its disk"
                )
                attachment.note(error)
                raise error from None
            if folder is not None:
                gone = await self._offload.disk(self._cache.delete, folder)
                self._cache.deleted(folder, gone)

    async def _is_closed(self, attachment: Attachment, index: int) -> bool:
        """Whether nobody has the file open. What its last reader has begun may need a moment."""
        with trio.move_on_after(_CLOSE_WAIT_S):
            while self._cache.is_open(attachment.snapshot.digest(index)):
                if attachment.peek(index).opens:
                    return False
                await trio.sleep(0.01)
            return True
        return False


def _shown(attachment: Attachment) -> "tuple[dict[str, bytes], list[tuple[str, str]]]":
    metadata = attachment.metadata
    if metadata.shown is None:
        metadata.shown = shown_values(metadata.values)
    return metadata.shown


def shown_values(values: dict[str, Any]) -> "tuple[dict[str, bytes], list[tuple[str, str]]]":
    """The metadata as attributes, and the keys that no attribute can carry with the reasons.

    Attributes are given by full name; the value is JSON text.
    """
    shown: dict[str, bytes] = {}
    hidden: list[tuple[str, str]] = []
    list_bytes = 0
    for key, value in values.items():
        try:
            name = (names.META_PREFIX + key).encode()
        except UnicodeEncodeError:
            hidden.append((printable(key), "the key is not valid UTF-8"))
            continue
        try:
            text = json.dumps(value).encode()  # ASCII: getfattr shows everything else in base64
        except RecursionError:  # it was just about read with a stack that was less deep
            hidden.append((printable(key), "too deeply nested"))
            continue
        list_bytes += len(name) + 1
        if not key or "\0" in key:
            hidden.append((printable(key), "the key is empty or holds a NUL"))
        elif len(name) > names.NAME_BYTES_MAX:
            hidden.append((printable(key), f"the name has more than {names.NAME_BYTES_MAX} bytes"))
        elif len(text) > names.VALUE_BYTES_MAX:
            reason = f"the value has more than {names.VALUE_BYTES_MAX} bytes"
            hidden.append((printable(key), reason))
        elif list_bytes > names.LIST_BYTES_MAX - _STATED_BYTES_MAX:
            reason = f"all names have more than {names.LIST_BYTES_MAX} bytes"
            hidden.append((printable(key), reason))
        else:
            shown[name.decode()] = text
    return shown, hidden


def _parsed(value: bytes) -> Any:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise InvalidValue("not UTF-8") from None
    try:
        return json.loads(text)
    except ValueError:
        return text
    except RecursionError:
        raise InvalidValue("too deeply nested") from None


def _is(text: str) -> Value:
    async def value() -> str:
        return text

    return value


def _files_below(node: Node) -> Iterator[int]:
    below = [node]  # no recursion: it can be two thousand directories deep
    while below:
        node = below.pop()
        if not node.is_directory:
            yield node.index
        below += node.children.values()


def _path_of(node: Node) -> str:
    parts: list[str] = []
    while node.parent is not None:
        parts.append(node.name.decode())
        node = node.parent
    return "/".join(reversed(parts))


def _glob_of(node: Node) -> str:
    """The glob that matches the file, or all below the directory."""
    path = glob.escape(_path_of(node))
    return f"{path}/*".lstrip("/") if node.is_directory else path


def _uri(location: Location, node: Node) -> str:
    return location.below(_path_of(node)).uri
