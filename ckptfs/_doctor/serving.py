"""Checks of the daemon that serves this user, and of mounts that no daemon serves any more.

A request to a mount without a daemon can wait for ever, and even ``kill -9`` does not end it. So
these checks never touch a mount, not even by stat(2). /proc/self/mountinfo lists the mounts. The
process that serves a mount has a descriptor of /dev/fuse. /proc/<pid>/fdinfo names its connection,
except on older kernels, by the same number as fusectl.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ckptfs._client import client
from ckptfs._client.start import scope_command
from ckptfs._doctor.checks import Outcome, failed, ok, skipped, warning
from ckptfs._doctor.disk import Disk
from ckptfs._doctor.node import Node, version_or_none
from ckptfs._model.wording import counted
from ckptfs._os import mountinfo
from ckptfs._os.jobs import job_of
from ckptfs._os.mountinfo import MountLine, why_hidden
from ckptfs.errors import NoDaemon

if TYPE_CHECKING:
    from ckptfs._model.protocol.replies import StatusReply

_ANSWER_S = 5.0
"""Longest wait for the daemon, which usually answers in milliseconds."""
_INIT_PID_NAMESPACE = 0xEFFFFFFC
"""Inode of the first pid namespace, which contains all processes (include/linux/proc_ns.h)."""
_FUSECTL = Path("/sys/fs/fuse/connections")
_KEEPERS = "ckptfs._keeper.keeper", "ckptfs._daemon.keeper"
"""The module that a keeper runs, and its alias in keepers of the previous release and in older
units."""


class Serving:
    """The checks. They pass their results to `node` and `disk`."""

    def __init__(self, node: Node, disk: Disk) -> None:
        self._node = node
        self._disk = disk
        self._reply: StatusReply | None = None
        self._keeper_pid = 0

    def daemon(self) -> Outcome:
        """Check whether a daemon answers, and its state."""
        config = self._node.config
        try:
            with client.connect(config, _ANSWER_S) as connection:
                path, self._keeper_pid = connection.path, connection.keeper_pid
                mount = connection.mount
                self._reply = reply = connection.status()
        except NoDaemon:
            return ok(f"no daemon is running at {config.socket}; the first attach starts one")
        is_ours = _runs(Path(f"/proc/{reply.pid}"), "ckptfs._daemon.app")
        if path != config.socket or not is_ours:
            self._node.served_by = path
        else:
            self._disk.cache_bytes = reply.cache_bytes
            self._node.use_cache(Path(reply.cache_dir))
        self._node.daemon_pid = reply.pid if is_ours else 0
        self._node.passthrough = reply.passthrough
        if hidden := why_hidden(mount or reply.mount):
            what, _, remedy = hidden.partition("; ")
            return failed(f"pid {reply.pid} at {path}: {what}", remedy)
        facts = (
            f"pid {reply.pid} at {path}, {counted(len(reply.attachments), 'checkpoint')} attached"
        )
        if reply.workers:
            facts += f", {counted(reply.workers, 'worker')} with {reply.worker_bytes >> 20} MiB"
        failed_uploads = [each for each in reply.uploads if each.state == "failed"]
        if failed_uploads:
            return warning(
                f"{facts}, {counted(len(failed_uploads), 'upload')} failed: "
                f"{failed_uploads[0].message}",
                "ckptfs uploads lists them, --retry sends one again, --drop removes its files",
            )
        troubled = [a for a in reply.attachments if a.state in ("failing", "changed")]
        if troubled:
            return warning(
                f"{facts}, {len(troubled)} of them {troubled[0].state}",
                "ckptfs status shows their last errors",
            )
        if reply.restarts:
            return warning(
                f"{facts}, restarted {counted(reply.restarts, 'time')}",
                f"read the causes in {reply.log}",
            )
        return ok(facts)

    def version(self) -> Outcome:
        """Check whether client and daemon have the same version."""
        if self._reply is None:
            return skipped("no daemon is running")
        ours, theirs = version_or_none("ckptfs"), self._reply.version
        if ours != theirs:
            return warning(
                f"the daemon is {theirs}, this client {ours}",
                "ckptfs restart, with the newer one installed where the daemon runs",
            )
        return ok(f"client and daemon are {ours}")

    def lifetime(self) -> Outcome:
        """Check whether the daemon, or one that starts here, ends with a scheduler's job."""
        remedy = "loginctl enable-linger, or one daemon for the node: see ckptfs help jobs"
        if self._reply is not None:
            if job := job_of(self._keeper_pid):
                return warning(f"the daemon runs inside {job}, and ends with it", remedy)
            return ok("the daemon runs inside no job of a scheduler")
        job = job_of(os.getpid())
        if not job:
            return ok("a daemon that is started here belongs to no job of a scheduler")
        if not self._node.config.leave_job:
            return warning(f"a daemon that is started here ends with {job}", "set leave_job = true")
        if os.geteuid() == 0 or scope_command():
            return ok(f"a daemon that is started here leaves {job}")
        return warning(f"a daemon that is started here ends with {job}", remedy)

    def leftovers(self) -> Outcome:
        """Check for mounts that no daemon serves."""
        mounts = [m for m in mountinfo.mounts() if os.geteuid() in (0, m.number("user_id"))]
        if not mounts:
            return ok("no mount of ckptfs is left")
        served, is_unknown = _sessions()
        dead: list[MountLine] = []
        unknown = 0
        for mounted in mounts:
            if _number(mounted) in served or self._has_answered_for(mounted):
                continue
            if is_unknown:
                unknown += 1
            else:
                dead.append(mounted)
        if not dead:
            more = f"; this kernel hides the daemons of {unknown} more" if unknown else ""
            return ok(f"mounts of ckptfs: {len(mounts) - unknown} served{more}")
        outside = "" if _sees_all_processes() else ", unless a process outside this container does"
        unmount = "umount -l" if os.geteuid() == 0 else "fusermount3 -uz"
        hung = [m for m in dead if _has_waiting(m)]
        first = (hung or dead)[0]
        remedy = f"{unmount} {first.path}"
        if hung:
            remedy = f"echo 1 > {_FUSECTL}/{_number(first)}/abort; {remedy}"
        return warning(f"no daemon serves {', '.join(m.path for m in dead)}{outside}", remedy)

    def _has_answered_for(self, mounted: MountLine) -> bool:
        """Whether the daemon of the mount has answered, perhaps from another container."""
        places = () if self._reply is None else (self._reply.mount, self._node.config.mount)
        return mounted.path in places


def _sessions() -> tuple[set[int], bool]:
    """Return the FUSE connections with a descriptor in a process other than a keeper or systemd,
    which only keep it for a daemon. True if the kernel names no connections of descriptors."""
    served: set[int] = set()
    found = tells = False
    for process in Path("/proc").iterdir():
        for number in _fuse_descriptors(process) if process.name.isdigit() else ():
            found = True
            connection = _connection_of(process, number)
            tells |= connection != 0
            if not _only_keeps(process):
                served.add(connection)
    return served, found and not tells


def _only_keeps(process: Path) -> bool:
    """Whether a process keeps descriptors of sessions without serving them."""
    is_keeper = any(_runs(process, module) for module in _KEEPERS)
    return is_keeper or _text_of(process / "comm") == "systemd\n"


def _fuse_descriptors(process: Path) -> list[str]:
    found: list[str] = []
    with contextlib.suppress(OSError):  # it has ended, or belongs to another user
        for entry in (process / "fd").iterdir():
            if os.readlink(entry) == "/dev/fuse":
                found.append(entry.name)
    return found


def _connection_of(process: Path, number: str) -> int:
    """Return the number of a descriptor's connection, or 0 if the kernel does not name it."""
    text = _text_of(process / "fdinfo" / number)
    line = re.search(r"^fuse_connection:\s*(\d+)$", text, re.MULTILINE)
    return int(line[1]) if line else 0


def _runs(process: Path, module: str) -> bool:
    return module in _text_of(process / "cmdline")


def _text_of(file: Path) -> str:
    """Return a file's text, or "" if it has gone or belongs to another user."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _number(mounted: MountLine) -> int:
    """Return the number of a mount's connection, which is part of its device number."""
    return int(mounted.device.partition(":")[2])


def _has_waiting(mounted: MountLine) -> bool:
    """Whether requests wait in the mount. False if fusectl is not mounted."""
    return int(_text_of(_FUSECTL / str(_number(mounted)) / "waiting") or 0) > 0


def _sees_all_processes() -> bool:
    return os.stat("/proc/self/ns/pid").st_ino == _INIT_PID_NAMESPACE
