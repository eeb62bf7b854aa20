"""Names of the extended attributes (xattr(7)) that ckptfs states about a checkpoint and its files.

Values are text. The same names appear in ``ckptfs status --json``.
"""

PREFIX = "user.ckptfs."

# -- of the checkpoint's root and of files

URI = PREFIX + "uri"
"""URI of the checkpoint or file, without secrets. Directories have it, too."""
ORIGIN = "user.xdg.origin.url"
"""The same, by the name that desktops know
(freedesktop.org, Guidelines for extended attributes)."""
SIZE = PREFIX + "size"
"""Bytes."""
CACHED = PREFIX + "cached"
"""Bytes of it that are in the node's cache."""
STATE = PREFIX + "state"
"""One of `lazy`, `fetching`, `cached`, `changed`, `failing`."""
ERROR = PREFIX + "error"
"""The last error: time, file and cause on one line. Absent where there was none."""

# -- of the checkpoint's root

VERSION = PREFIX + "version"
"""Root: digest of the manifest. File: the ETag once it is known, else ``<size>-<mtime in ns>``."""
ID = PREFIX + "id"
"""12 hex digits that are equal for attachments of the same place. Only the root has it."""
FILES = PREFIX + "files"
"""How many."""
SKIPPED = PREFIX + "skipped"
"""One line per object or metadata key that is not shown: name, tab, reason. Absent where there is
none."""
ATTACHED = PREFIX + "attached"
"""JSON: `since` (seconds since the epoch), `holders` (process ids; 0: `OTHER_CONTAINERS`),
`pinned`."""
OTHER_CONTAINERS = "processes of other containers"
"""Those that the daemon's pid namespace does not have: the kernel gives it 0 as their id."""
FORMAT = PREFIX + "format"
"""See ``ckptfs._model.formats``."""
META_PREFIX = PREFIX + "meta."
"""Before a key of the checkpoint's metadata; the value is JSON text. Can be set and removed; text
that is not JSON is taken for a string."""

# -- of files

ETAG = PREFIX + "etag"
"""The store's, without quotes. Absent until the file is first opened, and where there is none."""
MTIME = PREFIX + "mtime"
"""Seconds since the epoch, with nine decimals. Absent where the store has none."""
TENSORS = PREFIX + "tensors"
"""Of safetensors files: one line of JSON per tensor (name, dtype, shape, start, end: bytes in the
file), cut at `VALUE_BYTES_MAX`."""

# -- actions: they can be set, on files and directories, and have no value

PREFETCH = PREFIX + "prefetch"
"""Fetches it in the background."""
EVICT = PREFIX + "evict"
"""Drops it from the cache."""

STATED = frozenset(
    [
        URI,
        ORIGIN,
        SIZE,
        CACHED,
        STATE,
        ERROR,
        VERSION,
        ID,
        FILES,
        SKIPPED,
        ATTACHED,
        FORMAT,
        ETAG,
        MTIME,
        TENSORS,
    ]
)
"""What ckptfs itself states, and nobody can set."""

VALUE_BYTES_MAX = 65536
"""The kernel's limit for one value (XATTR_SIZE_MAX, limits.h)."""
NAME_BYTES_MAX = 255
"""The kernel's limit for one name (XATTR_NAME_MAX)."""
LIST_BYTES_MAX = 65536
"""The kernel's limit for all names of a file, each with a NUL (XATTR_LIST_MAX)."""
