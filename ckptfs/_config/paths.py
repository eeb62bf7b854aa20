"""The directories that ckptfs chooses if none is configured: for a daemon's socket and mount, for
its cache, and for the files of a user.

All processes of a user on one machine must find the same daemon. So these directories depend only
on the user and the machine. They do not depend on ``TMPDIR``, because each job of a scheduler has
its own, or on ``XDG_RUNTIME_DIR``, because it exists only during a login. ckptfs takes the first
candidate that the user can use. A candidate with an existing control socket of the user comes
before all others. ``TMPDIR`` is the last candidate, for machines where all others are read-only.

All users can write to ``/tmp``, so another user may have made our directory there. ckptfs does not
use such a directory. This is not an error, because ckptfs takes the next candidate.
"""

import errno
import functools
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ckptfs._model.config_values import SOCKET_BYTES_MAX
from ckptfs._os.mountinfo import filesystem_type

SOCKET_NAME = "control.sock"
_SHARED = Path("/tmp"), Path("/var/tmp")
_LOGINS = Path("/run/user")
_MACHINE_ID = Path("/etc/machine-id")
_REMOTE = frozenset(
    {
        *("9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "cvfs", "dvs", "gfs2"),
        *("glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs"),
        *("pvfs2", "quobyte", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs", "wekafs"),
    }
)
"""Types of file systems in mountinfo that several machines can mount at once."""
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.ntfs-3g"})
"""Types ``fuse.*`` that only one machine can mount."""
_MEMORY = frozenset({"ramfs", "tmpfs"})


class Place(NamedTuple):
    """A candidate for a directory.

    Attributes:
        path: The directory. It may not exist yet.
        fault: The reason why this user cannot use it, or "".
    """

    path: Path
    fault: str


def runtime_places(environ: Mapping[str, str]) -> list[Place]:
    """Return candidates for the directory of socket and mount, the best one first."""
    name = f"ckptfs-{os.geteuid()}"
    shared = [folder / name for folder in _SHARED]
    if os.geteuid() == 0:
        found = [Path("/run/ckptfs"), *shared]
    else:
        # It ends with the user's last login, but the user's systemd listens there.
        login = _LOGINS / str(os.geteuid()) / "ckptfs"
        found = [login, *shared] if _has_socket(login) else [*shared, login]
        if not os.path.isdir(login.parent):
            found.remove(login)
    found += _last(environ, name)
    found.sort(key=lambda path: not _has_socket(path))  # stable
    return [Place(path, "" if _has_socket(path) else _socket_fault(path)) for path in found]


def cache_places(environ: Mapping[str, str]) -> list[Place]:
    """Return candidates for the directory of the cache, the best one first.

    ckptfs prefers a disk of this machine to a shared file system, and a shared file system to
    memory. On a shared file system the directory has the name of this machine.
    """
    name = f"ckptfs-{os.geteuid()}"
    own = Path("/var/cache/ckptfs") if os.geteuid() == 0 else user_folder(environ, "CACHE")
    found = [] if own is None else [own]
    found += [folder / name / "cache" for folder in reversed(_SHARED)]
    kinds = {path: filesystem_type(path) for path in found}
    found.sort(key=lambda path: (is_memory(kinds[path]), is_shared(kinds[path])))  # stable
    paths = [path / _node_name() if is_shared(kinds[path]) else path for path in found]
    paths += [folder / "cache" for folder in _last(environ, name)]
    return [Place(path, _cache_fault(path, name)) for path in paths]


def kept_place(environ: Mapping[str, str]) -> Path:
    """Return the directory for lasting files of this user, on all machines with this home."""
    own = user_folder(environ, "CACHE")
    name = f"ckptfs-{os.geteuid()}"
    found = [] if own is None else [own]
    found += [folder / name for folder in reversed(_SHARED)] + _last(environ, name)
    return chosen([Place(path, fault_of(path)) for path in found])


def chosen(places: list[Place]) -> Path:
    """Return the first usable candidate, or the first of all, so that the error names it."""
    return next((place.path for place in places if not place.fault), places[0].path)


def user_folder(environ: Mapping[str, str], kind: str) -> Path | None:
    """Return ckptfs's folder below ``XDG_<kind>_HOME`` or the user's home; None without a home.

    `kind` is "CACHE" or "CONFIG", see the XDG Base Directory Specification. A home that does not
    exist does not count, and neither does ``/``, which containers set for users without a home.
    """
    base = environ.get(f"XDG_{kind}_HOME", "")
    if os.path.isabs(base):
        return Path(base, "ckptfs")
    home = environ.get("HOME", "")
    if not home:
        import pwd

        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            return None
    if not os.path.isabs(home) or not home.strip("/") or not os.path.isdir(home):
        return None
    return Path(home, f".{kind.lower()}", "ckptfs")


# -- whether a directory can be used


def fault_of(path: Path, *, full_is_fine: bool = False) -> str:
    """Return the reason why this user cannot keep private files in a directory, or "".

    A directory that does not exist is usable if this user can make it. The function does not make
    it. `full_is_fine` allows a full file system.
    """
    try:
        if fault := owner_fault(path):
            return fault
        if (owner := path.stat().st_uid) != os.geteuid():
            return f"{path} belongs to uid {owner}"
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"{path}: {error.strerror}"
    there = existing(path)
    if not there.is_dir():
        return f"{there} is not a directory"
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        return f"{there} cannot be written"
    if there != path and (fault := _parent_fault(there)):
        return fault
    return "" if full_is_fine else _room_fault(there)


def owner_fault(path: Path) -> str:
    """Return the reason why users besides this one and root could write to a directory, or "".
    Raises OSError."""
    if fault := _link_fault(path):
        return fault
    info = path.stat()
    if not stat.S_ISDIR(info.st_mode):
        return f"{path} is not a directory"
    if info.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to uid {info.st_uid}"
    if info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX:
        return f"{path} is writable by others"
    return ""


def _link_fault(path: Path) -> str:
    link = path.lstat()
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.geteuid()):
        return f"{path} is a link of uid {link.st_uid}"
    return ""


def existing(path: Path) -> Path:
    """Return `path`, or the closest directory above it that exists."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def make_folder(path: Path, mode: int = 0o700) -> None:
    """Make a directory and the missing ones above it, all with `mode` regardless of the umask.
    Raises OSError."""
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            if not folder.is_dir():  # if it is one, another process was faster
                cause = os.strerror(errno.ENOTDIR)
                raise NotADirectoryError(errno.ENOTDIR, cause, str(folder)) from None
        else:
            folder.chmod(mode)


def _parent_fault(folder: Path) -> str:
    """Return the reason why another user could remove files in `folder`, or ""."""
    info = folder.stat()
    if (fault := _link_fault(folder)) or info.st_mode & stat.S_ISVTX:
        return fault
    if info.st_uid not in (0, os.geteuid()):
        return f"{folder} belongs to uid {info.st_uid}"
    return f"{folder} is writable by others" if info.st_mode & 0o002 else ""


def _room_fault(folder: Path) -> str:
    try:
        space = os.statvfs(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    is_root = os.geteuid() == 0
    if not (space.f_bfree if is_root else space.f_bavail) and space.f_blocks:
        return f"{folder} is on a full disk"
    if space.f_files and not (space.f_ffree if is_root else space.f_favail):
        return f"{folder} has no inode left"
    return ""


def _socket_fault(folder: Path) -> str:
    if len(os.fsencode(folder / SOCKET_NAME)) > SOCKET_BYTES_MAX:
        return f"{folder} is too long for a socket"
    return fault_of(folder)


def _cache_fault(path: Path, name: str) -> str:
    """`fault_of` `path`, and of the directory `name` above it, which another user may have made."""
    for folder in path.parents:
        if folder.name == name and (fault := fault_of(folder, full_is_fine=True)):
            return fault
    return fault_of(path, full_is_fine=os.path.isdir(path))


def _has_socket(folder: Path) -> bool:
    """Whether the directory has a control socket of this user. In a directory that others can
    write to, the socket does not count, because another user may have made it."""
    try:
        link, info = folder.lstat(), (folder / SOCKET_NAME).lstat()
        fault = owner_fault(folder)
    except OSError:
        return False
    is_ours = stat.S_ISDIR(link.st_mode) and link.st_uid == info.st_uid == os.geteuid()
    return is_ours and stat.S_ISSOCK(info.st_mode) and not fault


def _last(environ: Mapping[str, str], name: str) -> list[Path]:
    folder = environ.get("TMPDIR", "")
    return [Path(folder, name)] if os.path.isabs(folder) else []


# -- the file system of a directory


def is_shared(kind: str) -> bool:
    """Whether several machines can mount a file system of that type at once."""
    return kind in _REMOTE or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)


def is_memory(kind: str) -> bool:
    """Whether file systems of that type are in memory."""
    return kind in _MEMORY


@functools.cache
def _node_name() -> str:
    """Return a name for this machine, from its host name and its machine id. Two machines can have
    equal host names, and machines of one image can have equal machine ids."""
    try:
        machine = _MACHINE_ID.read_text().strip()
    except (OSError, UnicodeDecodeError):
        machine = ""
    host = "".join(c if c.isalnum() or c in "-." else "-" for c in os.uname().nodename)
    return "-".join(part for part in ("node", host[:64], machine[:8]) if part)


# -- caches beside each other

SIBLINGS_MAX = 16
"""Maximum number of caches of one user on one machine. Containers and jobs that share a home but do
not see each other's mounts have daemons of their own. More than one per GPU is rare."""


def siblings(directory: Path) -> Iterator[Path]:
    """Return a default cache directory, and the directories for daemons that find it in use."""
    yield directory
    for number in range(2, SIBLINGS_MAX + 1):
        yield directory.with_name(f"{directory.name}-{number}")
