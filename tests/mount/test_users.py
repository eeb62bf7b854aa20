"""Users other than root: their own attachments on a node's daemon, and mounting without root.

The other users are child processes that give up root after everything is imported, because the
interpreter itself may lie where only root can read.
"""

import contextlib
import ctypes
import encodings.idna  # noqa: F401 - so that the children need not read it
import errno
import json
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from conftest import Node
from support.usernamespace import IS_SUPPORTED, clone_idmapped

import ckptfs
from ckptfs import xattrs
from ckptfs._client import client
from ckptfs._config import paths
from ckptfs._model.location import Location
from ckptfs._model.plans.plan import Wanted
from ckptfs._model.protocol.requests import Attach, Detach, GetTrace, MetadataChanged
from ckptfs._mount import session
from ckptfs._store.describe import describe
from ckptfs._upload import Options, run_upload

pytestmark = [
    pytest.mark.mount,
    # Python 3.12 warns because pyarrow has threads; they hold nothing that the children need.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

ALICE, BOB = 65533, 65534


def as_user(uid: int, action: Callable[[], object], *, for_good: bool = True) -> None:
    """Run `action` in a child process of that user; a failure there fails here.

    Without `for_good`, the process could become root, or another user, again.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid if for_good else -1, uid, uid if for_good else 0)
            action()
            os._exit(0)
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-4000:])
            os._exit(1)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with open(reader, "rb") as report:
        assert status == 0, report.read().decode()


def let_others_in(folder: Path) -> None:
    """Let other users into the folder and those of the test run around it."""
    for around in (folder, *folder.parents):
        if around.name.startswith("ckptfs-"):
            around.chmod(0o755)


@pytest.fixture
def shared_node(node: Node, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node whose daemon, run by root, serves other users."""
    # rclone does not understand the checksums that the AWS SDK sends by default.
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    node.configure(allow_other=True, linger_s=60.0)
    let_others_in(node.folder)
    node.here("mount")
    return node


def test_each_user_sees_own_attachments_only(
    shared_node: Node, small: Path, uri_of: Callable[[Path], str]
) -> None:
    (small / ".metadata.json").write_text('{"a": 1}')
    checkpoint = ckptfs.Checkpoint(uri_of(small))
    weights = (small / "layers" / "0" / "weights.bin").read_bytes()

    def alice_attaches() -> None:
        with checkpoint.as_directory() as path:
            assert os.stat(path).st_uid == ALICE
            assert Path(path, "layers/0/weights.bin").read_bytes() == weights

    as_user(ALICE, alice_attaches)
    (attachment,) = shared_node.status()["attachments"]
    assert attachment["uid"] == ALICE
    path = attachment["path"]

    inherited = [os.open(f"{path}{name}", os.O_RDONLY) for name in ("", "/config.json")]

    def bob_is_kept_out() -> None:
        top, file = inherited  # as a program that once was root may have them
        attempts: list[Callable[[], object]] = [
            lambda: os.getxattr(top, "user.ckptfs.meta.a"),
            lambda: os.getxattr(file, "user.ckptfs.uri"),
            lambda: os.setxattr(top, "user.ckptfs.meta.a", b"2"),
            lambda: os.setxattr(file, "user.ckptfs.prefetch", b""),
            lambda: os.removexattr(top, "user.ckptfs.meta.a"),
            lambda: os.open("config.json", os.O_RDONLY, dir_fd=top),
            lambda: os.stat("layers/0", dir_fd=top),
            lambda: os.open(f"/proc/self/fd/{file}", os.O_RDONLY),
            lambda: os.access(f"{path}/config.json", os.R_OK) or _denied(),
            lambda: os.setxattr(path, "user.ckptfs.prefetch", b""),
            lambda: os.scandir(f"{path}/layers"),
            lambda: os.listdir(path),
            lambda: os.listdir(shared_node.mount),
            lambda: os.stat(f"{path}/config.json"),
            lambda: os.open(f"{path}/config.json", os.O_RDONLY),
            lambda: os.chdir(path),
            lambda: os.getxattr(path, "user.ckptfs.meta.a"),
            lambda: os.setxattr(path, "user.ckptfs.meta.a", b"2"),
            lambda: os.removexattr(path, "user.ckptfs.meta.a"),
            lambda: os.setxattr(path, "user.ckptfs.evict", b""),
            lambda: os.getxattr(f"{path}/config.json", "user.ckptfs.uri"),
            lambda: xattrs.read(path),
        ]
        for attempt in attempts:
            with pytest.raises(PermissionError):
                attempt()
        for place in (path, f"{path}/config.json", *inherited):  # which the kernel allows
            with contextlib.suppress(PermissionError):
                assert os.listxattr(place) == []
        with client.connect() as connection:
            assert connection.status().attachments == []
            name = attachment["name"]
            for ask, refusal in (
                (lambda: connection.ask(Detach(name=name, force=True)), ckptfs.NotAttached),
                (lambda: connection.ask(Detach(location=location, force=True)), ckptfs.NotAttached),
                (lambda: connection.prefetch(name, Wanted(["*"]), print), ckptfs.NotAttached),
                (lambda: connection.ask(GetTrace(name=name)), ckptfs.NotAttached),
                (lambda: connection.ask(GetTrace(location=location)), ckptfs.NotAttached),
                (lambda: connection.stop(force=True), ckptfs.AccessDenied),
                (
                    lambda: connection.ask_once(Attach(location=Location("local", "/root"))),
                    ckptfs.AccessDenied,
                ),
                (lambda: connection.ask_once(Attach(location=without_keys)), ckptfs.AccessDenied),
                (
                    lambda: connection.ask_once(Attach(location=with_wrong_keys)),
                    ckptfs.AccessDenied,
                ),
            ):
                with pytest.raises(refusal):
                    ask()
            # The reply does not tell whether another user has attached it.
            connection.ask(MetadataChanged(location=location))

    location = describe(checkpoint.filesystem, checkpoint.path)
    without_keys = msgspec.structs.replace(location, secrets={})
    wrong = {**location.secrets, "secret_key": "wrong"}
    with_wrong_keys = msgspec.structs.replace(location, secrets=wrong)
    as_user(BOB, bob_is_kept_out)
    for fd in inherited:
        os.close(fd)
    assert len(shared_node.status()["attachments"]) == 1
    assert (small / ".metadata.json").read_text() == '{"a": 1}'


def _denied() -> None:
    raise PermissionError


def test_what_a_user_uploads_is_in_the_cache_for_that_user_only(
    shared_node: Node,
    tmp_path: Path,
    bucket: Path,
    uri_of: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = shared_node.folder / "places"  # of the users' own files, as /tmp is
    places.mkdir()
    places.chmod(0o1777)
    monkeypatch.setattr(paths, "_SHARED", (places,))
    run = tmp_path / "run"
    run.mkdir()
    content = bytes(range(256)) * (20 << 12)
    (run / "weights.bin").write_bytes(content)
    for folder in (run, *run.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    checkpoint = ckptfs.Checkpoint(uri_of(bucket / "run"))
    fetched = lambda: shared_node.status()["fetched_bytes"]  # noqa: E731

    def upload() -> None:
        done = run_upload(run, checkpoint, Options(), None)
        assert (done.cached_bytes, done.cache_error) == (len(content), "")

    def read() -> None:
        with checkpoint.as_directory() as path:
            assert Path(path, "weights.bin").read_bytes() == content

    as_user(ALICE, upload)
    as_user(ALICE, read)
    assert (fetched(), shared_node.status()["taken_bytes"]) == (0, len(content))
    shared_node.expected_in_log.append("was killed by signal 9: starting the next one")
    os.kill(shared_node.status()["pid"], signal.SIGKILL)
    as_user(ALICE, read)
    assert fetched() == 0
    [attachment] = shared_node.status()["attachments"]
    shared_node.here("detach", attachment["path"])
    as_user(ALICE, read)
    assert fetched() == 0
    as_user(BOB, read)
    assert fetched() == len(content)
    read()
    assert fetched() == len(content)


def test_users_attaching_one_place_have_separate_attachments(
    shared_node: Node, small: Path, uri_of: Callable[[Path], str]
) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(small))

    def one_attaches() -> None:
        with checkpoint.as_directory() as path:
            assert Path(path, "config.json").read_text() == '{"layers": 1}'

    for uid in (ALICE, BOB, ALICE):
        as_user(uid, one_attaches)
    assert sorted(a["uid"] for a in shared_node.status()["attachments"]) == [ALICE, BOB]
    for attachment in shared_node.status()["attachments"]:
        shared_node.here("detach", "--force", attachment["path"])
    assert shared_node.status()["attachments"] == []


def test_connections_of_one_user_leave_room_for_others(
    shared_node: Node, small: Path, uri_of: Callable[[Path], str]
) -> None:
    def bob_takes_all_connections() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(64):
                stack.enter_context(client.connect()).status()
            one_more = stack.enter_context(client.connect())
            with pytest.raises(ckptfs.LimitExceeded, match="64 control connections"):
                one_more.status()
            _say("full")
            os.read(done, 1)

    def _say(text: str) -> None:
        os.write(told, text.encode())

    def alice_is_served() -> None:
        with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
            assert Path(path, "config.json").read_text() == '{"layers": 1}'

    heard, told = os.pipe()
    done, finish = os.pipe()
    bob = threading.Thread(target=as_user, args=(BOB, bob_takes_all_connections))
    bob.start()
    assert os.read(heard, 9) == b"full"
    as_user(ALICE, alice_is_served)
    os.write(finish, b"x")
    bob.join()
    for fd in (heard, told, done, finish):
        os.close(fd)


def test_users_change_the_metadata_of_their_own(
    shared_node: Node, small: Path, uri_of: Callable[[Path], str]
) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(small))

    def alice_changes_it() -> None:
        with checkpoint.as_directory() as path:
            os.setxattr(path, "user.ckptfs.meta.a", b"1")
            xattrs.metadata(path)["b"] = 2
            assert xattrs.read(path).metadata == {"a": 1, "b": 2}
            assert Path(path, ".metadata.json").read_text() == '{"a": 1, "b": 2}'
            os.removexattr(path, "user.ckptfs.meta.a")
            os.setxattr(f"{path}/layers", "user.ckptfs.evict", b"")
            with pytest.raises(OSError, check=lambda error: error.errno == errno.EROFS):
                os.chmod(path, 0o777)

    as_user(ALICE, alice_changes_it)
    assert (small / ".metadata.json").read_text() == '{"b": 2}'
    (attachment,) = shared_node.status()["attachments"]
    os.setxattr(attachment["path"], "user.ckptfs.meta.c", b"3")  # root may, too
    assert (small / ".metadata.json").read_text() == '{"b": 2, "c": 3}'


def test_daemon_of_one_user_refuses_others(node: Node) -> None:
    node.here("mount")
    let_others_in(node.folder)
    node.socket.chmod(0o666)  # as if the socket's mode did not keep them out already

    def bob_asks() -> None:
        with client.connect() as connection, pytest.raises(ckptfs.AccessDenied):
            connection.status()

    as_user(BOB, bob_asks)


def test_client_refuses_a_socket_of_somebody_else(node: Node) -> None:
    let_others_in(node.folder)
    node.folder.chmod(0o777)

    def alice_listens_and_bob_connects() -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(node.socket))
            listening.listen()  # the kernel remembers who called this
            node.socket.chmod(0o666)
            os.seteuid(0)
            os.seteuid(BOB)
            with pytest.raises(ckptfs.DaemonError, match="neither you nor root"):
                client.connect()

    as_user(ALICE, alice_listens_and_bob_connects, for_good=False)
    node.socket.unlink()


def test_root_of_a_user_namespace_has_no_more_rights_than_its_user(
    shared_node: Node, small: Path, uri_of: Callable[[Path], str]
) -> None:
    """With ALLOW_IDMAP no request names its user, so the kernel and the daemon must not take root
    of a user namespace for root."""
    (small / ".metadata.json").write_text('{"a": 1}')
    checkpoint = ckptfs.Checkpoint(uri_of(small))
    own = os.stat("/proc/self/ns/user").st_ino

    def alice_attaches() -> None:
        with checkpoint.as_directory() as path:
            assert "user.ckptfs.meta.a" in os.listxattr(path)
            os.setxattr(path, "user.ckptfs.meta.b", b"2")

    as_user(ALICE, alice_attaches)
    (attachment,) = shared_node.status()["attachments"]
    path = attachment["path"]
    inherited = os.open(path, os.O_RDONLY)

    def bob_as_root() -> None:
        _become_root_of_a_user_namespace()
        assert os.geteuid() == 0
        assert os.stat("/proc/self/ns/user").st_ino != own
        attempts: list[Callable[[], object]] = [
            lambda: os.setxattr(path, "user.ckptfs.meta.a", b"3"),
            lambda: os.setxattr(inherited, "user.ckptfs.evict", b""),
            lambda: os.removexattr(inherited, "user.ckptfs.meta.a"),
            lambda: os.getxattr(inherited, "user.ckptfs.meta.a"),
            lambda: os.open(f"{path}/config.json", os.O_RDONLY),
            lambda: os.listdir(f"{shared_node.mount}/.volumes"),
        ]
        for attempt in attempts:
            with pytest.raises(PermissionError):
                attempt()
        with pytest.raises(OSError, match="not permitted" if IS_SUPPORTED else "Invalid"):
            clone_idmapped(path, os.open("/proc/self/ns/user", os.O_RDONLY))
        assert os.listxattr(path) == os.listxattr(inherited) == []

    as_user(BOB, bob_as_root)
    os.close(inherited)
    assert json.loads((small / ".metadata.json").read_text()) == {"a": 1, "b": 2}
    assert "user.ckptfs.meta.b" in os.listxattr(path)  # for root


def _become_root_of_a_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(4, 1)  # PR_SET_DUMPABLE, so that /proc/self is this user's own
    assert libc.unshare(0x10000000 | 0x20000) == 0, os.strerror(ctypes.get_errno())
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def test_mounting_by_fusermount(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.mount.mkdir()
    monkeypatch.setattr(session.os, "geteuid", lambda: 1000)
    fd = session.mount(node.mount, allow_other=False)
    try:
        session.answer_init(fd)
        assert session.device_of_mount(node.mount) is not None
        assert not os.get_inheritable(fd)
    finally:
        session.unmount(node.mount)
        os.close(fd)
    assert session.device_of_mount(node.mount) is None


def test_mount_without_fusermount_names_the_package(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(node.folder))
    with pytest.raises(ckptfs.CannotMount, match="install the package fuse3"):
        session.mount(node.mount, allow_other=False)
