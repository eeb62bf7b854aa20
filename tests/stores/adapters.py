"""Real stores of all kinds, behind one interface: how tests write to them, and how ckptfs reads.

Each is a context manager. Tests write to the server itself; ckptfs comes through a proxy, which
counts requests and makes them fail. Where the server has TLS, so has the proxy.
"""

from __future__ import annotations

import json
import ssl
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock
from urllib.parse import quote

import servers
from faultproxy import Proxy
from s3server import S3Server

import ckptfs

if TYPE_CHECKING:
    from typing_extensions import Self

BUCKET = "bucket"
SEED = 20


class RealStore:
    """One bucket (container, directory) of a server.

    Attributes:
        has_mount: Another process can read it, so it can be mounted.
        has_address: A user can type where it is; otherwise a private daemon mounts it.
        has_table: It can be a named store.
        has_keys: The server looks at credentials.
        is_writable: ckptfs can write metadata to it.
        has_versions: The server tells apart two versions of one size that were written within one
            second, by an ETag or a time.
        lacks: Characters that no name there can have.
        hides_dots: Its listings leave out names that begin with a dot.
        small_file_requests: Most requests for a file that one request can bring.
        environment: What the daemon and the clients need in theirs.
        secrets: What must never be shown.
        secret_environment: Variables that hold the credentials.
        refusals: The faults of `wronganswers` that are how such a server refuses credentials.
    """

    name: ClassVar[str]
    has_mount = True
    has_address = True
    has_table = True
    has_keys = False
    is_writable = True
    has_versions = True
    lacks = ""
    hides_dots = False
    small_file_requests = 1
    environment: ClassVar[dict[str, str]] = {}
    secrets: tuple[str, ...] = ()
    secret_environment: ClassVar[dict[str, str]] = {}
    refusals: tuple[str, ...] = ("denied", "s3 expired")
    proxy: Proxy | None = None

    def __init__(self) -> None:
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckptfs-r-")))
            self.start(stack)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def start(self, stack: ExitStack) -> None:
        """Start servers. Raises servers.Missing."""
        raise NotImplementedError

    def put(self, key: str, data: bytes) -> None:
        """Write an object, or write it anew."""
        raise NotImplementedError

    def delete(self, key: str) -> None:
        """Delete an object."""
        raise NotImplementedError

    def get(self, key: str) -> bytes:
        """An object as the server has it."""
        raise NotImplementedError

    def address(self, path: str) -> str:
        """What a user types for the directory `path`, with the credentials."""
        raise NotImplementedError

    def table(self, name: str, path: str) -> str:
        """The table of a named store that begins at `path`, with the credentials."""
        raise NotImplementedError

    def table_address(self, path: str) -> str:
        """What a user types for the directory, by the named store `main`, which is the bucket."""
        return f"main:{path}"

    def with_wrong_keys(self, path: str) -> ckptfs.Checkpoint:
        """The directory, by credentials that the server does not take."""
        raise NotImplementedError

    def checkpoint(self, path: str) -> ckptfs.Checkpoint:
        """The directory `path`."""
        return ckptfs.Checkpoint(self.address(path))

    def traffic(self) -> list[dict[str, Any]]:
        """The requests since the last `reset_traffic`."""
        assert self.proxy
        return self.proxy.ask({"traffic": "all"})["traffic"]

    def reset_traffic(self) -> None:
        assert self.proxy
        self.proxy.ask({"traffic": "reset"})

    def break_down(self, *faults: dict[str, Any]) -> None:
        """Let faults begin; without any, let them end. See `faultproxy`."""
        assert self.proxy
        self.proxy.ask({"faults": faults})

    def _serve(self, stack: ExitStack, upstream: str, pem: Path | None = None) -> None:
        """Start the proxy."""
        pems = [] if pem is None else [pem, pem]
        self.proxy = stack.enter_context(Proxy(upstream, SEED, pems))

    def secret_file(self, values: dict[str, str]) -> Path:
        """A file of credentials, for a table."""
        path = self.folder / "secrets.json"
        path.touch(0o600)
        path.write_text(json.dumps(values))
        return path


class OnDisk(RealStore):
    """A store that shows the files of a folder. `root` holds the bucket."""

    root: Path

    def put(self, key: str, data: bytes) -> None:
        path = self.root / BUCKET / key
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self.folder / "new"
        new.write_bytes(data)
        new.chmod(0o644)
        new.rename(path)  # no request finds half of it

    def delete(self, key: str) -> None:
        (self.root / BUCKET / key).unlink()

    def get(self, key: str) -> bytes:
        return (self.root / BUCKET / key).read_bytes()


class Local(OnDisk):
    """A directory of this machine."""

    name = "local"

    def start(self, stack: ExitStack) -> None:
        self.root = self.folder / "root"
        (self.root / BUCKET).mkdir(parents=True)

    def address(self, path: str) -> str:
        return f"file://{quote(f'{self.root}/{BUCKET}/{path}')}"

    def table(self, name: str, path: str) -> str:
        return f'\n[store.{name}]\nuri = "{self.address(path)}"\n'


class Memory(RealStore):
    """fsspec's memory, which only this process sees: its checkpoints are copied."""

    name = "memory"
    has_mount = False
    has_address = False
    has_table = False

    def start(self, stack: ExitStack) -> None:
        from fsspec.implementations.memory import MemoryFileSystem

        self._filesystem = MemoryFileSystem()
        stack.callback(self._filesystem.rm, f"/{BUCKET}", recursive=True)
        self._filesystem.mkdir(f"/{BUCKET}")

    def put(self, key: str, data: bytes) -> None:
        self._filesystem.pipe_file(f"/{BUCKET}/{key}", data)

    def delete(self, key: str) -> None:
        self._filesystem.rm_file(f"/{BUCKET}/{key}")

    def get(self, key: str) -> bytes:
        return self._filesystem.cat_file(f"/{BUCKET}/{key}")

    def checkpoint(self, path: str) -> ckptfs.Checkpoint:
        return ckptfs.Checkpoint(f"/{BUCKET}/{path}", filesystem=self._filesystem)


class S3(RealStore):
    """What the stores that speak S3 have in common. `server` is written to directly."""

    scheme = "http"
    has_keys = True
    server: servers.S3Program
    ca_file = ""

    def _make_bucket(self) -> None:
        self.client = self.server.client()
        self.client.create_bucket(Bucket=BUCKET)

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=key)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def address(self, path: str) -> str:
        return self.address_at(path, self.endpoint)

    def address_at(self, path: str, endpoint: str, secret_key: str = "") -> str:
        """`address` by another way to the server, or with another key."""
        secret_key = secret_key or self.keys[1]
        options = f"endpoint_override={quote(endpoint, safe='')}&region=us-east-1"
        options += f"&scheme={self.scheme}"
        if self.ca_file:
            options += f"&tls_ca_file_path={quote(self.ca_file, safe='')}"
        return f"s3://{self.keys[0]}:{secret_key}@{BUCKET}/{quote(path)}?{options}"

    @property
    def endpoint(self) -> str:
        assert self.proxy
        return self.proxy.endpoint

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.keys[1],)

    @property
    def secret_environment(self) -> dict[str, str]:
        return dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), self.keys, strict=True))

    @property
    def keys(self) -> tuple[str, str]:
        return self.server.access_key, self.server.secret_key

    def table(self, name: str, path: str) -> str:
        names = "aws_access_key_id", "aws_secret_access_key"
        file = self.secret_file(dict(zip(names, self.keys, strict=True)))
        return (
            f'\n[store.{name}]\nuri = "s3://{BUCKET}/{path}"\nregion = "us-east-1"\n'
            f'endpoint = "{self.scheme}://{self.endpoint}"\ncredentials = {{ file = "{file}" }}\n'
            + (f'ca_file = "{self.ca_file}"\n' if self.ca_file else "")
        )

    def with_wrong_keys(self, path: str) -> ckptfs.Checkpoint:
        return ckptfs.Checkpoint(self.address_at(path, self.endpoint, "wrong"))


class Rclone(OnDisk, S3):
    """`rclone serve s3`."""

    name = "rclone"
    lacks = "\t"  # rclone shows another character in its place

    def start(self, stack: ExitStack) -> None:
        self._disk = stack.enter_context(S3Server())
        self.root = self._disk.root
        self._disk.bucket_dir(BUCKET)
        self._serve(stack, self._disk.endpoint)

    @property
    def keys(self) -> tuple[str, str]:
        return self._disk.access_key, self._disk.secret_key

    def put(self, key: str, data: bytes) -> None:
        """It hashes and reads a file in two steps; no request is between them."""
        assert self.proxy
        self.proxy.ask({"pause": True})
        try:
            super().put(key, data)
        finally:
            self.proxy.ask({"pause": False})


class RcloneBehindNginx(Rclone):
    """`rclone serve s3` behind nginx, which does the TLS."""

    name = "nginx-s3"
    scheme = "https"

    def start(self, stack: ExitStack) -> None:
        authority = servers.Authority(self.folder)
        self.ca_file = str(authority.ca_file)
        self._disk = stack.enter_context(S3Server())
        self.root = self._disk.root
        self._disk.bucket_dir(BUCKET)
        front = stack.enter_context(servers.Nginx(authority, self._disk.endpoint))
        self.direct = front.tls_endpoint
        self._serve(stack, f"https://{front.tls_endpoint}", authority.certify(self.folder))


class Moto(S3):
    """moto."""

    name = "moto"
    has_keys = False

    def start(self, stack: ExitStack) -> None:
        self.server = stack.enter_context(servers.Moto())
        self._make_bucket()
        self._serve(stack, self.server.endpoint)


class JuiceFS(S3):
    """The gateway of JuiceFS."""

    name = "juicefs"

    def start(self, stack: ExitStack) -> None:
        self.server = stack.enter_context(servers.JuiceFS())
        self._make_bucket()
        self._serve(stack, self.server.endpoint)


class SeaweedFS(S3):
    """SeaweedFS by HTTP."""

    name = "seaweedfs"
    lacks = "\\"  # of which it makes a slash

    def start(self, stack: ExitStack) -> None:
        authority = servers.Authority(self.folder)
        self.server = stack.enter_context(servers.SeaweedFS(authority))
        self._make_bucket()
        self.connect(stack, self.server, authority)

    def connect(
        self, stack: ExitStack, server: servers.SeaweedFS, authority: servers.Authority
    ) -> None:
        self._serve(stack, server.endpoint)


class SeaweedFSTls(SeaweedFS):
    """SeaweedFS by HTTPS."""

    name = "seaweedfs-https"
    scheme = "https"

    def connect(
        self, stack: ExitStack, server: servers.SeaweedFS, authority: servers.Authority
    ) -> None:
        self.ca_file = str(authority.ca_file)
        self.direct = server.tls_endpoint
        self._serve(stack, f"https://{server.tls_endpoint}", authority.certify(self.folder))


class Gcs(RealStore):
    """fake-gcs-server."""

    name = "fake-gcs"
    refusals = ("google denied", "google expired")

    def start(self, stack: ExitStack) -> None:
        import requests

        self._serve(stack, "")
        assert self.proxy
        self.endpoint = self.proxy.endpoint
        server = stack.enter_context(servers.FakeGcs(self.endpoint))
        self.proxy.ask({"upstream": server.endpoint})
        self._session = stack.enter_context(requests.Session())
        self._session.headers["Host"] = self.endpoint
        self._base = f"http://{server.endpoint}"
        self._ask("POST", "/storage/v1/b", json={"name": BUCKET})

    def _ask(self, method: str, path: str, **more: Any) -> bytes:
        answer = self._session.request(method, self._base + path, timeout=30, **more)
        answer.raise_for_status()
        return answer.content

    def put(self, key: str, data: bytes) -> None:
        place = f"/upload/storage/v1/b/{BUCKET}/o"
        self._ask("POST", place, params={"uploadType": "media", "name": key}, data=data)

    def delete(self, key: str) -> None:
        self._ask("DELETE", f"/storage/v1/b/{BUCKET}/o/{quote(key, safe='')}")

    def get(self, key: str) -> bytes:
        place = f"/storage/v1/b/{BUCKET}/o/{quote(key, safe='')}"
        return self._ask("GET", place, params={"alt": "media"})

    def address(self, path: str) -> str:
        endpoint = quote(self.endpoint, safe="")
        return f"gs://anonymous@{BUCKET}/{quote(path)}?scheme=http&endpoint_override={endpoint}"

    def table(self, name: str, path: str) -> str:
        return (
            f'\n[store.{name}]\nuri = "gs://{BUCKET}/{path}"\n'
            f'endpoint = "http://{self.endpoint}"\ncredentials = "anonymous"\n'
        )


class Azure(RealStore):
    """Azurite."""

    name = "azurite"
    secrets = (servers.Azurite.key,)
    secret_environment: ClassVar = {"AZURE_STORAGE_ACCOUNT_KEY": servers.Azurite.key}
    refusals = ("azure denied", "azure expired")
    lacks = "\\"  # of which Azure makes a slash
    has_keys = True

    def start(self, stack: ExitStack) -> None:
        from azure.storage.blob import BlobServiceClient

        server = stack.enter_context(servers.Azurite())
        self._client = stack.enter_context(
            BlobServiceClient(f"http://{server.endpoint}/{server.account}", credential=server.key)
        ).get_container_client(BUCKET)
        self._client.create_container()
        self._serve(stack, server.endpoint)
        assert self.proxy
        self.endpoint = self.proxy.endpoint

    def put(self, key: str, data: bytes) -> None:
        self._client.upload_blob(key, data, overwrite=True)

    def delete(self, key: str) -> None:
        self._client.delete_blob(key)

    def get(self, key: str) -> bytes:
        return self._client.download_blob(key).readall()

    def filesystem(self, key: str = servers.Azurite.key) -> Any:
        """pyarrow's filesystem of the account."""
        from pyarrow.fs import AzureFileSystem

        return AzureFileSystem(
            servers.Azurite.account,
            account_key=key,
            blob_storage_authority=self.endpoint,
            blob_storage_scheme="http",
            dfs_storage_authority=self.endpoint,
            dfs_storage_scheme="http",
        )

    def address(self, path: str) -> str:
        """By the named store: no scheme of URIs can say where Azurite is, and with what key."""
        return self.table_address(path)

    def checkpoint(self, path: str) -> ckptfs.Checkpoint:
        return ckptfs.Checkpoint(f"{BUCKET}/{path}", filesystem=self.filesystem())

    def table(self, name: str, path: str) -> str:
        file = self.secret_file({"account_key": servers.Azurite.key})
        host = f"{servers.Azurite.account}.dfs.core.windows.net"
        return (
            f'\n[store.{name}]\nuri = "abfss://{BUCKET}@{host}/{path}"\n'
            f'endpoint = "http://{self.endpoint}"\ncredentials = {{ file = "{file}" }}\n'
        )

    def with_wrong_keys(self, path: str) -> ckptfs.Checkpoint:
        return ckptfs.Checkpoint(f"{BUCKET}/{path}", filesystem=self.filesystem("d3Jvbmc="))


class Adlfs(Azure):
    """Azurite through fsspec."""

    name = "azurite-adlfs"
    has_table = False
    small_file_requests = 3  # fsspec's ranges know no condition: the version is asked for twice

    @property
    def secret_environment(self) -> dict[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": self._connection_string(servers.Azurite.key)}

    @property
    def environment(self) -> dict[str, str]:
        return self.secret_environment

    def _connection_string(self, key: str) -> str:
        account = servers.Azurite.account
        return (
            f"DefaultEndpointsProtocol=http;AccountName={account};AccountKey={key};"
            f"BlobEndpoint=http://{self.endpoint}/{account};"
        )

    def filesystem(self, key: str = servers.Azurite.key) -> Any:
        from adlfs import AzureBlobFileSystem

        return AzureBlobFileSystem(
            connection_string=self._connection_string(key), skip_instance_cache=True
        )

    def address(self, path: str) -> str:
        return f"az://{BUCKET}/{path}"


class Gcsfs(Gcs):
    """fake-gcs-server through fsspec, which no URI can name: it gets a private daemon."""

    name = "fake-gcs-gcsfs"
    has_table = False
    has_address = False
    small_file_requests = 3  # fsspec's ranges know no condition: the version is asked for twice

    def checkpoint(self, path: str) -> ckptfs.Checkpoint:
        from gcsfs import GCSFileSystem

        filesystem = GCSFileSystem(
            token="anon", endpoint_url=f"http://{self.endpoint}", skip_instance_cache=True
        )
        return ckptfs.Checkpoint(f"{BUCKET}/{path}", filesystem=filesystem)


class Http(OnDisk):
    """nginx with its listings for people, by HTTP."""

    name = "nginx"
    refusals = ("html 403",)
    scheme = "http"
    has_table = False
    is_writable = False
    hides_dots = True
    has_versions = False  # its ETag is of size and whole seconds
    small_file_requests = 3  # fsspec's ranges know no condition: the version is asked for twice

    def start(self, stack: ExitStack) -> None:
        authority = servers.Authority(self.folder)
        server = stack.enter_context(servers.Nginx(authority))
        self.root = server.root
        (self.root / BUCKET).mkdir()
        self.connect(stack, server, authority)
        assert self.proxy
        self.endpoint = self.proxy.endpoint

    def connect(
        self, stack: ExitStack, server: servers.Nginx, authority: servers.Authority
    ) -> None:
        self._serve(stack, server.endpoint)

    def address(self, path: str) -> str:
        return f"{self.scheme}://{self.endpoint}/{BUCKET}/{quote(path)}"


class HttpTls(Http):
    """nginx by HTTPS."""

    name = "nginx-https"
    scheme = "https"

    def connect(
        self, stack: ExitStack, server: servers.Nginx, authority: servers.Authority
    ) -> None:
        # aiohttp looks at the variable when it is imported, which it has been in this process.
        trusting = ssl.create_default_context(cafile=str(authority.ca_file))
        stack.enter_context(mock.patch("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting))
        self.environment = {"SSL_CERT_FILE": str(authority.ca_file)}
        self._serve(stack, f"https://{server.tls_endpoint}", authority.certify(self.folder))


STORES: dict[str, type[RealStore]] = {
    kind.name: kind
    for kind in (
        *(Local, Memory, Rclone, Http, Gcs),
        *(HttpTls, RcloneBehindNginx, Moto, JuiceFS, SeaweedFS, SeaweedFSTls),
        *(Azure, Adlfs, Gcsfs),
    )
}
FAST = ("local", "memory", "rclone", "nginx", "fake-gcs")
"""Those that start in less than a second, and are tested by each run of all tests."""
