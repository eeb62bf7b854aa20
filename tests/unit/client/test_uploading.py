"""The cache's part of an upload, which is no condition of the upload."""

import logging
from pathlib import Path

import pytest

from ckptfs import Checkpoint
from ckptfs._client import save
from ckptfs._upload import Options, run_upload


def test_an_unexpected_error_of_the_caches_part_is_no_error_of_the_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> save.Saved:
        raise ValueError("mmap length is too large")

    monkeypatch.setattr(save, "save", fail)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"data")
    caplog.set_level(logging.WARNING, "ckptfs")
    done = run_upload(tmp_path / "source", Checkpoint(tmp_path / "target"), Options(), None)
    assert (tmp_path / "target" / "file").read_bytes() == b"data"
    assert (done.uploaded.files, done.cached_bytes) == (1, 0)
    assert done.cache_error.startswith("unexpected error (ValueError)")
    assert "mmap length is too large" in caplog.text
