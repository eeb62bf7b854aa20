"""Checks of the machine: whether it can mount, and how well."""

import os
import resource
import shutil
import stat
import tempfile
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ckptfs._config import load_config
from ckptfs._daemon import launch, passthrough, session
from ckptfs._daemon.trial import Trial, try_mount
from ckptfs._doctor.checks import Outcome, failed, ok, skipped, warning
from ckptfs.errors import CannotMount

if TYPE_CHECKING:
    from ckptfs._model.config import Config

DEVICE = Path("/dev/fuse")
FUSE_CONF = Path("/etc/fuse.conf")
"""Of fusermount3, see mount.fuse3(8)."""
PAGES_LIMIT = Path("/proc/sys/fs/fuse/max_pages_limit")
"""Linux >= 6.13; before, it was 256 pages always."""
_PAGES_WANTED = 256
_DESCRIPTORS_MIN = 8192
"""An open file takes two, and each of 128 handles and 48 connections at the store takes one."""
_OF_FUSERMOUNT = {
    "could not determine username": "give this user an entry in /etc/passwd",
    "too many FUSE filesystems": f"raise mount_max in {FUSE_CONF}",
}
"""What fusermount3 says (its fusermount.c), and what to do about it."""
_PACKAGES = ("pyfuse3", "trio", "xxhash")
"""Of the extra ``daemon``; each has a module of its name."""


class Node:
    """The checks, and what they find for others.

    Attributes:
        config: The configuration, after `configuration`.
        served_by: The socket of the daemon that serves us and is not ours to start; "": there is
            none, so this machine has to be able to mount. Set by ``serving``.
        daemon_pid: Of the daemon that answers; 0: none does, or it is out of sight.
        passthrough: What that daemon says of it.
    """

    def __init__(self) -> None:
        self.config: Config
        self.served_by = ""
        self.daemon_pid = 0
        self.passthrough = ""
        self._trial: Trial

    def served_elsewhere(self) -> str:
        """Why it does not matter whether this machine can mount; "": it does."""
        return f"the daemon at {self.served_by} mounts for us" if self.served_by else ""

    def configuration(self) -> Outcome:
        """Whether file and environment can be used."""
        self.config = load_config()
        variables = sorted(name for name in os.environ if name.startswith("CKPTFS_"))
        return ok(f"valid; the environment sets {', '.join(variables) or 'none of it'}")

    def package(self) -> Outcome:
        """Whether what the daemon needs is installed."""
        lacking = [name for name in _PACKAGES if find_spec(name) is None]
        if lacking and self.served_by:
            return skipped(f"no {', '.join(lacking)}; {self.served_elsewhere()}")
        if lacking:
            return failed(
                f"ckptfs {version_or_none('ckptfs')} without {', '.join(lacking)}",
                "pip install 'ckptfs[daemon]'",
            )
        versions = ", ".join(f"{name} {version_or_none(name)}" for name in ("ckptfs", *_PACKAGES))
        return ok(versions)

    def device(self) -> Outcome:
        """Whether /dev/fuse is there, and may be opened."""
        if why := self.served_elsewhere():
            return skipped(why)
        in_container = "docker run --device /dev/fuse"
        if not DEVICE.exists():
            return failed(f"there is no {DEVICE}", f"modprobe fuse; in a container: {in_container}")
        if not stat.S_ISCHR(DEVICE.stat().st_mode):
            return failed(
                f"{DEVICE} is no device", f"give the container the device: {in_container}"
            )
        try:
            os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
        except PermissionError as error:
            if os.geteuid() == 0:  # whom no mode stops: it is the device cgroup
                return failed(
                    f"{DEVICE}: {error.strerror}, by the container's device cgroup",
                    f"allow the device: {in_container}",
                )
            return failed(f"{DEVICE}: {error.strerror}", f"chmod 666 {DEVICE}, as root")
        return ok(f"{DEVICE} can be opened")

    def fusermount(self) -> Outcome:
        """Whether users other than root can mount."""
        if why := self.served_elsewhere():
            return skipped(why)
        if os.geteuid() == 0:
            return skipped("root mounts without it")
        path = shutil.which("fusermount3")
        if path is None:
            return failed("there is no fusermount3", "install the package fuse3")
        info = os.stat(path)
        if info.st_uid != 0 or not info.st_mode & stat.S_ISUID:
            return failed(f"{path} is not setuid root", f"chown root {path} && chmod u+s {path}")
        if os.statvfs(path).f_flag & os.ST_NOSUID:
            return failed(
                f"{path} is on a file system that is mounted nosuid", "remount it with suid"
            )
        return ok(f"{path} is setuid root")

    def mount(self) -> Outcome:
        """Whether mounting works: by doing it, for a moment."""
        if why := self.served_elsewhere():
            return skipped(why)
        cache_fd = _file_near(Path(self.config.cache_dir))
        try:
            self._trial = try_mount(self.config, cache_fd)
        except CannotMount as error:
            for said, remedy in _OF_FUSERMOUNT.items():
                if said in str(error):
                    return failed(str(error), remedy)
            raise
        finally:
            os.close(cache_fd)
        return ok("a mount was made, and ended again")

    def restarts(self) -> Outcome:
        """Whether a daemon that dies is a pause only."""
        release = os.uname().release
        if not self.config.restart:
            return skipped("restart = false in the configuration")
        if not self._trial.resend:
            return warning(
                f"Linux {release} cannot repeat requests: when the daemon dies, the mount ends",
                "use Linux 6.9 or later",
            )
        return ok(f"Linux {release} repeats what a dead daemon had taken")

    def passes_through(self) -> Outcome:
        """Whether the kernel reads cached files itself."""
        said = self.passthrough or self._trial.passthrough
        if said == passthrough.ON:
            return ok("on: the kernel reads cached files itself")
        if not self.config.passthrough:
            return skipped(said)
        if os.geteuid() != 0:
            return skipped(f"{said}; only root's daemon has it")
        why, _, remedy = said.removeprefix("off: ").partition("; ")
        return warning(
            f"off: {why}; cached files are read through the daemon",
            remedy or "set cache_dir to a directory on ext4 or xfs",
        )

    def request_size(self) -> Outcome:
        """Whether the kernel asks for 1 MiB at once."""
        limit = int(PAGES_LIMIT.read_text()) if PAGES_LIMIT.exists() else _PAGES_WANTED
        if limit < _PAGES_WANTED:
            return warning(
                f"{limit * resource.getpagesize() >> 10} KiB at most, by max_pages_limit",
                f"sysctl fs.fuse.max_pages_limit={_PAGES_WANTED}",
            )
        if os.geteuid() != 0:
            return skipped("only root's daemon may set the readahead: 128 KiB")
        if not self._trial.read_ahead:
            return warning(
                "128 KiB: /sys/class/bdi/…/read_ahead_kb cannot be written",
                "make /sys writable; in a container: -v /sys/class/bdi:/sys/class/bdi",
            )
        return ok(f"{self.config.read_ahead_kb} KiB")

    def other_users(self) -> Outcome:
        """Whether `allow_other` can work."""
        if not self.config.allow_other:
            return skipped("allow_other = false: only this user is served")
        if os.geteuid() == 0:
            return ok("root's daemon may serve other users")
        lines = FUSE_CONF.read_text().splitlines() if FUSE_CONF.exists() else []
        if "user_allow_other" not in (line.strip() for line in lines):
            return failed(
                f"allow_other = true, and no user_allow_other in {FUSE_CONF}",
                f"echo user_allow_other >> {FUSE_CONF}, as root; or set allow_other = false",
            )
        return ok(f"user_allow_other is in {FUSE_CONF}")

    def directories(self) -> Outcome:
        """Whether socket, mount point and cache can be where they are configured to be."""
        if why := self.served_elsewhere():
            return skipped(why)
        config = self.config
        mount = Path(config.mount)
        for path in (Path(config.socket).parent, mount.parent, Path(config.cache_dir)):
            if fault := _fault_of(path, is_cache=str(path) == config.cache_dir):
                return failed(*fault)
        # Whatever is mounted there is not touched.
        if session.device_of_mount(mount) is None and mount.exists():
            remedy = "empty it, or set CKPTFS_MOUNT to another"
            if not mount.is_dir():
                return failed(f"mount point {mount} is no directory", remedy)
            if any(mount.iterdir()):
                return failed(f"mount point {mount} is not empty", remedy)
        return ok(f"{config.socket}, {mount} and {config.cache_dir} can be used")

    def limits(self) -> Outcome:
        """Of the daemon that runs, or would be started from here."""
        pid = self.daemon_pid or os.getpid()
        try:
            _, descriptors = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            file_bytes, _ = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        except (PermissionError, ProcessLookupError):
            return skipped(f"the daemon (pid {pid}) is of another user, or of another container")
        if descriptors != resource.RLIM_INFINITY and descriptors < _DESCRIPTORS_MIN:
            return warning(
                f"{descriptors} open files (RLIMIT_NOFILE); one of the mount takes two",
                "ulimit -Hn 65536, or LimitNOFILE=65536 in the systemd unit",
            )
        if file_bytes != resource.RLIM_INFINITY:
            return warning(
                f"files of {file_bytes} bytes at most (RLIMIT_FSIZE): larger ones are not cached",
                "ulimit -f unlimited",
            )
        shown = "unlimited" if descriptors == resource.RLIM_INFINITY else str(descriptors)
        return ok(f"{shown} open files; nothing is locked in memory")


def existing(path: Path) -> Path:
    """`path`, or the closest directory above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def _fault_of(path: Path, *, is_cache: bool) -> tuple[str, str] | None:
    """What keeper or daemon would refuse, and what to do; None: nothing."""
    variables = "CKPTFS_SOCKET, CKPTFS_MOUNT and CKPTFS_CACHE_DIR"
    there = existing(path)
    info = there.stat()
    if not stat.S_ISDIR(info.st_mode):
        return f"{there} is no directory", f"remove it, or set {variables}"
    if there != path:
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{path} cannot be made in {there}", f"make it as root, or set {variables}"
        return None
    if not launch.is_ours(info) or (is_cache and info.st_mode & 0o022):
        return (
            f"{path} belongs to another user or is writable by others",
            f"chown and chmod go-w it, or set {variables} to a directory of your own",
        )
    if is_cache and info.st_uid != os.geteuid():
        return f"{path} belongs to another user", "set CKPTFS_CACHE_DIR to a directory of your own"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"{path} cannot be written", f"chmod u+rwx {path}, or set {variables}"
    return None


def _file_near(directory: Path) -> int:
    """A nameless file on the file system of `directory`; where we may not, in the temporary
    folder."""
    for place in (existing(directory), Path(tempfile.gettempdir())):
        try:
            return os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
    return os.memfd_create("ckptfs-doctor")


def version_or_none(package: str) -> str:
    try:
        return version_of(package)
    except PackageNotFoundError:
        return "none"
