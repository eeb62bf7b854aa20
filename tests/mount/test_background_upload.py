"""Uploads in the background: whole and verified at the store, or failed with their files kept."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, wait_until

import ckptfs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
MIB = 1 << 20
SIZE = 20 * MIB + 1


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint with a file of several parts, a small and an empty one, and metadata."""
    top = tmp_path / "checkpoint"
    (top / "a").mkdir(parents=True)
    (top / "large.bin").write_bytes(random.Random(5).randbytes(SIZE))
    (top / "a" / "small.bin").write_bytes(b"small")
    (top / "a" / "empty").touch()
    (top / ".metadata.json").write_text('{"step": 1}')
    return top


@pytest.fixture
def place(bucket: Path) -> Path:
    return bucket / "run" / "checkpoint"


def contents(top: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()
    }


def spooled(node: Node) -> list[str]:
    """The files in the spool, without the records of uploads that are done."""
    top = node.cache_dir / "uploads"
    return sorted(str(p.relative_to(top)) for p in top.rglob("*") if p.is_file())


def test_a_directory_may_change_and_go_when_the_call_returns(
    node: Node, run: Path, place: Path, uri_of: UriOf
) -> None:
    before = contents(run)
    upload = ckptfs.upload(run, uri_of(place), wait=False)
    (run / "large.bin").write_bytes(b"other")
    shutil.rmtree(run)
    checkpoint = upload.wait(60)
    assert upload.done()
    assert contents(place) == before
    assert upload.progress() == (sum(map(len, before.values())),) * 2
    assert checkpoint.get_metadata() == {"step": 1}
    wait_until(lambda: spooled(node) == [f"{upload.id}/upload.json"])
    with checkpoint.as_directory() as path:
        assert contents(Path(path)) == before
        assert node.status()["fetched_bytes"] == 0
