"""The start of the daemon, the life of an attachment, and the state after a process dies."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from conftest import COMMAND_TIMEOUT_S, Node, mounts, wait_until
from support.s3server import S3Server
from support.servers import Forwarder

import ckptfs
from ckptfs._client import client
from ckptfs._config.load import Flags, load_config
from ckptfs._keeper import keeper, places
from ckptfs._model.config import Config

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]

PAST_LINGER_S = 0.6
"""Several times the tests' linger: what is still attached then is held."""


def processes(node: Node, module: str) -> list[int]:
    """The node's processes that run `module`."""
    mine = f"CKPTFS_SOCKET={node.socket}".encode()
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if module.encode() in words and mine in environment:
                found.append(int(entry.name))
    return found


def keepers(node: Node) -> list[int]:
    return processes(node, "ckptfs._keeper.keeper")


def daemons(node: Node) -> list[int]:
    return processes(node, "ckptfs._daemon.app")


def has_ended(node: Node) -> bool:
    """Whether neither keeper nor daemon runs."""
    return not keepers(node) and not daemons(node)


def is_mounted(node: Node) -> bool:
    return str(node.mount) in mounts()


def attachments() -> list[dict[str, Any]]:
    """As in ``ckptfs status --json``, but asked for without another process."""
    with client.connect() as connection:
        return msgspec.to_builtins(connection.status())["attachments"]


def wait_detached() -> None:
    wait_until(lambda: not attachments())


HOLDER = """
import mmap, os, sys, ckptfs

uri, how = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
with ckptfs.Checkpoint(uri).as_directory() as path:
    if how in ("file", "mmap"):
        fd = os.open(path + "/layers/0/weights.bin", os.O_RDONLY)
    if how == "fork" and os.fork():
        os._exit(0)
    if how in ("lease", "fork"):
        print(path, flush=True)
        sys.stdin.readline()
if how == "mmap":
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
if how in ("file", "mmap"):
    print(path, flush=True)
    sys.stdin.readline()
    data = mapped[:] if how == "mmap" else os.pread(fd, 1 << 30, 0)
    print(len(data), flush=True)
"""


def hear(process: "subprocess.Popen[str]") -> str:
    """The next line that the process prints."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def tell(process: "subprocess.Popen[str]", text: str = "") -> None:
    assert process.stdin is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()


@contextmanager
def holder(node: Node, uri: str, how: str = "lease") -> "Iterator[subprocess.Popen[str]]":
    """A process that is about to attach; tell it to, and it answers with the path."""
    with node.python(HOLDER, uri, how) as process:
        assert hear(process) == "ready"
        yield process


# -- starting


def test_as_directory_starts_a_daemon(node: Node, small: Path, uri_of: UriOf) -> None:
    assert has_ended(node)
    assert not is_mounted(node)
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        assert Path(path).parent == node.mount
        assert is_mounted(node)
        assert len(keepers(node)) == len(daemons(node)) == 1
        assert sorted(os.listdir(path)) == ["config.json", "empty", "layers"]


def test_eight_processes_get_one_daemon_and_one_attachment(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    holding = [node.python(HOLDER, uri_of(small), "lease") for _ in range(8)]
    try:
        assert [hear(process) for process in holding] == ["ready"] * 8
        for process in holding:
            tell(process)
        paths = {hear(process) for process in holding}
        assert len(keepers(node)) == len(daemons(node)) == 1
        [attachment] = attachments()
        assert paths == {attachment["path"]}
        assert attachment["holders"] == sorted(process.pid for process in holding)
    finally:
        for process in holding:
            process.communicate(timeout=COMMAND_TIMEOUT_S)
    wait_detached()


def test_contexts_share_one_attachment(node: Node, small: Path, uri_of: UriOf) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(small))
    with checkpoint.as_directory() as outer:
        with (
            checkpoint.as_directory() as inner,
            ckptfs.Checkpoint(
                uri_of(small) + "&allow_bucket_creation=false"
            ).as_directory() as other,
        ):
            assert outer == inner == other
            assert len(attachments()) == 1
        assert os.listdir(outer)
    wait_detached()
    assert os.listdir(node.mount) == []


def test_an_unheld_attachment_lingers(node: Node, small: Path, uri_of: UriOf) -> None:
    node.configure(linger_s=600)
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        pass
    [attachment] = attachments()
    assert attachment["path"] == path
    assert attachment["holders"] == []


# -- holding


def test_a_killed_holder_lets_go(node: Node, small: Path, uri_of: UriOf) -> None:
    with holder(node, uri_of(small)) as process:
        tell(process)
        hear(process)
        assert attachments()[0]["holders"] == [process.pid]
        process.kill()
        assert process.wait(COMMAND_TIMEOUT_S) == -signal.SIGKILL
    wait_until(lambda: node.status()["attachments"] == [])


def test_a_forked_child_inherits_the_lease(node: Node, small: Path, uri_of: UriOf) -> None:
    with holder(node, uri_of(small), "fork") as process:
        tell(process)
        path = hear(process)
        assert process.wait(COMMAND_TIMEOUT_S) == 0
        assert not stays_away(path)
        tell(process)  # the child has the same pipes
    wait_detached()


def stays_away(path: str) -> bool:
    """Whether the attachment is gone once the linger time is over."""
    try:
        wait_until(lambda: not attachments(), PAST_LINGER_S)
    except TimeoutError:
        assert attachments()[0]["path"] == path
        return False
    return True


@pytest.mark.parametrize("how", ["file", "mmap"])
def test_an_open_file_holds_the_attachment(
    node: Node, small: Path, uri_of: UriOf, how: str
) -> None:
    with holder(node, uri_of(small), how) as process:
        tell(process)
        path = hear(process)
        assert not stays_away(path)
        [attachment] = attachments()
        assert (attachment["holders"], attachment["open_files"]) == ([], 1)
        tell(process)
        assert hear(process) == "3000000"
    wait_detached()


def test_a_pinned_attachment_needs_no_holder(node: Node, small: Path, uri_of: UriOf) -> None:
    path = node.here("attach", uri_of(small)).stdout.rstrip("\n")
    assert not stays_away(path)
    assert attachments()[0]["pinned"] is True
    assert Path(path, "config.json").read_text() == '{"layers": 1}'
    node.here("detach", path)
    assert attachments() == []
    assert not os.path.exists(path)


# -- which version an attach shows


def test_an_attach_shows_what_the_store_holds_unless_somebody_holds_the_old(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    node.configure(linger_s=600)
    checkpoint = ckptfs.Checkpoint(uri_of(small))

    def seen(path: str) -> tuple[bytes, bytes]:
        return os.getxattr(path, "user.ckptfs.version"), Path(path, "config.json").read_bytes()

    versions: list[tuple[bytes, bytes]] = []
    for round_ in range(10):
        text = f'{{"layers": {10**round_}}}'.encode()
        (small / "config.json").write_bytes(text)
        with checkpoint.as_directory() as path:
            versions.append(seen(path))
            assert versions[-1][1] == text
            (small / "config.json").write_bytes(b"{}")
            with checkpoint.as_directory() as again:
                assert again == path
                assert os.getxattr(again, "user.ckptfs.version") == versions[-1][0]
                assert Path(again, "config.json").stat().st_size == len(text)
    assert len(set(versions)) == 10
    with checkpoint.as_directory() as path:
        assert seen(path)[1] == b"{}"


# -- the daemon's end


def test_an_idle_daemon_ends_and_leaves_nothing(node: Node, small: Path, uri_of: UriOf) -> None:
    node.configure(idle_exit_s=1)
    checkpoint = ckptfs.Checkpoint(uri_of(small))
    with checkpoint.as_directory():
        [first] = daemons(node)
    wait_until(lambda: has_ended(node))
    assert not is_mounted(node)
    assert sorted(os.listdir(node.folder)) == ["cache", "ckptfs.toml"]
    with checkpoint.as_directory() as path:
        [second] = daemons(node)
        assert second != first
        assert Path(path, "empty").read_bytes() == b""


def test_a_client_that_comes_while_the_daemon_ends_gets_a_new_one(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    node.configure(idle_exit_s=0.3, linger_s=0)
    checkpoint = ckptfs.Checkpoint(uri_of(small))
    steps: list[Callable[[], bool]] = [
        lambda: " ending" in node.log(),
        lambda: not daemons(node),
        lambda: not is_mounted(node),
        lambda: not node.socket.exists(),
        lambda: not keepers(node),
    ]
    for reached in steps:
        with checkpoint.as_directory() as path:
            assert Path(path, "config.json").read_text() == '{"layers": 1}'
        wait_until(reached)
    with checkpoint.as_directory() as path:
        assert Path(path, "config.json").read_text() == '{"layers": 1}'
    wait_until(lambda: has_ended(node))


READER = """
import errno, os, sys

fd = os.open(sys.argv[1], os.O_RDONLY)
os.pread(fd, 4096, 0)
print("open", flush=True)
sys.stdin.readline()
try:
    os.pread(fd, 4096, int(sys.argv[2]))
    print("read", flush=True)
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
"""

GONE = {"ENOTCONN", "ECONNABORTED"}


@pytest.mark.parametrize("step", ["require_seen", "_warn_of_job"])
def test_an_attach_whose_mount_ends_meanwhile_mounts_again(
    node: Node, bucket: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    (bucket / "file").write_bytes(b"content")
    goes_on = getattr(client, step)
    killed: list[int] = []

    def end_the_mount_first(*args: Any) -> Any:
        if not killed:
            killed.extend(keepers(node))
            os.kill(killed[0], signal.SIGKILL)
            wait_until(lambda: has_ended(node))
        return goes_on(*args)

    monkeypatch.setattr(client, step, end_the_mount_first)
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory(mode="mount") as path:
        assert Path(path, "file").read_bytes() == b"content"
    assert killed != keepers(node)


@pytest.mark.parametrize("who", ["daemon", "keeper"])
def test_killed_processes_leave_errors_and_no_hang(
    node: Node, bucket: Path, uri_of: UriOf, who: str
) -> None:
    node.configure(restart=False)
    if who == "daemon":
        node.expected_in_log.append("killed by signal 9: ending the mount, because restart = false")
    (bucket / "large.bin").write_bytes(os.urandom(32 << 20))
    checkpoint = ckptfs.Checkpoint(uri_of(bucket))
    with checkpoint.as_directory() as path:
        with node.python(READER, f"{path}/large.bin", str(24 << 20)) as reader:
            assert hear(reader) == "open"
            victims = daemons(node) if who == "daemon" else keepers(node)
            os.kill(victims[0], signal.SIGKILL)
            wait_until(lambda: has_ended(node))
            tell(reader)
            assert hear(reader) in GONE
        # Without its keeper the mount stays, dead; the keeper would have taken it away.
        expected = errno.ENOENT if who == "daemon" else errno.ENOTCONN
        with pytest.raises(OSError, check=lambda error: error.errno == expected):
            os.stat(path)
        assert is_mounted(node) is (who == "keeper")
        with checkpoint.as_directory() as again:
            assert Path(again, "large.bin").read_bytes() == (bucket / "large.bin").read_bytes()
            assert list(mounts()).count(str(node.mount)) == 1


def test_a_waiting_reader_is_freed_when_the_daemon_dies(
    node: Node, s3: S3Server, bucket: Path
) -> None:
    node.configure(restart=False)
    node.expected_in_log.append("killed by signal 9: ending the mount, because restart = false")
    (bucket / "large.bin").write_bytes(os.urandom(32 << 20))
    with Forwarder(s3.endpoint) as forwarder:
        uri = s3.uri(bucket.name).replace(quoted(s3.endpoint), quoted(forwarder.endpoint))
        with (
            ckptfs.Checkpoint(uri).as_directory() as path,
            node.python(READER, f"{path}/large.bin", str(24 << 20)) as reader,
        ):
            assert hear(reader) == "open"
            forwarder.hold()
            tell(reader)
            wait_until(lambda: attachments()[0]["state"] == "fetching")
            os.kill(daemons(node)[0], signal.SIGKILL)
            assert hear(reader) in GONE
    wait_until(lambda: has_ended(node))


def quoted(endpoint: str) -> str:
    return quote(endpoint, safe="")


def test_the_administrators_umount_ends_everything(node: Node, small: Path, uri_of: UriOf) -> None:
    with ckptfs.Checkpoint(uri_of(small)).as_directory():
        refused = node.run("umount", str(node.mount), check=False)
        assert refused.returncode != 0
        assert "busy" in refused.stderr
        assert attachments()
    node.run("umount", str(node.mount))
    wait_until(lambda: has_ended(node))
    assert sorted(os.listdir(node.folder)) == ["cache", "ckptfs.toml"]
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        assert os.listdir(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_foreground_daemon_ends_by_signal(
    node: Node, small: Path, uri_of: UriOf, number: signal.Signals
) -> None:
    command = [str(Path(sys.executable).with_name("ckptfs")), "mount", "--foreground"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as foreground:
        wait_until(lambda: node.here("status", check=False).returncode == 0)
        assert keepers(node) == [foreground.pid]
        with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
            assert os.listdir(path)
            foreground.send_signal(number)
            _, log = foreground.communicate(timeout=COMMAND_TIMEOUT_S)
        assert foreground.returncode == 0
    node.check_log(log)
    assert has_ended(node)
    assert not is_mounted(node)
    assert sorted(os.listdir(node.folder)) == ["cache", "ckptfs.toml"]


# -- refusals


def test_a_second_keeper_is_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    assert node.here("mount").stdout == f"{node.mount}\n"
    [first] = keepers(node)
    assert node.here("mount").stdout == f"{node.mount}\n"  # it runs: nothing to do
    monkeypatch.setattr(places, "LOCK_WAIT_S", 0.1)
    with (
        keeper.Keeper(load_config()) as second,
        pytest.raises(ckptfs.DaemonError, match="is already running"),
    ):
        second.start()
    assert keepers(node) == [first]
    assert node.status()["attachments"] == []


def test_a_daemon_whose_starter_died_is_used(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was coming up, so the next starter could neither reach it nor have its lock."""
    start = client._start

    def start_too_late(config: Config, flags: Flags) -> None:
        start(config, flags)
        raise ckptfs.DaemonError("a ckptfs daemon is already running")

    monkeypatch.setattr(client, "_start", start_too_late)
    with client.connect_or_start(load_config()) as connection:
        assert connection.status().attachments == []


def test_a_mount_point_in_use_is_refused(node: Node, small: Path, uri_of: UriOf) -> None:
    node.expected_in_log.append("mount point")
    node.mount.mkdir()
    (node.mount / "mine").touch()
    with pytest.raises(ckptfs.PlaceUnusable, match="is not empty; set CKPTFS_MOUNT"):
        ckptfs.Checkpoint(uri_of(small)).as_directory(mode="mount").__enter__()
    assert os.listdir(node.mount) == ["mine"]
    wait_until(lambda: has_ended(node))


def test_a_mount_point_that_is_a_file_is_refused(node: Node, small: Path, uri_of: UriOf) -> None:
    node.expected_in_log.append("mount point")
    node.mount.write_text("mine")
    with pytest.raises(ckptfs.PlaceUnusable, match="not a directory; set CKPTFS_MOUNT"):
        ckptfs.Checkpoint(uri_of(small)).as_directory(mode="mount").__enter__()
    assert node.mount.read_text() == "mine"
    wait_until(lambda: has_ended(node))


def test_a_mount_point_of_the_users_own_stays(node: Node, small: Path, uri_of: UriOf) -> None:
    node.mount.mkdir()
    with ckptfs.Checkpoint(uri_of(small)).as_directory():
        pass
    node.end()
    assert node.mount.is_dir()


def test_one_cache_directory_serves_one_daemon(
    node: Node, small: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.expected_in_log.append("is in use by another")
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        with monkeypatch.context() as other:
            other.setenv("CKPTFS_SOCKET", str(node.folder / "other.sock"))
            other.setenv("CKPTFS_MOUNT", str(node.folder / "other"))
            done = node.here("attach", uri_of(small), check=False)
            assert done.returncode == 1
            [line] = done.stderr.splitlines()
            assert f"cache directory {node.cache_dir} is in use by another ckptfs daemon" in line
            assert "CKPTFS_CACHE_DIR" in line
            assert done.stdout == ""
        assert sorted(os.listdir(node.folder)) == [
            "cache",
            "ckptfs.toml",
            "mnt",
            "sock",
            "sock.lock",
        ]
        assert Path(path, "config.json").read_text() == '{"layers": 1}'


def test_attach_with_repeated_hangups_names_the_log(
    node: Node, small: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up(*_: object, **__: object) -> None:
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr("ckptfs._client.connection.Connection.ask_once", hang_up)
        done = node.here("attach", uri_of(small), check=False)
    assert f"see {node.cache_dir}/daemon.log" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert node.here("status").stdout.count(f"  {node.cache_dir}/daemon.log\n") == 1
