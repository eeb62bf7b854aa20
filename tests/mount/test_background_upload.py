"""Uploads in the background: whole and verified at the store, or failed with their files kept."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import LARGE_BYTES, Node, parent_of, wait_until
from mount.test_named_stores import configure, key_file, store_toml
from support.s3server import S3Server

import ckptfs
from ckptfs import BackgroundUpload, Checkpoint
from ckptfs._client import client
from ckptfs._model.protocol.requests import Stop
from ckptfs._upload import Options, begin_upload
from ckptfs.errors import Busy, LimitExceeded, NoUpload, TargetExists

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
MIB = 1 << 20


@pytest.fixture
def run(run: Path) -> Path:
    """The directory to upload has metadata, too."""
    (run / ".metadata.json").write_text('{"step": 1}')
    return run


@pytest.fixture
def place(bucket: Path) -> Path:
    return bucket / "run" / "checkpoint"


def contents(top: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()
    }


def spooled(node: Node) -> list[str]:
    """The files in the spool, without the records of uploads that are done."""
    top = node.cache_dir / "uploads"
    # Unlike rglob, os.walk bears with directories that are removed meanwhile.
    found = [os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names]
    return sorted(os.path.relpath(path, top) for path in found)


def test_a_directory_may_change_and_go_when_the_call_returns(
    node: Node, run: Path, place: Path, uri_of: UriOf
) -> None:
    before = contents(run)
    upload = ckptfs.upload(run, uri_of(place), wait=False)
    (run / "large.bin").write_bytes(b"other")
    shutil.rmtree(run)
    checkpoint = upload.wait(60)
    assert upload.done()
    assert contents(place) == before
    assert upload.progress() == (sum(map(len, before.values())),) * 2
    assert checkpoint.get_metadata() == {"step": 1}
    wait_until(lambda: spooled(node) == [f"{upload.id}/upload.json"])
    with checkpoint.as_directory() as path:
        assert contents(Path(path)) == before
        assert node.status()["fetched_bytes"] == len(before[".metadata.json"])


def slowly(run: Path, uri: str, rate: int = 8 * MIB) -> BackgroundUpload:
    """Begin an upload that takes some seconds."""
    return begin_upload(run, Checkpoint(uri), Options(rate=rate), None)


def begun(upload: BackgroundUpload) -> bool:
    return upload.progress()[0] > 0


def hold(node: Node) -> int:
    """Stop the process that sends, as soon as there is one, and return its pid. The upload takes
    some seconds, or the process could end before it is found."""
    found: list[int] = []

    def is_there() -> bool:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                pid = int(path.parent.name)
                if b"ckptfs._upload_process" in path.read_bytes() and parent_of(pid) == daemon:
                    found.append(pid)
        return bool(found)

    daemon = serving(node)
    wait_until(is_there)
    os.kill(found[0], signal.SIGSTOP)
    return found[0]


def serving(node: Node) -> int:
    return node.status()["pid"]


def listed(node: Node) -> dict[str, Any]:
    """The lines of ``ckptfs uploads``, by id."""
    return {each["id"]: each for each in json.loads(node.here("uploads", "--json").stdout)}


def test_an_upload_goes_on_after_the_program_and_the_daemon_were_killed(
    node: Node, run: Path, place: Path, uri_of: UriOf
) -> None:
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    code = (
        "import sys, os, signal, ckptfs\n"
        "from ckptfs import Checkpoint\n"
        "from ckptfs._upload import Options, begin_upload\n"
        "upload = begin_upload(sys.argv[1], Checkpoint(sys.argv[2]), Options(rate=8 << 20), None)\n"
        "print(upload.id, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    before = contents(run)
    with node.python(code, str(run), uri_of(place)) as program:
        assert program.stdout is not None
        upload = program.stdout.readline().strip()
    shutil.rmtree(run)
    wait_until(lambda: listed(node)[upload]["sent"] > 0)
    first = serving(node)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: serving(node) != first)
    assert listed(node)[upload]["state"] in ("waiting", "running", "done")
    node.here("uploads", "--wait")
    assert listed(node)[upload]["state"] == "done"
    assert contents(place) == before
    wait_until(lambda: spooled(node) == [f"{upload}/upload.json"])


@pytest.mark.parametrize("moment", ["staged", "accepted", "sent"])
def test_a_daemon_that_is_killed_at_the_edges_loses_nothing(
    moment: str,
    node: Node,
    run: Path,
    place: Path,
    uri_of: UriOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    before = contents(run)
    killed: list[int] = []

    def kill(*_: object) -> None:
        if not killed:
            killed.append(serving(node))
            os.kill(killed[0], signal.SIGKILL)

    client.connect_or_start(client.load_config()).close()
    told = kill if moment == "staged" else None
    upload = begin_upload(run, Checkpoint(uri_of(place)), Options(), told)
    if moment == "sent":
        wait_until(lambda: (place / ".metadata.json").exists())
    kill()
    upload.wait(60)
    assert contents(place) == before
    wait_until(lambda: serving(node) != killed[0])
    wait_until(lambda: spooled(node) == [f"{upload.id}/upload.json"])


def test_secrets_are_in_memory_only_and_an_upload_without_them_fails_until_a_retry(
    node: Node, run: Path, place: Path, uri_of: UriOf, s3: S3Server
) -> None:
    node.expected_in_log += ["its credentials were in the memory"]
    before = contents(run)
    upload = slowly(run, uri_of(place))
    hold(node)
    for path in node.cache_dir.rglob("*"):
        assert not path.is_file() or s3.secret_key.encode() not in path.read_bytes(), path
    with client.connect() as connection, pytest.raises(Busy, match="1 upload is not at the store"):
        connection.ask_once(Stop())
    node.end()
    client.connect_or_start(client.load_config()).close()
    with pytest.raises(ckptfs.AccessDenied, match="ckptfs uploads --retry") as error:
        upload.wait(60)
    assert upload.done()
    assert upload.id in str(error.value)
    status = node.status()["uploads"]
    assert [(each["id"], each["state"]) for each in status] == [(upload.id, "failed")]
    assert "its credentials were in the memory" in node.here("status").stdout
    assert "1 upload failed" in node.here("doctor", check=False).stdout
    assert f"{upload.id}/files/large.bin" in spooled(node)
    node.here("uploads", "--retry", upload.id, "--target", uri_of(place))
    upload.wait(60)
    assert contents(place) == before


def test_a_cancelled_upload_leaves_nothing(
    node: Node, run: Path, place: Path, uri_of: UriOf
) -> None:
    (run / "large.bin").write_bytes(bytes(2 * LARGE_BYTES))
    upload = slowly(run, uri_of(place), 4 * MIB)
    wait_until(lambda: begun(upload))
    upload.cancel()
    with pytest.raises(NoUpload, match=upload.id):
        upload.wait()
    upload.cancel()
    assert spooled(node) == []
    assert not (place / "large.bin").exists()
    assert not (place / ".metadata.json").exists()
    assert listed(node) == {}


def test_a_failed_upload_keeps_its_files_until_it_is_dropped(
    node: Node, run: Path, place: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    node.expected_in_log.append("has other content")
    node.expected_in_log.append("other content in 1 file")
    place.mkdir(parents=True)
    (place / "large.bin").write_bytes(b"other")
    upload = ckptfs.upload(run, uri_of(place), wait=False)
    with pytest.raises(TargetExists, match=r"large\.bin"):
        upload.wait(60)
    assert (place / "large.bin").read_bytes() == b"other"
    assert node.cli("uploads", "--wait", check=False).returncode == 1
    assert f"{upload.id}/files/large.bin" in spooled(node)
    with ckptfs.Checkpoint(uri_of(place)).as_directory() as path:
        node.here("report", path, "-o", str(tmp_path / "page.html"))
    assert f"The upload {upload.id} to this place is failed" in (tmp_path / "page.html").read_text()
    node.here("uploads", "--drop", upload.id)
    assert spooled(node) == []


def test_over_the_limit_a_caller_waits_or_is_refused(
    node: Node, run: Path, bucket: Path, uri_of: UriOf
) -> None:
    node.configure(upload_bytes_max=30 * MIB)
    first = slowly(run, uri_of(bucket / "first"))
    second = ckptfs.upload(run, uri_of(bucket / "second"), wait=False)
    assert first.done()  # or there would be no room for the second one
    first.wait(60)
    second.wait(60)
    assert contents(bucket / "second") == contents(run)
    (run / "more.bin").write_bytes(bytes(12 * MIB))
    with pytest.raises(LimitExceeded, match="upload_bytes_max allows"):
        ckptfs.upload(run, uri_of(bucket / "third"), wait=False)
    wait_until(lambda: len(spooled(node)) == 2)  # the records


def test_include_and_metadata_count_when_the_files_are_taken_over(
    node: Node, run: Path, place: Path, uri_of: UriOf
) -> None:
    place.mkdir(parents=True)
    (place / "large.bin").write_bytes(b"of another process that saves its part")
    options = {"include": ["a/*", ".metadata.json"], "metadata": {"loss": 0.5}, "wait": False}
    upload = ckptfs.upload(run, uri_of(place), **options)
    upload.wait(60)
    found = contents(place)
    assert json.loads(found.pop(".metadata.json")) == {"step": 1, "loss": 0.5}
    assert found.pop("large.bin") == b"of another process that saves its part"
    assert found == {"a/small.bin": b"small", "a/empty": b""}


def test_the_command_begins_an_upload_and_prints_its_id(
    node: Node, run: Path, place: Path, uri_of: UriOf
) -> None:
    upload = node.here("upload", "--background", str(run), uri_of(place)).stdout.strip()
    node.here("uploads", "--wait")
    assert listed(node)[upload]["state"] == "done"
    assert upload in node.here("uploads").stdout
    assert contents(place) == contents(run)
    assert json.loads(node.here("top", "--json", "--interval", "0.2").stdout)["uploads"] == {
        "staging": 0,
        "waiting": 0,
        "running": 0,
        "failed": 0,
    }


def test_the_daemon_takes_over_files_of_its_own_mount(
    node: Node, run: Path, bucket: Path, place: Path, uri_of: UriOf
) -> None:
    shutil.copytree(run, bucket / "source")
    with Checkpoint(uri_of(bucket / "source")).as_directory() as path:  # nobody has closed a file
        ckptfs.upload(path, uri_of(place), wait=False).wait(60)
    assert contents(place) == contents(run)


def test_pending_shows_the_files_until_the_store_has_them(
    node: Node, run: Path, place: Path, uri_of: UriOf
) -> None:
    before = contents(run)
    checkpoint = Checkpoint(uri_of(place))
    upload = slowly(run, uri_of(place))
    sender = hold(node)
    with checkpoint.as_directory(pending=True) as path:
        os.kill(sender, signal.SIGCONT)
        upload.wait(60)
        assert spooled(node) != [f"{upload.id}/upload.json"]
        assert contents(Path(path)) == before
        with pytest.raises(OSError, match="Read-only"):
            os.truncate(Path(path, "large.bin"), 0)
    wait_until(lambda: spooled(node) == [f"{upload.id}/upload.json"])
    with checkpoint.as_directory(pending=True) as path:
        assert path.startswith(str(node.mount / "checkpoint"))
        assert contents(Path(path)) == before
    shown = Path(node.here("attach", "--pending", uri_of(place)).stdout.strip())
    assert contents(shown) == before
    node.here("detach", str(shown))


def test_a_local_directory_is_a_target_and_not_one_in_the_directory(
    node: Node, run: Path, tmp_path: Path
) -> None:
    target = tmp_path / "disk" / "checkpoint"
    assert ckptfs.upload(run, target, wait=False).wait(60).path == str(target)
    assert contents(target) == contents(run)
    with pytest.raises(ckptfs.LocationError, match="in the directory to upload"):
        ckptfs.upload(run, run / "a", wait=False)


def test_a_filesystem_that_the_daemon_cannot_get_is_an_error_that_says_what_to_do(
    node: Node, run: Path
) -> None:
    memory = fsspec.filesystem("memory")
    with pytest.raises(ckptfs.LocationError, match="upload with wait=True"):
        ckptfs.upload(run, "bucket/checkpoint", filesystem=memory, wait=False)


def test_an_upload_to_a_named_store_goes_on_after_daemon_and_keeper_have_ended(
    node: Node, run: Path, place: Path, s3: S3Server
) -> None:
    credentials = f'{{ file = "{key_file(node, s3)}" }}'
    bucket = place.parts[len(s3.root.parts)]
    configure(node, store_toml(f"s3://{bucket}/run", s3.endpoint, credentials))
    upload = slowly(run, "prod:checkpoint")
    hold(node)
    node.end()
    assert upload.wait(60).path == "checkpoint"
    assert contents(place) == contents(run)
    assert listed(node)[upload.id]["uri"] == "prod:checkpoint"
    assert listed(node)[upload.id]["cached"] == LARGE_BYTES + 5
