"""``ckptfs report``: what a program has read, told exactly, also afterwards."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Node
from support.s3server import S3Server

import ckptfs

pytestmark = pytest.mark.mount

MIB = 1 << 20
UriOf = Callable[[Path], str]
READ_HALF = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
for at in range(0, 12 << 20, 1 << 20):
    os.pread(fd, 1 << 20, at)
"""


@pytest.fixture
def model(bucket: Path) -> Path:
    """A safetensors file of two tensors, of 12 MiB each less the header, and another file."""
    top = bucket / "run" / "checkpoint"
    top.mkdir(parents=True)
    header = {
        "lower": {"dtype": "U8", "shape": [12 * MIB - 512], "data_offsets": [0, 12 * MIB - 512]},
        "upper": {
            "dtype": "U8", "shape": [12 * MIB], "data_offsets": [12 * MIB - 512, 24 * MIB - 512]
        },
    }  # fmt: skip
    raw = json.dumps(header).encode().ljust(504)
    data = struct.pack("<Q", len(raw)) + raw + os.urandom(24 * MIB - 512)
    (top / "model.safetensors").write_bytes(data)
    (top / "other.bin").write_bytes(os.urandom(100_000))
    return top


def trace_of(node: Node, place: str) -> dict[str, Any]:
    return json.loads(node.here("report", "--json", place).stdout)


def test_report_shows_read_and_fetched_bytes(
    node: Node, s3: S3Server, model: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    uri = uri_of(model)
    page = tmp_path / "page.html"
    with ckptfs.Checkpoint(uri).as_directory() as path:
        with pytest.raises(AssertionError, match="report"):
            node.here("report", f"{path}/../../elsewhere")
        empty = node.here("report", path, "-o", str(page))
        assert empty.stdout == f"{page}\n"
        assert "Nothing was read yet" in page.read_text()
        s3.reset_traffic()
        subprocess.run([sys.executable, "-c", READ_HALF, f"{path}/model.safetensors"], check=True)
        node.wait_quiet()
        told = trace_of(node, path)
        node.here("report", path, "-o", str(page))
    assert told["files"] == [[0, "model.safetensors", 24 * MIB]]
    asked = [r.range for r in s3.traffic().requests if r.method == "GET" and r.range]
    told_of = [f"bytes={start}-{stop - 1}" for _, start, stop, *_ in told["fetches"]]
    assert sorted(asked) == sorted(told_of)
    read = [(start, stop) for _, _, start, stop, *_ in told["accesses"]]
    assert min(start for start, _ in read) == 0
    assert max(stop for _, stop in read) >= 12 * MIB
    ((pid, command, _),) = told["processes"]
    assert "python" in command
    assert {access[1] for access in told["accesses"]} == {pid}
    text = page.read_text()
    assert "lower" in text
    assert f"<td>{pid}</td>" in text


def test_report_after_the_last_holder_left_has_its_reads(
    node: Node, model: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    node.configure(linger_s=0, passthrough=False)
    uri = uri_of(model)
    with ckptfs.Checkpoint(uri).as_directory() as path:
        assert len(Path(path, "other.bin").read_bytes()) == 100_000
    for _ in range(2):
        assert node.status()["attachments"] == []
        told = trace_of(node, uri)
        assert (told["name"], told["files"]) == ("", [[1, "other.bin", 100_000]])
        node.here("ls", uri)  # looking at it does not hide what was
    page = tmp_path / "page.html"
    node.here("report", uri, "-o", str(page))
    assert "other.bin" in page.read_text()


def test_report_that_is_impossible_is_a_one_line_error(
    node: Node, model: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    def refusal(*arguments: str) -> str:
        done = node.here("report", *arguments, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        return done.stderr

    assert "no ckptfs daemon is running" in refusal(uri_of(model))
    node.here("mount")
    assert "is not attached" in refusal(uri_of(model))
    assert "is not attached" in refusal(str(tmp_path))
    with ckptfs.Checkpoint(uri_of(model)).as_directory() as path:
        assert "No such file or directory" in refusal(path, "-o", str(tmp_path / "no" / "page"))


def test_report_mentions_reads_of_the_kernel(
    node: Node, model: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    with ckptfs.Checkpoint(uri_of(model)).as_directory() as path:
        node.here("prefetch", path)
        if node.status()["passthrough"] != "on":
            pytest.skip("passthrough is off here")
        assert len(Path(path, "other.bin").read_bytes()) == 100_000
        told = trace_of(node, path)
        node.here("report", path, "-o", str(page))
    assert told["lent"] == [1]
    assert {fetch[3] for fetch in told["fetches"]} == {"prefetch"}
    assert "1 of the files" in page.read_text()
