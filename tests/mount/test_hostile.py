"""Names that no directory can hold, or that mean something to a shell, a terminal or a URI."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Node
from support.servers import Moto

import ckptfs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]

NAME_MAX = 255

GOOD = [
    "config.json",
    "n" * NAME_MAX,
    "ü" * (NAME_MAX // 2),
    "back\\slash\\x",
    "per%20cent%2f",
    "plus+plus",
    "sp ace",
    " ",
    "   ",
    "trailing ",
    "question?mark=1&x#frag",
    "uni-\u00e9",
    "uni-e\u0301",
    "emoji-🚀",
    "*",
    "[a-c]?",
    "$(touch x)",
    "`id`",
    "; rm -rf",
    "-rf",
    "--help",
    "'q\"q",
    ".hidden",
    "...",
    "tab\tx",
    "\x1b[31mred",
    "bell\x7f",
    "bell\x07",  # XML 1.0 has no character for this one
    "carriage\rreturn",
    "&amp;<x>",
    "user:secret@host",
    "\u202ertl",
    "u\u2028separator",
    "only/as/a/prefix/f",
    "marker/inside/f",
]
BAD = {
    "..": "'..'",
    "../evil": "'..'",
    "../../../../etc/evil": "'..'",
    "a/../b": "'..'",
    "./dot": "'.'",
    ".": "'.'",
    "/abs": "empty component",
    "//abs": "empty component",
    "a//b": "empty component",
    "n" * (NAME_MAX + 1): "longer than 255 bytes",
    "ü" * 128: "longer than 255 bytes",
    "deep/" + "m" * 300 + "/f": "longer than 255 bytes",
    "nul\0": "NUL or newline",
    "both": "both a file and a directory",
    "marker with content/": "directory with content",
}
MARKERS = [
    "marker/",
    "marker/inside/",
    "empty directory/",
    "empty/in/empty/",
    "gone/" + "x" * 256 + "/",
]


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    with Moto() as server:
        yield server


@pytest.fixture(scope="module")
def hostile(moto: Moto) -> str:
    """The URI of a checkpoint with all of these keys."""
    client = moto.client()
    client.create_bucket(Bucket="hostile")

    def put(key: str, data: bytes) -> None:
        client.put_object(Bucket="hostile", Key=f"run/checkpoint/{key}", Body=data)

    put("", b"")  # a marker for the checkpoint itself
    put("empty.bin", b"")
    for name in [*GOOD, *BAD]:
        put(name, name.encode())
    put("both/inner", b"inner")
    put("marker with content/f", b"f")
    for name in MARKERS:
        put(name, b"")
    client.put_object(Bucket="hostile", Key="run/checkpoint-2/neighbour", Body=b"")
    client.put_object(Bucket="hostile", Key="run/evil", Body=b"")
    return moto.uri("hostile/run/checkpoint")


def names_below(top: str) -> tuple[list[str], list[str]]:
    """All directories and files, relative to `top`."""
    directories, files = [], []
    for folder, subfolders, names in os.walk(top):
        directories += [os.path.relpath(os.path.join(folder, name), top) for name in subfolders]
        files += [os.path.relpath(os.path.join(folder, name), top) for name in names]
    return directories, files


def shown(name: str) -> str:
    """A name as reports show it."""
    text = name.replace("\0", "\\x00").replace("\n", "\\n")
    return text if len(text) <= 300 else text[:297] + "..."


def test_good_names_are_readable(node: Node, hostile: str) -> None:
    node.expected_in_log.append("left out ")
    with ckptfs.Checkpoint(hostile).as_directory() as path:
        for name in GOOD:
            assert Path(path, name).read_bytes() == name.encode(), name
        directories, files = names_below(path)
        assert sorted(files) == sorted([*GOOD, "empty.bin", "both/inner", "marker with content/f"])
        assert set(directories) == {
            *("both", "marker with content"),
            *("only", "only/as", "only/as/a", "only/as/a/prefix"),
            *("marker", "marker/inside", "empty directory", "empty", "empty/in", "empty/in/empty"),
        }
        assert Path(path, "empty.bin").stat().st_size == 0
        assert os.listdir(f"{path}/empty directory") == []
        assert os.stat(path).st_nlink == 2 + len([d for d in directories if "/" not in d])


def test_bad_names_are_reported_once_and_lead_nowhere(node: Node, hostile: str) -> None:
    node.expected_in_log.append("left out ")
    with ckptfs.Checkpoint(hostile).as_directory() as path:
        [attachment] = node.status()["attachments"]
        skipped = [(skip["name"], skip["reason"]) for skip in attachment["skipped"]]
        expected = {shown(name): reason for name, reason in BAD.items()}
        expected["gone/" + "x" * 256] = "longer than 255 bytes"
        assert sorted(name for name, _ in skipped) == sorted(expected)
        for name, reason in skipped:
            assert expected[name] in reason
        assert attachment["skipped_count"] == len(expected)
        lines = os.getxattr(path, "user.ckptfs.skipped").decode().splitlines()
        assert lines == [f"{name}\t{reason}" for name, reason in skipped]

        directories, files = names_below(path)
        for name in [*directories, *files]:
            assert os.path.realpath(os.path.join(path, name)) == os.path.join(path, name)
            assert not {"", ".", ".."} & set(name.split("/"))
        assert len(os.listdir(node.mount)) == 1
        assert node.log().count("left out ") == len(expected)


def test_reports_fit_a_terminal(node: Node, hostile: str) -> None:
    node.expected_in_log.append("left out ")
    path = node.here("attach", hostile).stdout.rstrip("\n")
    for command in (["status"], ["ls"], ["ls", path]):
        assert_printable(node.here(*command).stdout)
    listed = {row["path"] for row in json.loads(node.here("ls", "--json", path).stdout)}
    assert set(GOOD) <= listed


def assert_printable(text: str) -> None:
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_directory_marker_with_content_is_a_directory(node: Node, moto: Moto) -> None:
    node.expected_in_log.append("left out weights/: it is a directory with content")
    client = moto.client()
    client.create_bucket(Bucket="markers")
    client.put_object(Bucket="markers", Key="run/weights/", Body=b"content")
    client.put_object(Bucket="markers", Key="run/config.json", Body=b"{}")
    with ckptfs.Checkpoint(moto.uri("markers/run")).as_directory() as path:
        assert os.listdir(f"{path}/weights") == []
        assert Path(path, "config.json").read_bytes() == b"{}"


def test_names_of_a_local_file_system(node: Node) -> None:
    node.expected_in_log.append("left out ")
    good = ["fine", "sub/fine", "\x1b[31mred\x1b[0m", "[bold]x", "bell\x07", "\x9b31m", "\u202ertl"]
    bad = {
        b"new\nline": r"new\nline",
        b"sub/new\nline": r"sub/new\nline",
        b"not\xffutf": r"not\xffutf",
        b"folder\xff/file": r"folder\xff/file",
        b"empty\nfolder/": r"empty\nfolder",
        b"esc\x1b]0;title\x07\n": r"esc\x1b]0;title\x07\n",
    }
    top = os.fsencode(node.folder / "checkpoint")
    for name in [*map(os.fsencode, good), *bad]:
        path = os.path.join(top, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not name.endswith(b"/"):
            with open(path, "wb") as file:
                file.write(name)
    os.mkfifo(os.path.join(top, b"pipe"))

    path = node.here("attach", "file://" + os.fsdecode(top)).stdout.rstrip("\n")
    assert sorted(names_below(path)[1]) == sorted(good)
    for name in good:
        assert Path(path, name).read_bytes() == name.encode()
    skipped: list[Any] = [skip["name"] for skip in node.status()["attachments"][0]["skipped"]]
    named = {*bad.values(), "pipe", r"folder\xff"} - {
        r"folder\xff/file"
    }  # its folder stands for it
    assert sorted(skipped) == sorted(named)
    for command in (["status"], ["ls"], ["ls", path]):
        assert_printable(node.here(*command).stdout)
    assert r"\x1b[31mred\x1b[0m" in node.here("ls", path).stdout
    assert_printable(os.getxattr(path, "user.ckptfs.skipped").decode().replace("\t", ""))
    assert_printable(node.log())
