"""A short run of `scripts/chaos`, and what its long ones have found."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, wait_until
from mount.test_lifecycle import attachments, daemons

import ckptfs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
ROOT = Path(__file__).parents[2]
RUN_TIMEOUT_S = 300
WORKERS = {"kill worker", "stop worker", "starve worker"}


@pytest.mark.long
def test_readers_see_what_is_promised_whatever_goes_wrong() -> None:
    """The seed decides what happens, in lanes of seven actions or two uploads. Root has one of the
    disk."""
    command = [sys.executable, "-m", "chaostest", "--seed", "1229801", "--actions", "7"]
    path = os.pathsep.join(str(ROOT / folder) for folder in ("scripts", "tests"))
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    lanes = {"store", "node", *(["disk"] if "disk fails" not in outcome["left_out"] else [])}
    uploading = ("uploads", "background", "background beside it")
    expected = {**dict.fromkeys(lanes, 7), **dict.fromkeys(uploading, 2)}
    assert {lane: len(names) for lane, names in outcome["sequence"].items()} == expected
    uploads = outcome["uploads"]
    assert uploads["complete"] == 2
    ended = uploads["complete in the background"] + uploads.get("cancelled", 0)
    assert ended == uploads["begun in the background"] == 4
    assert outcome["bytes_verified"] > 0
    assert {*WORKERS, "kill daemon", "crash daemon", "crash loop"} <= set(outcome["actions"])
    assert outcome["breaches"] == []


def test_attach_while_the_daemon_is_killed_is_repeated(
    node: Node, small: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed after it has answered, and before the lease is taken."""
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    node.configure(linger_s=0)
    opened: list[str] = []

    def open_late(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECTORY and str(path).startswith(str(node.mount)):
            opened.append(path)
            if len(opened) == 1:
                [daemon] = daemons(node)
                os.kill(daemon, signal.SIGKILL)
                wait_until(lambda: not attachments())
        return really_open(path, flags, *rest, **options)

    really_open = os.open
    monkeypatch.setattr(os, "open", open_late)
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        assert opened == [path, path]
        assert Path(path, "config.json").read_text() == '{"layers": 1}'
