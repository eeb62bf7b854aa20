"""Variables and descriptors of a service manager, real and apparent ones."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest

from ckptfs._keeper import mount_state, systemd
from ckptfs._model.config import Config

CONFIG = Config(socket="/s", mount="/m", cache_dir="/c")


def test_service_manager_that_is_absent_gets_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"PATH": "/bin"}
    manager, given = systemd.taken_from(environ)
    monkeypatch.setenv("PATH", "")  # there is nobody to be asked
    manager.ready("serving")
    manager.keep({"fuse": 0})
    assert not manager.is_restarting()
    assert (manager._address, given, environ) == ("", {}, {"PATH": "/bin"})


def test_service_manager_ignores_variables_of_another_process() -> None:
    mine, others = str(os.getpid()), str(os.getppid())
    environ = {"LISTEN_PID": others, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    environ |= {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1", "WATCHDOG_PID": others}
    manager, given = systemd.taken_from(environ)
    assert given == {}
    assert environ == {}
    assert manager._address
    assert not manager._is_watched
    assert systemd.ServiceManager({**manager.variables, "WATCHDOG_PID": mine})._is_watched


def test_service_manager_without_an_answer_is_not_restarting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = systemd.ServiceManager({"NOTIFY_SOCKET": "/nowhere"})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not manager.is_restarting()
    systemctl = tmp_path / "systemctl"
    for answer, restarting in (
        ("", False),
        ("7 u.service stop running", False),
        ("7 u.service restart running", True),
    ):
        systemctl.write_text(f"#!/bin/sh\necho {answer}\n")
        systemctl.chmod(0o755)
        assert manager.is_restarting() is restarting


def test_mount_state_is_loaded_as_it_was_saved() -> None:
    first = mount_state.Held(CONFIG, made_mount=True, fuse=11)
    first.save()
    try:
        second = mount_state.load(first.itself)
        assert second == first
        second.config = Config(socket="/s" * 40, mount="/m" * 40, cache_dir="/c")
        second.save()
        assert mount_state.load(first.itself) == second
        os.pwrite(first.itself, b'{"config": 3', os.fstat(first.itself).st_size)  # and died
        assert mount_state.load(first.itself) == second
        first.save()
        assert mount_state.load(first.itself) == first
        with patch.object(mount_state.msgspec.json, "encode", return_value=b'{"config": 3}'):
            first.save()  # what another version means is not known
        assert mount_state.handed_back({"held": first.itself}) is None
    finally:
        os.close(first.itself)
