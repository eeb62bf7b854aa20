"""Installing ckptfs on a node, upgrading and removing it.

The running ckptfs installs the program. Then the installed program makes its links (the command,
mount's helpers, units, man pages, completions), because it knows its own files. systemd restarts a
running daemon, which is a pause for readers.
"""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from ckptfs._install import InstallError, program
from ckptfs._install.record import Record, say

PREFIX = Path("/opt/ckptfs")
"""The prefix in the units of the wheel."""
_CONFIG = Path("/etc/ckptfs.toml")
_CACHE = Path("/var/cache/ckptfs")
_LOCAL = Path("/usr/local")
_SHARED = ("man", "bash-completion", "zsh", "fish")
"""Folders of ``share/`` that man and the shells search."""
_SYSTEMD_RUNS = Path("/run/systemd/system")
_SERVICE, _SOCKET = "ckptfs.service", "ckptfs.socket"
_DRY = "this was a dry run, which changed nothing"


def install(prefix: Path, what: str, python: str, dry_run: bool) -> None:
    """Install or upgrade.

    Args:
        prefix: The folder of the program.
        what: The source for `program.install`. With "", the installed program makes only its links.
        python: The interpreter of a new environment.
        dry_run: Whether to show the steps instead of taking them.

    Raises:
        InstallError: A step failed.
    """
    _check(prefix, dry_run)
    program.check_source(what)
    record = Record(prefix, dry_run)
    if prefix.exists() and not record.exists() and not dry_run:
        raise InstallError(
            f"{prefix} exists, and install-node has not made it; choose another --prefix"
        )
    os.umask(0o022)
    record.begin()
    if what or not _is_own(prefix):
        program.install(record, what, python)
        if not dry_run:
            ckptfs = str(prefix / "bin/ckptfs")
            sys.stdout.flush()
            os.execv(ckptfs, [ckptfs, "install-node", "--prefix", str(prefix)])
    _install_links(record)
    _start_units(record)
    if dry_run:
        say(_DRY)
    else:
        say("done; ckptfs attach URI starts the daemon, and systemctl status ckptfs shows it")


def uninstall(prefix: Path, dry_run: bool) -> None:
    """Remove ckptfs and its cache from the node. A changed configuration file stays.

    Raises:
        InstallError: The prefix has no installation, or checkpoints are in use.
    """
    _check(prefix, dry_run)
    record = Record(prefix, dry_run)
    if not record.exists():
        raise InstallError(
            f"{prefix} holds no ckptfs that install-node has installed; give its --prefix"
        )
    if _service_runs():
        record.run(prefix / "bin/ckptfs", "umount")  # fails while checkpoints are in use
    if _is_running():
        record.run("systemctl", "stop", _SOCKET, _SERVICE)
    record.run("systemctl", "disable", "--quiet", _SOCKET, _SERVICE)
    is_changed = _CONFIG.exists() and _CONFIG.read_bytes() != _config_text(prefix).encode()
    record.remove(keep=_CONFIG if is_changed else None)
    for folder in (prefix, _CACHE):
        if folder.is_mount():  # a mount point cannot be removed
            record.run("find", folder, "-xdev", "-mindepth", "1", "-delete")
        else:
            record.run("rm", "-rf", folder)
    if Path("/run/ckptfs").is_dir():
        record.run("find", "/run/ckptfs", "-xdev", "-type", "d", "-empty", "-delete")
    if _is_running():
        record.run("systemctl", "daemon-reload")
    say(_DRY if dry_run else "removed ckptfs")


def _check(prefix: Path, dry_run: bool) -> None:
    if not prefix.is_absolute() or prefix == Path("/"):
        raise InstallError(f"--prefix must be an absolute path, not {prefix}")
    if not shutil.which("systemctl"):
        raise InstallError(
            "this machine has no systemd; install ckptfs with pip, because it works without systemd"
        )
    if os.geteuid() != 0 and not dry_run:
        raise InstallError(
            "only root can install or remove ckptfs on a node; --dry-run shows the steps"
        )
    if not dry_run:
        _require_roots(prefix)


def _require_roots(prefix: Path) -> None:
    """Check that only root can change the prefix and the folders above it, because root runs the
    programs in the prefix and removes the files on its list.

    Raises:
        InstallError: Another user owns one of them, or can replace it.
    """
    places = prefix / "installed", prefix, *prefix.parents
    for path in (*places, *Path(os.path.realpath(prefix)).parents):
        if not os.path.lexists(path):
            continue
        found = {path.lstat().st_uid, path.stat().st_uid if path.exists() else 0}
        mode = path.stat().st_mode if path.is_dir() else 0
        if found != {0} or (mode & stat.S_IWOTH and not mode & stat.S_ISVTX):
            raise InstallError(
                f"{path} belongs to another user or is writable by all, and root would run what "
                "they put there; choose another --prefix"
            )


def _is_own(prefix: Path) -> bool:
    """Whether this process runs the program in the prefix."""
    return os.path.realpath(sys.prefix) == os.path.realpath(prefix)


def _config_text(prefix: Path) -> str:
    return (
        f"# Settings of the node's ckptfs; {prefix}/share/ckptfs/ckptfs.toml shows all settings.\n"
        "allow_other = true # serve all users of this node\n"
    )


def _install_links(record: Record) -> None:
    prefix = record.prefix
    record.link(_LOCAL / "bin/ckptfs", prefix / "bin/ckptfs")
    for name in ("mount.ckptfs", "mount.fuse.ckptfs"):  # mount(8) looks for them
        record.link(Path("/sbin", name), prefix / "bin/mount.ckptfs")
    share = (prefix if _is_own(prefix) else Path(sys.prefix)) / "share"
    for unit in sorted((share / "ckptfs/systemd").glob("*/ckptfs.*")):
        text = unit.read_text().replace(f"{PREFIX}/", f"{prefix}/")
        record.write(_LOCAL / "lib/systemd" / unit.parent.name / unit.name, text)
    for folder in _SHARED:
        for file in sorted((share / folder).rglob("*ckptfs*")):
            if file.is_file():
                inside = file.relative_to(share)
                record.link(_LOCAL / "share" / inside, prefix / "share" / inside)
    record.remove_dead_links()
    if not _CONFIG.exists():
        record.write(_CONFIG, _config_text(prefix))


def _start_units(record: Record) -> None:
    record.run("systemctl", "enable", "--quiet", _SOCKET)
    if not _is_running():
        say(f"systemd is not running; it will start {_SOCKET} when the machine boots")
        return
    record.run("systemctl", "daemon-reload")
    if _service_runs():
        record.run("systemctl", "restart", _SERVICE)
    elif not _is_active(_SOCKET):
        if Path("/run/ckptfs/control.sock").is_socket():
            # A daemon that was started on demand holds the lock.
            record.run(record.prefix / "bin/ckptfs", "umount")
        record.run("systemctl", "start", _SOCKET)


def _is_running() -> bool:
    return _SYSTEMD_RUNS.is_dir()


def _service_runs() -> bool:
    return _is_running() and _is_active(_SERVICE)


def _is_active(unit: str) -> bool:
    command = ["systemctl", "is-active", "--quiet", unit]
    return subprocess.run(command, check=False).returncode == 0
