"""Checks of the daemon that serves us, and of mounts that nobody serves any more.

A request to a mount whose daemon is gone may wait for ever, also beyond ``kill -9``. So no mount is
touched here, not even by stat(2): what is mounted stands in /proc/self/mountinfo, and who serves it
is seen from its descriptor of /dev/fuse, whose connection /proc/<pid>/fdinfo names (not on older
kernels) and fusectl has by the same number.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckptfs import _client
from ckptfs._daemon import session
from ckptfs._doctor.checks import Outcome, ok, skipped, warning
from ckptfs._doctor.disk import Disk
from ckptfs._doctor.node import Node, version_or_none
from ckptfs.errors import NoDaemon

if TYPE_CHECKING:
    from ckptfs._model.replies import StatusReply

_ANSWER_S = 5.0
"""Longest wait for the daemon, which answers in milliseconds."""
_INIT_PID_NAMESPACE = 0xEFFFFFFC
"""Its inode, include/linux/proc_ns.h: from there all processes are seen."""
_FUSECTL = Path("/sys/fs/fuse/connections")


class _Sessions(NamedTuple):
    """Who has the mounts of this machine.

    Attributes:
        served: Connections of which a process has the descriptor that is more than a keeper, or a
            service manager that keeps it for one.
        unknown: There are descriptors, and the kernel does not tell of which connections.
    """

    served: set[int]
    unknown: bool


class Serving:
    """The checks. What they find goes to `node` and `disk`."""

    def __init__(self, node: Node, disk: Disk) -> None:
        self._node = node
        self._disk = disk
        self._reply: StatusReply | None = None

    def daemon(self) -> Outcome:
        """Whether a daemon answers, and how it is."""
        config = self._node.config
        try:
            with _client.connect(config, _ANSWER_S) as connection:
                path = connection.path
                self._reply = reply = connection.status()
        except NoDaemon:
            return ok(f"none is running at {config.socket}; who attaches starts one")
        is_ours = _runs(Path(f"/proc/{reply.pid}"), b"ckptfs._daemon.app")
        if path != config.socket or not is_ours:
            self._node.served_by = path
        else:
            self._disk.cache_bytes = reply.cache_bytes
        self._node.daemon_pid = reply.pid if is_ours else 0
        self._node.passthrough = reply.passthrough
        facts = f"pid {reply.pid} at {path}, {len(reply.attachments)} checkpoints attached"
        if reply.workers:
            facts += f", {reply.workers} workers with {reply.worker_bytes >> 20} MiB"
        troubled = [a for a in reply.attachments if a.state in ("failing", "changed")]
        if troubled:
            return warning(
                f"{facts}, {len(troubled)} of them {troubled[0].state}",
                "ckptfs status shows their last errors",
            )
        if reply.restarts:
            return warning(f"{facts}, restarted {reply.restarts} times", f"see why in {reply.log}")
        return ok(facts)

    def version(self) -> Outcome:
        """Whether client and daemon are of one version."""
        if self._reply is None:
            return skipped("no daemon is running")
        ours, theirs = version_or_none("ckptfs"), self._reply.version
        if ours != theirs:
            return warning(
                f"the daemon is {theirs}, this client {ours}",
                "ckptfs restart, with the newer one installed where the daemon runs",
            )
        return ok(f"client and daemon are {ours}")

    def leftovers(self) -> Outcome:
        """Whether there are mounts that nobody serves."""
        mounts = [m for m in session.mounts() if os.geteuid() in (0, m.uid)]
        if not mounts:
            return ok("no mount of ckptfs is left")
        sessions = _sessions()
        dead: list[session.Mounted] = []
        unknown = 0
        for mounted in mounts:
            if _number(mounted) in sessions.served or self._has_answered_for(mounted):
                continue
            if sessions.unknown:
                unknown += 1
            else:
                dead.append(mounted)
        if not dead:
            more = f", and of {unknown} it cannot be told" if unknown else ""
            return ok(f"mounts of ckptfs: {len(mounts) - unknown} served{more}")
        outside = "" if _sees_all_processes() else ", unless that is done outside this container"
        unmount = "umount -l" if os.geteuid() == 0 else "fusermount3 -uz"
        hung = [m for m in dead if _has_waiting(m)]
        first = (hung or dead)[0]
        remedy = f"{unmount} {first.path}"
        if hung:
            remedy = f"echo 1 > {_FUSECTL}/{_number(first)}/abort; {remedy}"
        return warning(f"nobody serves {', '.join(m.path for m in dead)}{outside}", remedy)

    def _has_answered_for(self, mounted: session.Mounted) -> bool:
        """Its daemon can be in another container."""
        places = () if self._reply is None else (self._reply.mount, self._node.config.mount)
        return mounted.path in places


def _sessions() -> _Sessions:
    served: set[int] = set()
    found = tells = False
    for process in Path("/proc").iterdir():
        for number in _fuse_descriptors(process) if process.name.isdigit() else ():
            found = True
            connection = _connection_of(process, number)
            tells |= connection != 0
            if not _only_keeps(process):
                served.add(connection)
    return _Sessions(served, found and not tells)


def _only_keeps(process: Path) -> bool:
    """Whether that process has descriptors of sessions without serving them."""
    if _runs(process, b"ckptfs._daemon.keeper"):
        return True
    try:
        return (process / "comm").read_bytes() == b"systemd\n"
    except OSError:
        return False


def _fuse_descriptors(process: Path) -> list[str]:
    found: list[str] = []
    try:
        for entry in (process / "fd").iterdir():
            if os.readlink(entry) == "/dev/fuse":
                found.append(entry.name)
    except OSError:  # it has ended, or is not ours to look at
        pass
    return found


def _connection_of(process: Path, number: str) -> int:
    """0: the kernel does not tell."""
    try:
        text = (process / "fdinfo" / number).read_text()
    except OSError:
        return 0
    line = re.search(r"^fuse_connection:\s*(\d+)$", text, re.MULTILINE)
    return int(line[1]) if line else 0


def _runs(process: Path, module: bytes) -> bool:
    """Whether that process runs a module of ours."""
    try:
        return module in (process / "cmdline").read_bytes()
    except OSError:
        return False


def _number(mounted: session.Mounted) -> int:
    """Of the connection: FUSE numbers them by the device of the mount."""
    return int(mounted.device.partition(":")[2])


def _has_waiting(mounted: session.Mounted) -> bool:
    """Whether requests wait there, as far as fusectl is mounted."""
    try:
        return int((_FUSECTL / str(_number(mounted)) / "waiting").read_text()) > 0
    except (OSError, ValueError):
        return False


def _sees_all_processes() -> bool:
    return os.stat("/proc/self/ns/pid").st_ino == _INIT_PID_NAMESPACE
