"""Uploads: complete and verified, or an error that names the file; nothing half visible."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, wait_until
from support.s3server import S3Server
from support.stores.adapters import STORES
from support.stores.realstore import BUCKET

import ckptfs
from ckptfs import _upload
from ckptfs._client import save
from ckptfs._model.backoff import Backoff
from ckptfs._store import retrying, source
from ckptfs._store.directory_upload import _Run
from ckptfs._store.s3 import retry, uploads
from ckptfs._store.s3.uploads import S3Uploads
from ckptfs._store.worker_threads import Pace

UriOf = Callable[[Path], str]
MIB = 1 << 20
PART_BYTES = 5 * MIB
"""S3's least, which moto demands."""
PARTS = 3
COMMAND = str(Path(sys.executable).with_name("ckptfs"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_BACKOFF", Backoff(0.01, 0.02))
    monkeypatch.setattr(retry, "BACKOFF", Backoff(0.01, 0.02))
    monkeypatch.setattr(uploads, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(save, "save", lambda *_: save.Saved(0, None))  # it has tests of its own


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint with a file of several parts, small and empty ones, and odd names."""
    chance = random.Random(7)
    top = tmp_path / "checkpoint"
    (top / "a" / "b").mkdir(parents=True)
    (top / "large.bin").write_bytes(chance.randbytes(2 * PART_BYTES + 5))
    (top / "a" / "we ird+%41é?&.bin").write_bytes(chance.randbytes(1000))
    (top / "a" / "b" / "empty").touch()
    return top


def files_in(top: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()
    }


# -- S3


@pytest.fixture(scope="module")
def moto() -> Iterator[Any]:
    with STORES["moto"]() as store:
        yield store


class Target:
    """A checkpoint of the test's own in moto, behind a proxy with faults."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.path = f"runs/{uuid.uuid4().hex[:12]}"
        self.uri: str = store.address(self.path)
        store.reset_traffic()

    def objects(self) -> dict[str, bytes]:
        page = self.store.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.path}/")
        keys = [item["Key"] for item in page.get("Contents", [])]
        return {key[len(self.path) + 1 :]: self.store.get(key) for key in keys}

    def unfinished(self) -> list[str]:
        """The keys of the uploads that have not ended."""
        found = self.store.client.list_multipart_uploads(Bucket=BUCKET, Prefix=f"{self.path}/")
        return [each["Key"].removeprefix(f"{self.path}/") for each in found.get("Uploads", [])]

    def sent(self) -> list[str]:
        """The targets of the requests with content, in their order."""
        return [each["target"] for each in self.store.traffic() if each["method"] == "PUT"]

    def break_down(self, fault: str, within: str = "", **more: Any) -> None:
        self.store.break_down({"fault": fault, "within": within, **more})

    def heal(self) -> None:
        self.store.break_down()


@pytest.fixture
def target(moto: Any) -> Iterator[Target]:
    target = Target(moto)
    yield target
    target.heal()
    for key in target.objects():
        moto.delete(f"{target.path}/{key}")
    assert target.unfinished() == []


def result(run: Path, uri: str, **options: Any) -> tuple[int, int]:
    """The numbers of all files and of the skipped ones."""
    done = _upload.run_upload(
        run, ckptfs.Checkpoint(uri), _upload.Options(**options), None
    ).uploaded
    return done.files, done.skipped_files


def test_upload_brings_all_files_and_returns_the_checkpoint(run: Path, target: Target) -> None:
    told: list[tuple[int, int]] = []
    checkpoint = ckptfs.upload(run, target.uri, progress=lambda *done: told.append(done))
    assert isinstance(checkpoint, ckptfs.Checkpoint)
    assert target.objects() == files_in(run)
    size = sum(map(len, files_in(run).values()))
    assert told[-1] == (size, size)
    assert len({target for target in target.sent() if "partNumber=" in target}) == PARTS
    assert target.unfinished() == []


def test_upload_a_second_time_sends_nothing(run: Path, target: Target) -> None:
    assert result(run, target.uri, metadata={"step": 1}) == (4, 0)
    target.store.reset_traffic()
    assert result(run, target.uri, metadata={"step": 1}) == (4, 4)
    assert target.sent() == []


def test_upload_continues_with_what_is_missing(run: Path, target: Target) -> None:
    ckptfs.upload(run, target.uri, include=["a/*"])
    (run / "new").write_text("new")
    assert result(run, target.uri) == (4, 2)
    assert target.objects() == files_in(run)


def test_upload_of_parts_of_a_directory_makes_one_checkpoint(run: Path, target: Target) -> None:
    ckptfs.upload(run, target.uri, include=["a/*"])
    ckptfs.upload(run, target.uri, include=["large*"], metadata={"step": 1})
    found = target.objects()
    assert json.loads(found.pop(".metadata.json")) == {"step": 1}
    assert found == files_in(run)


def test_upload_writes_metadata_last(run: Path, target: Target) -> None:
    (run / ".metadata.json").write_text('{"step": 1, "loss": 2}')
    checkpoint = ckptfs.upload(run, target.uri, metadata={"step": 3})
    assert checkpoint.get_metadata() == {"step": 3, "loss": 2}
    last = target.store.traffic()[-2]  # the last one is that of `get_metadata`
    assert (last["method"], last["target"].endswith("/.metadata.json")) == ("PUT", True)
    kept = files_in(run)
    kept.pop(".metadata.json")
    found = target.objects()
    assert json.loads(found.pop(".metadata.json")) == {"step": 3, "loss": 2}
    assert found == kept


def test_upload_copies_a_metadata_file_as_it_is(run: Path, target: Target) -> None:
    (run / ".metadata.json").write_text('{ "step":1 }\n')
    ckptfs.upload(run, target.uri)
    assert target.objects() == files_in(run)


def test_overwrite_removes_metadata_before_new_content(run: Path, target: Target) -> None:
    ckptfs.upload(run, target.uri, metadata={"step": 1})
    (run / "large.bin").write_bytes(b"other")
    target.break_down("denied", "/large.bin")
    with pytest.raises(ckptfs.AccessDenied, match=r"large\.bin in s3://"):
        ckptfs.upload(run, target.uri, metadata={"step": 2}, overwrite=True)
    assert ".metadata.json" not in target.objects()  # nobody takes the mixture for a checkpoint
    target.heal()
    ckptfs.upload(run, target.uri, metadata={"step": 2}, overwrite=True)
    found = target.objects()
    assert json.loads(found.pop(".metadata.json")) == {"step": 2}
    assert found == files_in(run)


@pytest.mark.parametrize("change", ["same size", "other size", "other name", "metadata"])
def test_target_with_other_content_is_refused(change: str, run: Path, target: Target) -> None:
    ckptfs.upload(run, target.uri, metadata={"step": 1})
    before = target.objects()
    step, what = 1, "large.bin"
    if change == "same size":
        data = bytearray((run / "large.bin").read_bytes())
        data[-1] ^= 1
        (run / "large.bin").write_bytes(data)
    elif change == "other size":
        (run / "large.bin").write_bytes(b"x")
    elif change == "other name":
        (run / "large.bin").rename(run / "renamed.bin")
    else:
        step, what = 2, ".metadata.json"
    target.store.reset_traffic()
    with pytest.raises(ckptfs.TargetExists, match=what) as caught:
        ckptfs.upload(run, target.uri, metadata={"step": step})
    assert isinstance(caught.value, FileExistsError)
    assert target.store.secrets[0] not in str(caught.value)
    assert target.sent() == []
    assert target.objects() == before
    ckptfs.upload(run, target.uri, metadata={"step": step}, overwrite=True)
    after = target.objects()
    assert {name: after[name] for name in files_in(run)} == files_in(run)


def test_target_keeps_metadata_that_the_upload_does_not_bring(run: Path, target: Target) -> None:
    ckptfs.upload(run, target.uri, metadata={"step": 1})
    assert result(run, target.uri) == (3, 3)
    assert json.loads(target.objects()[".metadata.json"]) == {"step": 1}


# -- merges


def other_half(run: Path, tmp_path: Path) -> Path:
    """Another directory of the same checkpoint, which has one file in common with `run`."""
    top = tmp_path / "other" / "checkpoint"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "other.bin").write_bytes(random.Random(8).randbytes(PART_BYTES + 1))
    (top / "config.json").write_text("{}")
    (run / "config.json").write_text("{}")
    return top


def target_of(kind: str, target: Target, tmp_path: Path) -> str:
    return target.uri if kind == "s3" else str(tmp_path / "target")


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_uploads_at_the_same_time_merge(
    kind: str, run: Path, target: Target, tmp_path: Path
) -> None:
    """Each one begins while the other has a large file under way, and both bring one file."""
    other, uri = other_half(run, tmp_path), target_of(kind, target, tmp_path)
    both = files_in(run) | files_in(other)
    halfway, done = threading.Event(), threading.Event()

    def tell(sent: int, total: int) -> None:
        halfway.set()
        assert done.wait(60)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ckptfs.upload, run, uri, merge=True, progress=tell)
        assert halfway.wait(60)
        ckptfs.upload(other, uri, merge=True)
        done.set()
        first.result()
    found = target.objects() if kind == "s3" else files_in(tmp_path / "target")
    assert found == both
    with pytest.raises(ckptfs.TargetExists, match="that the directory lacks"):
        ckptfs.upload(other, uri)


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_merge_refuses_other_content_of_the_same_name(
    kind: str, run: Path, target: Target, tmp_path: Path
) -> None:
    other, uri = other_half(run, tmp_path), target_of(kind, target, tmp_path)
    ckptfs.upload(run, uri, merge=True)
    (other / "config.json").write_text("[]")
    with pytest.raises(ckptfs.TargetExists, match=r"other content in 1 file \(config\.json\)"):
        ckptfs.upload(other, uri, merge=True)
    ckptfs.upload(other, uri, merge=True, overwrite=True)
    found = target.objects() if kind == "s3" else files_in(tmp_path / "target")
    assert found == files_in(run) | files_in(other)


def replaced_before_verification(monkeypatch: pytest.MonkeyPatch, replace: Any) -> None:
    def verify(upload: Any, verify: Any = _Run._verify) -> None:
        replace()
        verify(upload)

    monkeypatch.setattr(_Run, "_verify", verify)


@pytest.mark.parametrize("content", [b"same", b"else", b"longer"])
def test_file_that_another_program_writes_meanwhile_is_compared(
    content: bytes, run: Path, target: Target, moto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "config.json").write_bytes(b"same")
    replaced_before_verification(
        monkeypatch, lambda: moto.put(f"{target.path}/config.json", content)
    )
    if content == b"same":
        ckptfs.upload(run, target.uri, merge=True)
        assert target.objects() == files_in(run)
        return
    with pytest.raises(ckptfs.TargetExists, match=r"other content in 1 file \(config\.json\)"):
        ckptfs.upload(run, target.uri, merge=True)


def test_object_with_another_kind_of_etag_is_compared_in_a_merge(
    run: Path, target: Target, moto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (run / "large.bin").read_bytes()
    replaced_before_verification(monkeypatch, lambda: moto.put(f"{target.path}/large.bin", content))
    ckptfs.upload(run, target.uri, merge=True)
    assert target.objects() == files_in(run)


def test_merge_removes_parts_of_its_own_files_only(run: Path, target: Target) -> None:
    client = target.store.client
    for name in ("large.bin", "of another rank.bin"):
        client.create_multipart_upload(Bucket=BUCKET, Key=f"{target.path}/{name}")
    ckptfs.upload(run, target.uri, merge=True)
    (left,) = client.list_multipart_uploads(Bucket=BUCKET, Prefix=target.path)["Uploads"]
    assert left["Key"] == f"{target.path}/of another rank.bin"
    client.abort_multipart_upload(Bucket=BUCKET, Key=left["Key"], UploadId=left["UploadId"])


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_merged_metadata_is_that_of_the_last_upload_and_never_missing(
    kind: str, run: Path, target: Target, tmp_path: Path
) -> None:
    other, uri = other_half(run, tmp_path), target_of(kind, target, tmp_path)

    def metadata() -> Any:
        found = target.objects() if kind == "s3" else files_in(tmp_path / "target")
        return json.loads(found[".metadata.json"])

    seen: list[Any] = []
    ckptfs.upload(run, uri, merge=True, metadata={"rank": 0})
    ckptfs.upload(
        other, uri, merge=True, metadata={"rank": 1}, progress=lambda *_: seen.append(metadata())
    )
    assert {"rank": 0} in seen
    assert all(each in ({"rank": 0}, {"rank": 1}) for each in seen)
    assert metadata() == {"rank": 1}
    (other / "more").touch()
    ckptfs.upload(other, uri, merge=True)
    assert metadata() == {"rank": 1}


# -- faults of the network and of the store


def test_upload_that_fails_removes_its_parts(run: Path, target: Target) -> None:
    target.break_down("denied", "partNumber=3")
    with pytest.raises(ckptfs.AccessDenied, match=r"large\.bin in s3://.*denied"):
        ckptfs.upload(run, target.uri, metadata={})
    assert target.unfinished() == []
    assert target.objects().keys() <= files_in(run).keys() - {"large.bin"}


def test_store_that_dies_between_parts_is_an_error_and_the_next_upload_cleans_up(
    run: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = source.SourceFile.read_into

    def read_and_break(self: source.SourceFile, offset: int, buffer: memoryview) -> None:
        read(self, offset, buffer)
        if offset == PART_BYTES:
            target.break_down("refused")

    with monkeypatch.context() as patched:
        patched.setattr(source.SourceFile, "read_into", read_and_break)
        with pytest.raises(ckptfs.StoreUnavailable, match="cannot reach the store"):
            ckptfs.upload(run, target.uri, include=["large.bin"])
    target.heal()
    assert target.objects() == {}
    assert target.unfinished() == ["large.bin"]
    ckptfs.upload(run, target.uri)
    assert target.unfinished() == []
    assert target.objects() == files_in(run)


@pytest.mark.parametrize("fault", ["unavailable", "reset", "cut", "slow"])
def test_faults_that_pass_do_not_fail_an_upload(fault: str, run: Path, target: Target) -> None:
    for number in range(20):
        (run / f"small-{number}").write_text(f"{number}")
    # One request in ten meets the fault, and each is tried five times.
    target.break_down(fault, share=0.1, delay_s=0.05, operation="put")
    ckptfs.upload(run, target.uri, metadata={"step": 1})
    target.heal()
    found = target.objects()
    assert json.loads(found.pop(".metadata.json")) == {"step": 1}
    assert found == files_in(run)


def test_store_with_other_bytes_is_an_error_that_names_the_file(run: Path, target: Target) -> None:
    target.break_down("another version", "/a/we")
    with pytest.raises(
        ckptfs.StoreError, match=r"we ird.*the store has other bytes than were sent"
    ):
        ckptfs.upload(run, target.uri)


def test_object_that_another_program_replaces_meanwhile_is_an_error(
    run: Path, target: Target
) -> None:
    size = (run / "a" / "we ird+%41é?&.bin").stat().st_size

    def tell(done: int, total: int) -> None:
        if done == total:
            target.store.put(f"{target.path}/a/we ird+%41é?&.bin", bytes(size))

    with pytest.raises(ckptfs.StoreError, match=r"we ird.*other bytes than were sent"):
        ckptfs.upload(run, target.uri, include=["a/we*"], progress=tell)


def test_missing_bucket_is_an_error(run: Path, moto: Any) -> None:
    with pytest.raises(ckptfs.CheckpointNotFound, match="there is no such bucket"):
        ckptfs.upload(run, moto.address("x").replace(f"@{BUCKET}/", "@missing-bucket/"))


# -- an end by a signal

PROGRAM = """
import sys, ckptfs
from ckptfs._store.s3 import uploads
uploads.PART_BYTES = 5 << 20
ckptfs.upload(sys.argv[1], sys.argv[2], cache=False)
"""


def stuck(run: Path, target: Target, *command: str) -> "subprocess.Popen[str]":
    """A program that uploads, and waits for the answer to a part."""
    target.break_down("dark", "partNumber=2")
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: any("partNumber=3" in each for each in target.sent()))
    return process


def test_killed_upload_leaves_nothing_that_the_next_one_does_not_end(
    run: Path, target: Target
) -> None:
    client, foreign = target.store.client, f"{target.path}/foreign"
    upload_id = client.create_multipart_upload(Bucket=BUCKET, Key=foreign)["UploadId"]
    with stuck(run, target, "-c", PROGRAM, str(run), target.uri) as process:
        process.kill()
    assert "large.bin" not in target.objects()
    assert target.unfinished() == ["foreign", "large.bin"]
    target.heal()
    ckptfs.upload(run, target.uri)
    assert target.objects() == files_in(run)
    assert target.unfinished() == ["foreign"]
    client.abort_multipart_upload(Bucket=BUCKET, Key=foreign, UploadId=upload_id)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_interrupted_command_removes_its_parts(
    number: int, status: int, run: Path, target: Target
) -> None:
    (run / "large.bin").write_bytes(bytes(3 * 8 * MIB))  # the command has the usual parts
    with stuck(run, target, COMMAND, "upload", "--no-cache", str(run), target.uri) as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in said
    assert target.unfinished() == []
    assert "large.bin" not in target.objects()


# -- the local directory


def refused(run: Path, target: Target, error: type[Exception], match: str, **options: Any) -> None:
    """An upload that is refused before anything is written."""
    with pytest.raises(error, match=match) as caught:
        ckptfs.upload(run, target.uri, **options)
    assert "\n" not in str(caught.value)
    assert target.sent() == []
    assert target.objects() == {}


def test_directory_that_is_missing_empty_or_a_file_is_refused(
    tmp_path: Path, target: Target
) -> None:
    refused(tmp_path / "missing", target, ckptfs.CheckpointNotFound, "does not exist")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", target, ckptfs.CheckpointIsFile, "is a file, not a directory")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    refused(tmp_path / "empty", target, ckptfs.CannotUpload, "has no files")
    refused(tmp_path, target, ckptfs.CannotUpload, "no file that include matches", include=["*.x"])


def test_links_out_of_the_directory_and_special_files_are_refused(
    run: Path, target: Target, tmp_path: Path
) -> None:
    (tmp_path / "outside").write_text("outside")
    for name, to, why in (
        ("out", tmp_path / "outside", "leads out of the directory"),
        ("up", "..", "leads out of the directory"),
        ("nowhere", "missing", "leads nowhere"),
        ("loop", "../a", "leads to a directory above it"),
    ):
        link = run / "a" / name
        link.symlink_to(to)
        refused(run, target, ckptfs.CannotUpload, f"a/{name}.*{why}")
        link.unlink()
    os.mkfifo(run / "pipe")
    refused(run, target, ckptfs.CannotUpload, r"pipe: it is neither a file nor a directory")
    ckptfs.upload(run, target.uri, include=["*.bin", "*/empty"])
    assert target.objects() == files_in(run)


def test_links_within_the_directory_are_followed(run: Path, target: Target) -> None:
    (run / "link").symlink_to("a/b/empty")
    (run / "folder").symlink_to("a")
    ckptfs.upload(run, target.uri)
    expected = files_in(run) | {"folder/b/empty": b""}
    expected["folder/we ird+%41é?&.bin"] = expected["a/we ird+%41é?&.bin"]
    assert target.objects() == expected


def test_names_that_s3_cannot_hold_are_refused(run: Path, target: Target) -> None:
    folder = run.joinpath(*["d" * 200] * 5)
    folder.mkdir(parents=True)
    (folder / "deep").touch()
    refused(run, target, ckptfs.CannotUpload, "longer than 1024 bytes; remove it, or leave it out")
    (folder / "deep").unlink()
    (run / "new\nline").touch()
    refused(run, target, ckptfs.CannotUpload, r"new\\nline: the name holds a NUL or newline")
    (run / "new\nline").unlink()
    bad = os.fsencode(run) + b"/\xff"
    with open(bad, "wb"):
        refused(run, target, ckptfs.CannotUpload, "not valid UTF-8")


def test_file_that_changes_while_it_is_read_is_an_error_that_names_it(
    run: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, large = source.SourceFile.read_into, run / "large.bin"

    def read_and_touch(self: source.SourceFile, offset: int, buffer: memoryview) -> None:
        read(self, offset, buffer)
        if offset == PART_BYTES:
            os.utime(large, (1, 1))

    monkeypatch.setattr(source.SourceFile, "read_into", read_and_touch)
    with pytest.raises(ckptfs.CannotUpload, match=r"large\.bin: the file changed while it was"):
        ckptfs.upload(run, target.uri)
    assert "large.bin" not in target.objects()


def test_disk_error_is_an_error_that_names_the_file(
    run: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def fail(file: int, buffers: Any, offset: int) -> int:
        if offset == PART_BYTES:
            raise OSError(5, "Input/output error")
        return read(file, buffers, offset)

    monkeypatch.setattr(source.os, "preadv", fail)
    with pytest.raises(
        ckptfs.CannotUpload, match=r"large\.bin: Input/output error; check the disk"
    ):
        ckptfs.upload(run, target.uri)
    assert "large.bin" not in target.objects()


def test_metadata_that_is_no_json_fails_before_anything_is_sent(run: Path, target: Target) -> None:
    refused(run, target, TypeError, "not JSON serializable", metadata={"x": object()})
    (run / ".metadata.json").write_text("[1]")
    refused(run, target, ckptfs.MetadataNotDict, "holds a list", metadata={"x": 1})
    (run / ".metadata.json").write_text("nonsense")
    refused(run, target, ckptfs.MetadataError, "is not JSON", metadata={"x": 1})


def test_wrong_arguments(run: Path, target: Target) -> None:
    refused(run, target, TypeError, "must be a list of globs", include="*.bin")
    with pytest.raises(TypeError, match="leave filesystem out"):
        ckptfs.upload(run, ckptfs.Checkpoint(target.uri), filesystem=object())  # type: ignore[arg-type]


# -- local targets


def test_local_target_shows_complete_files_only(run: Path, tmp_path: Path) -> None:
    seen: list[set[str]] = []
    copy = tmp_path / "deep" / "copy"
    ckptfs.upload(run, copy, progress=lambda *_: seen.append(set(files_in(copy))))
    assert files_in(copy) == files_in(run)
    for names in seen:
        for name in names & files_in(run).keys():
            assert (copy / name).stat().st_size == (run / name).stat().st_size
    assert result(run, str(copy)) == (3, 3)
    (copy / "large.bin").write_bytes(bytes(2 * PART_BYTES + 5))
    with pytest.raises(ckptfs.TargetExists, match=r"large\.bin"):
        ckptfs.upload(run, copy)


def test_local_target_that_a_killed_upload_left_is_completed(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    code = "import os, sys, ckptfs\nos.fsync = lambda _: os._exit(9)\nckptfs.upload(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, str(run), str(copy)], check=False)
    assert done.returncode == 9
    left = [path for path in copy.rglob("*") if path.name.endswith(".ckptfs-upload")]
    assert left
    assert files_in(copy).keys() == {str(path.relative_to(copy)) for path in left}
    ckptfs.upload(run, copy)
    assert files_in(copy) == files_in(run)


def test_target_in_the_directory_itself_is_refused(run: Path) -> None:
    for path in (run, run / "a" / "copy"):
        with pytest.raises(ckptfs.LocationError, match="is in the directory to upload"):
            ckptfs.upload(run, path)


# -- the command


def test_upload_command_prints_what_it_did(node: Node, run: Path, target: Target) -> None:
    arguments = "--json", str(run), target.uri
    told = json.loads(node.here("upload", "--include", "*.bin", *arguments).stdout)
    size = sum(map(len, files_in(run).values()))
    assert told.pop("seconds") > 0
    assert target.store.secrets[0] not in told["uri"]
    assert told.pop("uri").startswith(f"s3://{BUCKET}/{target.path}")
    expected = {"files": 2, "bytes": size, "skipped_files": 0, "skipped_bytes": 0}
    assert told == expected | {"cached_bytes": 0, "cache_error": ""}
    told = json.loads(node.here("upload", *arguments, "--limit-rate", "1G").stdout)
    assert (told["files"], told["skipped_files"], told["skipped_bytes"]) == (3, 2, size)
    merged = json.loads(
        node.here("upload", "--merge", *arguments[:1], str(run / "a"), target.uri).stdout
    )
    assert (merged["files"], merged["skipped_files"]) == (2, 0)
    (run / "large.bin").write_bytes(b"")
    done = node.here("upload", str(run), target.uri, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("ckptfs: error: s3://")
    assert "--overwrite" in done.stderr
    done = node.here("upload", "--overwrite", str(run), target.uri)
    assert done.stdout.startswith("3 files, 1000 B: 0 B uploaded in ")
    assert target.objects() == files_in(run) | files_in(run / "a")
    assert node.here("upload", str(run), check=False).returncode == 2
    done = node.here("upload", "--limit-rate", "nonsense", str(run), target.uri, check=False)
    assert (done.returncode, "is not a rate" in done.stderr) == (1, True)


def test_upload_command_prints_warnings_as_its_own(node: Node, run: Path, target: Target) -> None:
    target.break_down("denied", "uploads=")
    done = node.here("upload", str(run), target.uri, "--include", "a/*")
    assert done.stderr.startswith("ckptfs: warning: cannot look for parts that killed uploads have")
    assert done.stderr.count("\n") == 1


def test_upload_to_a_named_store(node: Node, run: Path, target: Target) -> None:
    with (node.folder / "ckptfs.toml").open("a") as file:
        file.write(target.store.table("main", ""))
    checkpoint = ckptfs.upload(run, f"main:{target.path}")
    assert repr(checkpoint).endswith(f"ckptfs-store:main, path={target.path})")
    assert target.objects() == files_in(run)


@pytest.mark.parametrize("is_local", [False, True])
def test_limited_rate_counts_each_byte_once(
    is_local: bool, run: Path, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(Pace, "delay_s", lambda _, count: counts.append(count) or 0.0)
    assert result(run, str(tmp_path / "copy") if is_local else target.uri, rate=10**9)[1] == 0
    assert sum(counts) >= sum(map(len, files_in(run).values()))
    overhead = 0 if is_local else 1000  # the list of parts of the large file
    assert sum(counts) <= sum(map(len, files_in(run).values())) + overhead
    assert max(counts) <= MIB


def test_uploaded_checkpoint_is_read_back(
    run: Path, bucket: Path, uri_of: UriOf, s3: S3Server, tmp_path: Path
) -> None:
    """rclone's ETags say nothing of the content, so a second upload reads all objects again, or
    sends all files again."""
    checkpoint = ckptfs.upload(run, uri_of(bucket / "run" / "checkpoint"))
    copy = checkpoint.to_directory(tmp_path / "copy")
    assert files_in(Path(copy)) == files_in(run)
    s3.reset_traffic()
    assert result(run, uri_of(bucket / "run" / "checkpoint")) == (3, 3)
    assert result(run, uri_of(bucket / "run" / "checkpoint"), overwrite=True) == (3, 0)
    content = (run / "large.bin").read_bytes()
    (run / "large.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ckptfs.TargetExists, match=r"other content in 1 file \(large\.bin\)"):
        ckptfs.upload(run, uri_of(bucket / "run" / "checkpoint"))
    assert (bucket / "run" / "checkpoint" / "large.bin").read_bytes() == content


def test_directory_that_changes_after_the_files_were_sent_is_an_error(
    run: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change, why in (
        (lambda: (run / "new.bin").touch(), r"new\.bin: the file is new since the upload began"),
        (lambda: (run / "large.bin").write_bytes(b"other"), r"large\.bin: the file changed"),
    ):
        changes = iter([change])

        def verify(upload: Any, changes: Any = changes, verify: Any = _Run._verify) -> None:
            verify(upload)
            for each in changes:
                each()

        with monkeypatch.context() as patched:
            patched.setattr(_Run, "_verify", verify)
            with pytest.raises(ckptfs.CannotUpload, match=why):
                ckptfs.upload(run, target.uri, metadata={"step": 1})
        assert ".metadata.json" not in target.objects()
        (run / "new.bin").unlink(missing_ok=True)


def test_object_of_another_program_with_another_kind_of_etag_is_an_error(
    run: Path, target: Target, moto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain PUT has no ETag of parts."""
    size = (run / "large.bin").stat().st_size

    def verify(upload: Any, verify: Any = _Run._verify) -> None:
        moto.put(f"{target.path}/large.bin", bytes(size))
        verify(upload)

    monkeypatch.setattr(_Run, "_verify", verify)
    with pytest.raises(ckptfs.StoreError, match="another program has written it"):
        ckptfs.upload(run, target.uri, metadata={"step": 1})
    assert ".metadata.json" not in target.objects()


@pytest.mark.parametrize("size", [4, (8 << 20) + 1], ids=["put", "multipart"])
@pytest.mark.parametrize("is_same", [True, False])
def test_of_two_merges_at_one_moment_the_first_stays(
    is_same: bool,
    size: int,
    run: Path,
    target: Target,
    moto: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another program writes the file between the listing and the end of the upload."""
    (run / "file.bin").write_bytes(bytes(size))
    other = bytes(size) if is_same else b"\x01" * size
    prepare = S3Uploads.prepare

    def write_first(uploads: Any, *paths: Any, **options: Any) -> None:
        prepare(uploads, *paths, **options)
        moto.put(f"{target.path}/file.bin", other)

    monkeypatch.setattr(S3Uploads, "prepare", write_first)
    if is_same:
        ckptfs.upload(run, target.uri, merge=True)
    else:
        with pytest.raises(ckptfs.TargetExists, match=r"other content in 1 file \(file\.bin\)"):
            ckptfs.upload(run, target.uri, merge=True)
    assert target.objects()["file.bin"] == other
    assert "Uploads" not in target.store.client.list_multipart_uploads(Bucket=BUCKET)
