"""Extended attributes of mounted checkpoints, for code that has only a path.

    >>> info = xattrs.read("/run/ckptfs/mnt/checkpoint_000100-6f1d0c2a9b3e")
    >>> info.state, info.metadata["val_loss"]
    ('lazy', 0.25)
    >>> xattrs.metadata(info.path)["reviewed"] = True

Every function takes any path inside a checkpoint and speaks of the checkpoint, except `get` and
`read_all`, which speak of that file or directory.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, cast

import msgspec

from ckptfs._model import attributes as names
from ckptfs._model.attributes import PREFIX as PREFIX
from ckptfs._model.manifest import METADATA_NAME
from ckptfs._mounts import is_mounted
from ckptfs.errors import MetadataError, MetadataNotDict, NotAttached, StoreError


class CheckpointInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a mounted checkpoint.

    Attributes:
        path: Its directory inside the mount.
        uri: Where it comes from, without secrets.
        id: 12 hex digits, equal for attachments of the same place.
        version: Digest of all names, sizes and times.
        format: `safetensors`, `torch-zip`, `torch-dcp`, `orbax`, `huggingface`, `tensorflow` or
            `unknown`.
        size: Bytes.
        files: How many.
        cached: Bytes that are on this node.
        state: `lazy`, `fetching`, `cached`, `changed` or `failing`.
        error: The last error, or "".
        skipped: What is not shown, and why.
        attached: When, seconds since the epoch.
        holders: Ids of the processes that hold it.
        pinned: It stays until it is detached.
        metadata: Its own metadata, as far as attributes can carry it.
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
    """What is known about the checkpoint that `path` is in.

    Raises:
        NotAttached: It is in no mounted checkpoint.
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
    """The metadata of the checkpoint that `path` is in, as a mapping that can be changed.

    Raises:
        NotAttached: It is in no mounted checkpoint.
        OSError: The path does not exist or cannot be read.
    """
    return Metadata(root_of(path))


class Metadata(MutableMapping[str, Any]):
    """The metadata of a mounted checkpoint, all of it, also what attributes cannot carry. Each
    access asks the daemon; a change is at the store, and visible to everybody, when it returns.

    Raises:
        TypeError, ValueError: A value cannot be written as JSON.
        MetadataError: What is read is no JSON object; or a key to be set cannot be the name of an
            attribute, or the value is too long for one.
        PermissionError: The store, or the mount, refuses.
        StoreError: Any other reason why it cannot be changed, as ``user.ckptfs.error`` has it.
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
        """Set several keys, one after the other; none if one of them cannot be set."""
        new = dict(changes, **more)
        for key, value in new.items():
            _name_of(key)
            _text_of(key, value)
        super().update(new)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored())

    def __len__(self) -> int:
        return len(self._stored())

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
                f"{path} holds a {type(found).__name__} and not a dict, so it has no keys"
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
    """The text of the attribute `name` (e.g. ``user.ckptfs.state``), or None where there is none.

    Raises OSError if the path does not exist or cannot be read.
    """
    try:
        return os.getxattr(path, name).decode("utf-8", "replace")
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return None
        raise


def read_all(path: "str | os.PathLike[str]") -> dict[str, str]:
    """All attributes that ckptfs states about `path`, by full name.

    Raises:
        NotAttached: The path is not inside a mounted checkpoint.
        OSError: The path does not exist or cannot be read.
    """
    if get(path, names.URI) is None or not is_mounted(path):
        raise _not_attached(path)
    found = {name: get(path, name) for name in os.listxattr(path) if name.startswith(PREFIX)}
    return {name: value for name, value in found.items() if value is not None}


def root_of(path: "str | os.PathLike[str]") -> str:
    """The directory of the checkpoint that `path` is in. Raises as `read`."""
    top = os.path.realpath(path)
    os.stat(top)  # its own error, where there is nothing
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
