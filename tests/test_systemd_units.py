"""The units in ``systemd/``."""

import configparser
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from ckptfs._keeper import daemon_process
from ckptfs._keeper.mount_state import CONTROL, Held
from ckptfs._model.config import Config
from ckptfs._mount import handoff

PROJECT = Path(__file__).parents[1]
SYSTEM, USER = PROJECT / "systemd", PROJECT / "systemd" / "user"


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(path)
    return parser


@pytest.mark.parametrize("folder", [SYSTEM, USER], ids=["system", "user"])
def test_units_fit_the_program(folder: Path) -> None:
    service, socket = (unit(folder / f"ckptfs.{kind}") for kind in ("service", "socket"))
    settings = service["Service"]
    replacing_s = daemon_process.READY_WAIT_S + daemon_process._END_WAIT_S
    noticing_s = handoff.BEAT_S * daemon_process._HEART_STOPPED_BEATS
    assert int(settings["WatchdogSec"]) > noticing_s + replacing_s
    assert int(settings["TimeoutStopSec"]) > 2 * daemon_process._END_WAIT_S
    held = Held(Config(socket="/s", mount="/m", cache_dir="/c"))
    assert int(settings["FileDescriptorStoreMax"]) >= len(held.named())
    assert socket["Socket"]["FileDescriptorName"] == CONTROL
    assert settings["ExecStart"].endswith("-m ckptfs._keeper.keeper")


def test_the_units_are_as_systemd_wants_them(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze")
    for folder, options in ((SYSTEM, []), (USER, ["--user"])):
        copies = tmp_path / folder.name
        copies.mkdir()
        for kind in ("service", "socket"):
            text = (folder / f"ckptfs.{kind}").read_text()
            (copies / f"ckptfs.{kind}").write_text(
                re.sub("/opt/ckptfs/bin/[a-z]+", "/bin/sh", text)
            )
        # Sockets are made in it, in thought: the longest path is 107 bytes.
        with tempfile.TemporaryDirectory(prefix="u") as runtime:
            done = subprocess.run(
                ["systemd-analyze", *options, "verify", *copies.iterdir()],
                env={**os.environ, "XDG_RUNTIME_DIR": runtime},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        ours = [line for line in done.stderr.splitlines() if "ckptfs.s" in line]
        assert (done.returncode, ours) == (0, [])
