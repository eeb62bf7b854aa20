"""The targets of ``scripts/fuzz`` work with the code as it is, because their own seeds pass."""

import os
import tempfile
from pathlib import Path

import fuzzing
import pytest


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_seeds_pass(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path))
    run, seeds = fuzzing.TARGETS[name]()
    for seed in [*seeds, b"", b"\xff" * 100]:
        run(seed)
