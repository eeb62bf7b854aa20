"""Checks of the machine, which show whether and how well it can mount."""

import itertools
import os
import re
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ckptfs._config import environment
from ckptfs._config.load import VARIABLES, load
from ckptfs._config.paths import existing, owner_fault, runtime_places
from ckptfs._daemon.fuse import passthrough
from ckptfs._doctor.checks import Outcome, failed, ok, skipped, warning
from ckptfs._doctor.trial_mount import Trial, try_mount
from ckptfs._keeper import launch
from ckptfs._model.wording import INSTALL_DAEMON
from ckptfs._mount import session

if TYPE_CHECKING:
    from ckptfs._model.config import Config

DEVICE = Path("/dev/fuse")
FUSE_CONF = Path("/etc/fuse.conf")
"""Configuration of fusermount3, see mount.fuse3(8)."""
STATUS = Path("/proc/self/status")
PAGES_LIMIT = Path("/proc/sys/fs/fuse/max_pages_limit")
"""Limit of a request's pages (Linux >= 6.13). Older kernels have a fixed limit of 256 pages."""
_PAGES_WANTED = 256
_OTHER = "set cache_dir (CKPTFS_CACHE_DIR) to another directory, or unset it"
_DESCRIPTORS_MIN = 8192
"""An open file takes two descriptors. Each of 128 handles and of 48 connections takes one more."""
_PACKAGES = ("pyfuse3", "trio", "xxhash")
"""Packages of the extra ``daemon``. Each has a module with its name."""


class Node:
    """The checks, and results that other checks need. ``serving`` sets all but `config`.

    Attributes:
        config: The configuration, with the cache directory that the daemon has or would take.
        served_by: The socket of a daemon that this user does not start; "" if this machine must
            mount itself.
        daemon_pid: The process id of the running daemon, or 0 if none runs or is visible.
        passthrough: The running daemon's state of passthrough.
    """

    def __init__(self) -> None:
        self.config: Config
        self.served_by = ""
        self.daemon_pid = 0
        self.passthrough = ""
        self._sources: dict[str, str] = {}
        self._passed_over: list[str] = []  # why ckptfs did not choose other caches
        self._trial: Trial

    def served_elsewhere(self) -> str:
        """Return the reason why this machine need not be able to mount, or ""."""
        return f"the daemon at {self.served_by} mounts for this user" if self.served_by else ""

    def unless_served(self, look: Callable[[], Outcome]) -> Callable[[], Outcome]:
        """Return a check that is skipped if this machine need not be able to mount."""

        def look_here() -> Outcome:
            why = self.served_elsewhere()
            return skipped(why) if why else look()

        return look_here

    def configuration(self) -> Outcome:
        """Check the configuration file and the environment."""
        loaded = load()
        self.config, self._sources = loaded.config, loaded.sources
        if self._is_default("cache_dir"):
            free, self._passed_over = launch.free_cache(os.environ)
            self.use_cache(free or Path(self.config.cache_dir))
        unknown = environment.unknown()
        ours = [name for name in VARIABLES if name in os.environ]
        facts = f"valid; the environment sets {', '.join(ours) or 'no setting'}"
        if unknown:
            verb = "has" if len(unknown) == 1 else "have"
            hints = {environment.hint(near): None for near in unknown.values()}
            return warning(f"{facts}; {', '.join(unknown)} {verb} no effect", "; ".join(hints))
        return ok(facts)

    def use_cache(self, directory: Path) -> None:
        """Use this directory as the cache in other checks."""
        self.config = msgspec.structs.replace(self.config, cache_dir=str(directory))

    def _is_default(self, setting: str) -> bool:
        return self._sources.get(setting) == "default"

    def package(self) -> Outcome:
        """Check whether the packages of the daemon are installed."""
        lacking = [name for name in _PACKAGES if find_spec(name) is None]
        if lacking and self.served_by:
            return skipped(f"no {', '.join(lacking)}; {self.served_elsewhere()}")
        if lacking:
            return failed(
                f"ckptfs {version_or_none('ckptfs')} without {', '.join(lacking)}", INSTALL_DAEMON
            )
        versions = ", ".join(f"{name} {version_or_none(name)}" for name in ("ckptfs", *_PACKAGES))
        return ok(versions)

    def device(self) -> Outcome:
        """Check whether /dev/fuse exists and can be opened."""
        in_container = "docker run --device /dev/fuse"
        if not DEVICE.exists():
            return failed(
                f"{DEVICE} does not exist", f"modprobe fuse; in a container: {in_container}"
            )
        if not stat.S_ISCHR(DEVICE.stat().st_mode):
            return failed(
                f"{DEVICE} is not a device", f"give the container the device: {in_container}"
            )
        try:
            os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
        except PermissionError as error:
            if os.geteuid() == 0:  # no mode stops root, so the device cgroup did
                return failed(
                    f"{DEVICE}: {error.strerror}, because of the container's device cgroup",
                    f"allow the device: {in_container}",
                )
            return failed(f"{DEVICE}: {error.strerror}", f"chmod 666 {DEVICE}, as root")
        return ok(f"{DEVICE} can be opened")

    def fusermount(self) -> Outcome:
        """Check whether users other than root can mount."""
        if os.geteuid() == 0:
            return skipped("root mounts without it")
        path = shutil.which("fusermount3")
        if path is None:
            return failed("fusermount3 is not installed", "install the package fuse3")
        info = os.stat(path)
        if info.st_uid != 0 or not info.st_mode & stat.S_ISUID:
            return failed(f"{path} is not setuid root", f"chown root {path} && chmod u+s {path}")
        if os.statvfs(path).f_flag & os.ST_NOSUID:
            return failed(
                f"{path} is on a file system that is mounted nosuid", "remount it with suid"
            )
        if re.search(r"^NoNewPrivs:\s*1$", STATUS.read_text(), re.MULTILINE):
            return failed(
                f"{path} has no effect, because this process has no_new_privs set",
                "let the container run set-uid programs (Kubernetes: allowPrivilegeEscalation: "
                "true; systemd: NoNewPrivileges=no), or let the node's daemon mount",
            )
        return ok(f"{path} is setuid root")

    def mount(self) -> Outcome:
        """Check by a short trial whether mounting works."""
        cache_fd = _file_near(Path(self.config.cache_dir))
        try:
            self._trial = try_mount(self.config, cache_fd)
        finally:
            os.close(cache_fd)
        return ok("a trial mount worked")

    def restarts(self) -> Outcome:
        """Check whether readers only see a pause if the daemon dies."""
        release = os.uname().release
        if not self.config.restart:
            return skipped("restart = false in the configuration")
        if not self._trial.resend:
            return warning(
                f"Linux {release} cannot repeat requests, so the mount ends if the daemon dies",
                "use Linux 6.9 or later",
            )
        return ok(f"Linux {release} repeats the requests of a dead daemon")

    def passes_through(self) -> Outcome:
        """Check whether the kernel reads cached files itself."""
        said = self.passthrough or self._trial.passthrough
        if said == passthrough.ON:
            return ok("on: the kernel reads cached files itself")
        if not self.config.passthrough:
            return skipped(said)
        if os.geteuid() != 0:
            return skipped(f"{said}; only root's daemon has passthrough")
        why, _, remedy = said.removeprefix("off: ").partition("; ")
        return warning(
            f"off: {why}; reads of cached files pass through the daemon",
            remedy or "set cache_dir to a directory on ext4 or xfs",
        )

    def request_size(self) -> Outcome:
        """Check whether the kernel sends requests of 1 MiB."""
        limit = int(PAGES_LIMIT.read_text()) if PAGES_LIMIT.exists() else _PAGES_WANTED
        if limit < _PAGES_WANTED:
            return warning(
                f"at most {limit * resource.getpagesize() >> 10} KiB, because of max_pages_limit",
                f"sysctl fs.fuse.max_pages_limit={_PAGES_WANTED}",
            )
        if os.geteuid() != 0:
            return skipped("128 KiB, because only root's daemon may set the readahead")
        if not self._trial.read_ahead:
            return warning(
                "128 KiB, because /sys/class/bdi/…/read_ahead_kb is read-only",
                "make /sys writable; in a container: -v /sys/class/bdi:/sys/class/bdi",
            )
        return ok(f"{self.config.read_ahead_kb} KiB")

    def other_users(self) -> Outcome:
        """Check whether `allow_other` can work."""
        if not self.config.allow_other:
            others = "" if os.geteuid() == 0 else ", not even root and Docker,"
            return skipped(
                f"allow_other = false: only uid {os.geteuid()} can read the mount; no other user"
                f"{others} can (ckptfs help containers)"
            )
        own = {place.path for place in runtime_places(os.environ)}
        for path in (self.config.socket, self.config.mount):
            for folder in Path(path).parents:
                # A daemon opens its own directory to other users.
                if folder in own or not folder.exists():
                    continue
                if not folder.stat().st_mode & stat.S_IXOTH:
                    return failed(
                        f"allow_other = true, but {folder} gives other users no access to {path}",
                        f"chmod o+x {folder}, or set CKPTFS_SOCKET and CKPTFS_MOUNT",
                    )
        if os.geteuid() == 0:
            return ok("root's daemon may serve other users")
        lines = FUSE_CONF.read_text().splitlines() if FUSE_CONF.exists() else []
        if "user_allow_other" not in (line.strip() for line in lines):
            return failed(
                f"allow_other = true, but {FUSE_CONF} has no line user_allow_other",
                f"echo user_allow_other >> {FUSE_CONF}, as root; or set allow_other = false",
            )
        return ok(f"{FUSE_CONF} has the line user_allow_other")

    def directories(self) -> Outcome:
        """Check whether the directories of socket, mount point and cache are usable."""
        config = self.config
        mount = Path(config.mount)
        for path in (Path(config.socket).parent, mount.parent, Path(config.cache_dir)):
            if fault := _fault_of(path, is_cache=str(path) == config.cache_dir):
                return failed(*fault)
        # This check never touches a mount, because that could hang.
        if session.device_of_mount(mount) is None and mount.exists():
            remedy = "empty it, or set CKPTFS_MOUNT to another"
            if not mount.is_dir():
                return failed(f"mount point {mount} is not a directory", remedy)
            if any(mount.iterdir()):
                return failed(f"mount point {mount} is not empty", remedy)
        if not self.daemon_pid and launch.is_in_use(Path(config.cache_dir)):
            return failed(
                f"{config.cache_dir} is in use by another ckptfs daemon, or by ckptfs cache", _OTHER
            )
        passed_over = [] if self.daemon_pid else self._passed_over
        if self._is_default("socket"):
            first = Path(config.socket).parent
            places = itertools.takewhile(
                lambda place: place.path != first, runtime_places(os.environ)
            )
            passed_over = [place.fault for place in places if place.fault] + passed_over
        others = f"; not elsewhere, because {', '.join(passed_over)}" if passed_over else ""
        return ok(f"{config.socket}, {mount} and {config.cache_dir} can be used{others}")

    def limits(self) -> Outcome:
        """Check the limits of the running daemon, or of a daemon that this process would start."""
        pid = self.daemon_pid or os.getpid()
        try:
            _, descriptors = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            file_bytes, _ = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        except (PermissionError, ProcessLookupError):
            return skipped(f"the daemon (pid {pid}) belongs to another user or container")
        if descriptors != resource.RLIM_INFINITY and descriptors < _DESCRIPTORS_MIN:
            return warning(
                f"at most {descriptors} open files (RLIMIT_NOFILE); an open file takes two",
                "ulimit -Hn 65536, or LimitNOFILE=65536 in the systemd unit",
            )
        if file_bytes != resource.RLIM_INFINITY:
            return warning(
                f"files of at most {file_bytes} bytes (RLIMIT_FSIZE); the cache has no larger ones",
                "ulimit -f unlimited",
            )
        shown = "unlimited" if descriptors == resource.RLIM_INFINITY else str(descriptors)
        return ok(f"{shown} open files; the daemon locks no memory")


def _fault_of(path: Path, *, is_cache: bool) -> tuple[str, str] | None:
    """Return a fault that the keeper or the daemon would report, with its remedy, or None."""
    variables = "CKPTFS_SOCKET, CKPTFS_MOUNT and CKPTFS_CACHE_DIR"
    there = existing(path)
    info = there.stat()
    if not stat.S_ISDIR(info.st_mode):
        return f"{there} is not a directory", f"remove it, or set {variables}"
    if there != path:
        if not os.access(there, os.W_OK | os.X_OK):
            return (
                f"this user cannot make {path} in {there}",
                f"make it as root, or set {variables}",
            )
        return None
    if owner_fault(path) or (is_cache and info.st_mode & 0o022):
        return (
            f"{path} belongs to another user or is writable by others",
            f"chown and chmod go-w it, or set {variables} to a directory of your own",
        )
    if is_cache and info.st_uid != os.geteuid():
        return f"{path} belongs to another user", "set CKPTFS_CACHE_DIR to a directory of your own"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"this user cannot write to {path}", f"chmod u+rwx {path}, or set {variables}"
    return None


def _file_near(directory: Path) -> int:
    """Return a nameless file on the file system of `directory`, or otherwise in the temporary
    folder or in memory."""
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
