"""Stores that speak S3. See `realstore`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from support import servers
from support.s3server import S3Server
from support.serverbase import Authority
from support.stores.realstore import BUCKET, OnDisk, RealStore

import ckptfs

if TYPE_CHECKING:
    from contextlib import ExitStack


class S3(RealStore):
    """The base of the stores that speak S3. The tests write to `server` directly."""

    scheme = "http"
    has_keys = True
    server: servers.S3Program
    ca_file = ""
    direct = ""
    """The endpoint of the server itself, without the proxy, if the server has TLS."""

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
        authority = Authority(self.folder)
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
        authority = Authority(self.folder)
        self.server = stack.enter_context(servers.SeaweedFS(authority))
        self._make_bucket()
        self.connect(stack, self.server, authority)

    def connect(self, stack: ExitStack, server: servers.SeaweedFS, authority: Authority) -> None:
        self._serve(stack, server.endpoint)


class SeaweedFSTls(SeaweedFS):
    """SeaweedFS by HTTPS."""

    name = "seaweedfs-https"
    scheme = "https"

    def connect(self, stack: ExitStack, server: servers.SeaweedFS, authority: Authority) -> None:
        self.ca_file = str(authority.ca_file)
        self.direct = server.tls_endpoint
        self._serve(stack, f"https://{server.tls_endpoint}", authority.certify(self.folder))
