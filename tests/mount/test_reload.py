"""A running daemon takes in a changed configuration, and goes on."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, wait_until
from mount.test_named_stores import configure, key_file, store_toml
from mount.test_users import ALICE, as_user, let_others_in
from support.s3server import S3Server

import ckptfs
from ckptfs._client import client
from ckptfs._client import connection as _connection
from ckptfs._model.location import Location
from ckptfs._model.protocol.requests import Reload

pytestmark = [
    pytest.mark.mount,
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]


def keeper_of(node: Node) -> int:
    """The parent of the daemon."""
    daemon = node.status()["pid"]
    return int(Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()[1])


@contextlib.contextmanager
def nonsense(node: Node) -> Iterator[None]:
    """The file is none for the length of the context."""
    file = node.folder / "ckptfs.toml"
    good = file.read_text()
    file.write_text("nonsense")
    try:
        yield
    finally:
        file.write_text(good)


def reload(node: Node) -> dict[str, Any]:
    return json.loads(node.here("reload", "--json").stdout)


def test_reload_applies_changeable_settings(
    node: Node, small: Path, uri_of: Callable[[Path], str]
) -> None:
    path = node.here("attach", uri_of(small)).stdout.strip()
    weights = Path(path, "layers/0/weights.bin")
    with weights.open("rb") as held:
        assert held.read() == (small / "layers/0/weights.bin").read_bytes()
        daemon = node.status()["pid"]
        node.configure(attachments_max=1, read_deadline_s=5.0, connections_max=2)
        changed = reload(node)["changed"]
        assert changed == ["read_deadline_s", "connections_max", "attachments_max"]
        other = small.parent / "other"
        other.mkdir()
        (other / "x").write_text("x")
        said = node.here("attach", uri_of(other), check=False).stderr
        assert "attachments_max" in said
        node.configure()
        node.here("reload")
        node.here("attach", uri_of(other))
        assert node.status()["pid"] == daemon
        held.seek(0)
        assert held.read(5) == weights.read_bytes()[:5]
    assert node.here("reload").stdout == "reloaded: nothing has changed\n"


def test_a_smaller_cache_holds_at_once(
    node: Node, small: Path, uri_of: Callable[[Path], str]
) -> None:
    path = node.here("attach", uri_of(small)).stdout.strip()
    weights = Path(path, "layers/0/weights.bin")
    content = weights.read_bytes()
    wait_until(lambda: node.status()["cache_bytes"] > 3_000_000)
    node.configure(cache_bytes_max="2MB")
    assert reload(node)["changed"] == ["cache_bytes_max"]
    status = node.status()
    assert status["cache_bytes_max"] == 2_000_000
    assert status["cache_bytes"] <= 2_000_000
    assert weights.read_bytes() == content
    wait_until(lambda: node.status()["cache_bytes"] <= 2_000_000)


def test_an_invalid_file_changes_nothing(node: Node) -> None:
    node.here("mount")
    file = node.folder / "ckptfs.toml"
    good = file.read_text()
    node.expected_in_log += ["was not reloaded"]
    for text, error in (
        ("linger_s =", "not valid TOML"),
        (good + "lingers_s = 3\n", "did you mean 'linger_s'"),
        (good.replace("linger_s = 0.2", 'linger_s = "x"'), "linger_s must be a number of seconds"),
        (good + '[store.prod]\nuri = "ftp://x"\n', r"store.prod.uri"),
    ):
        file.write_text(text)
        with pytest.raises(ckptfs.ConfigError, match=error), _connected(node) as connection:
            connection.ask(Reload())
    file.write_text(good + "connections_max = 3\n")
    assert reload(node)["changed"] == ["connections_max"]


def _connected(node: Node) -> _connection.Connection:
    return _connection.connect_to(str(node.socket), 10)


def test_reload_names_the_settings_that_a_mount_keeps(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.here("mount")
    node.configure(read_ahead_kb=512, allow_other=True, linger_s=0.3)
    node.expected_in_log += ["not reloaded, because a mount keeps them"]
    said = node.here("reload", check=False)
    assert said.stdout == "reloaded: linger_s\n"
    assert "keeps its read_ahead_kb, allow_other; to change that, run ckptfs umount" in said.stderr
    assert said.returncode == 1


def test_a_hangup_of_the_keeper_is_a_reload(node: Node) -> None:
    node.here("mount")
    keeper = keeper_of(node)
    node.configure(attachments_max=7)
    os.kill(keeper, signal.SIGHUP)
    wait_until(lambda: "reloaded: attachments_max" in node.log())
    node.expected_in_log += ["was not reloaded"]
    with nonsense(node):
        os.kill(keeper, signal.SIGHUP)
        wait_until(lambda: "was not reloaded" in node.log())


def test_the_next_daemon_begins_with_what_was_reloaded(node: Node) -> None:
    """And the keeper, which has settings of its own to take in; an invalid file is none."""
    node.here("mount")
    node.configure(cache_bytes_max=123_456_789, spare=True)
    reload(node)
    daemon, keeper = node.status()["pid"], keeper_of(node)
    wait_until(lambda: len(_children_of(keeper)) == 2)  # the spare one
    node.expected_in_log += ["was killed by signal 9"]
    with nonsense(node):
        os.kill(daemon, signal.SIGKILL)
        wait_until(lambda: _pid_now(node) not in (0, daemon))
    assert node.status()["cache_bytes_max"] == 123_456_789


def _children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _pid_now(node: Node) -> int:
    try:
        with _connected(node) as connection:
            return connection.status().pid
    except (ckptfs.CkptfsError, ConnectionError):
        return 0


def test_flags_win_over_a_file_that_is_reloaded(node: Node) -> None:
    node.here("mount", "--cache-size", "5GB", "--set", "linger_s=0.5")
    assert node.status()["cache_bytes_max"] == 5_000_000_000
    node.configure(cache_bytes_max=7, linger_s=0.7, attachments_max=9)
    assert reload(node)["changed"] == ["attachments_max"]
    said = node.here("mount", "--cache-size", "6GB", check=False).stderr
    assert "already running" in said
    node.here("restart")
    assert node.status()["cache_bytes_max"] == 5_000_000_000


def test_reload_takes_a_store_from_users_who_lost_it(
    node: Node, s3: S3Server, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = small.parent.parent.name
    source = f'{{ file = "{key_file(node, s3)}" }}'
    table = store_toml(f"s3://{bucket}/run", s3.endpoint, source)
    configure(node, table, f"users = [{ALICE}]\n", allow_other=True)
    let_others_in(node.folder)
    node.here("mount")
    mine = node.here("attach", "prod:checkpoint").stdout.strip()
    theirs = node.folder / "theirs.toml"
    theirs.touch()

    def alice_attaches() -> None:
        monkeypatch.setenv("CKPTFS_CONFIG", str(theirs))
        with client.attached(Location("named", "checkpoint", {"store": "prod"}), pinned=True):
            pass

    as_user(ALICE, alice_attaches)
    (hers,) = [a["path"] for a in node.status()["attachments"] if a["uid"] == ALICE]
    held = os.open(f"{hers}/config.json", os.O_RDONLY)
    try:
        configure(node, table, allow_other=True)
        node.expected_in_log += ["is not for uid"]
        assert reload(node) == {
            "changed": ["store"],
            "unchanged": [],
            "ended": ["prod:checkpoint"],
        }
        wait_until(lambda: not os.path.exists(hers))
        assert Path(mine, "config.json").read_text() == '{"layers": 1}'
    finally:
        os.close(held)
    with pytest.raises(AssertionError, match="StoreNotAllowed"):
        as_user(ALICE, alice_attaches)


def test_a_store_that_gets_other_credentials_uses_them(
    node: Node, s3: S3Server, small: Path
) -> None:
    bucket = small.parent.parent.name
    first = store_toml(f"s3://{bucket}/run", s3.endpoint, f'{{ file = "{key_file(node, s3)}" }}')
    configure(node, first)
    path = node.here("attach", "prod:checkpoint").stdout.strip()
    weights = Path(path, "layers/0/weights.bin")
    (node.folder / "wrong").write_text('{"AccessKeyId": "a", "SecretAccessKey": "b"}')
    (node.folder / "wrong").chmod(0o600)
    configure(node, first.replace('/keys"', '/wrong"'))
    assert reload(node)["changed"] == ["store"]
    node.expected_in_log += ["access denied"]
    with pytest.raises(PermissionError):
        weights.read_bytes()
    configure(node, first)
    reload(node)
    assert weights.read_bytes() == (small / "layers/0/weights.bin").read_bytes()


def test_only_root_and_the_daemons_own_user_reload(node: Node) -> None:
    node.configure(allow_other=True)
    let_others_in(node.folder)
    node.here("mount")

    def alice_asks() -> None:
        with _connected(node) as connection, pytest.raises(ckptfs.AccessDenied):
            connection.ask(Reload())

    as_user(ALICE, alice_asks)
