"""``ckptfs meta`` is the same for a mounted path, a URI and a local directory; ``ls --tensors``."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Node
from safetensors.numpy import save_file
from support.s3server import S3Server

import ckptfs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
TARGETS = ("mounted", "below", "uri", "local")


@pytest.fixture
def target_of(
    node: Node, small: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """The same checkpoint by its path in the mount, a path below that, its URI, its folder."""
    # rclone does not understand the checksums that the AWS SDK sends by default.
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")

    def target_of(kind: str) -> str:
        if kind == "uri":
            return uri_of(small)
        if kind == "local":
            return str(small)
        path = node.here("attach", uri_of(small)).stdout.strip()
        return path if kind == "mounted" else f"{path}/layers/0/weights.bin"

    return target_of


@pytest.mark.parametrize("kind", TARGETS)
def test_meta_command_changes_the_same_file_for_each_target(
    node: Node, small: Path, target_of: Callable[[str], str], kind: str
) -> None:
    target = target_of(kind)
    file = small / ".metadata.json"
    assert json.loads(node.here("meta", "list", target, "--json").stdout) == {}
    node.here("meta", "set", target, "val_loss", "0.25")
    node.here("meta", "set", target, "note", "no JSON, ä")
    node.here("meta", "update", target, '{"step": 7, "tags": ["a"], "note": null}')
    expected = {"val_loss": 0.25, "note": None, "step": 7, "tags": ["a"]}
    assert json.loads(file.read_text()) == expected
    assert json.loads(node.here("meta", "list", target, "--json").stdout) == expected
    assert json.loads(node.here("meta", "get", target, "tags").stdout) == ["a"]
    assert "val_loss  0.25" in node.here("meta", "list", target).stdout
    node.here("meta", "rm", target, "tags")
    assert "tags" not in json.loads(file.read_text())
    for command in ("get", "rm"):
        refused = node.here("meta", command, target, "tags", check=False)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "has no metadata 'tags'" in refused.stderr
        assert refused.stderr.count("\n") == 1
    for wrong in ("[1]", "nonsense"):
        refused = node.here("meta", "update", target, wrong, check=False)
        assert refused.returncode == 1
        assert "JSON" in refused.stderr
    assert json.loads(file.read_text()) == {"val_loss": 0.25, "note": None, "step": 7}
    assert node.socket.exists() == (kind in ("mounted", "below"))


def test_numbers_that_json_lacks_are_kept_and_shown_as_strings(
    node: Node, small: Path, target_of: Callable[[str], str]
) -> None:
    """Ray writes them, as Python's json does; ``--json`` is read by other programs."""

    def not_json(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    numbers = {"loss": math.nan, "best": [math.inf, {"worst": -math.inf}], "big": 1e300}
    (small / ".metadata.json").write_text(json.dumps(numbers))
    mounted = target_of("mounted")
    for target in (mounted, target_of("uri"), target_of("local")):
        listed = node.here("meta", "list", target, "--json").stdout
        expected = {"loss": "NaN", "best": ["Infinity", {"worst": "-Infinity"}], "big": 1e300}
        assert json.loads(listed, parse_constant=not_json) == expected
        assert node.here("meta", "get", target, "loss").stdout == '"NaN"\n'
        assert "NaN" in node.here("meta", "list", target).stdout
    (found,) = json.loads(node.here("find", str(small), "--json").stdout, parse_constant=not_json)
    assert found["metadata"] == expected
    assert math.isnan(ckptfs.Checkpoint(target_of("uri")).get_metadata()["loss"])
    assert math.isnan(ckptfs.xattrs.read(mounted).metadata["loss"])
    node.run("setfattr", "-n", "user.ckptfs.meta.set", "-v", "-Infinity", mounted)
    node.here("meta", "set", mounted, "more", "1")
    assert os.getxattr(mounted, "user.ckptfs.meta.loss") == b"NaN"
    stored = json.loads((small / ".metadata.json").read_text())
    assert repr(stored) == repr({**numbers, "set": -math.inf, "more": 1})


@pytest.mark.parametrize("depth", [10, 600, 900])
def test_nested_numbers_that_json_lacks(node: Node, small: Path, depth: int) -> None:
    text = "[" * depth + "NaN" + "]" * depth
    (small / ".metadata.json").write_text(f'{{"deep": {text}}}')
    listed = node.here("meta", "get", str(small), "deep").stdout
    assert listed.replace(" ", "").replace("\n", "") == text.replace("NaN", '"NaN"')


def test_changes_show_in_a_mount_whichever_way_they_were_made(
    node: Node, small: Path, target_of: Callable[[str], str], s3: S3Server
) -> None:
    mounted, uri = target_of("mounted"), target_of("uri")
    for number, target in enumerate((mounted, uri)):
        node.here("meta", "set", target, f"key{number}", str(number))
        assert os.getxattr(mounted, f"user.ckptfs.meta.key{number}") == str(number).encode()
        assert ckptfs.Checkpoint(uri).get_metadata()[f"key{number}"] == number
    s3.reset_traffic()
    with open(f"{mounted}/.metadata.json") as file:
        assert json.load(file) == {"key0": 0, "key1": 1}


@pytest.mark.parametrize("kind", TARGETS)
def test_broken_metadata_is_named(
    node: Node, small: Path, target_of: Callable[[str], str], kind: str
) -> None:
    node.expected_in_log.append(".metadata.json")
    (small / ".metadata.json").write_text("{")
    target = target_of(kind)
    for arguments in (["list", target], ["set", target, "a", "1"], ["rm", target, "a"]):
        refused = node.here("meta", *arguments, check=False)
        assert refused.returncode == 1
        assert ".metadata.json" in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert (small / ".metadata.json").read_text() == "{"


def test_meta_command_for_a_missing_target_fails(node: Node, tmp_path: Path) -> None:
    refused = node.here("meta", "list", str(tmp_path / "nothing"), check=False)
    assert refused.returncode == 1
    assert "does not exist" in refused.stderr


def test_meta_command_with_odd_keys_works_by_uri(
    node: Node, small: Path, target_of: Callable[[str], str]
) -> None:
    """A key that no attribute can carry is shown, and can be changed by URI."""
    mounted, uri = target_of("mounted"), target_of("uri")
    long = "k" * 300
    node.here("meta", "update", uri, json.dumps({long: 1, "": 2}))
    assert json.loads(node.here("meta", "list", mounted, "--json").stdout) == {long: 1, "": 2}
    refused = node.here("meta", "update", mounted, json.dumps({"a": 1, long: 1}), check=False)
    assert "cannot be the name of an attribute" in refused.stderr
    assert "a" not in json.loads((small / ".metadata.json").read_text())
    assert long[:200] in os.getxattr(mounted, "user.ckptfs.skipped").decode()


def test_ls_tensors(node: Node, small: Path, uri_of: UriOf) -> None:
    tensors = {"w.0": np.zeros((3, 4), "float32"), "scale": np.zeros((), "int64")}
    save_file(tensors, small / "layers" / "model.safetensors")
    (small / "broken.safetensors").write_bytes(b"no header")
    rows = json.loads(node.here("ls", "--tensors", uri_of(small), "--json").stdout)
    assert {row["name"]: (row["dtype"], row["shape"], row["path"]) for row in rows} == {
        "w.0": ("F32", [3, 4], "layers/model.safetensors"),
        "scale": ("I64", [], "layers/model.safetensors"),
    }
    assert {row["name"]: row["end"] - row["start"] for row in rows} == {"w.0": 48, "scale": 8}
    table = node.here("ls", "--tensors", uri_of(small)).stdout
    assert "3×4" in table
    assert "scalar" in table
