"""The base of the tests' servers, each with a process, a folder, a port and a certificate."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 5.0
PORTS = 15_000, 32_000
_given: set[int] = set()
_chance = random.SystemRandom()
"""hypothesis seeds the other one, so that processes of pytest would try the same ports."""


def accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that come in, until the listener is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        yield connection


class ConnectionServer:
    """A server in this process, with a thread for each connection, a context manager.

    Subclasses serve a connection in `_serve`. `_healed` is set while nothing is wrong.
    """

    stop_deadline_s: ClassVar[float] = STOP_DEADLINE_S

    def __init__(self) -> None:
        self.port = 0
        self._healed = threading.Event()
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()  # guards the two below
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._healed.set()
        self._close()
        for thread in self._threads:
            thread.join(self.stop_deadline_s)
            assert not thread.is_alive()

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._start(self._accept, self._listener)

    def _close(self) -> None:
        """Refuse connections, and end those that are open."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _start(self, target: Callable[[socket.socket], None], connection: socket.socket) -> None:
        thread = threading.Thread(target=target, args=(connection,), daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        for connection in accepted(listener):
            with self._lock:
                self._open.add(connection)
            self._start(self._run, connection)

    def _run(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._serve(connection)
        with self._lock:
            self._open.discard(connection)

    def _serve(self, connection: socket.socket) -> None:
        """Serve a connection until its end, and close it."""
        raise NotImplementedError


class Missing(Exception):
    """A server that this machine lacks, and what would bring it."""


class Server:
    """A program of its own that serves on 127.0.0.1 from a temporary folder, a context manager.

    Its output goes to a log, which an error shows. `endpoint` is "host:port".
    """

    name: ClassVar[str]
    endpoint: str

    def __init__(self) -> None:
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        program = self.program()  # before a folder is made: Missing
        with ExitStack() as stack:
            prefix = f"ckptfs-{self.name}-"
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
            self.log = self.folder / "log"
            self.folder.chmod(0o755)  # nginx's workers have another user
            self.endpoint = f"127.0.0.1:{free_port()}"
            self.prepare(program)
            with self.log.open("wb") as log_file:
                self.process = subprocess.Popen(
                    self.command(program),
                    env={"PATH": os.environ["PATH"], "HOME": str(self.folder), **self.environment},
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    start_new_session=True,  # Ctrl-C ends the tests first, then they end the server
                )
            stack.callback(self.stop, self.process)
            self._wait_ready()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    @property
    def port(self) -> str:
        return self.endpoint.rpartition(":")[2]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the process; its arguments are shown by ps."""
        return {}

    @classmethod
    def program(cls) -> str:
        """The path of what is started. Raises Missing."""
        raise NotImplementedError

    def prepare(self, program: str) -> None:
        """Write into `folder` what the program needs."""

    def command(self, program: str) -> list[str]:
        """The command line."""
        raise NotImplementedError

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End the process."""
        stop(process)

    def is_ready(self) -> bool:
        """Whether it serves. May raise OSError."""
        host, _, port = self.endpoint.rpartition(":")
        socket.create_connection((host, int(port)), 1.0).close()
        return True

    def memory_bytes(self) -> int:
        """The resident memory (RSS) of the process and its children."""
        pages = 0
        for pid in [self.process.pid, *children(self.process.pid)]:
            with suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            with suppress(OSError):
                if self.is_ready():
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self.log.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"{self.name} did not start to serve; its log:\n{said}")
            time.sleep(0.02)


class Authority:
    """A certificate authority of the tests' own; `ca_file` is what its clients have to trust."""

    def __init__(self, folder: Path) -> None:
        import trustme

        self._authority = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca_file))

    def certify(self, folder: Path) -> Path:
        """A certificate for 127.0.0.1 with its key, in one file."""
        path = folder / "server.pem"
        issued = self._authority.issue_cert("127.0.0.1", "localhost")
        issued.private_key_and_cert_chain_pem.write_to_path(str(path))
        return path


def free_port() -> int:
    """A port that is free at this moment, and below those that the kernel gives to connections."""
    while True:
        port = _chance.randrange(*PORTS)
        if port not in _given:
            with socket.socket() as bound, suppress(OSError):
                bound.bind(("127.0.0.1", port))
                _given.add(port)
                return port


def children(pid: int) -> list[int]:
    """All descendants of a process. Each thread has children of its own."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                own = map(int, (task / "children").read_text().split())
                found += [each for child in own for each in (child, *children(child))]
    return found


def beside(name: str, package: str) -> str:
    """The path of a program that pip has put beside the interpreter. Raises Missing."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise Missing(f"{name} is not installed ({package})")
    return str(path)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
