"""Extended attributes of mounted checkpoints, for code that has only a path.

    >>> from ckptfs import xattrs
    >>> info = xattrs.read("/run/ckptfs/mnt/checkpoint_000100-6f1d0c2a9b3e")
    >>> info.state, info.metadata["val_loss"]
    ('lazy', 0.25)
    >>> xattrs.metadata(info.path)["reviewed"] = True

Every function takes any path inside a checkpoint. `read`, `metadata` and `root_of` are about the
checkpoint, `get` and `read_all` about that file or directory.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, ItemsView, Iterator, KeysView, MutableMapping, ValuesView
from typing import Any, cast

import msgspec

from ckptfs._model import attributes as names
from ckptfs._model.attributes import PREFIX as PREFIX
from ckptfs._model.manifest import METADATA_NAME
from ckptfs._os.mountinfo import is_mounted
from ckptfs.errors import MetadataError, MetadataNotDict, NotAttached, StoreError


class CheckpointInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a mounted checkpoint.

    Attributes:
        path: Its directory inside the mount.
        uri: The URI of its place, without secrets.
        id: 12 hex digits, equal for attachments of the same place.
        version: Digest of all names, sizes, times and ETags.
        format: `safetensors`, `torch-zip`, `torch-dcp`, `orbax`, `huggingface`, `tensorflow` or
            `unknown`.
        size: Bytes of all files.
        files: Number of files.
        cached: Bytes in this node's cache.
        state: `lazy`, `fetching`, `cached`, `changed` or `failing`.
        error: The last error, or "".
        skipped: Objects and metadata keys that the mount cannot show, each with the reason.
        attached: The time of the attach, in seconds since the epoch.
        holders: Ids of the processes that hold it.
        pinned: Whether it stays until it is detached.
        metadata: Its metadata, without values that attributes cannot carry.
    """

    path: str
    uri: str
    id: str
    version: str
    format: str
    size: int
    files: int
    cached: int
    state: str
    error: str
    skipped: dict[str, str]
    attached: float
    holders: list[int]
    pinned: bool
    metadata: dict[str, Any]


def read(path: "str | os.PathLike[str]") -> CheckpointInfo:
    """Read the state of the checkpoint that contains `path`.

    Raises:
        NotAttached: The path is not inside a mounted checkpoint.
        OSError: The path does not exist or cannot be read.
    """
    top = root_of(path)
    found = read_all(top)
    attached = json.loads(found[names.ATTACHED])
    return CheckpointInfo(
        path=top,
        uri=found[names.URI],
        id=found[names.ID],
        version=found[names.VERSION],
        format=found[names.FORMAT],
        size=int(found[names.SIZE]),
        files=int(found[names.FILES]),
        cached=int(found[names.CACHED]),
        state=found[names.STATE],
        error=found.get(names.ERROR, ""),
        skipped=dict(
            line.split("\t", 1)
            for line in found.get(names.SKIPPED, "").splitlines()  # pyright: ignore[reportArgumentType]
        ),
        attached=attached["since"],
        holders=attached["holders"],
        pinned=attached["pinned"],
        metadata={
            name[len(names.META_PREFIX) :]: json.loads(value)
            for name, value in found.items()
            if name.startswith(names.META_PREFIX)
        },
    )


def metadata(path: "str | os.PathLike[str]") -> "Metadata":
    """The metadata of the checkpoint that contains `path`, as a mapping that can be changed.

    Raises:
        NotAttached: The path is not inside a mounted checkpoint.
        OSError: The path does not exist or cannot be read.
    """
    return Metadata(root_of(path))


class Metadata(MutableMapping[str, Any]):
    """The metadata of a mounted checkpoint as a mapping. `metadata` makes it.

    It has all of the metadata, also values that attributes cannot carry. Each access reads the
    file, once: `keys`, `values` and `items` show it as it is at their call. When a change returns,
    the store has it, and every reader sees it.

        >>> shown = xattrs.metadata(path)
        >>> shown["reviewed"] = True
        >>> del shown["draft"]

    Raises:
        TypeError, ValueError: A value cannot be written as JSON.
        MetadataError: The stored metadata is not a JSON object, a new key cannot be the name of an
            attribute, or its value is too long for one.
        PermissionError: The store or the mount refused the change.
        StoreError: The change failed for another reason, which ``user.ckptfs.error`` has.
    """

    def __init__(self, top: str) -> None:
        self._top = top

    def __getitem__(self, key: str) -> Any:
        return self._stored()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        text = _text_of(key, value)
        self._change(key, lambda name: os.setxattr(self._top, name, text))

    def __delitem__(self, key: str) -> None:
        self._change(key, lambda name: os.removexattr(self._top, name))

    def update(self, changes: Any = (), /, **more: Any) -> None:
        """Set several keys, one after the other. If one is invalid, set none."""
        new = dict(changes, **more)
        for key, value in new.items():
            _name_of(key)
            _text_of(key, value)
        super().update(new)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored())

    def __len__(self) -> int:
        return len(self._stored())

    def keys(self) -> KeysView[str]:
        return self._stored().keys()

    def values(self) -> ValuesView[Any]:
        return self._stored().values()

    def items(self) -> ItemsView[str, Any]:
        return self._stored().items()

    def __repr__(self) -> str:
        return f"Metadata({self._stored()!r})"

    def _stored(self) -> dict[str, Any]:
        path = os.path.join(self._top, METADATA_NAME)
        try:
            with open(path, "rb") as file:
                found = json.loads(file.read())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise MetadataError(f"{path} is not JSON ({error}); correct the file") from None
        if not isinstance(found, dict):
            raise MetadataNotDict(
                f"{path} holds a {type(found).__name__} and not a dict, so it has no keys; "
                "ckptfs.Checkpoint.set_metadata replaces it"
            )
        return cast("dict[str, Any]", found)

    def _change(self, key: str, how: Callable[[str], None]) -> None:
        try:
            how(_name_of(key))
        except OSError as error:
            if error.errno == errno.ENODATA:
                raise KeyError(key) from None
            if error.errno in (errno.EIO, errno.ETIMEDOUT, errno.ESTALE):
                cause = (get(self._top, names.ERROR) or "").partition(" ")[2]
                raise StoreError(cause or f"{self._top}: {error.strerror}") from None
            raise


def get(path: "str | os.PathLike[str]", name: str) -> str | None:
    """The text of an attribute, e.g. ``user.ckptfs.state``; None if the path does not have it.

    Raises:
        OSError: The path does not exist or cannot be read.
    """
    try:
        return os.getxattr(path, name).decode("utf-8", "replace")
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return None
        raise


def read_all(path: "str | os.PathLike[str]") -> dict[str, str]:
    """All attributes of ckptfs of `path` by their full names, also those that listxattr(2) omits.

    Raises:
        NotAttached: The path is not inside a mounted checkpoint.
        OSError: The path does not exist or cannot be read.
    """
    if get(path, names.URI) is None or not is_mounted(path):
        raise _not_attached(path)
    stated = (name for name in sorted(names.STATED) if name.startswith(PREFIX))
    found = {name: value for name in stated if (value := get(path, name)) is not None}
    return found | (_metadata_of(os.fspath(path)) if names.ID in found else {})


def _metadata_of(top: str) -> dict[str, str]:
    """The attributes of the metadata, most of which listxattr(2) omits. Empty if the store does not
    answer or the file is not a JSON object; ``user.ckptfs.error`` then has the reason."""
    found: dict[str, str] = {}
    with contextlib.suppress(MetadataError, OSError):
        for key, value in Metadata(top).items():
            with contextlib.suppress(MetadataError, RecursionError):
                found[_name_of(key)] = _text_of(key, value).decode()
    return found


def root_of(path: "str | os.PathLike[str]") -> str:
    """The directory of the checkpoint that contains `path`.

    Raises:
        NotAttached: The path is not inside a mounted checkpoint.
        OSError: The path does not exist or cannot be read.
    """
    top = os.path.realpath(path)
    os.stat(top)  # raises the error of a missing path
    if is_mounted(top):
        while top != os.path.dirname(top):
            if get(top, names.ID) is not None:
                return top
            top = os.path.dirname(top)
    raise _not_attached(path)


def _name_of(key: str) -> str:
    name = names.META_PREFIX + key
    try:
        fits = bool(key) and "\0" not in key and len(name.encode()) <= names.NAME_BYTES_MAX
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise MetadataError(
            f"{key!r} cannot be the name of an attribute; use ckptfs.Checkpoint.update_metadata"
        )
    return name


def _text_of(key: str, value: Any) -> bytes:
    text = json.dumps(value).encode()
    if len(text) > names.VALUE_BYTES_MAX:
        raise MetadataError(
            f"the value of {key!r} has more than the {names.VALUE_BYTES_MAX} bytes of an "
            "attribute; use ckptfs.Checkpoint.update_metadata"
        )
    return text


def _not_attached(path: "str | os.PathLike[str]") -> NotAttached:
    return NotAttached(
        f"{os.fspath(path)} is not in a mounted checkpoint; ckptfs status lists them"
    )
