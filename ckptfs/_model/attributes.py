"""Names of the extended attributes (xattr(7)) that ckptfs states about a checkpoint and its files.

Values are text. The same names appear in ``ckptfs status --json``.
"""

PREFIX = "user.ckptfs."

URI = PREFIX + "uri"
"""URI of the checkpoint or file, without secrets."""
VERSION = PREFIX + "version"
"""Root: digest of the manifest. File: the ETag once it is known, else ``<size>-<mtime in ns>``."""
SIZE = PREFIX + "size"
"""Bytes."""
CACHED = PREFIX + "cached"
"""Bytes of it that are in the node's cache."""
STATE = PREFIX + "state"
"""One of `lazy`, `fetching`, `cached`, `changed`, `failing`."""
ERROR = PREFIX + "error"
"""The last error: time, file and cause on one line. Absent where there was none."""
SKIPPED = PREFIX + "skipped"
"""Root only: one line per object that is left out: name, tab, reason. Absent where there is
none."""

VALUE_BYTES_MAX = 65536
"""The kernel's limit for one value (XATTR_SIZE_MAX, limits.h)."""
