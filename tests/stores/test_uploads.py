"""Uploads to each kind of store: all files and their bytes, other content refused, nothing half
visible."""

import json
import random
from pathlib import Path

import pytest
from support.stores.realstore import RealStore

import ckptfs
from ckptfs import _upload
from ckptfs._client import save
from ckptfs._model.backoff import Backoff
from ckptfs._store import retrying
from ckptfs._store.s3 import retry

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_BACKOFF", Backoff(0.01, 0.02))
    monkeypatch.setattr(retry, "BACKOFF", Backoff(0.01, 0.02))
    monkeypatch.setattr(save, "save", lambda *_: save.Saved(0, None))  # it has tests of its own


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint with a file of several parts, small and empty ones."""
    top = tmp_path / "checkpoint"
    (top / "a").mkdir(parents=True)
    (top / "large.bin").write_bytes(random.Random(3).randbytes(20 * MIB + 1))
    (top / "a" / "small+%20 é.bin").write_bytes(b"small")
    (top / "a" / "empty").touch()
    return top


def stored(store: RealStore, run: Path, path: str) -> dict[str, bool]:
    """Whether the store has each file as it is in the directory."""
    files = [file for file in run.rglob("*") if file.is_file()]
    names = [str(file.relative_to(run)) for file in files]
    return {name: store.get(f"{path}/{name}") == (run / name).read_bytes() for name in names}


def skipped(store: RealStore, run: Path, path: str, **options: object) -> int:
    """Upload, and return the number of the files that were there."""
    checkpoint = store.checkpoint(path)
    done = _upload.run_upload(run, checkpoint, _upload.Options(**options), None)  # type: ignore[arg-type]
    return done.uploaded.skipped_files


def test_uploaded_files_are_those_of_the_directory(store: RealStore, path: str, run: Path) -> None:
    if not store.is_writable:
        with pytest.raises(ckptfs.AccessDenied, match="ckptfs cannot upload"):
            ckptfs.upload(run, store.checkpoint(path))
        return
    checkpoint = ckptfs.upload(run, store.checkpoint(path), metadata={"step": 1})
    assert all(stored(store, run, path).values())
    assert checkpoint.get_metadata() == {"step": 1}
    assert skipped(store, run, path, metadata={"step": 1}) == 4
    assert all(stored(store, run, path).values())


def test_uploaded_names_are_listed_and_copied(store: RealStore, path: str, run: Path) -> None:
    if not store.is_writable:
        return
    checkpoint = ckptfs.upload(run, store.checkpoint(path))
    copy = Path(checkpoint.to_directory(run.parent / "copy"))
    names = {str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file()}
    assert names == stored(store, run, path).keys()
    assert (copy / "large.bin").read_bytes() == (run / "large.bin").read_bytes()


def test_other_content_is_refused_and_can_be_replaced(
    store: RealStore, path: str, run: Path
) -> None:
    if not store.is_writable:
        return
    ckptfs.upload(run, store.checkpoint(path), metadata={"step": 1})
    store.put(f"{path}/foreign", b"foreign")
    with pytest.raises(ckptfs.TargetExists, match="foreign"):
        ckptfs.upload(run, store.checkpoint(path), metadata={"step": 1})
    store.delete(f"{path}/foreign")
    large = run / "large.bin"
    large.write_bytes(bytes(large.stat().st_size))
    with pytest.raises(ckptfs.TargetExists, match=r"large\.bin"):
        ckptfs.upload(run, store.checkpoint(path), metadata={"step": 2})
    assert json.loads(store.get(f"{path}/.metadata.json")) == {"step": 1}
    checkpoint = ckptfs.upload(run, store.checkpoint(path), metadata={"step": 2}, overwrite=True)
    assert all(stored(store, run, path).values())
    assert checkpoint.get_metadata() == {"step": 2}


@pytest.mark.all_servers
@pytest.mark.parametrize("fault", ["unavailable", "denied", "reset", "cut", "garbage"])
def test_upload_through_a_fault_is_an_error_or_complete(
    fault: str, store: RealStore, path: str, run: Path
) -> None:
    if not store.is_writable or store.proxy is None:
        return
    store.break_down({"fault": fault, "operation": "put", "share": 0.5})
    failure = ""
    try:
        ckptfs.upload(run, store.checkpoint(path), metadata={"step": 1})
    except ckptfs.CkptfsError as error:
        failure = str(error)
    assert "\n" not in failure
    assert not [secret for secret in store.secrets if secret in failure]
    store.break_down()
    ckptfs.upload(run, store.checkpoint(path), metadata={"step": 1}, overwrite=True)
    assert all(stored(store, run, path).values())
    assert store.checkpoint(path).get_metadata() == {"step": 1}


@pytest.mark.all_servers
def test_upload_to_a_store_that_stays_away_shows_nothing(
    store: RealStore, path: str, run: Path
) -> None:
    if not store.is_writable or store.proxy is None:
        return
    store.break_down({"fault": "unavailable", "operation": "put"})
    with pytest.raises(ckptfs.StoreUnavailable):
        ckptfs.upload(run, store.checkpoint(path))
    store.break_down()
    with pytest.raises(ckptfs.CheckpointNotFound):
        store.checkpoint(path).to_directory(run.parent / "copy")


def test_wrong_credentials_are_denied_before_anything_is_sent(
    store: RealStore, path: str, run: Path
) -> None:
    if not store.has_keys:
        return
    with pytest.raises(ckptfs.AccessDenied):
        ckptfs.upload(run, store.with_wrong_keys(path))
    assert not [each for each in store.traffic() if each["operation"] == "put"]
