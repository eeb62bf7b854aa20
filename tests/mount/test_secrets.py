"""The daemon has credentials in its memory only, and in no place that a user can read."""

import logging
import os
import re
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Node, wait_until
from support.s3server import S3Server

import ckptfs
from ckptfs._client import client
from ckptfs._model.location import Location
from ckptfs._model.protocol.requests import Attach
from ckptfs._model.protocol.wire import encode
from ckptfs._store.describe import describe
from ckptfs._store.resolve import open_store

pytestmark = pytest.mark.mount


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_secrets_stay_in_the_daemons_memory(
    log_format: str,
    node: Node,
    s3: S3Server,
    small: Path,
    uri_of: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted = "PLANTED/SECRET+KEY"
    metrics = node.folder / "m.sock"
    node.configure(log_format=log_format, log_level="debug", metrics=f"unix:{metrics}")
    node.check_log = lambda log: None  # type: ignore[method-assign] # it has all levels
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN"):
        monkeypatch.setenv(name, planted)
    (small / ".metadata.json").write_text('{"a": 1}')
    secrets = [s3.secret_key.encode(), planted.encode()]
    said: list[bytes] = []
    checkpoint = ckptfs.Checkpoint(uri_of(small))
    with checkpoint.as_directory() as path:
        location = describe(checkpoint.filesystem, checkpoint.path)
        keys = {**location.secrets, "secret_key": planted}
        wrong = Location("s3", location.path, location.options, keys)
        with client.connect() as connection, pytest.raises(ckptfs.AccessDenied) as denied:
            connection.ask_once(Attach(location=wrong))
        said += [
            "".join(traceback.format_exception(denied.value)).encode(),
            repr(location).encode(),
        ]
        for place in (path, *map(str, Path(path).rglob("*"))):
            said += [os.getxattr(place, name) for name in os.listxattr(place)]
        commands = ["status", "--json"], ["status"], ["top", "--json", "--interval", "0.2"]
        said += [bytes(node.here(*command).stdout, "utf-8") for command in commands]
        said.append(scraped(metrics))
        daemon = node.status()["pid"]
        keeper = int(Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in (daemon, keeper):
            said += [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
        limits = Path(f"/proc/{daemon}/limits").read_text()
        assert re.search(r"core file size +1 +1 ", limits)  # so there is no core file
    node.end()
    said += [file.read_bytes() for file in node.folder.rglob("*") if file.is_file()]
    assert len(said) > 30
    log = b"".join(text for text in said if b"Attach asked by uid" in text)
    assert b"Status asked by uid" in log  # it is of all levels
    assert not any(secret in text for secret in secrets for text in said)


def scraped(path: Path) -> bytes:
    """The answer of the metrics socket."""
    wait_until(path.exists)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_secrets_are_in_no_log_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secrets = {"access_key": "PLANTED", "secret_key": "PLANTED", "session_token": "PLANTED"}
    options = {"region": "us-east-1", "endpoint_override": "127.0.0.1:1", "scheme": "http"}
    said: list[str] = []
    places = [
        Location("s3", "bucket/run", options, secrets),
        Location("s3", "bucket/run", {**options, "role_arn": "arn:x"}, secrets),
        Location("s3", "bucket/run", {**options, "anonymous": "PLANTEDNOT"}, secrets),
        Location("azure", "c/run", {"account_name": "a"}, {"account_key": "PLANTED"}),
        Location("hf", "org/run", {"endpoint": "http://127.0.0.1:1"}, {"token": "PLANTED"}),
        Location("hdfs", "/run", {}, secrets),
    ]
    for place in places:
        try:
            store = open_store(place, 0.5)
        except ckptfs.CkptfsError as error:
            said.append("".join(traceback.format_exception(error)))
        else:
            with pytest.raises(ckptfs.CkptfsError) as failed:
                store.list(10)
            said.append("".join(traceback.format_exception(failed.value)))
            store.close()
    said.append(caplog.text)
    assert not [text for text in said if "PLANTED" in text.replace("PLANTEDNOT", "")]
    assert b"PLANTED" in encode(Attach(location=places[0]))  # only the wire has them
