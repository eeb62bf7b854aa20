"""Programs that copy files with their attributes, to file systems that keep little of them."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COMMAND_TIMEOUT_S, Node
from safetensors.numpy import save_file

import ckptfs
from ckptfs import xattrs
from ckptfs._client import client
from ckptfs._model import attributes as names
from ckptfs._model.location import Location

pytestmark = pytest.mark.mount

FILE = ".metadata.json"
NODES_OWN = {names.STATE, names.CACHED, names.ATTACHED, names.ERROR}
IMAGE_BYTES = 512 << 20
"""Enough for each file system; the image is sparse."""
LONG = "/".join(["模型" * 20] * 7)
"""840 bytes, which are three times as many in the URI."""
LONG_ASCII = "/".join(["model" * 20] * 10)
"""1009 bytes; the URI of a file below it would stand in two attributes."""

PLACES = ("", "model.safetensors", LONG, f"{LONG}/w.bin", LONG_ASCII, f"{LONG_ASCII}/w.bin")

METADATA: dict[str, dict[str, Any]] = {
    "none": {},
    "few": {"loss": 0.25, "größe": [1]},
    "many": {f"eval/metric_{number}": number * 0.123456 for number in range(120)},
    "long names": {"k" * 235 + f"{number:03}": number for number in range(30)},
    "long value": {"big": "x" * 20_000, "loss": 0.25},
    "long values": {f"note {number}": "x" * 500 for number in range(20)},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint whose attributes are more than any file system keeps."""
    top = tmp_path / "checkpoint"
    for folder in (LONG, LONG_ASCII):
        (top / folder).mkdir(parents=True)
        (top / folder / "w.bin").write_bytes(b"x")
    (top / "config.json").write_text("{}")
    tensors = {f"model.layers.{n}.mlp.gate_proj.weight": np.zeros(64, "f4") for n in range(300)}
    save_file(tensors, top / "model.safetensors")
    return top


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[str]:
    with client.leased(Location("local", str(folder))) as path:
        yield path


@contextlib.contextmanager
def file_system(folder: Path, kind: str) -> Iterator[Path]:
    """A new file system of that kind, or a skipped test where this machine has none."""
    place, image = folder / "place", folder / "image"
    place.mkdir()
    command = ["mount", "-t", kind.partition(" ")[0]]
    if kind == "tmpfs":
        command += ["tmpfs", str(place)]
    else:
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        make = {"ext4 4096": ["ext4", "-b", "4096"], "xfs": ["xfs"], "btrfs": ["btrfs"]}[kind]
        tool = shutil.which(f"mkfs.{make[0]}")
        if tool is None:
            pytest.skip(f"MKFS.{make[0].upper()} IS MISSING: COPIES TO IT WERE NOT TESTED")
        subprocess.run([tool, "-q", *make[1:], str(image)], check=True, timeout=COMMAND_TIMEOUT_S)
        command += ["-o", "loop", str(image), str(place)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    if done.returncode:
        pytest.skip(f"NO {kind.upper()} CAN BE MOUNTED HERE: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=COMMAND_TIMEOUT_S)


def by_python(call: str) -> Callable[[str, Path], list[str]]:
    code = f"import os, shutil, sys; source, target = sys.argv[1:]; {call}"
    return lambda source, target: [sys.executable, "-c", code, source, str(target)]


TAR = "--xattrs --xattrs-include=*"
WAYS: dict[str, Callable[[str, Path], list[str]]] = {
    "copytree": by_python("shutil.copytree(source, target)"),
    "copy2": by_python("shutil.copy2(f'{source}/model.safetensors', target)"),
    "copystat": by_python("os.mkdir(target); shutil.copystat(source, target)"),
    "cp -a": lambda source, target: ["cp", "-a", source, str(target)],
    "cp xattr": lambda source, target: ["cp", "-r", "--preserve=xattr", source, str(target)],
    "cp all": lambda source, target: ["cp", "-r", "--preserve=all", source, str(target)],
    "rsync": lambda source, target: ["rsync", "-aX", f"{source}/", str(target)],
    "tar": lambda source, target: [
        *("sh", "-ec", 'mkdir "$2"; tar -C "$1" $3 -cf - . | tar -C "$2" $3 -xf -', "sh"),
        *(source, str(target), TAR),
    ],
}


@pytest.mark.parametrize(
    "kind",
    [
        "ext4 4096",
        "tmpfs",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("xfs", "btrfs")),
    ],
)
def test_copies_work_whatever_the_file_system_keeps(
    module_node: Node, source: Path, tmp_path: Path, kind: str, subtests: pytest.Subtests
) -> None:
    with file_system(tmp_path, kind) as place:
        for number, (which, metadata) in enumerate(METADATA.items()):
            (source / FILE).write_text(json.dumps(metadata))
            with mounted(source) as path:
                assert xattrs.read(path).metadata == metadata
                for way, command in WAYS.items():
                    if way == "rsync" and shutil.which("rsync") is None:
                        continue
                    with subtests.test(way, metadata=which):
                        target = place / f"{number} {way}"
                        done = module_node.run(*command(path, target))
                        assert done.stderr == ""
                        check_copy(path, target, way)


def check_copy(path: str, target: Path, way: str) -> None:
    """All bytes and all listed attributes are there, and nothing that is true of this node only."""
    pairs = {"copy2": [("model.safetensors", "")], "copystat": [("", "")]}.get(way)
    for name, copied in pairs or [(n, n) for n in PLACES]:
        found = attributes(target / copied)
        if found or os.path.isfile(target / copied):
            assert found in ({}, attributes(Path(path, name)))
        assert not found.keys() & NODES_OWN
    if pairs is None:
        assert (target / "model.safetensors").read_bytes() == Path(
            path, "model.safetensors"
        ).read_bytes()
        with pytest.raises(ckptfs.NotAttached):
            xattrs.read(target)
        shutil.rmtree(target)


def attributes(path: Path) -> dict[str, bytes]:
    """The attributes that the file lists; {} on a file system without user attributes."""
    try:
        return {name: os.getxattr(path, name) for name in os.listxattr(path)}
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return {}


def test_each_attribute_is_read_by_name_and_in_python(module_node: Node, source: Path) -> None:
    (source / FILE).write_text(json.dumps(METADATA["many"]))
    with mounted(source) as path:
        model = f"{path}/model.safetensors"
        assert names.TENSORS not in os.listxattr(model)
        assert len(os.getxattr(model, names.TENSORS).splitlines()) == 300
        told = xattrs.read_all(path)
        assert told.keys() >= {names.STATE, names.CACHED, names.ATTACHED, names.FORMAT}
        assert {
            name[len(names.META_PREFIX) :]: json.loads(value)
            for name, value in told.items()
            if name.startswith(names.META_PREFIX)
        } == METADATA["many"]
        assert xattrs.read_all(model).keys() >= {names.STATE, names.TENSORS, names.SIZE}
        assert os.getxattr(model, names.ORIGIN) == os.getxattr(model, names.URI)
        assert {names.ORIGIN, names.URI} <= set(os.listxattr(model))
        assert os.listxattr(f"{path}/{LONG_ASCII}") == [names.URI]  # both would not fit
        assert {names.URI, names.ETAG} <= set(os.listxattr(f"{path}/{LONG_ASCII}/w.bin"))
        assert os.listxattr(f"{path}/{LONG}") == []  # neither does
        for place in (f"{path}/{LONG}", f"{path}/{LONG}/w.bin", f"{path}/{LONG_ASCII}/w.bin"):
            assert os.getxattr(place, names.ORIGIN) == os.getxattr(place, names.URI)


def test_a_list_of_attributes_fetches_nothing(node: Node, source: Path) -> None:
    with mounted(source) as path:
        for _ in range(3):
            for folder, _, files in os.walk(path):
                for place in (folder, *(f"{folder}/{name}" for name in files)):
                    for name in os.listxattr(place):
                        os.getxattr(place, name)
        assert os.getxattr(path, names.CACHED) == b"0"
        assert node.status()["fetched_bytes"] == 0


OVERLAY_STEPS = {
    "touch": 'touch "$1/model.safetensors"',
    "append to a shard": 'echo x >> "$1/model.safetensors"',
    "chmod": 'chmod 640 "$1/config.json"',
    "append": 'echo >> "$1/config.json"',
    "truncate": ': > "$1/LONG/w.bin"',
    "move": 'mv "$1/config.json" "$1/moved.json"',
    "write the metadata": 'echo "{}" > "$1/.metadata.json"',
    "new": 'mkdir "$1/new"; echo x > "$1/new/file"',
    "remove": 'rm "$1/moved.json"',
}


@pytest.mark.parametrize("options", ["", ",metacopy=on"])
@pytest.mark.parametrize("which", METADATA)
def test_an_overlay_copies_up(
    module_node: Node, source: Path, tmp_path: Path, options: str, which: str
) -> None:
    (source / FILE).write_text(json.dumps(METADATA[which]))
    up, work, merged = (tmp_path / name for name in ("up", "work", "merged"))
    for folder in (up, work, merged):
        folder.mkdir()
    with mounted(source) as path:
        said = f"lowerdir={path},upperdir={up},workdir={work}{options}"
        done = module_node.run("mount", "-t", "overlay", "-o", said, "o", str(merged), check=False)
        if done.returncode:
            pytest.skip(f"NO OVERLAY CAN BE MOUNTED HERE: {done.stderr.strip()}")
        try:
            assert os.access(merged / "config.json", os.W_OK)  # it is the overlay that is written
            for step in OVERLAY_STEPS.values():
                module_node.run("sh", "-ec", step.replace("LONG", LONG), "sh", str(merged))
            copied = (merged / "model.safetensors").read_bytes()
            assert copied == (source / "model.safetensors").read_bytes() + b"x\n"
            for place in (up, up / "model.safetensors"):
                assert not set(os.listxattr(place)) & NODES_OWN
        finally:
            module_node.run("umount", str(merged))
