"""The link by which the driver registers with the kubelet, and the kubelet's answers."""

import errno
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs._csi import registration
from ckptfs._csi.messages import CLASSES
from ckptfs._csi.registration import Registration
from ckptfs.errors import ConfigError, PlaceUnusable

NAME = "csi.example"
ENDPOINT = "/var/lib/kubelet/plugins/csi.example/csi.sock"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def link(tmp_path: Path) -> Path:
    return tmp_path / "csi.example-reg.sock"


def made(folder: Path) -> Registration:
    return Registration(NAME, str(folder), ENDPOINT)


def notify(found: Registration, **status: object) -> None:
    found.NotifyRegistrationStatus(CLASSES["NotifyRegistrationStatusRequest"](**status), 1.0)


def test_kubelet_gets_the_name_and_the_endpoint(tmp_path: Path) -> None:
    info = made(tmp_path).GetInfo(None, 1.0)
    assert (info.type, info.name, info.endpoint) == ("CSIPlugin", NAME, ENDPOINT)
    assert list(info.supported_versions) == ["1.0.0"]


def test_takeover_leaves_the_link_and_a_start_makes_it_anew(tmp_path: Path, link: Path) -> None:
    found = made(tmp_path)
    found.start(taken_over=True)
    first = link.lstat().st_ino
    assert os.readlink(link) == ENDPOINT
    made(tmp_path).start(taken_over=True)
    assert link.lstat().st_ino == first
    (tmp_path / ".csi.example-reg.sock").symlink_to("of a driver that was killed")
    made(tmp_path).start(taken_over=False)
    assert link.lstat().st_ino != first
    assert os.listdir(tmp_path) == [link.name]


def test_link_to_another_place_is_replaced_also_after_a_takeover(
    tmp_path: Path, link: Path
) -> None:
    link.symlink_to("/elsewhere")
    made(tmp_path).start(taken_over=True)
    assert os.readlink(link) == ENDPOINT


def test_end_removes_only_the_own_link(tmp_path: Path, link: Path) -> None:
    link.symlink_to("/elsewhere")
    made(tmp_path).end()
    assert os.readlink(link) == "/elsewhere"
    found = made(tmp_path)
    found.start(taken_over=False)
    found.end()
    assert not os.path.lexists(link)


def test_removed_link_is_made_again(tmp_path: Path, link: Path) -> None:
    found = made(tmp_path)
    found.start(taken_over=False)
    link.unlink()
    found.keep()
    assert os.readlink(link) == ENDPOINT


def fails(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_refusal_is_logged_and_the_link_made_anew_after_a_pause(
    tmp_path: Path, link: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made(tmp_path)
    found.start(taken_over=False)
    first = link.lstat().st_ino
    notify(found, error="no\nAPI server")
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert record.getMessage().startswith(f"the kubelet does not register {NAME}: no API server;")
    caplog.clear()  # the log is expected
    found.keep()
    assert link.lstat().st_ino == first
    monkeypatch.setattr(registration, "RETRY_S", 0.0)
    notify(found, error="no API server")
    with monkeypatch.context() as full:
        full.setattr("os.rename", fails)
        found.keep()
    caplog.clear()
    assert link.lstat().st_ino == first
    found.keep()
    second = link.lstat().st_ino
    assert second != first
    caplog.clear()
    notify(found, plugin_registered=True)
    found.keep()
    assert link.lstat().st_ino == second


def test_silence_of_the_kubelet_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "_SILENCE_S", -1.0)
    found = made(tmp_path)
    found.start(taken_over=False)
    found.keep()
    found.keep()
    warnings = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert ENDPOINT in warnings[0].getMessage()
    caplog.clear()
    made(tmp_path).start(taken_over=False)
    answered = made(tmp_path)
    answered.start(taken_over=False)
    notify(answered, plugin_registered=True)
    answered.keep()
    assert not [each for each in caplog.records if each.levelno == logging.WARNING]


@pytest.mark.parametrize("thing", ["file", "directory", "socket"])
def test_name_that_is_taken_is_refused(tmp_path: Path, link: Path, thing: str) -> None:
    if thing == "file":
        link.touch()
    elif thing == "directory":
        link.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        if thing == "socket":
            listener.bind(str(link))
            listener.listen()
        with pytest.raises(PlaceUnusable, match=f"{link}.*(remove it|another --driver-name)") as e:
            made(tmp_path).check()
        assert "\n" not in str(e.value)


def test_socket_of_a_dead_registrar_is_replaced(tmp_path: Path, link: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(link))
    made(tmp_path).start(taken_over=False)
    assert os.readlink(link) == ENDPOINT


def test_missing_directory_and_a_file_in_its_place_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        for step in ("check", "_make"):
            with pytest.raises(PlaceUnusable, match=f"{tmp_path / name}: .*--registration-dir"):
                getattr(made(tmp_path / name), step)()


def test_directory_that_cannot_be_written_is_refused(
    tmp_path: Path, link: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def symlink(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "symlink", symlink)
    with pytest.raises(PlaceUnusable, match=f"{tmp_path}: Read-only file system; give"):
        made(tmp_path).start(taken_over=False)
    assert not os.path.lexists(link)


def test_trouble_is_logged_once_and_again_after_success(
    tmp_path: Path, link: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = made(tmp_path)
    for _ in range(2):
        link.mkdir()
        found.keep()
        found.keep()
        [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
        assert f"{link} is not a socket or a link" in record.getMessage()
        caplog.clear()
        link.rmdir()
        found.keep()
        link.unlink()


@pytest.mark.parametrize(("name", "endpoint"), [("a/b", ENDPOINT), (".a", ENDPOINT), (NAME, "x")])
def test_wrong_names_are_refused(tmp_path: Path, name: str, endpoint: str) -> None:
    with pytest.raises(ConfigError, match="is not"):
        Registration(name, str(tmp_path), endpoint)
