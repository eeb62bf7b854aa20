"""A log on a full disk."""

import errno
import logging
import os
from pathlib import Path

import pytest

from ckptfs._daemon.lossy import LossyHandler


def test_lines_that_a_full_disk_refuses_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    log = logging.Logger("test")
    log.addHandler(handler := LossyHandler(fd))
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    room = 10
    real = os.write

    def write(to: int, data: bytes) -> int:
        nonlocal room
        if to != fd:
            return real(to, data)
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(to, data[:room])
        room -= done
        return done

    monkeypatch.setattr(os, "write", write)
    for number in range(3):
        log.info("line %d", number)
    room = 1 << 20
    log.info("line 3: \udcff")
    log.info("line 4")
    monkeypatch.undo()
    os.close(fd)
    lost = "WARNING ckptfs._daemon.lossy: 3 lines of this log were lost: No space left on device"
    assert path.read_text().splitlines() == [
        "INFO test:",
        lost,
        "INFO test: line 3: \\udcff",
        "INFO test: line 4",
    ]
    assert capsys.readouterr().err == ""
