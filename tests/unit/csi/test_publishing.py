"""The condition of a volume says what is wrong with it."""

import threading
from pathlib import Path
from typing import Any

import pytest

from ckptfs._csi import publishing
from ckptfs._csi.publishing import Publishing
from ckptfs._csi.records import Records
from ckptfs._csi.refusals import Refusal
from ckptfs._model.manifest import Skipped
from ckptfs._model.protocol.replies import AttachmentStatus
from ckptfs._os.mountinfo import FSTYPE, MountLine

SHOWN = MountLine("/pods/mount", "0:99", FSTYPE, "", "/.volumes/key")


def status(**changes: Any) -> AttachmentStatus:
    known: dict[str, Any] = {
        "name": ".volumes/key",
        "path": "/mnt/.volumes/key",
        "uri": "s3://bucket/run",
        "version": "1",
        "state": "lazy",
        "files": 1,
        "size": 1,
        "cached": 0,
        "holders": [],
        "open_files": 0,
        "pinned": True,
        "attached": 0.0,
        "uid": 0,
        "volume": "key",
    }
    return AttachmentStatus(**known | changes)


@pytest.mark.parametrize(
    ("found", "line", "said"),
    [
        ([status()], SHOWN, ""),
        ([status(state="fetching", error="an old one")], SHOWN, ""),
        ([], SHOWN, "the daemon has lost the attachment"),
        ([status()], None, "not mounted"),
        ([status()], SHOWN._replace(kind="tmpfs"), "not mounted"),
        ([status(state="changed", error="w: changed")], SHOWN, "is changed: w: changed"),
        ([status(state="failing", error="w: refused")], SHOWN, "is failing: w: refused"),
        ([status(skipped=[Skipped("w", "is archived", True)])], SHOWN, "lacks w: is archived"),
        ([status(skipped=[Skipped("w//x", "has no name")])], SHOWN, ""),
    ],
)
def test_conditions(found: list[AttachmentStatus], line: MountLine | None, said: str) -> None:
    trouble = publishing._trouble(found, line, "/nowhere")  # type: ignore[attr-defined]
    assert said in trouble
    assert bool(said) == bool(trouble)


def test_a_mount_of_an_earlier_daemon_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = MountLine("/run/mnt", "0:100", FSTYPE, "", "/")
    monkeypatch.setattr(publishing, "mount_table", lambda: [SHOWN, now])
    trouble = publishing._trouble([status()], SHOWN, "/run/mnt")  # type: ignore[attr-defined]
    assert "start the pod again" in trouble
    assert not publishing._trouble(  # type: ignore[attr-defined]
        [status()], SHOWN._replace(device="0:100"), "/run/mnt"
    )


def test_calls_for_one_publication_exclude_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Publishing(Records(tmp_path))
    begun, goes_on = threading.Event(), threading.Event()

    def detach(_: str) -> None:
        begun.set()
        assert goes_on.wait(30)

    monkeypatch.setattr(publishing, "_detach", detach)
    target = str(tmp_path / "pod" / "mount")
    thread = threading.Thread(target=driver.unpublish, args=("v", target))
    thread.start()
    assert begun.wait(30)
    with pytest.raises(Refusal, match="another call for volume v is running") as caught:
        driver.unpublish("v", target)
    assert caught.value.status == "ABORTED"
    goes_on.set()
    driver.unpublish("w", target)
    thread.join()
    driver.unpublish("v", target)
