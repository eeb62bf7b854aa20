"""``ckptfs cache``: with a daemon and without, beside readers, and for several users."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND_TIMEOUT_S, Node, wait_until
from mount.test_cache_on_disk import MIB, object_folders, read_all, requests_of_reads, write_files
from mount.test_users import ALICE, BOB, as_user, let_others_in
from support.s3server import S3Server

import ckptfs
import ckptfs.checkpoint  # here, because other users may not read where it lies
from ckptfs._client import client
from ckptfs._model.protocol.replies import CacheResults
from ckptfs._model.protocol.requests import ClearCache, CollectCache, ListCache, VerifyCache

pytestmark = [
    pytest.mark.mount,
    # Python 3.12 warns because pyarrow has threads; they hold nothing that the children need.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

UriOf = Callable[[Path], str]
SIZES = {"model": 3 * MIB + 7, "config": 10}


def cache(node: Node, *arguments: str, status: int = 0) -> Any:
    """``ckptfs cache … --json``; what it prints."""
    done = node.here("cache", *arguments, "--json", check=False)
    assert done.returncode == status, done
    return json.loads(done.stdout)


def flip(file: Path, at: int) -> None:
    """Change a bit of a file, as its disk might, and leave its times as they are."""
    times = file.stat()
    with file.open("r+b") as data:
        data.seek(at)
        byte = data.read(1)[0]
        data.seek(at)
        data.write(bytes([byte ^ 16]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def runs(bucket: Path) -> dict[str, Path]:
    """Two checkpoints."""
    folders = {name: bucket / "run" / name for name in ("step_1", "step_2")}
    for folder in folders.values():
        folder.mkdir(parents=True)
        write_files(folder, SIZES)
    return folders


@pytest.fixture(params=["daemon", "alone"])
def cached(
    request: pytest.FixtureRequest, node: Node, runs: dict[str, Path], uri_of: UriOf
) -> dict[str, str]:
    """The URIs of two cached checkpoints, step_1 used before step_2; no process has them attached.

    The commands run with a daemon and without one.
    """
    uris = {name: uri_of(folder) for name, folder in runs.items()}
    for uri in uris.values():
        read_all(uri)
        node.wait_quiet()
    wait_until(lambda: not node.status()["attachments"])
    if request.param == "alone":
        node.end()
    return uris


# -- what is in it


def test_checkpoints_are_listed(node: Node, cached: dict[str, str]) -> None:
    found = cache(node, "ls")
    assert [each["name"].rpartition("-")[0] for each in found] == ["step_2", "step_1"]
    for each in found:
        uri = cached[each["name"].rpartition("-")[0]]
        assert uri.partition("?")[0].endswith(each["uri"].partition("?")[0].removeprefix("s3://"))
        assert "@" not in each["uri"]
        assert each["files"] == 2
        assert each["cached"] == each["size"] == sum(SIZES.values())
        assert each["bytes"] > each["cached"]
        assert abs(each["used"] - time.time()) < 600
        assert (each["attached"], each["pinned"], each["open_files"]) == (False, False, 0)
        assert each["uid"] == 0
    said = node.here("cache", "ls").stdout.splitlines()
    assert said[0].split() == [
        "ON",
        "DISK",
        "CACHED",
        "FILES",
        "LAST",
        "USE",
        "STATE",
        "NAME",
        "URI",
    ]
    assert "100%" in said[1]
    assert said[-1].endswith(" in 4 files")


def test_files_of_one_are_listed(node: Node, cached: dict[str, str]) -> None:
    name = cache(node, "ls")[1]["name"]
    path = f"{node.mount}/{name}/model"  # it is not attached now
    for what in (cached["step_1"], name, f"{name}-65533", "step_1", path):
        found = cache(node, "ls", what)
        assert {each["path"]: each["cached"] for each in found} == SIZES, what
        assert all(each["uri"].endswith("step_1") or "step_1?" in each["uri"] for each in found)
    assert "model" in node.here("cache", "ls", "step_1").stdout


def test_cache_command_for_an_uncached_checkpoint_says_so(
    node: Node, cached: dict[str, str]
) -> None:
    for command in ("ls", "verify", "clear"):
        said = node.here("cache", command, "step_3", check=False)
        assert said.returncode == 1
        assert said.stderr.startswith("ckptfs: error: nothing of step_3 is in the cache")
        said = node.here("cache", command, "/usr/lib")
        assert said.stderr == "ckptfs: warning: nothing of /usr/lib is in the cache\n"
    assert cache(node, "ls", cached["step_1"].replace("step_1", "step_3")) == []
    assert cache(node, "clear", cached["step_1"].replace("step_1", "step_3"))["files"] == 0


def test_cache_clear_of_an_ambiguous_name_is_refused(
    node: Node, bucket: Path, uri_of: UriOf
) -> None:
    for folder in (bucket / "a" / "last", bucket / "b" / "last"):
        folder.mkdir(parents=True)
        write_files(folder, SIZES)
        read_all(uri_of(folder))
    said = node.here("cache", "clear", "last", check=False)
    assert (said.returncode, said.stdout) == (1, "")
    assert (
        "2 checkpoints in the cache are called last; give the URI, or one of last-" in said.stderr
    )
    assert len(cache(node, "ls")) == 2


def test_cache_ls_of_hostile_names_is_printable(node: Node, bucket: Path, uri_of: UriOf) -> None:
    folder = bucket / "run [red]\u202e" / "check\u200bpoint"
    folder.mkdir(parents=True)
    names = ["\u202ea", "[bold]b", "-c", "d\\e", "ü😀", "f" * 250]
    write_files(folder, dict.fromkeys(names, 5))
    uri = uri_of(folder)
    assert len(read_all(uri)) == len(names)
    node.wait_quiet()
    [listed] = cache(node, "ls")
    assert listed["name"].startswith("check_point-")
    assert sorted(each["path"] for each in cache(node, "ls", uri)) == sorted(names)
    for shown in (node.here("cache", "ls").stdout, node.here("cache", "ls", uri).stdout):
        assert all(character.isprintable() or character == "\n" for character in shown)
    assert "[bold]b" in shown
    assert cache(node, "clear", uri)["files"] == len(names)


def test_attached_pinned_and_open_are_said(
    node: Node, runs: dict[str, Path], uri_of: UriOf
) -> None:
    uris = {name: uri_of(folder) for name, folder in runs.items()}
    path = node.here("attach", uris["step_1"]).stdout.strip()
    Path(path, "model").read_bytes()
    with (
        ckptfs.Checkpoint(uris["step_2"]).as_directory() as second,
        open(f"{second}/model", "rb") as file,
    ):
        file.read()
        node.wait_quiet()
        found = {each["name"].rpartition("-")[0]: each for each in cache(node, "ls")}
        assert (found["step_1"]["attached"], found["step_1"]["pinned"]) == (True, True)
        assert (found["step_2"]["attached"], found["step_2"]["pinned"]) == (True, False)
        assert [found[name]["open_files"] for name in ("step_1", "step_2")] == [0, 1]
        assert [each["open"] for each in cache(node, "ls", second)] == [True]
        assert cache(node, "ls", f"{path}/model") == cache(node, "ls", "step_1")


# -- taking out


def test_cache_gc_evicts_the_oldest_first(node: Node, cached: dict[str, str], s3: S3Server) -> None:
    before = sum(each["bytes"] for each in cache(node, "ls"))
    freed = cache(node, "gc", "--free", "1M")
    assert [each["uri"].partition("?")[0].rpartition("/")[2] for each in freed["checkpoints"]] == [
        "step_1"
    ]
    assert freed["freed"] >= 1_000_000
    assert sum(each["bytes"] for each in cache(node, "ls")) == before - freed["freed"]
    freed = cache(node, "gc", "--keep", "4M")
    assert sum(each["bytes"] for each in cache(node, "ls")) <= 4_000_000
    assert len(cache(node, "ls", "step_2")) == 2
    assert cache(node, "gc", "--keep", "4M")["freed"] == 0
    assert cache(node, "gc")["freed"] == 0  # there is no limit
    s3.reset_traffic()
    assert set(read_all(cached["step_2"])) == set(SIZES)
    assert requests_of_reads(s3) == []


def test_cache_gc_older_than_evicts_unused_files(node: Node, cached: dict[str, str]) -> None:
    node.end()
    for name, folder in object_folders(node).items():
        if name == "model":
            day_ago_s = time.time() - 86400.0
            os.utime(folder, (day_ago_s, day_ago_s))
    assert cache(node, "gc", "--older-than", "25h")["files"] == 0
    assert cache(node, "gc", "--older-than", "23h")["files"] == 1
    assert cache(node, "gc", "--older-than", "0s")["files"] == 3
    assert cache(node, "ls") == []


def test_cache_gc_of_more_than_is_cached_fails_and_frees_all(
    node: Node, cached: dict[str, str]
) -> None:
    said = node.here("cache", "gc", "--free", "1T", check=False)
    assert said.returncode == 1
    assert said.stderr.startswith("ckptfs: error: only ")
    assert cache(node, "ls") == []


def test_cache_gc_without_a_goal_uses_the_configured_limit(
    node: Node, cached: dict[str, str]
) -> None:
    node.end()
    node.configure(cache_bytes_max=4 * MIB)
    assert [each["files"] <= 2 for each in cache(node, "gc")["checkpoints"]] == [True]
    assert len(cache(node, "ls", "step_2")) == 2
    assert sum(each["bytes"] for each in cache(node, "ls")) <= 4 * MIB


def test_cache_clear_removes_all(node: Node, cached: dict[str, str]) -> None:
    assert cache(node, "clear", "step_1")["files"] == 2
    assert [each["name"][:6] for each in cache(node, "ls")] == ["step_2"]
    assert node.here("cache", "clear").stdout.endswith("2 files\n")
    assert cache(node, "ls") == []
    assert not any((node.cache_dir / "objects").iterdir())
    assert not any((node.cache_dir / "trash").iterdir())
    assert set(read_all(cached["step_1"])) == set(SIZES)


def test_cache_command_leaves_files_in_use(
    node: Node, runs: dict[str, Path], uri_of: UriOf
) -> None:
    uri = uri_of(runs["step_1"])
    data = (runs["step_1"] / "model").read_bytes()
    read_all(uri)
    node.wait_quiet()
    with ckptfs.Checkpoint(uri).as_directory() as path, open(f"{path}/model", "rb") as file:
        for command in ("gc --keep 0", "clear step_1", "gc --older-than 0s"):
            done = node.here("cache", *command.split(), check=False)
            assert done.returncode == (command == "clear step_1")
            if done.returncode:
                assert "1 file is in use, with 3.0 MiB" in done.stderr
            assert [each["path"] for each in cache(node, "ls", path)] == ["model"]
        os.unlink(runs["step_1"] / "model")  # what is read now is in the cache
        assert file.read() == data


def test_readers_beside_gc_are_right(node: Node, runs: dict[str, Path], uri_of: UriOf) -> None:
    """Files are taken out between the reads, and fetched anew."""
    contents = {name: (runs["step_1"] / name).read_bytes() for name in SIZES}
    with ckptfs.Checkpoint(uri_of(runs["step_1"])).as_directory() as path:
        for _ in range(20):
            for name, data in contents.items():
                with open(f"{path}/{name}", "rb") as file:
                    half = file.read(len(data) // 2)
                    node.here("cache", "gc", "--keep", "0")
                    assert half + file.read() == data
            node.here("cache", "gc", "--keep", "0")


# -- checking


def test_a_whole_cache_is_verified(node: Node, cached: dict[str, str]) -> None:
    order = [each["name"] for each in cache(node, "ls")]
    found = cache(node, "verify")
    assert (found["files"], found["damaged"], found["freed"]) == (4, [], 0)
    assert found["checked"] == 2 * sum(SIZES.values())
    assert [each["name"] for each in cache(node, "ls")] == order  # it was no use of them
    assert cache(node, "verify", "step_1", "--limit-rate", "1G")["files"] == 2


def test_flipped_bits_are_found_and_taken_out(
    node: Node, cached: dict[str, str], runs: dict[str, Path], s3: S3Server
) -> None:
    node.expected_in_log.append("is damaged: dropped")
    folders = object_folders(node)  # of one of the two
    model, config = folders["model"], folders["config"]
    flip(model / "data", MIB + 5)
    flip(model / "data", 3 * MIB + 1)
    flip(config / "about.json", 20)
    found = cache(node, "verify", status=1)
    damaged = {each["path"]: each["blocks"] for each in found["damaged"]}
    if node.socket.exists():
        assert damaged == {"model": 2, "": 0}
    else:  # what is not whole was removed at once
        assert damaged == {"model": 2}
        assert found["removed_at_start"] == 1
    assert cache(node, "verify")["damaged"] == []
    s3.reset_traffic()
    for name, uri in cached.items():
        assert read_all(uri) == {each: (runs[name] / each).read_bytes() for each in SIZES}
    ranges = {request.range for request in requests_of_reads(s3) if request.method == "GET"}
    assert ranges == {f"bytes={MIB}-{2 * MIB - 1}", f"bytes={3 * MIB}-{3 * MIB + 6}", "bytes=0-9"}


def test_cache_verify_drops_damage_of_an_open_file(
    node: Node, runs: dict[str, Path], uri_of: UriOf
) -> None:
    """Also of a file that the kernel reads by itself."""
    node.expected_in_log.append("is damaged: dropped")
    uri = uri_of(runs["step_1"])
    contents = read_all(uri)
    node.wait_quiet()
    with ckptfs.Checkpoint(uri).as_directory() as path, open(f"{path}/model", "rb") as file:
        file.read(1)
        flip(object_folders(node)["model"] / "data", 2 * MIB)
        said = node.here("cache", "verify", check=False)
        assert said.returncode == 1
        assert "damaged: model of s3://" in said.stdout
        assert said.stderr.startswith("ckptfs: error: 1 of ")
    wait_until(lambda: not node.status()["attachments"])
    assert read_all(uri) == contents


def test_readers_wait_for_no_verify(node: Node, runs: dict[str, Path], uri_of: UriOf) -> None:
    """A verification that takes its time goes on while others read, attach and ask, and ends with
    its command."""
    uri = uri_of(runs["step_1"])
    contents = read_all(uri)
    node.wait_quiet()
    with client.connect() as connection:
        first: list[CacheResults] = []

        class Begun(Exception):
            pass

        def tell(news: CacheResults) -> None:
            first.append(news)
            if news.done:
                raise Begun

        with pytest.raises(Begun):
            connection.cache(VerifyCache(rate=1000), tell)  # some hours
        assert not first[-1].ended
        assert read_all(uri) == contents
        assert cache(node, "ls")[0]["files"] == 2
        assert node.here("cache", "clear", check=False).returncode == 0
    with contextlib.ExitStack() as stack:
        for _ in range(16):  # each has ended with its connection, or there would be no place
            connection = stack.enter_context(client.connect())
            connection.cache(ListCache(), lambda _: None)


def test_cache_command_without_a_daemon_can_be_interrupted(
    node: Node, runs: Any, uri_of: UriOf
) -> None:
    read_all(uri_of(runs["step_1"]))
    node.end()
    command = [str(Path(sys.executable).with_name("ckptfs")), "cache", "verify", "--limit-rate"]
    begun = subprocess.Popen([*command, "1k"], stderr=subprocess.PIPE)
    wait_until(lambda: _is_locked(node.cache_dir))
    time.sleep(0.5)  # most likely it reads by then; it ends as well if it does not
    begun.send_signal(signal.SIGINT)
    _, errors = begun.communicate(timeout=COMMAND_TIMEOUT_S)
    assert (begun.returncode, errors) == (130, b"ckptfs: interrupted\n")
    assert len(cache(node, "ls")) == 1


def _is_locked(directory: Path) -> bool:
    with open(directory / "lock", "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# -- without a daemon, and with one of another kind


def test_cache_command_without_a_cache_makes_no_directory(node: Node) -> None:
    assert cache(node, "ls") == []
    assert cache(node, "verify")["files"] == 0
    assert not node.cache_dir.exists()


def test_a_daemon_of_another_socket_is_not_disturbed(
    node: Node, cached: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not node.socket.exists():
        return
    monkeypatch.setenv("CKPTFS_SOCKET", str(node.folder / "other"))
    said = node.here("cache", "clear", check=False)
    monkeypatch.setenv("CKPTFS_SOCKET", str(node.socket))
    assert said.returncode == 1
    assert "is in use by another ckptfs daemon" in said.stderr
    assert len(cache(node, "ls")) == 2


def test_a_cache_of_an_older_format(node: Node, cached: dict[str, str]) -> None:
    running = node.socket.exists()
    node.end()
    for about in node.cache_dir.glob("objects/*/*/about.json"):
        about.write_text(
            '{"about":{"format":2,"key":{"store":"s","path":"p","size":1,"mtime_ns":1},"etag":"",'
            '"settled":false,"verified":""},"xxh3":"0000000000000000"}'
        )
    if running:
        node.here("mount")
    assert cache(node, "verify")["removed_at_start"] == 4
    assert cache(node, "ls") == []
    assert not any((node.cache_dir / "objects").iterdir())
    assert set(read_all(cached["step_1"])) == set(SIZES)


# -- rights


def test_users_see_and_touch_their_own(
    node: Node, runs: dict[str, Path], uri_of: UriOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.configure(allow_other=True, linger_s=0.1)
    let_others_in(node.folder)
    node.here("mount")
    uris = {name: uri_of(folder) for name, folder in runs.items()}

    def ask(request: Any) -> list[CacheResults]:
        told: list[CacheResults] = []
        with client.connect() as connection:
            connection.cache(request, told.append)
        return told

    def reads(name: str) -> Callable[[], object]:
        return lambda: read_all(uris[name])

    as_user(ALICE, reads("step_1"))
    as_user(BOB, reads("step_2"))
    read_all(uris["step_1"])  # root's, of what is in the cache
    wait_until(lambda: not node.status()["attachments"])
    found = {each["name"].rpartition("-")[0]: each for each in cache(node, "ls")}
    assert {name: each["uid"] for name, each in found.items()} == {"step_1": ALICE, "step_2": BOB}
    names = {name: each["name"] for name, each in found.items()}

    def bob_is_kept_to_his_own() -> None:
        [listed] = [each for news in ask(ListCache()) for each in news.checkpoints]
        assert listed.name == names["step_2"]
        for foreign in (names["step_1"], f"{names['step_1']}-{ALICE}"):
            for request in (
                ListCache(checkpoint=foreign),
                VerifyCache(checkpoint=foreign),
                ClearCache(checkpoint=foreign),
            ):
                last = ask(request)[-1]
                assert (last.files, last.done, last.freed, last.cached_files) == (0, 0, 0, [])
        with pytest.raises(ckptfs.LocationError, match="nothing of step_1"):
            ask(ClearCache(checkpoint="step_1"))
        assert ask(VerifyCache())[-1].files == 2
        with contextlib.ExitStack() as stack:
            for number in range(5):
                connection = stack.enter_context(client.connect())
                refusal = pytest.raises(ckptfs.LimitExceeded, match="4 cache commands are running")
                with refusal if number == 4 else contextlib.nullcontext():
                    connection.ask_once(VerifyCache(rate=1))
        assert ask(CollectCache(keep=0))[-1].files == 2
        assert ask(ClearCache())[-1].files == 0

    as_user(ALICE, reads("step_1"))
    as_user(BOB, bob_is_kept_to_his_own)
    [left] = cache(node, "ls")
    assert (left["name"], left["files"]) == (names["step_1"], 2)
    assert cache(node, "clear")["files"] == 2
