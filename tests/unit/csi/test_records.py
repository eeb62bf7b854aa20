"""Records outlive a driver, whole or not at all, and one driver has them at a time."""

import threading
from pathlib import Path

import pytest

from ckptfs._csi import records
from ckptfs._csi.publication import Pod, Publication
from ckptfs._csi.records import Record
from ckptfs._os import filelock
from ckptfs.errors import PlaceUnusable

PUBLICATION = Publication("v", "/t/mount", {"uri": "s3://b/c"}, Pod("team", "pod", "account"), 7)


def test_records_are_found_again(tmp_path: Path) -> None:
    place = tmp_path / "made" / "state"
    with records.opened(place) as found:
        assert found.all() == []
        found.put(Record(PUBLICATION, "publishing"))
        found.put(Record(PUBLICATION, "published", 3, 5))
    assert place.stat().st_mode & 0o777 == 0o700
    with records.opened(place) as found:
        assert found.get(PUBLICATION.key) == Record(PUBLICATION, "published", 3, 5)
        assert [record.state for record in found.all()] == ["published"]
        for _ in range(2):
            found.remove(PUBLICATION.key)
        assert found.get(PUBLICATION.key) is None
    assert list(place.iterdir()) == []


def test_a_damaged_record_counts_as_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with records.opened(tmp_path) as found:
        found.put(Record(PUBLICATION, "published"))
        [path] = tmp_path.glob("*.json")
        (tmp_path / "other.json").write_bytes(path.read_bytes())
        path.write_bytes(path.read_bytes()[:-3])
        (tmp_path / "half.new").write_bytes(b"{")  # a driver was killed while it wrote
        assert found.all() == []
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PlaceUnusable, match="--state-dir"), records.opened(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(PlaceUnusable), records.opened(tmp_path / "file"):
        pass


def test_two_drivers_do_not_share_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_LOCK_WAIT_S", 0.0)
    with records.opened(tmp_path):
        refused: list[Exception] = []

        def second() -> None:
            try:
                with records.opened(tmp_path):
                    pass
            except PlaceUnusable as error:
                refused.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert "another ckptfs csi" in str(refused[0])
    assert filelock.wait_unlocked(str(tmp_path / "lock"), 0.0)
