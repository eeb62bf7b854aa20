"""Tools that know nothing of ckptfs read, change and copy its attributes."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Node

import ckptfs
from ckptfs import xattrs
from ckptfs._client import client
from ckptfs._model.location import Location

pytestmark = pytest.mark.mount

FILE = ".metadata.json"
STORED = '{"loss": 0.25, "gr\\u00f6\\u00dfe": {"a": [1]}, "note": "x y"}'
META = "user.ckptfs.meta."


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint on the local disk, with metadata."""
    top = tmp_path / "checkpoint"
    (top / "sub").mkdir(parents=True)
    (top / "sub" / "a.bin").write_bytes(os.urandom(100_000))
    (top / FILE).write_text(STORED)
    return top


@pytest.fixture
def mounted(module_node: Node, source: Path) -> Iterator[str]:
    """Its path in the mount."""
    with client.leased(Location("local", str(source))) as path:
        yield path


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that keeps user attributes."""
    for parent in (tmp_path, Path("/var/tmp"), Path("/dev/shm")):
        with tempfile.TemporaryDirectory(dir=parent, prefix=".copy-") as folder:
            try:
                os.setxattr(folder, "user.test", b"1")
            except OSError:
                continue
            os.removexattr(folder, "user.test")
            yield Path(folder)
            return
    pytest.skip("NO FILE SYSTEM HERE KEEPS USER ATTRIBUTES: COPIES WITH THEM WERE NOT TESTED")


def dump(node: Node, path: "str | Path", *options: str) -> dict[str, str]:
    """The attributes as ``getfattr`` prints them."""
    command = ("getfattr", "--absolute-names", "-d", "-m", "-", *options, str(path))
    lines = node.run(*command).stdout.splitlines()
    assert lines[0] == f"# file: {path}"
    return dict(line.split("=", 1) for line in lines[1:] if line)


def test_getfattr(module_node: Node, mounted: str) -> None:
    found = dump(module_node, mounted)
    assert set(found) == {os.fsencode(name).decode() for name in os.listxattr(mounted)}
    assert found[f"{META}loss"] == '"0.25"'
    assert found[f"{META}note"] == r'"\"x y\""'
    assert found["user.ckptfs.files"] == '"2"'
    assert found["user.xdg.origin.url"] == found["user.ckptfs.uri"]
    assert all(value.startswith('"') for value in found.values())  # nothing is binary
    only = module_node.run("getfattr", "--only-values", "-n", "user.ckptfs.state", mounted).stdout
    assert only == "lazy"
    below = module_node.run(
        "getfattr", "--absolute-names", "-R", "-d", "-m", "size", mounted
    ).stdout
    assert below.count("# file: ") == 3
    absent = module_node.run("getfattr", "-n", "user.ckptfs.meta.no", mounted, check=False)
    assert absent.returncode == 1
    assert "No such attribute" in absent.stderr


def test_setfattr(module_node: Node, mounted: str, source: Path, subtests: pytest.Subtests) -> None:
    cases: dict[str, object] = {
        "12": 12,
        "text": "text",
        '{"a": [1, null]}': {"a": [1, None]},
        "größe": "größe",
        r'"quoted \"text\""': 'quoted "text"',
        "0x3132": 12,  # setfattr's own notation for bytes
        "0sWzFd": [1],
        "": "",
    }
    for given, expected in cases.items():
        with subtests.test(given):
            module_node.run("setfattr", "-n", f"{META}new.key", "-v", given, mounted)
            assert xattrs.metadata(mounted)["new.key"] == expected
            module_node.run("setfattr", "-x", f"{META}new.key", mounted)
            assert f"{META}new.key" not in dump(module_node, mounted)
    again = module_node.run("setfattr", "-x", f"{META}new.key", mounted, check=False)
    assert again.returncode == 1
    assert "No such attribute" in again.stderr
    assert (source / FILE).read_text() == STORED


def test_a_dump_can_be_restored(module_node: Node, mounted: str, source: Path) -> None:
    command = ("getfattr", "--absolute-names", "-d", "-m", "^user.ckptfs.meta", mounted)
    (module_node.folder / "dump").write_text(module_node.run(*command).stdout)
    for name in os.listxattr(mounted):
        if name.startswith(META):
            module_node.run("setfattr", "-x", name, mounted)
    assert (source / FILE).read_text() == "{}"
    module_node.run("setfattr", f"--restore={module_node.folder / 'dump'}")
    assert ckptfs.Checkpoint.from_directory(source).get_metadata() == {
        "loss": 0.25,
        "größe": {"a": [1]},
        "note": "x y",
    }


def test_attr(module_node: Node, mounted: str, source: Path) -> None:
    listed = module_node.run("attr", "-l", mounted).stdout
    assert f'Attribute "ckptfs.meta.loss" has a 4 byte value for {mounted}\n' in listed
    assert 'Attribute "ckptfs.files" has a 1 byte value' in listed
    assert module_node.run("attr", "-q", "-g", "ckptfs.meta.loss", mounted).stdout == "0.25"
    module_node.run("attr", "-s", "ckptfs.meta.loss", "-V", "0.125", mounted)
    module_node.run("attr", "-r", "ckptfs.meta.note", mounted)
    assert ckptfs.Checkpoint.from_directory(source).get_metadata() == {
        "loss": 0.125,
        "größe": {"a": [1]},
    }


def copy_by_cp(node: Node, path: str, target: Path) -> None:
    node.run("cp", "-a", f"{path}/.", str(target))


def copy_by_cp_with_attributes(node: Node, path: str, target: Path) -> None:
    node.run("cp", "-r", "--preserve=xattr", f"{path}/.", str(target))


def copy_by_rsync(node: Node, path: str, target: Path) -> None:
    if shutil.which("rsync") is None:
        pytest.skip("RSYNC IS MISSING: COPIES BY IT WERE NOT TESTED")
    node.run("rsync", "-aX", f"{path}/", f"{target}/")


def copy_by_tar(node: Node, path: str, target: Path) -> None:
    archive = str(node.folder / "archive.tar")
    node.run("tar", "--xattrs", "-C", path, "-cf", archive, ".")
    node.run("tar", "--xattrs", "--xattrs-include=*", "-C", str(target), "-xf", archive)


@pytest.mark.parametrize(
    "copy", [copy_by_cp, copy_by_cp_with_attributes, copy_by_rsync, copy_by_tar]
)
def test_a_copy_with_its_attributes_is_not_taken_for_mounted(
    module_node: Node,
    mounted: str,
    source: Path,
    target: Path,
    copy: Callable[[Node, str, Path], None],
) -> None:
    for name in ("sub/a.bin", FILE):  # from then on the ETag is known
        Path(mounted, name).read_bytes()
    module_node.wait_quiet()
    expected = dump(module_node, mounted)
    copy(module_node, mounted, target)
    for name in ("sub/a.bin", FILE):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    found = dump(module_node, target)
    assert found.keys() == expected.keys()
    for name in ("user.ckptfs.uri", "user.ckptfs.id", "user.ckptfs.version", f"{META}loss"):
        assert found[name] == expected[name]
    uri = xattrs.get(target / "sub/a.bin", "user.xdg.origin.url")
    assert uri == xattrs.get(f"{mounted}/sub/a.bin", "user.xdg.origin.url")
    for place in (target, target / "sub", target / "sub" / "a.bin"):
        for function in (xattrs.read, xattrs.metadata, xattrs.root_of, xattrs.read_all):
            with pytest.raises(ckptfs.NotAttached, match="is not in a mounted checkpoint"):
                function(place)
    module_node.run("setfattr", "-n", f"{META}loss", "-v", "7", str(target))  # it is the copy's own
    assert xattrs.metadata(mounted)["loss"] == 0.25


def test_no_tool_writes_files(module_node: Node, mounted: str, source: Path, target: Path) -> None:
    (target / "new").write_text("new")
    commands = [
        ("cp", f"{target}/new", mounted),
        ("cp", "-f", f"{target}/new", f"{mounted}/sub/a.bin"),
        ("touch", f"{mounted}/sub/a.bin"),
        ("touch", f"{mounted}/{FILE}"),
        ("rm", "-f", f"{mounted}/{FILE}"),
        ("rm", "-rf", f"{mounted}/sub"),
        ("mv", f"{mounted}/sub", f"{mounted}/other"),
        ("mkdir", f"{mounted}/x"),
        ("chmod", "-R", "a+r", f"{mounted}/sub"),
        ("ln", "-s", "x", f"{mounted}/x"),
        ("ln", f"{mounted}/sub/a.bin", f"{mounted}/x"),
        ("truncate", "-s", "0", f"{mounted}/sub/a.bin"),
        ("dd", "if=/dev/zero", f"of={mounted}/sub/a.bin", "count=1"),
        ("sed", "-i", "s/a/b/", f"{mounted}/{FILE}"),
        ("setfattr", "-n", "user.ckptfs.uri", "-v", "x", mounted),
    ]
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    for command in commands:
        done = module_node.run(*command, check=False)
        assert done.returncode != 0, command
        assert "Read-only file system" in done.stderr, (command, done.stderr)
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
    assert module_node.run("diff", "-r", str(source), mounted).stdout == ""
