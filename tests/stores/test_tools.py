"""Each kind of store: metadata, and what commands say of it."""

import json
import os
from pathlib import Path

import pytest
from conftest import Node
from support.stores.common import MIB, credentials_in_environment, directory, fill
from support.stores.realstore import RealStore
from support.stores.s3stores import S3

import ckptfs
from ckptfs import xattrs

pytestmark = pytest.mark.mount

META = xattrs.PREFIX + "meta."
FILE = ".metadata.json"
FILES = {"config.json": b"{}", "sub/weights.bin": bytes(range(256)) * 100}


@pytest.fixture
def readable(store: RealStore, path: str) -> str:
    """The path of a small checkpoint."""
    fill(store, path, FILES)
    return path


def test_metadata_by_api_and_attribute(store: RealStore, node: Node, readable: str) -> None:
    checkpoint = store.checkpoint(readable)
    assert checkpoint.get_metadata() == {}
    if not store.is_writable:
        with pytest.raises(ckptfs.CkptfsError):
            checkpoint.update_metadata({"step": 7})
        assert checkpoint.get_metadata() == {}
        return
    checkpoint.update_metadata({"step": 7, "größe": [1.5, None]})
    assert json.loads(store.get(f"{readable}/{FILE}")) == {"step": 7, "größe": [1.5, None]}
    assert checkpoint.get_metadata() == {"step": 7, "größe": [1.5, None]}
    if not store.has_mount:
        return
    with directory(store, readable) as top:
        assert os.getxattr(top, META + "step") == b"7"
        os.setxattr(top, META + "step", b"8")
        os.setxattr(top, META + "name", b'"x"')
        os.removexattr(top, META + "größe")
        assert json.loads(store.get(f"{readable}/{FILE}")) == {"step": 8, "name": "x"}
        assert json.loads(Path(top, FILE).read_bytes()) == {"step": 8, "name": "x"}
    assert checkpoint.get_metadata() == {"step": 8, "name": "x"}


def test_find_prints_uris_that_can_be_attached(store: RealStore, node: Node, path: str) -> None:
    """A URI that `find` prints can be attached as it is, and shows the metadata by which it was
    found."""
    if not store.has_address:
        pytest.skip("no command can name it")
    if store.hides_dots:
        pytest.skip("its listings have no .metadata.json")
    for step in (1, 2, 3):
        place = f"{path}/my run#{step}/a%41 [x]"
        fill(store, place, {FILE: b'{"step": %d}' % step, **FILES})
    found = node.here("find", store.address(path), "--where", "step > 1", "--sort", "-step")
    assert found.stderr == ""
    printed = found.stdout.splitlines()
    assert len(printed) == 2
    for step, uri in zip((3, 2), printed, strict=True):
        with credentials_in_environment(store):
            top = node.here("attach", uri).stdout.rstrip("\n")
        try:
            assert os.getxattr(top, META + "step") == b"%d" % step
            assert os.getxattr(top, "user.ckptfs.uri").decode() == uri
            assert Path(top, "config.json").read_bytes() == b"{}"
        finally:
            node.here("detach", top)


def test_doctor_finds_nothing_wrong(store: RealStore, node: Node, readable: str) -> None:
    if not store.has_address:
        pytest.skip("no command can name it")
    said = json.loads(node.here("doctor", "--json", store.address(readable), check=False).stdout)
    results = {check["name"]: check for check in said["checks"]}
    for name in ("location", "credentials", "store-list", "store-read"):
        assert results[name]["status"] == "ok", results[name]
    for name in ("store-name", "store-connect", "store-tls", "clock"):
        assert results[name]["status"] in ("ok", "skipped"), results[name]
    size = sum(map(len, FILES.values()))
    assert f"{len(FILES)} files" in results["store-list"]["message"], size


def test_a_named_store(store: RealStore, node: Node, readable: str, tmp_path: Path) -> None:
    if not store.has_table:
        pytest.skip("a named store cannot lead there")
    name = f"runs:{readable.partition('/')[2]}"
    top = node.here("attach", name).stdout.rstrip("\n")
    try:
        assert os.getxattr(top, "user.ckptfs.uri").decode() == name
        for file, data in FILES.items():
            assert Path(top, file).read_bytes() == data
        (attachment,) = node.status()["attachments"]
        assert attachment["uri"] == name
    finally:
        node.here("detach", top)
    copied = ckptfs.Checkpoint(name).to_directory(tmp_path / "copy")
    assert {str(p.relative_to(copied)) for p in Path(copied).rglob("*") if p.is_file()} == {*FILES}
    assert name in node.here("doctor", name, check=False).stdout
    with pytest.raises(ckptfs.CheckpointNotFound):
        ckptfs.Checkpoint(f"{name}-not").to_directory()


def test_status_and_attributes_show_uris_that_can_be_attached(
    store: RealStore, node: Node, readable: str
) -> None:
    """It holds no secret; with the credentials of the environment it leads to the same place."""
    if not store.has_address:
        pytest.skip("no command can name it")
    with directory(store, readable) as top:
        shown = os.getxattr(top, "user.ckptfs.uri").decode()
        assert shown == node.status()["attachments"][0]["uri"]
        for secret in store.secrets:
            assert secret not in shown
            assert secret not in node.log()
        with credentials_in_environment(store):
            again = node.here("attach", shown).stdout.rstrip("\n")
        try:
            assert Path(again, "config.json").read_bytes() == b"{}"
            assert os.stat(again).st_ino == os.stat(top).st_ino  # one attachment
        finally:
            node.here("detach", again)


def test_the_servers_own_tls(store: RealStore, node: Node, readable: str) -> None:
    """Past the proxy, whose TLS is Python's."""
    if not (isinstance(store, S3) and store.ca_file):
        pytest.skip("no TLS, or one that the proxy has as the server")
    store.put(f"{readable}/large", bytes(range(256)) * (20 * MIB // 256))
    checkpoint = ckptfs.Checkpoint(store.address_at(readable, store.direct))
    with checkpoint.as_directory() as top:
        assert Path(top, "large").read_bytes() == bytes(range(256)) * (20 * MIB // 256)
        assert Path(top, "config.json").read_bytes() == b"{}"
