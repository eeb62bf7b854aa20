"""Names as people type and read them, through a real mount and a real server."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Node
from mount.test_named_stores import key_file, store_toml
from support.s3server import S3Server

import ckptfs
from ckptfs import xattrs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]

NAMES = [
    "run#2",
    "x_h=[32, 16]",
    "100%",
    "a+b c",
    "lr=(1, 2)",
    "c{k}|^`\"'<>;&",
    "模型",
    "e\u0301",
    "\u00e9",
    "@at:colon",
    "user:pw@x",
    "run&scheme=https",
]
MEANT = [*NAMES, "q?x=1", "a%20b", "a?anonymous=true"]
"""Those that a URI has to encode, too."""


@pytest.fixture
def odd(bucket: Path) -> Path:
    """Checkpoints of these names, and of names that a part of them could be taken for."""
    for name in [*MEANT, "run", "a b", "q", "a"]:
        (bucket / name / "ckpt").mkdir(parents=True)
        (bucket / name / "ckpt" / "name").write_text(name)
        (bucket / name / "ckpt" / ".metadata.json").write_text("{}")
    return bucket


def test_odd_names_are_attached_as_typed(
    node: Node, s3: S3Server, odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    query = f"?endpoint_override=http://{s3.endpoint}"
    for name in NAMES:
        path = node.here("attach", f"s3://{odd.name}/{name}/ckpt{query}").stdout.strip()
        assert Path(path, "name").read_text() == name
    for name in ("q?x=1", "what?"):
        said = node.here("attach", f"s3://{odd.name}/{name}/ckpt{query}", check=False).stderr
        assert "percent-encode it as %3F" in said


def test_printed_uri_attaches_the_same_checkpoint(
    node: Node, s3: S3Server, odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    found = node.here("find", s3.uri(odd.name)).stdout.splitlines()
    assert len(found) == len(MEANT) + 4
    names: set[str] = set()
    for line in found:
        checkpoint = ckptfs.Checkpoint(line)
        assert checkpoint.get_metadata() == {}
        with checkpoint.as_directory(mode="mount") as path:
            names.add(Path(path, "name").read_text())
            assert checkpoint.path == f"{odd.name}/{Path(path, 'name').read_text()}/ckpt"
            assert xattrs.read(path).uri == line
            of_file = os.getxattr(f"{path}/name", "user.ckptfs.uri").decode()
            assert ckptfs.Checkpoint(of_file).path == f"{checkpoint.path}/name"
            attached: list[Any] = node.status()["attachments"]
            assert line in [each["uri"] for each in attached]
    assert names == {*MEANT, "run", "a b", "q", "a"}


def test_names_in_a_store_are_taken_and_printed_as_they_are(
    node: Node, s3: S3Server, odd: Path
) -> None:
    keys = key_file(node, s3)
    text = store_toml(f"s3://{odd.name}", s3.endpoint, f'{{ file = "{keys}" }}')
    with (node.folder / "ckptfs.toml").open("a") as file:
        file.write(text.replace("store.prod", "store.st"))
    assert set(node.here("find", "st:").stdout.splitlines()) == {
        f"st:{name}/ckpt" for name in [*MEANT, "run", "a b", "q", "a"]
    }
    for name in MEANT:
        with ckptfs.Checkpoint(f"st:{name}/ckpt").as_directory(mode="mount") as path:
            assert Path(path, "name").read_text() == name


def test_spellings_of_an_endpoint_are_one_attachment(
    node: Node, s3: S3Server, small: Path, uri_of: UriOf
) -> None:
    port = s3.endpoint.rpartition(":")[2]
    plain = uri_of(small).partition("?")[0]
    for endpoint in (
        f"http://{s3.endpoint}",
        f"{s3.endpoint}&scheme=http",
        f"HTTP://127.0.0.1:{port}/",
    ):
        node.here("attach", f"{plain}?endpoint_override={endpoint}")
    (attachment,) = node.status()["attachments"]
    assert f"?endpoint_override=http://{s3.endpoint}" in attachment["uri"]


@pytest.mark.parametrize(
    "arguments",
    [("attach",), ("ls",), ("find",), ("prefetch",), ("meta", "list"), ("doctor",)],
)
def test_anonymous_access_by_flag(
    node: Node,
    s3: S3Server,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    """The test server refuses requests that are not signed, though there are keys for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    bucket = small.parent.parent.name
    uri = f"s3://{bucket}/run/checkpoint?endpoint_override=http://{s3.endpoint}"
    done = node.here(*arguments, uri, "--anonymous", check=False)
    assert done.returncode == 1
    assert "UnsupportedAlgorithm" in done.stderr + done.stdout
    for other in ("prod:run", "file:///x"):
        said = node.here(*arguments, other, "--anonymous", check=False).stderr
        assert "anonymous access is for s3://" in said


def test_an_endpoint_of_the_environment_is_not_shown(
    node: Node, s3: S3Server, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a region. The URI leads back where the environment is the same."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"HTTP://{s3.endpoint}/")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    uri = f"s3://{small.parent.parent.name}/run/checkpoint"
    path = node.here("attach", uri).stdout.strip()
    assert xattrs.read(path).uri == uri
    assert os.getxattr(f"{path}/config.json", "user.ckptfs.uri").decode() == f"{uri}/config.json"
    assert (
        node.here("attach", f"{uri}?endpoint_override=http://{s3.endpoint}").stdout == f"{path}\n"
    )
    (attachment,) = node.status()["attachments"]
    assert attachment["uri"] == uri
    node.here("meta", "set", uri, "step", "7")
    assert node.here("find", uri).stdout == f"{uri}\n"
    assert os.getxattr(path, "user.ckptfs.meta.step") == b"7"
