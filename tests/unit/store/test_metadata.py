"""Stored metadata: changed as a whole or not at all, and by one process at a time."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.fakes import FakeStore

from ckptfs._model.manifest import METADATA_NAME
from ckptfs._store import metadata
from ckptfs._store.local import LocalStore
from ckptfs.errors import (
    AccessDenied,
    CheckpointNotFound,
    MetadataError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)


class Slow:
    """A store that holds only metadata, and takes its time between two calls."""

    name = "slow://ckpt"

    def __init__(self, raw: bytes | None = None) -> None:
        self.raw = raw
        self.puts = 0
        self.error: Exception | None = None

    def get(self, path: str) -> bytes | None:
        assert path == METADATA_NAME
        if self.error is not None:
            raise self.error
        raw = self.raw
        time.sleep(0.002)  # others can come in between
        return raw

    def put(self, path: str, data: bytes) -> None:
        assert path == METADATA_NAME
        self.puts += 1
        self.raw = data


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the locks are; nothing is left there."""
    folder = tmp_path / "runtime"
    monkeypatch.setattr(metadata, "runtime_dir", lambda _: folder)
    return folder


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A checkpoint on the local disk."""
    (tmp_path / "ckpt").mkdir()
    return tmp_path / "ckpt"


def local(top: Path) -> LocalStore:
    return LocalStore(str(top), f"file://{top}")


def test_updates_wait_for_each_other(locks: Path) -> None:
    store = Slow(b'{"kept": true}')

    def update(number: int) -> None:
        for turn in range(5):
            metadata.update(store, {f"{number} {turn}": number})  # type: ignore[arg-type]

    threads = [threading.Thread(target=update, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert store.puts == 20
    assert len(metadata.read(store)) == 21  # type: ignore[arg-type]
    assert list(locks.iterdir()) == []


UPDATER = """
import sys, ckptfs
checkpoint = ckptfs.Checkpoint(sys.argv[1])
for turn in range(20):
    checkpoint.update_metadata({f"{sys.argv[2]} {turn}": turn})
"""


def test_updates_of_several_processes_wait_for_each_other(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTFS_SOCKET", str(top.parent / "no daemon"))
    command = [sys.executable, "-c", UPDATER, str(top)]
    processes = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(json.loads((top / METADATA_NAME).read_bytes())) == 60
    assert os.listdir(top) == [METADATA_NAME]


def test_metadata_change_waits_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_LOCK_WAIT_S", 0.05)
    store, other = Slow(b"{}"), Slow(b"{}")
    other.name = "slow://other"
    with metadata._serialised(store.name):
        for change in (metadata.update, metadata.write):
            with pytest.raises(StoreTimeout, match="slow://ckpt: other processes"):
                change(store, {"a": 1})  # type: ignore[arg-type]
        metadata.update(other, {"a": 1})  # type: ignore[arg-type]
    assert (store.puts, other.puts) == (0, 1)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("s3://b/x", "s3://b/x?region=another&anonymous=true"),
        ("s3://b/x", "s3://b/x?endpoint_override=http://of.the.environment"),
        ("abfss://b@me.dfs.core.windows.net/x", "abfss://me@127.0.0.1:10000/b/x"),
        ("slow://ckpt", "slow://ckpt?region=another"),
    ],
)
def test_two_uris_of_one_place_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, name: str, other: str
) -> None:
    monkeypatch.setattr(metadata, "_LOCK_WAIT_S", 0.05)
    store = Slow(b"{}")
    store.name = other
    with metadata._serialised(name), pytest.raises(StoreTimeout):
        metadata.update(store, {"a": 1})  # type: ignore[arg-type]


def test_metadata_update_of_unreadable_file_writes_nothing() -> None:
    store = Slow(b'{"precious": 1}')
    store.error = StoreUnavailable("dark")
    with pytest.raises(StoreUnavailable):
        metadata.update(store, {"a": 1})  # type: ignore[arg-type]
    for raw in (b"{", b"\xff\xfe", b"[" * 100_000, b'"text"', b"null"):
        store.error, store.raw = None, raw
        with pytest.raises((MetadataError, TypeError), match=r"\.metadata\.json in slow://ckpt"):
            metadata.update(store, {"a": 1})  # type: ignore[arg-type]
    assert store.puts == 0


def test_a_change_takes_the_files_place(top: Path) -> None:
    store = local(top)
    metadata.write(store, {"step": 1})
    with (top / METADATA_NAME).open("rb") as old:
        metadata.write(store, {"step": 2, "long": "x" * 10_000})
        metadata.update(store, {"step": 3})
        assert old.read() == b'{"step": 1}'
    assert metadata.read(store)["step"] == 3
    assert os.listdir(top) == [METADATA_NAME]


def test_a_change_that_fails_leaves_nothing_beside_the_file(top: Path) -> None:
    (top / METADATA_NAME / "in the way").mkdir(parents=True)
    with pytest.raises(StoreError, match=METADATA_NAME):
        metadata.write(local(top), {"a": 1})
    assert os.listdir(top) == [METADATA_NAME]
    with pytest.raises(StoreError):
        metadata.read(local(top))


def test_a_checkpoint_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    store = local(tmp_path / "missing")
    assert metadata.read(store) == {}
    for change in (metadata.write, metadata.update):
        with pytest.raises(CheckpointNotFound, match="missing does not exist"):
            change(store, {"a": 1})
    assert not (tmp_path / "missing").exists()


def test_metadata_that_is_not_json_is_not_sent() -> None:
    store = Slow(b"{}")
    circle: dict[str, object] = {}
    circle["self"] = circle
    for values in ({"a": {1}}, circle, {(1, 2): 3}):
        for change in (metadata.write, metadata.update):
            with pytest.raises((TypeError, ValueError)):
                change(store, values)  # type: ignore[arg-type]
    assert (store.puts, store.raw) == (0, b"{}")


def test_metadata_denial_means_missing_if_listing_lacks_file() -> None:
    store = FakeStore({"weights": b"x"})
    store.fail_always("get", AccessDenied("s3:ListBucket is missing"))
    assert metadata.read(store) == {}
    metadata.update(store, {"a": 1})
    assert store.content(METADATA_NAME) == b'{"a": 1}'
    with pytest.raises(AccessDenied):  # now it is listed
        metadata.read(store)


def test_metadata_denial_is_an_error_if_listing_is_denied() -> None:
    store = FakeStore({"weights": b"x"})
    store.fail_always("get", AccessDenied("wrong key"))
    store.fail_always("list", AccessDenied("wrong key"))
    with pytest.raises(AccessDenied, match="wrong key"):
        metadata.read(store)
