"""HTTP servers that people have: nginx, Python's http.server and ``rclone serve http``."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from conftest import wait_until
from support.serverbase import free_port

from ckptfs import Checkpoint
from ckptfs._model.location import Location
from ckptfs._store.base import Store, pin_of
from ckptfs._store.http.client import HttpOptions
from ckptfs._store.http.store import HttpStore
from ckptfs._store.resolve import open_store
from ckptfs.errors import ObjectChanged, StoreError, StoreUnavailable

NGINX = """
daemon off; pid {folder}/pid; error_log stderr; worker_processes 1; {user}
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  types {{ application/json json; text/html html; }}
  gzip on; gzip_types application/json text/plain; gzip_min_length 100;
  server {{
    listen 127.0.0.1:{port}; listen 127.0.0.1:{tls_port} ssl;
    ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.pem;
    root {root}; autoindex on; charset utf-8;
  }}
}}
"""
FILES = {
    "config.json": json.dumps({"layers": list(range(5000))}).encode(),
    "weights.bin": os.urandom(3_000_000),
    "empty": b"",
    "step=100 (a+b)/größe 100%.txt": b"1",
    "step=100 (a+b)/a%20b#c?d&e;f": b"2",
    "sub/deep/<t>&amp;'x'.bin": b"3",
}


class Served(NamedTuple):
    """A directory, and how to read it."""

    folder: Path
    url: str
    tls_url: str = ""
    ca_file: str = ""


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module", params=["nginx", "http.server", "rclone"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("http")
    root, port, tls_port = folder / "root", free_port(), free_port()
    for path, data in FILES.items():
        (root / "run" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "run" / path).write_bytes(data)
    if request.param == "nginx":
        if not (program := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")):
            pytest.skip("there is no nginx")
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        user = "user root;" if os.getuid() == 0 else ""
        config = NGINX.format(folder=folder, root=root, port=port, tls_port=tls_port, user=user)
        (folder / "nginx.conf").write_text(config)
        command = [program, "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    elif request.param == "http.server":
        bind = ["--bind", "127.0.0.1", "--directory", str(root)]
        command = [sys.executable, "-m", "http.server", str(port), *bind]
    else:
        rclone = str(Path(sys.executable).with_name("rclone"))
        options = ["--addr", f"127.0.0.1:{port}", "--dir-cache-time", "1ms", "--config", ""]
        command = [rclone, "serve", "http", *options, str(root)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(port))
        tls_url = f"https://127.0.0.1:{tls_port}/run" if request.param == "nginx" else ""
        yield Served(root / "run", f"http://127.0.0.1:{port}/run", tls_url, str(folder / "ca.pem"))
    finally:
        process.terminate()
        process.wait(30)


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def read(store: Store, path: str, offset: int, length: int) -> bytes:
    pin = next(pin_of(file) for file in store.list(99).files if file.path == path)
    buffer = bytearray(length)
    store.read_into(pin, offset, memoryview(buffer))
    store.confirm(pin)
    return bytes(buffer)


def test_a_copy_has_all_names_and_bytes(served: Served, tmp_path: Path) -> None:
    for url in (served.url, f"{served.url}/"):
        target = Checkpoint(url).to_directory(tmp_path / "copy")
        assert files_in(Path(target)) == FILES


@pytest.mark.mount
def test_a_mount_has_all_names_and_bytes(served: Served, node: object) -> None:
    with Checkpoint(served.url).as_directory() as path:
        assert files_in(Path(path)) == FILES


def test_ranges_are_right(served: Served) -> None:
    store = open_store(Location("http", served.url), 20)
    data = FILES["weights.bin"]
    for offset, length in ((0, 10), (1_000_003, 100_000), (2_999_999, 1)):
        assert read(store, "weights.bin", offset, length) == data[offset : offset + length]
    store.close()


def test_a_metadata_file_that_is_not_there_is_none(served: Served) -> None:
    assert Checkpoint(served.url).get_metadata() == {}


def test_versions_of_one_second_are_not_mixed(served: Served) -> None:
    """The times of the servers' answers have whole seconds, and so have nginx's ETags."""
    store = open_store(Location("http", served.url), 20)
    file = served.folder / "young"
    length, right, stale = 100_000, 0, 0
    try:
        for number in range(2):
            file.write_bytes(b"%d" % number * length)
            pin = next(pin_of(f) for f in store.list(99).files if f.path == "young")
            versions = set[bytes]()
            for again in (b"x", b"y", b""):
                buffer = bytearray(length)
                try:
                    store.read_into(pin, 0, memoryview(buffer))
                    if again:
                        file.with_name("fresh").write_bytes(again * length)
                        file.with_name("fresh").replace(file)
                    store.confirm(pin)
                except (ObjectChanged, StoreUnavailable):
                    stale += 1
                    break
                versions.add(bytes(buffer))
                right += 1
            assert len(versions) <= 1
            assert all(len(set(version)) == 1 for version in versions)
    finally:
        file.unlink()
        store.close()
    assert right + stale > 1


def test_certificates_are_checked(served: Served) -> None:
    if not served.tls_url:
        pytest.skip("this server has no TLS")
    for options, is_read in (
        (HttpOptions(tls_ca_file_path=served.ca_file), True),
        (HttpOptions(tls_verify_certificates=False), True),
        (HttpOptions(), False),
    ):
        store = HttpStore(served.tls_url, served.tls_url, options, 20)
        if is_read:
            assert read(store, "config.json", 1, 100) == FILES["config.json"][1:101]
        else:
            with pytest.raises(StoreError, match=r"the certificate of .* is not trusted") as caught:
                store.list(99)
            assert not isinstance(caught.value, StoreUnavailable)
        store.close()
    store = HttpStore(served.url.replace("http:", "https:"), "https://x", HttpOptions(), 20)
    with pytest.raises(StoreError, match="write http://"):
        store.list(99)
