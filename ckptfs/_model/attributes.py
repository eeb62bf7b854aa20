"""Names of the extended attributes (xattr(7)) of a checkpoint and its files.

Values are text. The same names appear in ``ckptfs status --json``.

Programs that copy files list the attributes and set each of them on the copy, and most file systems
have little space per file. So only some attributes are listed (see `listed`). Each can be read by
name.
"""

from collections.abc import Mapping

PREFIX = "user.ckptfs."

# -- of the checkpoint's root and of files

URI = PREFIX + "uri"
"""URI of the checkpoint, directory or file, without secrets."""
ORIGIN = "user.xdg.origin.url"
"""The same URI by the name that desktops use (freedesktop.org, Guidelines for extended
attributes)."""
SIZE = PREFIX + "size"
"""Length in bytes."""
CACHED = PREFIX + "cached"
"""Bytes in the node's cache."""
STATE = PREFIX + "state"
"""One of `lazy`, `fetching`, `cached`, `changed`, `failing`."""
ERROR = PREFIX + "error"
"""The last error, with time, file and cause on one line. Absent if no error occurred."""

# -- of the checkpoint's root

VERSION = PREFIX + "version"
"""Of the root, the digest of the manifest. Of a file, the ETag when it is known, and otherwise
``<size>-<mtime in ns>``."""
ID = PREFIX + "id"
"""12 hex digits that are equal for attachments of the same place."""
FILES = PREFIX + "files"
"""Number of files."""
SKIPPED = PREFIX + "skipped"
"""One line (name, tab, reason) per object or metadata key that is not shown. Absent if all are
shown."""
ATTACHED = PREFIX + "attached"
"""JSON with `since` (seconds since the epoch), `holders` (process ids; 0 stands for
`OTHER_CONTAINERS`) and `pinned`."""
OTHER_CONTAINERS = "processes of other containers"
"""Processes outside the daemon's pid namespace. The kernel reports 0 as their id."""
FORMAT = PREFIX + "format"
"""Format of the checkpoint's files, see ``ckptfs._model.formats.headers``."""
METADATA_KEYS = PREFIX + "metadata_keys"
"""Number of keys in the checkpoint's metadata. It is listed only if the list lacks some keys."""
META_PREFIX = PREFIX + "meta."
"""Prefix of a key of the checkpoint's metadata, with JSON text as value. The attribute can be set
and removed. Text that is not JSON becomes a string."""

# -- of files

ETAG = PREFIX + "etag"
"""The store's ETag, without quotes. Absent until the file is first opened, and if the store has no
ETag."""
MTIME = PREFIX + "mtime"
"""Seconds since the epoch, with nine decimals. Absent if the store has no time."""
TENSORS = PREFIX + "tensors"
"""Of safetensors files, one line of JSON per tensor (name, dtype, shape, start and end in the
file), cut at `VALUE_BYTES_MAX`."""

# -- actions, which can be set on files and directories and have no value

PREFETCH = PREFIX + "prefetch"
"""Fetches the file or directory in the background."""
EVICT = PREFIX + "evict"
"""Drops the file or directory from the cache."""

LISTED = (URI, VERSION, ID, SIZE, FILES, ETAG, MTIME, ORIGIN)
"""Listed attributes, the most important first. They stay true in a copy, they are short, and the
daemon knows them without the store. The others describe this node at this moment (`STATE`,
`CACHED`, `ATTACHED`, `ERROR`), can be long (`TENSORS`, `SKIPPED`), or need a file's first bytes
(`FORMAT`, `TENSORS`)."""
STATED = frozenset(
    [*LISTED, CACHED, STATE, ERROR, SKIPPED, ATTACHED, FORMAT, METADATA_KEYS, TENSORS]
)
"""Attributes that state facts. Programs cannot set them."""

VALUE_BYTES_MAX = 65536
"""The kernel's limit for one value (XATTR_SIZE_MAX, limits.h)."""
NAME_BYTES_MAX = 255
"""The kernel's limit for one name (XATTR_NAME_MAX)."""
LISTED_BYTES_MAX = 2048
"""Space for the listed attributes of one file on ext4. It keeps all attributes of a file in one
block, usually of 4096 bytes. The other half is for labels, ACLs and overlayfs."""
_ENTRY_BYTES = 16
"""Length of struct ext4_xattr_entry, without the name (fs/ext4/xattr.h)."""
_PAD_BYTES = 4
"""Alignment of names and values (EXT4_XATTR_PAD)."""


def kept_bytes(name: str, value: bytes) -> int:
    """Space of an attribute on ext4, which stores ``user.`` as a number."""
    name_bytes = len(name.removeprefix("user.").encode())
    return _ENTRY_BYTES + _padded(name_bytes) + _padded(len(value))


def _padded(size: int) -> int:
    return -(-size // _PAD_BYTES) * _PAD_BYTES


def listed(values: Mapping[str, bytes], left_bytes: int = LISTED_BYTES_MAX) -> list[str]:
    """Names of the attributes that fit into `left_bytes`, in the order of `values`. The list leaves
    out an attribute that does not fit or has no value, and goes on with the next."""
    found: list[str] = []
    for name, value in values.items():
        size = kept_bytes(name, value)
        if value and size <= left_bytes:
            found.append(name)
            left_bytes -= size
    return found
