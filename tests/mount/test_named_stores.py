"""Named stores, through a real mount and a real S3 server.

The tests cover the users who know a name, the users who may use it, and credentials that change
during a read.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND_TIMEOUT_S, Node
from mount.test_users import ALICE, BOB, as_user, let_others_in
from support.s3server import S3Server
from support.servers import Forwarder

import ckptfs
import ckptfs.checkpoint  # here, because other users may not read where it lies
from ckptfs import xattrs
from ckptfs._client import client
from ckptfs._model.location import Location, StoreRef
from ckptfs._model.protocol.requests import Attach

pytestmark = [
    pytest.mark.mount,
    # Python 3.12 warns because pyarrow has threads; they hold nothing that the children need.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

CONTENT = '{"layers": 1}'


def store_toml(uri: str, endpoint: str, credentials: str, more: str = "") -> str:
    return (
        f'\n[store.prod]\nuri = "{uri}"\nendpoint = "http://{endpoint}"\nregion = "us-east-1"\n'
        f"credentials = {credentials}\n{more}"
    )


def configure(node: Node, *stores: str, **settings: Any) -> None:
    """Settings of the node, and the stores that are in its file."""
    node.configure(**settings)
    with (node.folder / "ckptfs.toml").open("a") as file:
        file.write("".join(stores))


def key_file(node: Node, server: S3Server, name: str = "keys") -> Path:
    """The server's keys in a file as AWS has it."""
    path = node.folder / name
    beside = path.with_suffix(".new")
    beside.touch(mode=0o600)
    beside.write_text(
        f"[default]\naws_access_key_id = {server.access_key}\n"
        f"aws_secret_access_key = {server.secret_key}\n"
    )
    beside.rename(path)
    return path


@pytest.fixture
def prod(node: Node, s3: S3Server, small: Path) -> str:
    """The table of a store that begins above the checkpoint, whose keys are in a file."""
    keys = key_file(node, s3)
    bucket = small.parts[len(s3.root.parts)]
    return store_toml(f"s3://{bucket}/run", s3.endpoint, f'{{ file = "{keys}" }}')


def test_a_checkpoint_by_name(node: Node, prod: str, small: Path) -> None:
    configure(node, prod)
    path = node.here("attach", "prod:checkpoint").stdout.strip()
    assert Path(path, "config.json").read_text() == CONTENT
    assert xattrs.read(path).uri == "prod:checkpoint"
    (attachment,) = node.status()["attachments"]
    assert attachment["uri"] == "prod:checkpoint"
    assert "config.json" in node.here("ls", "prod:checkpoint").stdout
    node.here("prefetch", "prod:checkpoint")
    node.here("meta", "set", "prod:checkpoint", "step", "7")
    assert json.loads((small / ".metadata.json").read_text()) == {"step": 7}
    assert Path(path, ".metadata.json").read_text() == '{"step": 7}'
    assert node.here("find", "prod:").stdout == "prod:checkpoint\n"
    node.here("detach", "prod:checkpoint")
    node.wait_detached()


def test_a_name_in_python(node: Node, prod: str, s3: S3Server, tmp_path: Path) -> None:
    configure(node, prod)
    checkpoint = pickle.loads(pickle.dumps(ckptfs.Checkpoint("prod:checkpoint")))
    assert s3.secret_key.encode() not in pickle.dumps(checkpoint)
    with checkpoint.as_directory() as path:
        assert Path(path, "config.json").read_text() == CONTENT
    checkpoint.update_metadata({"a": 1})
    assert checkpoint.get_metadata() == {"a": 1}
    checkpoint.to_directory(tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_text() == CONTENT
    names = {i.base_name for i in checkpoint.filesystem.get_file_info(_selector("checkpoint"))}
    assert {"config.json", "layers"} <= names
    with checkpoint.filesystem.open_input_file("checkpoint/config.json") as file:
        assert file.read() == CONTENT.encode()


def _selector(path: str) -> Any:
    from pyarrow.fs import FileSelector

    return FileSelector(path)


@pytest.mark.parametrize(
    "path", ["../run/checkpoint", "checkpoint/../..", "/checkpoint", "a//b", "./checkpoint", "a\nb"]
)
def test_a_path_does_not_leave_its_store(node: Node, prod: str, path: str) -> None:
    configure(node, prod)
    assert "in a store has no" in node.here("attach", f"prod:{path}", check=False).stderr
    node.here("mount")
    with client.connect() as connection, pytest.raises(ckptfs.LocationError):
        connection.ask_once(Attach(location=Location("named", path, {"store": "prod"})))


def test_named_store_claimed_by_a_client_is_refused(node: Node, prod: str, small: Path) -> None:
    configure(node, prod)
    node.here("mount")
    bucket = small.parent.parent.name
    forged = Location("s3", f"{bucket}/run", {}, {}, StoreRef("prod", f"{bucket}/run"))
    for _ in range(2):
        with client.connect() as connection, pytest.raises(ckptfs.ProtocolError):
            connection.ask_once(Attach(location=forged))
    with client.connect() as connection, pytest.raises(ckptfs.LocationError):
        connection.ask_once(
            Attach(location=Location("named", "checkpoint", {"store": "prod", "region": "x"}))
        )


def test_named_store_with_an_unknown_name_is_an_error(node: Node, prod: str) -> None:
    configure(node, prod)
    said = node.here("attach", "prd:checkpoint", check=False)
    assert said.returncode == 1
    assert "no store 'prd'" in said.stderr
    with pytest.raises(ckptfs.UnknownStore, match="no store 'prd'"):
        ckptfs.Checkpoint("prd:checkpoint").get_metadata()
    assert "unknown scheme" in node.here("attach", "s4://x/y", check=False).stderr


def test_named_store_is_shown_by_the_cache_command(node: Node, prod: str) -> None:
    configure(node, prod)
    path = node.here("attach", "prod:checkpoint").stdout.strip()
    Path(path, "config.json").read_bytes()
    node.wait_quiet()
    for _ in ("attached", "detached"):
        (checkpoint,) = json.loads(node.here("cache", "ls", "--json").stdout)
        assert checkpoint["uri"] == "prod:checkpoint"
        (file,) = json.loads(node.here("cache", "ls", "prod:checkpoint", "--json").stdout)
        assert file["path"] == "config.json"
        assert "nothing of prod:check" in node.here("cache", "ls", "prod:check").stderr
        node.here("detach", "prod:checkpoint", check=False)
    assert "1 file" in node.here("cache", "verify", "prod:checkpoint").stdout
    node.here("cache", "clear", "prod:checkpoint")
    assert json.loads(node.here("cache", "ls", "--json").stdout) == []


# -- other users


@contextlib.contextmanager
def other_configuration(node: Node, text: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clients have another file than the daemon."""
    file = node.folder / "theirs.toml"
    file.write_text(text)
    with monkeypatch.context() as patched:
        patched.setenv("CKPTFS_CONFIG", str(file))
        yield


def test_a_store_that_only_the_daemon_knows(
    node: Node, prod: str, monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    """Alice may use it by number, Bob by one of his groups, and they never see the keys."""
    group = os.getgid() + 4711
    configure(node, prod + f"users = [{ALICE}]\ngroups = [{group}]\n", allow_other=True)
    let_others_in(node.folder)
    node.here("mount")
    scratch = node.folder / "scratch"
    scratch.mkdir()
    scratch.chmod(0o777)

    def reads() -> None:
        with ckptfs.Checkpoint("prod:checkpoint").as_directory() as path:
            assert Path(path, "config.json").read_text() == CONTENT
            assert os.stat(path).st_uid == os.geteuid()

    def everything() -> None:
        tempfile.tempdir = str(scratch)
        reads()
        checkpoint = ckptfs.Checkpoint("prod:checkpoint")
        checkpoint.update_metadata({"a": 1, "b": 2})
        checkpoint.set_metadata({"a": 2})
        assert checkpoint.get_metadata() == {"a": 2}
        copy = checkpoint.to_directory(include=["config.json"])
        assert Path(copy, "config.json").read_text() == CONTENT
        with checkpoint.as_directory(mode="copy") as path:
            assert Path(path, "config.json").read_text() == CONTENT
        with pytest.raises(ckptfs.UnknownStore, match="your configuration has no store 'prod'"):
            checkpoint.filesystem.get_file_info("checkpoint")

    def is_refused() -> None:
        with pytest.raises(ckptfs.StoreNotAllowed, match="not for uid"):
            reads()
        with client.connect() as connection:
            bucket = small.parent.parent.name
            with pytest.raises(ckptfs.AccessDenied, match="lend_daemon_rights"):
                connection.ask_once(Attach(location=Location("s3", f"{bucket}/run/checkpoint")))

    def in_group() -> None:
        os.seteuid(0)
        os.setgroups([group])
        os.seteuid(BOB)
        reads()

    with other_configuration(node, "", monkeypatch):
        as_user(ALICE, everything)
        as_user(BOB, is_refused)
        as_user(BOB, in_group, for_good=False)
    assert json.loads((small / ".metadata.json").read_text()) == {"a": 2}


def test_named_store_of_the_client_goes_before_the_daemons(
    node: Node, s3: S3Server, prod: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alice has her own store of that name, with keys in her environment; the daemon's is not hers,
    and leads elsewhere."""
    elsewhere = small.parent / "elsewhere" / "checkpoint"
    elsewhere.mkdir(parents=True)
    (elsewhere / "config.json").write_text("{}")
    bucket = small.parent.parent.name
    theirs = '{ environment = "MY_" }'
    hers = store_toml(f"s3://{bucket}/run/elsewhere", s3.endpoint, theirs)
    configure(node, prod + 'users = "*"\n', allow_other=True)
    let_others_in(node.folder)
    node.here("mount")
    monkeypatch.setenv("MY_AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("MY_AWS_SECRET_ACCESS_KEY", s3.secret_key)

    def alice_reads() -> None:
        with ckptfs.Checkpoint("prod:checkpoint").as_directory() as path:
            assert Path(path, "config.json").read_text() == "{}"

    with other_configuration(node, hers, monkeypatch):
        as_user(ALICE, alice_reads)


@pytest.mark.parametrize(
    ("credentials", "prefix"), [('"default"', ""), ('{ environment = "MY_" }', "MY_")]
)
def test_named_store_with_environment_credentials_uses_the_callers(
    node: Node,
    s3: S3Server,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    credentials: str,
    prefix: str,
) -> None:
    """A daemon that starts on demand keeps none of these credentials for the next caller."""
    bucket = small.parent.parent.name
    configure(node, store_toml(f"s3://{bucket}/run", s3.endpoint, credentials))
    with monkeypatch.context() as patched:
        patched.setenv(f"{prefix}AWS_ACCESS_KEY_ID", s3.access_key)
        patched.setenv(f"{prefix}AWS_SECRET_ACCESS_KEY", s3.secret_key)
        path = node.here("attach", "prod:checkpoint").stdout.strip()
        assert Path(path, "config.json").read_text() == CONTENT
        assert ckptfs.Checkpoint("prod:checkpoint").get_metadata() == {}
        node.here("detach", "prod:checkpoint")
    daemon = node.status()["pid"]
    assert s3.secret_key.encode() not in Path(f"/proc/{daemon}/environ").read_bytes()
    said = node.here("attach", "prod:checkpoint", check=False)
    assert said.returncode == 1
    assert f"{prefix}AWS_ACCESS_KEY_ID" in said.stderr


# -- credentials that change


@contextlib.contextmanager
def server_with(root: Path, secret_key: str) -> Iterator[S3Server]:
    server = S3Server(root)
    server.secret_key = secret_key
    with server:
        yield server


class Changing:
    """A store whose server has other keys from some moment on, and a checkpoint that is read."""

    def __init__(self, node: Node, root: Path, stack: contextlib.ExitStack) -> None:
        self._node = node
        self._stack = stack
        self.content = os.urandom(6 << 20)
        checkpoint = root / "bucket" / "checkpoint"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights.bin").write_bytes(self.content)
        self.first = stack.enter_context(server_with(root, "first"))
        self.second = stack.enter_context(server_with(root, "second"))
        self._forwarder = stack.enter_context(Forwarder(self.first.endpoint))

    def open(self, source: str) -> int:
        """Attach it with credentials from there, and read the beginning; the open file."""
        store = store_toml("s3://bucket", self._forwarder.endpoint, source)
        configure(self._node, store, window_bytes_max=0)
        top = self._node.here("attach", "prod:checkpoint").stdout.strip()
        file = os.open(f"{top}/weights.bin", os.O_RDONLY)
        self._stack.callback(os.close, file)
        assert os.pread(file, 1 << 20, 0) == self.content[: 1 << 20]
        return file

    def change(self) -> None:
        """From now on the server has the second keys."""
        self._node.wait_quiet()
        self._forwarder.cut()
        self._forwarder.redirect(self.second.endpoint)
        self._forwarder.restore()


@pytest.fixture
def changing(node: Node, tmp_path: Path) -> Iterator[Changing]:
    with contextlib.ExitStack() as stack:
        yield Changing(node, tmp_path / "objects", stack)


def test_named_store_with_keys_changed_beside_a_reader_uses_the_new_ones(
    node: Node, changing: Changing
) -> None:
    """The file with the keys is rewritten later."""
    file = changing.open(f'{{ file = "{key_file(node, changing.first)}" }}')
    changing.change()
    node.expected_in_log += ["access denied"]
    with pytest.raises(PermissionError):
        os.pread(file, 4096, 5 << 20)
    key_file(node, changing.second)
    assert os.pread(file, 1 << 20, 5 << 20) == changing.content[5 << 20 :]
    assert os.pread(file, 6 << 20, 0) == changing.content


def test_a_profile_whose_keys_have_expired_is_read_anew(
    node: Node, changing: Changing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a tool that writes new session keys into AWS's own file."""
    keys = key_file(node, changing.first)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    file = changing.open('{ profile = "default" }')
    key_file(node, changing.second)
    node.expected_in_log += ["cannot reach the store"]
    changing.change()
    ended = [os.pread(file, 1 << 20, at << 20) for at in (5, 2, 3)]
    assert ended == [changing.content[at << 20 : (at + 1) << 20] for at in (5, 2, 3)]


def test_a_file_that_others_can_read_is_refused(node: Node, prod: str) -> None:
    configure(node, prod)
    (node.folder / "keys").chmod(0o644)
    said = node.here("attach", "prod:checkpoint", check=False).stderr
    assert "chmod 600" in said
    (node.folder / "keys").chmod(0o600)
    node.here("attach", "prod:checkpoint")


def test_a_relative_file_is_one_of_systemds(
    node: Node, s3: S3Server, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = small.parent.parent.name
    configure(node, store_toml(f"s3://{bucket}/run", s3.endpoint, '{ file = "keys" }'))
    said = node.here("attach", "prod:checkpoint", check=False).stderr
    assert "CREDENTIALS_DIRECTORY" in said
    node.here("umount")
    key_file(node, s3)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(node.folder))
    command = [str(Path(sys.executable).with_name("ckptfs")), "mount", "--foreground"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as unit:
        assert unit.stderr is not None
        while "serving on" not in unit.stderr.readline():
            assert unit.poll() is None
        node.here("attach", "prod:checkpoint")
        node.here("umount", "--force")
        unit.communicate(timeout=COMMAND_TIMEOUT_S)


def test_the_keys_of_a_store_are_shown_nowhere(node: Node, prod: str, s3: S3Server) -> None:
    configure(node, prod)
    path = node.here("attach", "prod:checkpoint").stdout.strip()
    said = [node.here(*c).stdout for c in (["status", "--json"], ["config"], ["config", "--json"])]
    said += [str(xattrs.read_all(path)), node.log()]
    daemon = node.status()["pid"]
    said += [
        Path(f"/proc/{daemon}/{name}").read_bytes().decode(errors="replace")
        for name in ("cmdline", "environ")
    ]
    assert not [text for text in said if s3.secret_key in text]
