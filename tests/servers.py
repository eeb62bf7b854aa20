"""Servers for what a real S3 server does not do on demand: to vanish, to fall silent, odd keys.

Their threads share the test's interpreter: never touch an mmap of the mount while they serve.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 5.0


class Forwarder:
    """A TCP forwarder to `upstream` ("host:port") that can be cut and held, as a context manager.

    The port stays the same for the life of the context.
    """

    endpoint: str

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._port = 0
        self._listener: socket.socket | None = None
        self._flows = threading.Event()
        self._lock = threading.Lock()  # guards the two below
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Forwarder:
        self._flows.set()
        self.restore()
        return self

    def __exit__(self, *_: object) -> None:
        self._flows.set()
        self.cut()

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        if self._listener is None:
            return
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._listener = None
        with self._lock:
            for end in self._open:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            threads, self._threads = self._threads, []
        held, _ = not self._flows.is_set(), self._flows.set()
        for thread in threads:
            thread.join(STOP_DEADLINE_S)
        if held:
            self._flows.clear()

    def redirect(self, upstream: str) -> None:
        """Lead new connections elsewhere."""
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))

    def restore(self) -> None:
        """Accept connections (again)."""
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=128)
        self._port = self._listener.getsockname()[1]
        self.endpoint = f"127.0.0.1:{self._port}"
        self._start(self._accept, self._listener)

    def hold(self) -> None:
        """Fall silent: connections are accepted, and nothing passes."""
        self._flows.clear()

    def release(self) -> None:
        """Let everything pass again."""
        self._flows.set()

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self._start(self._connection, client)

    def _connection(self, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(self._upstream)
            except OSError:
                return
            with server:
                with self._lock:
                    self._open |= {client, server}
                answers = threading.Thread(target=self._pump, args=(server, client), daemon=True)
                answers.start()
                self._pump(client, server)
                answers.join()
                with self._lock:
                    self._open -= {client, server}

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self._flows.wait()
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Moto:
    """A moto S3 server in a process of its own, as a context manager: keys no disk can hold."""

    endpoint: str

    def __init__(self) -> None:
        self._cleanup = ExitStack()

    def __enter__(self) -> Moto:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckptfs-moto-")))
            log = scratch / "log"
            with log.open("wb") as log_file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    start_new_session=True,
                )
            stack.callback(_stop, process)
            deadline = time.monotonic() + START_DEADLINE_S
            while not (started := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"moto did not start to serve; its log:\n{log.read_text()}")
                time.sleep(0.02)
            self.endpoint = f"127.0.0.1:{started[1]}"
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def client(self) -> Any:
        """A boto3 client."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=f"http://{self.endpoint}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )

    def uri(self, path: str) -> str:
        """The URI of `path` ("bucket/key") with the credentials."""
        return (
            f"s3://key:secret@{quote(path)}?endpoint_override={quote(self.endpoint, safe='')}"
            "&scheme=http&region=us-east-1"
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
