"""The daemon that uploads for a user, and what is handed over to it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ckptfs._client import background, client
from ckptfs._config.load import load_config
from ckptfs._store.source import names_below
from ckptfs.errors import CannotMount, CannotUpload, NoDaemon


class Answers:
    """In place of a connection to the node's daemon or to the user's."""

    def __init__(self, is_owned: bool) -> None:
        self.is_owned = is_owned
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def daemons(monkeypatch: pytest.MonkeyPatch) -> dict[str, Answers]:
    """The daemons that run: "node" and "own"."""
    running: dict[str, Answers] = {}

    def connect(config: Any, _: float) -> Answers:
        for name in ("node", "own"):
            if name in running and (name == "own" or config.node_socket):
                return running[name]
        raise NoDaemon("none")

    def connect_or_start(config: Any, _: float) -> Answers:
        assert not config.node_socket
        return running.setdefault("own", Answers(True))

    for name in ("CKPTFS_SOCKET", "CKPTFS_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "connect", connect)
    monkeypatch.setattr(client, "connect_or_start", connect_or_start)
    config = load_config()
    monkeypatch.setattr(
        background,
        "load_config",
        lambda: type(config)(
            socket="/own", node_socket="/node", mount="/mnt", cache_dir="/nowhere"
        ),
    )
    return running


def test_root_uses_the_nodes_daemon_and_others_their_own(daemons: dict[str, Answers]) -> None:
    daemons["node"] = Answers(True)
    assert background.connect(starts=True) is daemons["node"]
    refuses = daemons["node"] = Answers(False)
    with pytest.raises(NoDaemon, match="/own"):
        background.connect(starts=False)
    assert refuses.is_closed
    own = background.connect(starts=True)
    assert own is daemons["own"]
    assert background.connect(starts=False) is own


def test_a_socket_of_another_user_is_an_error_that_says_so(daemons: dict[str, Answers]) -> None:
    daemons["own"] = Answers(False)
    with pytest.raises(CannotMount, match="/own is another user's"):
        background.connect(starts=True)


def directory(top: Path, include: "list[str] | None" = None) -> background.Directory:
    return background.Directory(str(top), include or [], lambda _: None, None)


def test_what_include_leaves_out_is_named_for_the_check_of_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/one.bin", "a/two.json", "three.json"):
        (tmp_path / name).write_text("x")
    assert directory(tmp_path).left_out() == ()
    (tmp_path / os.fsdecode(b"\xff.json")).touch()  # a request cannot name it
    assert directory(tmp_path, ["*.bin"]).left_out() == ("a/two.json", "three.json")
    monkeypatch.setattr(background, "_LEFT_OUT_MAX", 1)
    with pytest.raises(CannotUpload, match="wait=True"):
        directory(tmp_path, ["*.bin"]).left_out()


def test_what_include_leaves_out_may_be_below_a_linked_directory(tmp_path: Path) -> None:
    """As in an upload without `include`, no link leads out of the directory."""
    top = tmp_path / "top"
    for folder in (top / "a" / "b", tmp_path / "outside"):
        folder.mkdir(parents=True)
        (folder / "one.json").write_text("x")
    (top / "two.bin").write_text("x")
    (top / "linked").symlink_to("a")
    (top / "out").symlink_to(tmp_path / "outside")
    left = ("a/b/one.json", "linked/b/one.json")
    assert directory(top, ["*.bin"]).left_out() == left
    (top / "a" / "b" / "above").symlink_to("..")
    assert "a/b/above/b/one.json" not in names_below(str(top))


def test_a_directory_that_changes_while_it_is_taken_over_is_an_error(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    for change in ("content", "new file", "gone"):
        found = directory(tmp_path)
        contents = found.contents()
        assert next(contents)[0] == "one"
        if change == "content":
            (tmp_path / "one").write_text("other content")
        elif change == "new file":
            (tmp_path / "three").write_text("new")
        else:
            (tmp_path / "two").unlink()
        with pytest.raises(CannotUpload):
            list(contents)


def test_metadata_replaces_the_file_and_counts(tmp_path: Path) -> None:
    (tmp_path / ".metadata.json").write_text("{}")
    (tmp_path / "file").write_text("data")
    metadata = json.dumps({"step": 1}).encode()
    found = background.Directory(str(tmp_path), [], lambda _: None, metadata)
    assert (found.files, found.bytes) == (2, 4 + len(metadata))
    read = {path: os.pread(fd, size, 0) for path, size, fd in found.contents()}
    assert read == {"file": b"data", ".metadata.json": metadata}
