"""Changes of metadata where a lock has no place are made, and nothing is raised after them."""

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Node
from support.worlds import READ_ONLY_ROOT, in_world, over_tmp

import ckptfs
from ckptfs._model.manifest import METADATA_NAME
from ckptfs._os import filelock
from ckptfs._store import metadata

UriOf = Callable[[Path], str]

CHANGE = """
import logging, sys, ckptfs
logging.basicConfig(format="%(levelname)s %(message)s")
checkpoint = ckptfs.Checkpoint(sys.argv[1])
checkpoint.set_metadata({"a": 1})
checkpoint.update_metadata({"b": 2})
print(checkpoint.get_metadata())
"""
CHANGED = "{'a': 1, 'b': 2}\n"
NOWHERE: dict[str, Any] = {
    "CKPTFS_SOCKET": "/nonexistent/sock",
    "CKPTFS_CONFIG": "",
    "HOME": "/nonexistent",
}


@pytest.fixture
def top(node: Node) -> Path:
    """A local checkpoint that every user may change."""
    (node.folder / "ckpt").mkdir()
    (node.folder / "ckpt").chmod(0o777)
    (node.folder / "tmp").mkdir()
    (node.folder / "tmp").chmod(0o1777)
    for around in (node.folder, *node.folder.parents):
        if around.name.startswith("ckptfs-"):
            around.chmod(0o755)
    return node.folder / "ckpt"


def stored(top: Path) -> object:
    return json.loads((top / METADATA_NAME).read_bytes())


RUN = {
    "read-only": "mount -t tmpfs -o ro tmpfs /run",
    "full": "mount -t tmpfs -o nr_inodes=1 tmpfs /run",
    "missing": "mount -t tmpfs tmpfs /run; mkdir /run/ckptfs; mount -t tmpfs -o ro x /run/ckptfs",
    "another user's": "mount -t tmpfs tmpfs /run; mkdir /run/ckptfs; chown 4242 /run/ckptfs",
}


def with_own_tmp(script: str, top: Path, tmp: Path) -> str:
    """The script, and `tmp` is /tmp, and the checkpoint is at /mnt."""
    return f"{script}\nmount --bind {top} /mnt; {over_tmp(f'mount --bind {tmp}')}"


@pytest.mark.parametrize("run", RUN)
def test_roots_lock_is_elsewhere_where_run_has_no_place(run: str, node: Node, top: Path) -> None:
    tmp = top.parent / "tmp"
    done = in_world(with_own_tmp(RUN[run], top, tmp), CHANGE, "/mnt")
    assert (done.stdout, done.stderr) == (CHANGED, "")
    assert stored(top) == {"a": 1, "b": 2}
    assert [name for name in os.listdir(tmp) if name.startswith("ckptfs-")] == ["ckptfs-0"]
    assert os.listdir(tmp / "ckptfs-0") == []
    assert os.listdir(top) == [METADATA_NAME]


def test_a_user_without_home_or_runtime_directory(node: Node, top: Path) -> None:
    tmp = top.parent / "tmp"
    without = ("HOME", "XDG_RUNTIME_DIR", *node.environment)
    done = in_world(with_own_tmp("", top, tmp), CHANGE, "/mnt", uid=12345, without=without)
    assert done.stdout == CHANGED
    assert "without a lock" not in done.stderr
    assert stored(top) == {"a": 1, "b": 2}
    assert (tmp / "ckptfs-12345").stat().st_uid == 12345


@pytest.mark.parametrize("uid", [0, 12345])
def test_where_no_lock_has_a_place_the_change_is_made_and_a_warning_logged(
    uid: int, node: Node, top: Path
) -> None:
    script = f"mount --bind {top} {top}; {READ_ONLY_ROOT} mount -t tmpfs -o ro tmpfs /run"
    done = in_world(script, CHANGE, str(top), uid=uid, **NOWHERE)
    assert done.stdout == CHANGED
    assert stored(top) == {"a": 1, "b": 2}
    lines = done.stderr.splitlines()
    assert [line.partition(": its metadata is changed without a lock")[0] for line in lines] == [
        f"WARNING file://{top}",
        f"WARNING file://{top}",
    ]
    assert lines[0].endswith("set TMPDIR to a directory that this user can write")


def test_a_folder_that_another_user_has_planted_has_no_lock(
    node: Node, top: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other user could keep ours waiting, or have a file of ours made elsewhere."""
    tmp, aim = top.parent / "tmp", top.parent / "aim"
    aim.mkdir()
    (tmp / f"ckptfs-{os.geteuid()}").symlink_to(aim)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp))
    monkeypatch.setattr(metadata, "runtime_dir", lambda _: aim / "missing" / "file")
    (aim / "missing").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        ckptfs.Checkpoint(top).set_metadata({"a": 1})
    assert stored(top) == {"a": 1}
    assert os.listdir(aim) == ["missing"]
    assert "without a lock" in caplog.text


@pytest.fixture
def quiet(node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metadata, "runtime_dir", lambda _: tmp_path / "runtime")


@pytest.mark.usefixtures("quiet")
def test_a_lock_that_cannot_be_removed_fails_no_change(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(path: str, **more: int) -> None:
        if str(path).endswith(".lock"):
            raise OSError(30, "Read-only file system")
        real(path, **more)

    real = os.unlink
    monkeypatch.setattr(filelock.os, "unlink", unlink)
    checkpoint = ckptfs.Checkpoint(top)
    before = os.listdir("/proc/self/fd")
    checkpoint.set_metadata({"a": 1})
    checkpoint.update_metadata({"b": 2})  # the file that stays locks nothing
    assert checkpoint.get_metadata() == {"a": 1, "b": 2}
    assert len(os.listdir("/proc/self/fd")) == len(before)


OURS = [
    PermissionError(13, "Permission denied"),
    ckptfs.ConfigError("/etc/ckptfs.toml: unknown key 'nonsense'"),
    ckptfs.AccessDenied("AWS_PROFILE names a profile that is not there"),
]
OTHERS = [
    RuntimeError("Could not determine home directory."),
    KeyError("getpwuid(): uid not found: 12345"),
]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("where", "error"),
    [
        *(("ckptfs.checkpoint.describe", error) for error in OURS),
        *(("ckptfs._client.client.connect", error) for error in OURS + OTHERS),
    ],
)
def test_a_daemon_that_cannot_be_told_fails_no_change(
    where: str,
    error: Exception,
    top: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[object] = []

    def fail(*given: object) -> None:
        told.append(given)
        raise error

    monkeypatch.setattr(where, fail)
    with caplog.at_level(logging.WARNING):
        ckptfs.Checkpoint(top).set_metadata({"a": 1})
    assert stored(top) == {"a": 1}
    assert told
    assert ("was not told of changed metadata" in caplog.text) is (error in OTHERS)


def test_a_change_of_an_object_store_needs_no_place_either(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    script = f"{READ_ONLY_ROOT} mount -t tmpfs -o ro tmpfs /run"
    done = in_world(script, CHANGE, uri_of(small), **NOWHERE)
    assert done.stdout == CHANGED
    assert stored(small) == {"a": 1, "b": 2}
