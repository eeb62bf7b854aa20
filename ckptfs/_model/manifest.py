"""The manifest: the files and directories of a checkpoint when it was attached.

Object names are not trusted. The manifest leaves out and reports a name that a Linux directory
cannot have, or that would lead out of the mount. The rest of the checkpoint is not affected.
"""

import hashlib
from collections.abc import Iterable

import msgspec

from ckptfs.errors import LimitExceeded

METADATA_NAME = ".metadata.json"
"""The file with the checkpoint's own metadata. The name is Ray's (``ray.train._checkpoint``). Only
this file may change while the checkpoint is attached, so versions do not cover it."""
NAME_BYTES_MAX = 255
"""Longest path component (NAME_MAX of Linux, limits.h)."""
PATH_BYTES_MAX = 4095
"""Longest path (PATH_MAX without the NUL). S3's keys have at most 1,024 bytes."""
DIRECTORIES_MAX = 1_000_000
"""Most directories that the names of one checkpoint may imply, because one name can imply two
thousand."""


class ListedFile(msgspec.Struct, frozen=True, gc=False):
    """A file as the store listed it.

    Attributes:
        path: Path relative to the checkpoint, with ``/`` between components.
        size: Bytes.
        mtime_ns: Modification time in nanoseconds since the epoch; 0 if the store has none.
        etag: The ETag as in HTTP, with quotes; "" if the listing has none.
    """

    path: str
    size: int
    mtime_ns: int
    etag: str = ""


class Skipped(msgspec.Struct, frozen=True, gc=False):
    """An object that is not shown, and the reason.

    Attributes:
        name: The object's name as printable (escaped) text.
        reason: The reason as a clause.
        is_lacking: Whether it is a file of the checkpoint that cannot be read now, so a copy
            without it would be incomplete.
    """

    name: str
    reason: str
    is_lacking: bool = False


class Listing(msgspec.Struct, frozen=True):
    """A store's listing: unchecked files, directories (relative paths), and unreadable names."""

    files: list[ListedFile]
    directories: list[str]
    skipped: list[Skipped] = []

    @property
    def count(self) -> int:
        """The number of all names."""
        return len(self.files) + len(self.directories) + len(self.skipped)


class Manifest(msgspec.Struct, frozen=True):
    """An immutable snapshot of names, sizes and times.

    Attributes:
        files: The files, sorted by path.
        directories: Every directory except the root, parents first.
        skipped: Objects that are left out.
        version: Digest (32 hex digits) of all names, sizes, times and ETags but those of
            `METADATA_NAME`.
        size: Bytes of all files together.
    """

    files: tuple[ListedFile, ...]
    directories: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    version: str
    size: int


def printable(name: str, characters_max: int = 300) -> str:
    """`name` with control characters, quotes and undecodable bytes escaped, and cut at
    `characters_max`."""
    text = name.encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= characters_max else text[: characters_max - 3] + "..."


def fault_of_name(path: str) -> str | None:
    """The reason why a Linux directory cannot have the name `path`, or None if it can."""
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        return "the name is not valid UTF-8"
    if len(raw) > PATH_BYTES_MAX:
        return f"the name is longer than {PATH_BYTES_MAX} bytes"
    if b"\0" in raw or b"\n" in raw:
        return "the name holds a NUL or newline"
    for component in raw.split(b"/"):
        if component == b"":
            return "the name has an empty component"
        if component in (b".", b".."):
            return "the name has a '.' or '..' component"
        if len(component) > NAME_BYTES_MAX:
            return f"a component of the name is longer than {NAME_BYTES_MAX} bytes"
    return None


def build_manifest(listing: Listing) -> Manifest:
    """Check every name of `listing`, add the implied directories, and compute the version.

    Raises LimitExceeded if the directories are more than `DIRECTORIES_MAX`.
    """
    skipped = list(listing.skipped)
    files: dict[str, ListedFile] = {}
    directories: set[str] = set()  # with the parents of each

    def add_directory(path: str) -> None:
        while path and path not in directories:
            directories.add(path)
            if len(directories) > DIRECTORIES_MAX:
                raise LimitExceeded(
                    f"the checkpoint has more than {DIRECTORIES_MAX} directories, e.g. "
                    f"{printable(path)}; name a directory below it"
                )
            path = path.rpartition("/")[0]

    hostile: dict[str, str] = {}
    for path in listing.directories:
        fault = fault_of_name(path)
        if fault is None:
            add_directory(path)
        elif path:
            hostile[path] = fault
    for file in listing.files:
        fault = fault_of_name(file.path)
        if fault is None and file.path in files:
            fault = "the store listed the name twice"
        if fault is not None:
            skipped.append(Skipped(printable(file.path), fault))
            _drop_parents(hostile, file.path)
            continue
        files[file.path] = file
        add_directory(file.path.rpartition("/")[0])
    for path in directories & files.keys():
        skipped.append(Skipped(printable(path), "the name is both a file and a directory"))
        del files[path]
    for path in sorted(hostile, key=len, reverse=True):  # the deepest first
        if fault := hostile.pop(path, None):
            skipped.append(Skipped(printable(path), fault))
            _drop_parents(hostile, path)
    ordered = tuple(files[path] for path in sorted(files))
    return Manifest(
        files=ordered,
        directories=tuple(sorted(directories)),
        skipped=tuple(skipped),
        version=_version(ordered, sorted(directories)),
        size=sum(file.size for file in ordered),
    )


def _drop_parents(hostile: dict[str, str], path: str) -> None:
    """Drop the parents of `path`, because the report of `path` covers them, too."""
    while hostile and (path := path.rpartition("/")[0]):
        hostile.pop(path, None)


def _version(files: Iterable[ListedFile], directories: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in directories:
        digest.update(f"{path}/\n".encode())
    for file in files:
        if file.path == METADATA_NAME:
            continue
        digest.update(f"{file.path}\0{file.size}\0{file.mtime_ns}\0{file.etag}\n".encode())
    return digest.hexdigest()
