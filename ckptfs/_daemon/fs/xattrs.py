"""Extended attributes: facts about checkpoints and files, the metadata's keys, and actions.

``ckptfs._model.attributes`` has the names, their meaning, and the selection for lists. Values that
need the store (metadata, a file's header) are read when a program asks for them by name.

A program that copies files lists the names and then reads each value, and an error of one read can
end its copy. So a list contains only names whose values can still be read a moment later: the
metadata's keys if the store has just answered, and otherwise no keys. To list them, the daemon
reads metadata again that is older than `_BEFORE_READS_S`, so the reads after the list need no
store.
"""

import contextlib
import glob
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
import trio

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.inodes import OUTSIDE, Node, ReadOnly, VfsError
from ckptfs._daemon.attachment.metadata import MetadataKeeper
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.fetch.fetcher import Fetcher
from ckptfs._daemon.fs.vfs import Vfs
from ckptfs._daemon.offload import Offload
from ckptfs._model import attributes as names
from ckptfs._model.formats import headers
from ckptfs._model.location import Location
from ckptfs._model.manifest import printable
from ckptfs._model.plans.plan import Wanted
from ckptfs.errors import Busy, CacheError, CkptfsError

_FORMAT_WAIT_S = 5.0
"""Longest wait for the header of a file that may be a zip archive."""
_CLOSE_WAIT_S = 2.0
"""Longest wait for running fetches of a closed file, before the file is dropped from the cache."""
_HEADER_BYTES_MAX = 8 << 20
"""Longest header whose tensors are an attribute, with some 80,000 tensors. The decoded header can
take fifty times as much memory, and the attribute shows only 64 KiB of the list."""
_BEFORE_READS_S = 0.5
"""Greatest age of the metadata for a list, half of the greatest age for a value read by name."""

Value: TypeAlias = "str | Callable[[], str | Awaitable[str]]"
"""The text of an attribute, or a function that makes it; "" if the file does not have it."""


class NoAttribute(VfsError):
    """The file has no such extended attribute."""


class AttributeStated(VfsError):
    """The attribute states a fact, and cannot be set."""


class NotSupported(VfsError):
    """ckptfs has no attribute of that name."""


class InvalidValue(VfsError):
    """The value is not UTF-8, or too deeply nested."""


class NotPermitted(VfsError):
    """The checkpoint belongs to another user."""


@dataclass(eq=False)
class Xattrs:
    """The extended attributes of all files in the mount. `prefetch` begins to fetch files."""

    vfs: Vfs
    fetcher: Fetcher
    cache: Cache
    offload: Offload
    metadata: MetadataKeeper
    prefetch: Callable[[Attachment, Wanted], object]

    # -- reading

    async def get(self, inode: int, name: str) -> bytes:
        """The value of an extended attribute. Raises NoAttribute, StaleInode, and for metadata
        what `MetadataKeeper.values` raises."""
        if inode in OUTSIDE:
            raise NoAttribute(name)
        attachment, node = self.vfs.find(inode)
        if name.startswith(names.META_PREFIX):
            if node is not attachment.snapshot.tree.root:
                raise NoAttribute(name)
            await self.metadata.values(attachment)
            text = _shown(attachment)[0].get(name)
            if text is None:
                raise NoAttribute(name)
            return text
        raw = await _made(self._stated(attachment, node).get(name, ""))
        if not raw:
            raise NoAttribute(name)
        if len(raw) > names.VALUE_BYTES_MAX:  # a list, so it is cut at a line
            raw = raw[: names.VALUE_BYTES_MAX].rpartition(b"\n")[0]
        return raw

    async def list(self, inode: int, uid: int) -> "list[str]":
        """Names of the attributes that copies of the file get (see `attributes.listed`).

        The list is empty for other users, because the kernel does not check a permission before it
        lists, and the metadata's keys are not for other users.
        """
        if inode in OUTSIDE:
            return []
        attachment, node = self.vfs.find(inode)
        if uid not in (0, attachment.uid):
            return []
        stated = self._stated(attachment, node)
        values = {n: await _made(stated[n]) for n in names.LISTED if n in stated}
        if node is attachment.snapshot.tree.root:
            return await self._list_root(attachment, values)
        return names.listed(values)

    async def _list_root(self, attachment: Attachment, stated: dict[str, bytes]) -> "list[str]":
        """The names of the root. If not all keys of the metadata fit, the list has the attribute
        with their number, too, so a program can notice that keys are missing."""
        try:
            keys = await self.metadata.values(attachment, _BEFORE_READS_S)
        except CkptfsError:  # noted at the attachment
            return names.listed(stated)
        metadata = _shown(attachment)[0]
        found = names.listed({**stated, **metadata})
        if metadata.keys() <= set(found):
            return found
        count = {names.METADATA_KEYS: str(len(keys)).encode()}
        return names.listed({**count, **stated, **metadata})

    def _stated(self, attachment: Attachment, node: Node) -> dict[str, Value]:
        uri = _uri(attachment.location, node)
        origin: dict[str, Value] = {names.URI: uri, names.ORIGIN: uri}
        if node is attachment.snapshot.tree.root:
            return origin | self._of_root(attachment)
        return origin if node.is_directory else origin | self._of_file(attachment, node)

    def _of_root(self, attachment: Attachment) -> dict[str, Value]:
        manifest = attachment.manifest

        async def skipped() -> str:
            with contextlib.suppress(CkptfsError):  # noted at the attachment
                await self.metadata.values(attachment)
            hidden = _shown(attachment)[1]
            listed = [f"{s.name}\t{s.reason}\n" for s in manifest.skipped]
            return "".join(listed + [f"{key}\t{reason}\n" for key, reason in hidden])

        async def metadata_keys() -> str:
            return str(len(await self.metadata.values(attachment)))

        def cached_bytes() -> int:  # not at once, because it looks at each file
            return attachment.cached_bytes(self.cache)

        leases = attachment.leases
        attached = {
            "since": round(attachment.attached_s, 3),
            "holders": leases.holders,
            "pinned": leases.pinned,
        }
        return {
            names.ID: attachment.location.digest,
            names.VERSION: manifest.version,
            names.SIZE: str(attachment.snapshot.size),
            names.FILES: str(attachment.snapshot.file_count),
            names.CACHED: lambda: str(cached_bytes()),
            names.STATE: lambda: attachment.state(cached_bytes()),
            names.ERROR: attachment.error,
            names.SKIPPED: skipped,
            names.ATTACHED: json.dumps(attached),
            names.FORMAT: lambda: self._format(attachment),
            names.METADATA_KEYS: metadata_keys,
        }

    def _of_file(self, attachment: Attachment, node: Node) -> dict[str, Value]:
        file = attachment.peek(node.index)
        cached_bytes = self.cache.stored_bytes(attachment.snapshot.digest(node.index))
        etag = file.pin.etag.strip('"')
        mtime = f"{file.pin.mtime_ns // 10**9}.{file.pin.mtime_ns % 10**9:09}"

        async def tensors() -> str:
            lines = (msgspec.json.encode(t).decode() for t in await self._tensors(attachment, node))
            return "".join(f"{line}\n" for line in lines)

        found: dict[str, Value] = {
            names.VERSION: etag or f"{file.size}-{file.pin.mtime_ns}",
            names.SIZE: str(node.size),
            names.CACHED: str(cached_bytes),
            names.STATE: file.state(cached_bytes),
            names.ERROR: file.health.error,
            names.ETAG: etag,
            names.MTIME: mtime if file.pin.mtime_ns else "",
        }
        if node.name.endswith(b".safetensors"):
            found[names.TENSORS] = tensors
        return found

    # -- from headers

    async def _format(self, attachment: Attachment) -> str:
        if not attachment.format:
            files = {file.path: index for index, file in attachment.snapshot.shown()}
            found, to_check = await self.offload.disk(headers.format_of, files)
            if to_check:
                head = None
                with trio.move_on_after(_FORMAT_WAIT_S), contextlib.suppress(CkptfsError):
                    head = await self._head(attachment, files[to_check], len(headers.ZIP_MAGIC))
                if head is None:
                    return "unknown"  # until the next call; the file has the cause
                found = found if head == headers.ZIP_MAGIC else "unknown"
            attachment.format = found
        return attachment.format

    async def _tensors(self, attachment: Attachment, node: Node) -> Sequence[headers.Tensor]:
        prefix_bytes = headers.SAFETENSORS_PREFIX_BYTES + 1
        prefix = await self._head(attachment, node.index, prefix_bytes)
        if len(prefix) < prefix_bytes:
            return []
        length = headers.safetensors_header_length(prefix, node.size, _HEADER_BYTES_MAX)
        if not length:
            return []
        head = await self._head(attachment, node.index, length)
        return await self.offload.compute(headers.safetensors_tensors, head)

    async def _head(self, attachment: Attachment, index: int, length: int) -> bytes:
        """The first bytes of a file, fewer than `length` if it is shorter."""
        file = attachment.file(index)
        length = min(length, file.size)
        if not length:
            return b""
        with self.fetcher.opened(file):
            return b"".join(await self.fetcher.read(file, 0, length))

    # -- writing

    async def set(self, inode: int, name: str, value: bytes, uid: int | None) -> None:
        """Set a key of the metadata, or begin an action. `uid` is the user; None if the kernel has
        checked the permission and does not name the user.

        Raises AttributeStated, ReadOnly, NotSupported, NotPermitted, InvalidValue, StaleInode,
        Busy, CacheError, and what `MetadataKeeper.change` raises.
        """
        attachment, node = self._writable(inode, name, uid)
        if name == names.PREFETCH:
            self.prefetch(attachment, Wanted([_glob_of(node)]))
        elif name == names.EVICT:
            await self._evict(attachment, node)
        else:
            key, new = self._key(attachment, node, name), _parsed(value)
            try:
                await self.metadata.change(attachment, lambda values: {**values, key: new})
            except RecursionError:
                raise InvalidValue("too deeply nested") from None

    async def remove(self, inode: int, name: str, uid: int | None) -> None:
        """Remove a key of the metadata. Raises NoAttribute, and what `set` raises."""
        attachment, node = self._writable(inode, name, uid)
        if name in (names.PREFETCH, names.EVICT):
            raise NoAttribute(name)
        key = self._key(attachment, node, name)

        def without(values: dict[str, Any]) -> dict[str, Any]:
            if key not in values:
                raise NoAttribute(name)
            return {k: v for k, v in values.items() if k != key}

        await self.metadata.change(attachment, without)

    def _writable(self, inode: int, name: str, uid: int | None) -> tuple[Attachment, Node]:
        if name in names.STATED:
            raise AttributeStated(name)
        known = name in (names.PREFETCH, names.EVICT) or name.startswith(names.META_PREFIX)
        if inode in OUTSIDE or not known:
            raise NotSupported(name)
        attachment, node = self.vfs.find(inode)
        if attachment.volume is not None:  # whatever rights the pod has in its own namespaces
            raise ReadOnly(inode)
        if uid is not None and uid not in (0, attachment.uid):
            raise NotPermitted(name)
        return attachment, node

    def _key(self, attachment: Attachment, node: Node, name: str) -> str:
        key = name[len(names.META_PREFIX) :]
        if node is not attachment.snapshot.tree.root or not key:
            raise NotSupported(name)
        return key

    async def _evict(self, attachment: Attachment, node: Node) -> None:
        for index in _files_below(node):
            digest = attachment.snapshot.digest(index)
            path = printable(attachment.snapshot.listed[index].path)
            entry = self.cache.opened.get(digest)
            if entry is not None and entry.kept:
                error = Busy(
                    f"{path} is kept until the program ends that has waited for it (wait=True)"
                )
                attachment.note(error)
                raise error
            if not await self._is_closed(attachment, index):
                error = Busy(f"{path} is open or being fetched; close it to drop it from the cache")
                attachment.note(error)
                raise error
            try:
                folder = self.cache.index.evict(digest)
            except OSError as refused:
                error = CacheError(
                    f"{path} cannot be dropped from the cache: {refused.strerror}; check the disk "
                    "of the cache"
                )
                attachment.note(error)
                raise error from None
            if folder is not None:
                await self.cache.index.delete(self.offload.disk, [folder])

    async def _is_closed(self, attachment: Attachment, index: int) -> bool:
        """Whether the file is closed. Waits a moment for fetches that its last reader has begun."""
        with trio.move_on_after(_CLOSE_WAIT_S):
            while attachment.snapshot.digest(index) in self.cache.opened:
                if attachment.peek(index).opened.count:
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
    """The metadata's keys as attributes, by full name with JSON text as value; and the keys that
    cannot be attributes, each with a reason."""
    shown: dict[str, bytes] = {}
    hidden: list[tuple[str, str]] = []
    for key, value in values.items():
        try:
            name, text = _shown_value(key, value)
            shown[name] = text
        except ValueError as reason:
            hidden.append((printable(key), str(reason)))
    return shown, hidden


def _shown_value(key: str, value: Any) -> tuple[str, bytes]:
    """The name and the text of a key's attribute. The text of a ValueError is the reason why the
    key cannot be an attribute."""
    name = names.META_PREFIX + key
    try:
        name_bytes = len(name.encode())
        text = json.dumps(value).encode()  # in ASCII; getfattr shows other text in base64
    except UnicodeEncodeError:
        raise ValueError("the key is not valid UTF-8") from None
    except RecursionError:  # parsing it had a less deep stack
        raise ValueError("too deeply nested") from None
    if not key or "\0" in key:
        raise ValueError("the key is empty or holds a NUL")
    if name_bytes > names.NAME_BYTES_MAX:
        raise ValueError(f"the name has more than {names.NAME_BYTES_MAX} bytes")
    if len(text) > names.VALUE_BYTES_MAX:
        raise ValueError(f"the value has more than {names.VALUE_BYTES_MAX} bytes")
    return name, text


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


async def _made(value: Value) -> bytes:
    text = value if isinstance(value, str) else value()
    return (text if isinstance(text, str) else await text).encode()


def _files_below(node: Node) -> Iterator[int]:
    below = [node]  # without recursion, because the tree can be two thousand directories deep
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
    """The glob that matches the file, or all files below the directory."""
    path = glob.escape(_path_of(node))
    return f"{path}/*".lstrip("/") if node.is_directory else path


def _uri(location: Location, node: Node) -> str:
    return location.below(_path_of(node)).uri
