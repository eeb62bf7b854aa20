"""Users other than root: their own attachments on a node's daemon, and mounting without root.

The other users are child processes that give up root after everything is imported, because the
interpreter itself may lie where only root can read.
"""

import errno
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Node

import ckptfs
from ckptfs import _client, xattrs
from ckptfs._daemon import session

pytestmark = [
    pytest.mark.mount,
    # Python 3.12 warns because pyarrow has threads; they hold nothing that the children need.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

ALICE, BOB = 65533, 65534


def as_user(uid: int, action: Callable[[], None], *, for_good: bool = True) -> None:
    """Run `action` in a child process of that user; a failure there fails here.

    Not `for_good`: the process could become root, or somebody else, again.
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

    def bob_is_kept_out() -> None:
        attempts: list[Callable[[], object]] = [
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
        assert os.listxattr(path) == []  # which the kernel allows
        with _client.connect() as connection:
            assert connection.status().attachments == []
            with pytest.raises(ckptfs.NotAttached):
                connection.detach(attachment["name"], force=True)
            with pytest.raises(ckptfs.AccessDenied):
                connection.stop(force=True)

    as_user(BOB, bob_is_kept_out)
    assert len(shared_node.status()["attachments"]) == 1
    assert (small / ".metadata.json").read_text() == '{"a": 1}'


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
        with _client.connect() as connection, pytest.raises(ckptfs.AccessDenied):
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
                _client.connect()

    as_user(ALICE, alice_listens_and_bob_connects, for_good=False)
    node.socket.unlink()


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


def test_no_fusermount_is_said(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(node.folder))
    with pytest.raises(ckptfs.CannotMount, match="install the package fuse3"):
        session.mount(node.mount, allow_other=False)
