"""The part of the kernel's FUSE protocol that ckptfs uses: numbers, flags and message layouts.

Source of all of it: include/uapi/linux/fuse.h of the Linux kernel. Each constant has the name there
without the prefix ``FUSE_``.
"""

import struct

PROTOCOL_MAJOR = 7
PROTOCOL_MINOR_MAX = 45
"""The newest protocol that ckptfs knows. The kernel's is used if it is older."""
PROTOCOL_MINOR_MIN = 28
"""The oldest protocol that ckptfs accepts: Linux 4.20, which has MAX_PAGES."""

# -- enum fuse_opcode

FORGET = 2
GETATTR = 3
OPEN = 14
READ = 15
STATFS = 17
RELEASE = 18
REMOVEXATTR = 24
FLUSH = 25
INIT = 26
OPENDIR = 27
RELEASEDIR = 29
INTERRUPT = 36
BATCH_FORGET = 42
READDIRPLUS = 44

# -- enum fuse_notify_code

NOTIFY_INVAL_ENTRY = 3
NOTIFY_RESEND = 7
"""Makes the kernel repeat the requests that a daemon has read and not answered (Linux 6.9)."""

UNIQUE_RESEND = 1 << 63
"""Bit in the number of a repeated request."""

INVALID_UID = 0xFFFFFFFF
"""FUSE_INVALID_UIDGID, the user of every request that makes no inode, in a session with
ALLOW_IDMAP."""

# -- flags of INIT

ASYNC_READ = 1 << 0
DO_READDIRPLUS = 1 << 13
ASYNC_DIO = 1 << 15
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
CACHE_SYMLINKS = 1 << 23
EXPLICIT_INVAL_DATA = 1 << 25
INIT_EXT = 1 << 30
PASSTHROUGH = 1 << 37
HAS_RESEND = 1 << 39
ALLOW_IDMAP = 1 << 40
"""Lets root make idmapped mounts of the session (Linux 6.12). The kernel fails the session if it
has this flag without ``default_permissions``."""

# -- flags of the reply to OPEN and OPENDIR

FOPEN_KEEP_CACHE = 1 << 1
FOPEN_CACHE_DIR = 1 << 3
FOPEN_PASSTHROUGH = 1 << 7

# -- messages

IN_HEADER = struct.Struct("<IIQQIIIHH")
"""struct fuse_in_header: length, opcode, unique, inode, uid, gid, pid, extensions, padding."""
OUT_HEADER = struct.Struct("<IiQ")
"""struct fuse_out_header: length, error (negative) or notification, unique."""
INIT_IN = struct.Struct("<IIII12I")
"""struct fuse_init_in: major, minor, readahead, flags, and 12 words that begin with flags2."""
INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
"""struct fuse_init_out: major, minor, readahead, flags, background requests, congestion threshold,
longest write, granularity of times, pages of a request, map alignment, flags2, stack depth of
backing files, request timeout."""
READ_IN = struct.Struct("<QQI")
"""The begin of struct fuse_read_in: handle, offset, size. Listings have the same."""
READ_REQUEST = struct.Struct("<4xIQ16xI4xQQI12xI")
"""A whole READ, of fuse_in_header and fuse_read_in: opcode, unique, pid of the thread, handle,
offset, size, flags of the open file."""
RELEASE_IN = struct.Struct("<Q")
"""The begin of struct fuse_release_in: handle."""
OPEN_OUT = struct.Struct("<QIi")
"""struct fuse_open_out: handle, flags, backing id."""
ATTR_OUT = struct.Struct("<QI4x6Q10I")
"""struct fuse_attr_out: validity (s, ns), then struct fuse_attr: inode, size, blocks, three times
in seconds and three in nanoseconds, mode, links, uid, gid, rdev, size of a block, flags."""
STATFS_OUT = struct.Struct("<5Q3I28x")
"""struct fuse_statfs_out: blocks, free and available ones, inodes, free ones, size of a block,
longest name, size of a fragment."""
NOTIFY_INVAL_ENTRY_OUT = struct.Struct("<QII")
"""struct fuse_notify_inval_entry_out: parent, length of the name, flags."""

# -- ioctls of /dev/fuse

DEV_IOC_BACKING_OPEN = 0x4010E501
DEV_IOC_BACKING_CLOSE = 0x4004E502
BACKING_MAP = struct.Struct("<iIQ")
"""struct fuse_backing_map: descriptor, flags, padding."""
BACKING_ID = struct.Struct("<I")
