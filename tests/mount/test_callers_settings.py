"""The environment and profile of a process count for the checkpoints that it attaches.

The user who started the daemon, and the daemon's environment, make no difference.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Node
from mount.test_users import ALICE, as_user, let_others_in
from pyarrow import fs as pafs
from support.s3server import S3Server
from support.servers import Moto

import ckptfs
import ckptfs._store.portable
import ckptfs._store.s3.keys  # here, because other users may not read where it lies

pytestmark = [
    pytest.mark.mount,
    # Python 3.12 warns because pyarrow has threads; they hold nothing that the children need.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

CONTENT = '{"layers": 1}'


@pytest.fixture(autouse=True)
def home(node: Node, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with two profiles, of which the first has no right to anything."""
    for name in [*os.environ]:
        if name.startswith("AWS_") and name != "AWS_EC2_METADATA_DISABLED":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(node.folder))
    (node.folder / ".aws").mkdir()
    return node.folder


def write_profiles(home: Path, s3: S3Server, config: str = "") -> None:
    (home / ".aws" / "credentials").write_text(
        "[wrong]\naws_access_key_id = wrong\naws_secret_access_key = wrong\n"
        f"[right]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    (home / ".aws" / "config").write_text(config)


def bare_uri(s3: S3Server, folder: Path) -> str:
    """A URI without credentials."""
    path = folder.relative_to(s3.root)
    return f"s3://{path}?endpoint_override={s3.endpoint}&scheme=http&region=us-east-1"


def test_the_profile_is_that_of_who_attaches(
    node: Node, s3: S3Server, small: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profiles(home, s3)
    monkeypatch.setenv("AWS_PROFILE", "wrong")
    refused = node.here("attach", bare_uri(s3, small), check=False)
    assert refused.returncode == 1
    assert "access denied" in refused.stderr
    monkeypatch.setenv("AWS_PROFILE", "right")
    path = node.here("attach", bare_uri(s3, small)).stdout.strip()
    assert Path(path, "config.json").read_text() == CONTENT
    monkeypatch.setenv("AWS_PROFILE", "gone")
    refused = node.here("attach", bare_uri(s3, small), check=False)
    assert f"AWS_PROFILE: there is no profile 'gone' in {home}/.aws/config" in refused.stderr
    node.here("detach", path)


def test_the_endpoint_of_a_profile_is_used(
    node: Node, s3: S3Server, small: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = f"endpoint_url = http://{s3.endpoint}\n"
    write_profiles(home, s3, f"[profile right]\nregion = us-east-1\n{endpoint}")
    monkeypatch.setenv("AWS_PROFILE", "right")
    place = str(small.relative_to(s3.root))
    with ckptfs.Checkpoint(place, pafs.S3FileSystem()).as_directory(mode="mount") as path:
        assert Path(path, "config.json").read_text() == CONTENT


def test_an_attach_gives_a_running_attachment_new_keys(
    node: Node, s3: S3Server, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attach with keys that are refused leaves those that the attachment had."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    checkpoint = ckptfs.Checkpoint(bare_uri(s3, small))
    with checkpoint.as_directory() as path:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert node.here("attach", bare_uri(s3, small), check=False).returncode == 1
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
        monkeypatch.setenv("AWS_SESSION_TOKEN", "new")
        with checkpoint.as_directory() as again:
            assert again == path
            assert Path(path, "config.json").read_text() == CONTENT


@pytest.fixture
def shared_node(node: Node, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node whose daemon, run by root, serves other users."""
    node.configure(allow_other=True, linger_s=60.0)
    let_others_in(node.folder)
    node.here("mount")
    return node


def test_another_users_daemon_gets_keys_and_no_paths(
    shared_node: Node, s3: S3Server, small: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profiles(home, s3)
    monkeypatch.setenv("AWS_PROFILE", "right")
    for file in (home / ".aws").iterdir():
        os.chown(file, ALICE, ALICE)
    checkpoint = ckptfs.Checkpoint(
        str(small.relative_to(s3.root)),
        pafs.S3FileSystem(endpoint_override=s3.endpoint, scheme="http", region="us-east-1"),
    )

    def alice_attaches() -> None:
        with checkpoint.as_directory(mode="mount") as path:
            assert Path(path, "config.json").read_text() == CONTENT

    as_user(ALICE, alice_attaches)
    (attachment,) = shared_node.status()["attachments"]
    assert attachment["uid"] == ALICE
    shared_node.here("detach", "--force", attachment["path"])


# -- Amazon's token service


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    with Moto() as server:
        client = server.client()
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="run/config.json", Body=CONTENT.encode())
        yield server


@pytest.fixture
def attach(node: Node) -> Callable[[], None]:
    """Attaches the checkpoint at moto by the environment alone, and reads it."""

    def attach() -> None:
        checkpoint = ckptfs.Checkpoint("bucket/run", pafs.S3FileSystem())
        with checkpoint.as_directory(mode="mount") as path:
            assert Path(path, "config.json").read_text() == CONTENT

    return attach


def test_a_web_identity(
    moto: Moto, home: Path, attach: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "token").write_text("a token")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{moto.endpoint}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(home / "token"))
    attach()


def test_a_role_of_a_profile(
    moto: Moto, home: Path, attach: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".aws" / "config").write_text(
        f"[profile role]\nregion = us-east-1\nendpoint_url = http://{moto.endpoint}\n"
        "role_arn = arn:aws:iam::123456789012:role/reader\nsource_profile = keys\n"
        f"[profile keys]\naws_access_key_id = k\naws_secret_access_key = s\n"
        f"region = us-east-1\nendpoint_url = http://{moto.endpoint}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "role")
    attach()


def test_a_process_that_prints_keys(
    moto: Moto, home: Path, attach: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = '{"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "s"}'
    (home / "keys.json").write_text(keys)
    (home / ".aws" / "config").write_text(
        f"[default]\nregion = us-east-1\nendpoint_url = http://{moto.endpoint}\n"
        f"credential_process = cat {home}/keys.json\n"
    )
    attach()
