"""What was uploaded from a node is in its cache: the right version, whole, and without a byte from
the store."""

import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import LARGE_BYTES, Node
from support.s3server import S3Server

import ckptfs
from ckptfs import _upload, xattrs
from ckptfs._client import client
from ckptfs._model import attributes
from ckptfs.errors import CannotMount

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
MIB = 1 << 20


@pytest.fixture
def uri(bucket: Path, uri_of: UriOf) -> str:
    return uri_of(bucket / "run" / "checkpoint")


def meanwhile(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Have something happen between the upload and the moment at which the cache gets it."""
    leased = client.leased

    @contextmanager
    def happens_first(*args: Any, **kwargs: Any) -> Iterator[str]:
        happens()
        with leased(*args, **kwargs) as path:
            yield path

    monkeypatch.setattr(client, "leased", happens_first)


def uploaded(node: Node, run: Path, uri: str, *options: str) -> dict[str, Any]:
    return json.loads(node.here("upload", "--json", *options, str(run), uri).stdout)


def test_a_restore_reads_nothing_of_what_was_uploaded_here(
    node: Node, run: Path, uri: str, s3: S3Server
) -> None:
    told = uploaded(node, run, uri)
    assert (told["cached_bytes"], told["cache_error"]) == (LARGE_BYTES + 5, "")
    s3.reset_traffic()
    with ckptfs.Checkpoint(uri).as_directory() as path:
        large = Path(path, "large.bin")
        assert large.read_bytes() == (run / "large.bin").read_bytes()
        assert Path(path, "a", "small.bin").read_bytes() == b"small"
        assert xattrs.get(path, attributes.CACHED) == str(LARGE_BYTES + 5)
        status = node.status()
        assert (status["fetched_bytes"], status["taken_bytes"]) == (0, LARGE_BYTES + 5)
    assert s3.traffic().bytes_to_client < MIB  # listings, and the checks of versions


def test_a_second_upload_gives_the_cache_what_it_lacks(node: Node, run: Path, uri: str) -> None:
    assert uploaded(node, run, uri, "--no-cache")["cached_bytes"] == 0
    assert not node.socket.exists()
    assert uploaded(node, run, uri, "--overwrite")["cached_bytes"] == LARGE_BYTES + 5


def test_uploads_that_merge_at_the_same_time_give_the_cache_all_files(
    node: Node, run: Path, uri: str, tmp_path: Path, s3: S3Server
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "other.bin").write_bytes(random.Random(6).randbytes(LARGE_BYTES))
    options = _upload.Options(merge=True)

    def upload(top: Path) -> _upload.Done:
        return _upload.run_upload(top, ckptfs.Checkpoint(uri), options, None)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(upload, [run, other]))
    assert [each.cached_bytes for each in done] == [LARGE_BYTES + 5, LARGE_BYTES]
    s3.reset_traffic()
    with ckptfs.Checkpoint(uri).as_directory() as path:
        assert xattrs.get(path, attributes.CACHED) == str(2 * LARGE_BYTES + 5)
        for top, name in ((run, "large.bin"), (other, "other.bin")):
            assert Path(path, name).read_bytes() == (top / name).read_bytes()
    assert s3.traffic().bytes_to_client < MIB


def test_an_object_that_is_replaced_after_the_upload_is_not_taken_for_it(
    node: Node, run: Path, uri: str, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = random.Random(6).randbytes(LARGE_BYTES)
    place = bucket / "run" / "checkpoint" / "large.bin"
    meanwhile(monkeypatch, lambda: place.write_bytes(other))
    assert uploaded(node, run, uri)["cached_bytes"] == 5
    with ckptfs.Checkpoint(uri).as_directory() as path:
        assert Path(path, "large.bin").read_bytes() == other


def test_a_file_that_changes_after_the_upload_is_not_taken_for_the_object(
    node: Node, run: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (run / "large.bin").read_bytes()
    meanwhile(monkeypatch, lambda: (run / "large.bin").write_bytes(content[::-1]))
    told = uploaded(node, run, uri)
    assert "large.bin: the file changed" in told["cache_error"]
    with ckptfs.Checkpoint(uri).as_directory() as path:
        assert Path(path, "large.bin").read_bytes() == content


def test_a_cache_that_is_too_small_is_no_error_of_the_upload(
    node: Node, run: Path, uri: str
) -> None:
    node.configure(cache_bytes_max=4 * MIB)
    done = node.here("upload", str(run), uri)
    assert "in the cache of this node" in done.stdout
    assert done.stderr.startswith("ckptfs: warning: the cache of this node does not have all of it")
    assert "cache_bytes_max" in done.stderr
    with ckptfs.Checkpoint(uri).as_directory() as path:
        assert Path(path, "large.bin").read_bytes() == (run / "large.bin").read_bytes()


def test_a_machine_that_cannot_mount_is_no_error_of_the_upload(
    node: Node,
    run: Path,
    uri: str,
    bucket: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise CannotMount("cannot mount: there is no /dev/fuse")

    monkeypatch.setattr(client, "connect_or_start", refuse)
    with caplog.at_level("INFO", "ckptfs"):
        ckptfs.upload(run, uri)
    said = [record.message for record in caplog.records if "cache" in record.message]
    assert len(said) == 1
    assert said[0].startswith("the cache of this node does not have all of s3://")
    assert said[0].endswith(": cannot mount: there is no /dev/fuse")
    assert os.listdir(bucket / "run" / "checkpoint") != []
