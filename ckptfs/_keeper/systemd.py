"""The protocol between a keeper and systemd (sd_notify(3), sd_listen_fds(3)).

- The keeper sends datagrams to ``NOTIFY_SOCKET``: that the service is ready, its state in a line,
  and that it is alive.
- systemd keeps descriptors that the keeper sends there, each with a name, beyond the end of all
  processes of the service. The next start gets them, beside those of the socket unit, as
  descriptors from 3 on (``LISTEN_FDS``, ``LISTEN_FDNAMES``). A stop of the service closes them.

A restart is a stop and then a start, with the same signal as a stop. So an ending keeper asks
systemd which of both it is (`ServiceManager.is_restarting`).
"""

import array
import contextlib
import os
import socket
import subprocess
from collections.abc import Iterable, Mapping, MutableMapping

from ckptfs._mount.logs import unit_of_process

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_QUERY_WAIT_S = 5.0
_FOR_THE_PROCESS = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
_FOR_THE_START = "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"


class ServiceManager:
    """The service manager of this process. Without one, the methods do nothing.

    Attributes:
        variables: The part of the environment that a program needs which replaces this one.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = variables
        # An abstract address has a NUL where the variable has "@": unix(7).
        self._address = variables.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        watched = variables.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._is_watched = watched and "WATCHDOG_USEC" in variables

    def ready(self, status: str) -> None:
        """Report that the service serves. `status` is a line for people."""
        self._say(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """Report the service's state, a line for people."""
        self._say(f"STATUS={status}")

    def ending(self) -> None:
        """Report that the service is about to end."""
        self._say("STOPPING=1")

    def alive(self) -> None:
        """Report that the service works. systemd kills a service that does not report it in time
        (WatchdogSec)."""
        if self._is_watched:
            self._say("WATCHDOG=1")

    def keep(self, fds: Mapping[str, int]) -> None:
        """Let systemd keep these descriptors by their names, for the next start."""
        for name, fd in fds.items():
            self._say(f"FDSTORE=1\nFDNAME={name}", fd)

    def drop(self, names: Iterable[str]) -> None:
        """Let systemd keep these descriptors no longer."""
        for name in names:
            self._say(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def is_restarting(self) -> bool:
        """Whether systemd ends the service to start it again."""
        if not self._address:
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
        if not self._address:
            return
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        with (
            contextlib.suppress(OSError),  # nothing depends on these messages
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to,
        ):
            to.sendmsg([text.encode()], rights, 0, self._address)


def taken_from(environ: MutableMapping[str, str]) -> tuple[ServiceManager, dict[str, int]]:
    """The service manager that `environ` names, and the descriptors that came from it, by name.

    This removes the variables from `environ`, and sets close-on-exec, because neither is for
    children.
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
