"""What a keeper that systemd runs says to it, and has kept by it.

The protocol (sd_notify(3), sd_listen_fds(3)) is a few datagrams and variables:

- ``NOTIFY_SOCKET``: where to say that the service is ready, what it does, and that it is alive.
- The store: descriptors that are sent there, each with a name, outlive all processes of the
  service. Its next start gets them, beside those of its socket unit, as descriptors from 3 on
  (``LISTEN_FDS``, ``LISTEN_FDNAMES``). The store is emptied when the service is stopped.

A restart is a stop and then a start, and the service gets the same signal for both. So who has been
told to end asks which it is (`ServiceManager.is_restarting`).
"""

import array
import contextlib
import os
import socket
import subprocess
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_QUERY_WAIT_S = 5.0
_FOR_THE_PROCESS = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
_FOR_THE_START = "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"


class ServiceManager:
    """The service manager of this process, if it has one; without one, all of it does nothing.

    Attributes:
        variables: What of the environment a program that replaces this one needs.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = variables
        # An abstract address has a NUL where the variable has "@": unix(7).
        self._address = variables.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        watched = variables.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._is_watched = watched and "WATCHDOG_USEC" in variables

    @property
    def is_there(self) -> bool:
        """Whether this process is a service."""
        return bool(self._address)

    def ready(self, status: str) -> None:
        """The service serves; `status` is a line for people."""
        self._say(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """What the service does now, a line for people."""
        self._say(f"STATUS={status}")

    def ending(self) -> None:
        """The service is about to end."""
        self._say("STOPPING=1")

    def alive(self) -> None:
        """The service does its work. Who does not say so in time is killed (WatchdogSec)."""
        if self._is_watched:
            self._say("WATCHDOG=1")

    def keep(self, fds: Mapping[str, int]) -> None:
        """Have these descriptors kept for the next start, by their names."""
        for name, fd in fds.items():
            self._say(f"FDSTORE=1\nFDNAME={name}", fd)

    def drop(self, names: Iterable[str]) -> None:
        """Have descriptors kept no longer."""
        for name in names:
            self._say(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def is_restarting(self) -> bool:
        """Whether the service is being ended to be started again."""
        if not self.is_there:
            return False
        unit, user = unit_of_process()
        command = ["systemctl", *user, "list-jobs", "--plain", "--no-legend", "--no-pager"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [*command, "--", unit],
                capture_output=True,
                text=True,
                timeout=_QUERY_WAIT_S,
                check=False,
            )
            return done.stdout.split()[2:3] == ["restart"]  # number, unit, kind, state
        return False

    def _say(self, text: str, fd: int = -1) -> None:
        """Nothing depends on its being heard."""
        if not self._address:
            return
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to,
        ):
            to.sendmsg([text.encode()], rights, 0, self._address)


def unit_of_process() -> tuple[str, list[str]]:
    """The unit that this process belongs to, and the flags that tell systemctl and journalctl whose
    it is: none, or those of a user's manager."""
    path = Path("/proc/self/cgroup").read_text().rstrip("\n").rpartition("\n")[2]
    return path.rpartition("/")[2], ["--user"] if "/user@" in path else []


def taken_from(environ: MutableMapping[str, str]) -> tuple[ServiceManager, dict[str, int]]:
    """The service manager that `environ` names, and the descriptors that came from it, by name.

    All of it is taken out of `environ`: it is not for children. The descriptors are not for them,
    either (close-on-exec).
    """
    started = {name: environ.pop(name, "") for name in _FOR_THE_START}
    found = {name: environ.pop(name) for name in _FOR_THE_PROCESS if name in environ}
    given: dict[str, int] = {}
    if started["LISTEN_PID"] == str(os.getpid()):
        names = started["LISTEN_FDNAMES"].split(":")
        for number in range(int(started["LISTEN_FDS"])):
            os.set_inheritable(_FIRST_FD + number, False)
            name = names[number] if number < len(names) else ""
            given[name] = _FIRST_FD + number
    return ServiceManager(found), given
