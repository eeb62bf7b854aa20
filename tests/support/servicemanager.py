"""A service manager for tests: what systemd does for one service, without systemd.

It starts a program with the protocol of sd_notify(3) and sd_listen_fds(3), keeps the descriptors
that the program has kept, and hands them to the next start.
"""

import array
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LAUNCHER = """
import fcntl, os, sys

fds, names, *command = sys.argv[1:]
fds = [int(fd) for fd in fds.split(",") if fd]
moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
for fd in fds:
    os.close(fd)
for number, fd in enumerate(moved):
    os.dup2(fd, 3 + number)
    os.close(fd)
if fds:
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds))}
    os.environ["LISTEN_FDNAMES"] = names
os.execv(command[0], command)
"""

SYSTEMCTL = """#!/bin/sh
echo "$@" >> {folder}/asked
cat {folder}/job
"""


class ServiceManager:
    """Runs one service.

    Attributes:
        folder: Where its socket is, and its ``systemctl`` (a folder for PATH).
        store: Descriptors that the service has kept, by name.
        said: What it has said, but for ``WATCHDOG=1``, in order.
        beats: How often it has said that it is alive.
        process: Of its current start.
    """

    def __init__(self, folder: Path, command: Sequence[str], watchdog_s: float = 60) -> None:
        self.folder = folder
        self.store: dict[str, int] = {}
        self.said: list[str] = []
        self.beats = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._command = command
        self._watchdog_s = watchdog_s
        self._sockets: dict[str, int] = {}
        self._paths: list[Path] = []
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(f"{folder}/notify")
        systemctl = folder / "systemctl"
        systemctl.write_text(SYSTEMCTL.format(folder=folder))
        systemctl.chmod(systemctl.stat().st_mode | stat.S_IXUSR)
        (folder / "job").touch()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def listen(self, name: str, path: Path) -> None:
        """A socket unit: listen at `path`, and pass that as `name` to each start."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(str(path))
        listening.listen()
        self._sockets[name] = listening.detach()
        self._paths.append(path)

    def start(self) -> "subprocess.Popen[bytes]":
        """``systemctl start``, but for waiting; with all that is in the store."""
        given = self._sockets | self.store
        fds, names = ",".join(map(str, given.values())), ":".join(given)
        environment = os.environ | {
            "NOTIFY_SOCKET": f"{self.folder}/notify",
            "WATCHDOG_USEC": str(int(self._watchdog_s * 1e6)),
            "PATH": f"{self.folder}:{os.environ['PATH']}",
        }
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, fds, names, *self._command],
                env=environment,
                pass_fds=list(given.values()),
                stderr=log,
                cwd="/",
            )
        return self.process

    def stop(self, job: str = "stop", timeout_s: float = 30) -> int:
        """End it by SIGTERM, for a job of that kind; returns its exit status. Only a restart keeps
        the store."""
        assert self.process is not None
        (self.folder / "job").write_text(f"12 ckptfs.service {job} running\n")
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout_s)
        if job != "restart":
            self.release()
        return status

    def kill(self) -> None:
        """Its process dies. The store stays, as for a service with ``Restart=on-failure``."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def release(self) -> None:
        """Empty the store."""
        while self.store:
            os.close(self.store.popitem()[1])

    def log(self) -> str:
        """The text that the service has written."""
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def close(self) -> None:
        """Let everything go."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", f"{self.folder}/notify")
        self._listener.join()
        self._notify.close()
        self.release()
        for fd in self._sockets.values():
            os.close(fd)
        for path in self._paths:
            path.unlink()

    def _listen(self) -> None:
        while True:
            text, rights, _, _ = self._notify.recvmsg(4096, socket.CMSG_SPACE(4 * 16))
            if not text:
                return
            fds = array.array("i")
            for _, _, data in rights:
                fds.frombytes(data)
            fields = dict(line.split("=", 1) for line in text.decode().splitlines())
            if fields.get("WATCHDOG") == "1":
                self.beats += 1
                continue
            self.said.append(text.decode())
            name = fields.get("FDNAME", "")
            if "FDSTORE" in fields:
                [fd] = fds
                self._forget(name)
                self.store[name] = fd
            if "FDSTOREREMOVE" in fields:
                self._forget(name)

    def _forget(self, name: str) -> None:
        if name in self.store:
            os.close(self.store.pop(name))


@contextmanager
def managing(folder: Path, command: Sequence[str]) -> Iterator[ServiceManager]:
    """A service manager whose service has ended, and whose store is empty, at the end."""
    manager = ServiceManager(folder, command)
    try:
        yield manager
    finally:
        manager.close()
