"""Writes of whole buffers."""

import os
from pathlib import Path

import pytest

from ckptfs._os.write_all import pwrite_all, write_all


@pytest.fixture
def short_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))


@pytest.mark.usefixtures("short_writes")
@pytest.mark.parametrize("data", [b"", b"ab", b"0123456789", bytearray(b"0123456")])
def test_write_all_repeats_short_writes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        write_all(file.fileno(), data)
        pwrite_all(file.fileno(), data, 20)
    written = path.read_bytes()
    assert written[: len(data)] == data
    assert written[20:] == data
