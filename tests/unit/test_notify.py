"""What comes from a service manager, and what only looks so."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest

from ckptfs._daemon import held, notify
from ckptfs._model.config import Config

CONFIG = Config(socket="/s", mount="/m", cache_dir="/c")


def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"PATH": "/bin"}
    manager, given = notify.taken_from(environ)
    monkeypatch.setenv("PATH", "")  # there is nobody to be asked
    manager.ready("serving")
    manager.keep({"fuse": 0})
    assert not manager.is_restarting()
    assert (manager.is_there, given, environ) == (False, {}, {"PATH": "/bin"})


def test_variables_of_another_process_are_not_believed() -> None:
    mine, others = str(os.getpid()), str(os.getppid())
    environ = {"LISTEN_PID": others, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    environ |= {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1", "WATCHDOG_PID": others}
    manager, given = notify.taken_from(environ)
    assert given == {}
    assert environ == {}
    assert manager.is_there
    assert not manager._is_watched
    assert notify.ServiceManager({**manager.variables, "WATCHDOG_PID": mine})._is_watched


def test_a_service_manager_that_cannot_be_asked_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = notify.ServiceManager({"NOTIFY_SOCKET": "/nowhere"})
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


def test_what_is_held_is_read_back_as_it_was() -> None:
    first = held.Held(CONFIG, made_mount=True, fuse=11)
    first.save()
    try:
        second = held.load(first.itself)
        assert second == first
        second.config = Config(socket="/s" * 40, mount="/m" * 40, cache_dir="/c")
        second.save()
        assert held.load(first.itself) == second
        os.pwrite(first.itself, b'{"config": 3', os.fstat(first.itself).st_size)  # and died
        assert held.load(first.itself) == second
        first.save()
        assert held.load(first.itself) == first
        with patch.object(held.msgspec.json, "encode", return_value=b'{"config": 3}'):
            first.save()  # what another version means is not known
        assert held.handed_back({"held": first.itself}) is None
    finally:
        os.close(first.itself)
