"""The manifest: what a checkpoint held at the moment it was attached.

Object names are not trusted. A name that no Linux directory can hold, or that would lead out of the
mount, is left out and reported; the rest of the checkpoint is not affected.
"""

import hashlib
from collections.abc import Iterable

import msgspec

from ckptfs.errors import LimitExceeded

METADATA_NAME = ".metadata.json"
"""The file with the checkpoint's own metadata, Ray's name for it (``ray.train._checkpoint``). It is
the one that may change while the checkpoint is attached, so it is in no version."""
NAME_BYTES_MAX = 255
"""Bytes of one path component (NAME_MAX of Linux, limits.h)."""
PATH_BYTES_MAX = 4095
"""Bytes of a path (PATH_MAX without the NUL); S3's keys have 1,024."""
DIRECTORIES_MAX = 1_000_000
"""Most directories that the names of one checkpoint may imply: a name can be two thousand deep."""


class ListedFile(msgspec.Struct, frozen=True, gc=False):
    """A file as the store listed it.

    Attributes:
        path: Path relative to the checkpoint, with ``/`` between components.
        size: Bytes.
        mtime_ns: Modification time in nanoseconds since the epoch; 0 where the store has none.
        etag: As HTTP has it, with quotes; "" where the listing has none.
    """

    path: str
    size: int
    mtime_ns: int
    etag: str = ""


class Skipped(msgspec.Struct, frozen=True, gc=False):
    """An object that is not shown, and why.

    Attributes:
        name: Printable (escaped) text.
        reason: A sentence.
        is_lacking: It is a file of the checkpoint that cannot be read now, so a copy without it
            would not be whole.
    """

    name: str
    reason: str
    is_lacking: bool = False


class Listing(msgspec.Struct, frozen=True):
    """What a store reported: unchecked files, directories (relative paths), unreadable names."""

    files: list[ListedFile]
    directories: list[str]
    skipped: list[Skipped] = []


class Manifest(msgspec.Struct, frozen=True):
    """An immutable snapshot of names, sizes and times.

    Attributes:
        files: The files, sorted by path.
        directories: Every directory except the root, parents first.
        skipped: Objects that are left out.
        version: 32 hex digits over all names, sizes, times and ETags but those of `METADATA_NAME`.
        size: Bytes of all files together.
    """

    files: tuple[ListedFile, ...]
    directories: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    version: str
    size: int


def printable(name: str, characters_max: int = 300) -> str:
    """`name` with control characters, quotes and undecodable bytes escaped; at most so many
    characters."""
    text = name.encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= characters_max else text[: characters_max - 3] + "..."


def fault_of_name(path: str) -> str | None:
    """Why `path` cannot be shown in a Linux directory, or None where it can."""
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
    """Check every name of `listing`, add the implied directories, and fix the version.

    Raises LimitExceeded where these are more than `DIRECTORIES_MAX`.
    """
    skipped = list(listing.skipped)
    files: dict[str, ListedFile] = {}
    directories: set[str] = set()
    good_parents: set[str] = {""}  # most files share their parent: check each only once

    def add_parents(path: str) -> None:
        parent = path.rpartition("/")[0]
        while parent not in good_parents:
            good_parents.add(parent)
            directories.add(parent)
            if len(directories) > DIRECTORIES_MAX:
                raise LimitExceeded(
                    f"the checkpoint has more than {DIRECTORIES_MAX} directories, e.g. "
                    f"{printable(parent)}; name a directory below it"
                )
            parent = parent.rpartition("/")[0]

    hostile: dict[str, str] = {}
    for path in listing.directories:
        fault = fault_of_name(path)
        if fault is None:
            directories.add(path)
            add_parents(path)
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
        add_parents(file.path)
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
    """A hostile directory is reported through what is below it, where there is anything."""
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
