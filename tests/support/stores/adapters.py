"""All stores of the suite, and those that do not speak S3. See `realstore`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from support import servers
from support.serverbase import Authority
from support.stores.realstore import BUCKET, Local, Memory, OnDisk, RealStore
from support.stores.s3stores import (
    JuiceFS,
    Moto,
    Rclone,
    RcloneBehindNginx,
    SeaweedFS,
    SeaweedFSTls,
)

import ckptfs

if TYPE_CHECKING:
    from contextlib import ExitStack


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
    refusals = ("azure denied", "azure expired")
    lacks = "\\"  # of which Azure makes a slash
    has_keys = True

    @property
    def secrets(self) -> tuple[str, ...]:
        return (servers.Azurite.key,)

    @property
    def secret_environment(self) -> dict[str, str]:
        return {"AZURE_STORAGE_ACCOUNT_KEY": servers.Azurite.key}

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
        authority = Authority(self.folder)
        server = stack.enter_context(servers.Nginx(authority))
        self.root = server.root
        (self.root / BUCKET).mkdir()
        self.connect(stack, server, authority)
        assert self.proxy
        self.endpoint = self.proxy.endpoint

    def connect(self, stack: ExitStack, server: servers.Nginx, authority: Authority) -> None:
        self._serve(stack, server.endpoint)

    def address(self, path: str) -> str:
        return f"{self.scheme}://{self.endpoint}/{BUCKET}/{quote(path)}"


class HttpTls(Http):
    """nginx by HTTPS."""

    name = "nginx-https"
    scheme = "https"
    ca_file = ""

    @property
    def environment(self) -> dict[str, str]:
        return {"SSL_CERT_FILE": self.ca_file}

    def connect(self, stack: ExitStack, server: servers.Nginx, authority: Authority) -> None:
        self.ca_file = str(authority.ca_file)
        self._serve(stack, f"https://{server.tls_endpoint}", authority.certify(self.folder))


STORES: dict[str, type[RealStore]] = {
    kind.name: kind
    for kind in (
        *(Local, Memory, Rclone, Http, Gcs),
        *(HttpTls, RcloneBehindNginx, Moto, JuiceFS, SeaweedFS, SeaweedFSTls),
        *(Azure, Adlfs),
    )
}
FAST = ("local", "memory", "rclone", "nginx", "fake-gcs")
"""Those that start in less than a second, and are tested by each run of all tests."""
