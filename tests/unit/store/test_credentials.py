"""Credentials of stores: what files may say, who may read them, what happens when they change."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ckptfs._model.kinds import Kind
from ckptfs._model.location import Location
from ckptfs._model.manifest import Listing
from ckptfs._model.named_store import CredentialSource
from ckptfs._store.credentials import SecretFile, environment_secrets
from ckptfs._store.resolve import open_store
from ckptfs._store.s3.keys import keys_for
from ckptfs._store.s3.options import S3Options
from ckptfs._store.s3.sigv4 import Keys
from ckptfs._store.wrappers import RenewedStore
from ckptfs.errors import AccessDenied

INI = """
[default]
aws_access_key_id = k%1
aws_secret_access_key = s=1
[other]
aws_access_key_id = k2
aws_secret_access_key = s2
aws_session_token = t2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    return path


def write(path: Path, text: str) -> None:
    """As a rotation does it: another file under the same name."""
    beside = path.with_suffix(".new")
    beside.touch(mode=0o600)
    beside.write_text(text)
    beside.rename(path)


def keys_json(number: int) -> str:
    return json.dumps({"Version": 1, "AccessKeyId": f"k{number}", "SecretAccessKey": f"s{number}"})


@pytest.mark.parametrize(
    ("kind", "text", "profile", "secrets"),
    [
        ("s3", INI, "", {"access_key": "k%1", "secret_key": "s=1"}),
        ("s3", INI, "other", {"access_key": "k2", "secret_key": "s2", "session_token": "t2"}),
        (
            "s3",
            INI.replace("[default]", "[one]").partition("[other]")[0],
            "",
            {"access_key": "k%1", "secret_key": "s=1"},
        ),
        ("s3", keys_json(1), "", {"access_key": "k1", "secret_key": "s1"}),
        (
            "s3",
            '{"access_key": "k", "secret_key": "s", "session_token": "t"}',
            "",
            {"access_key": "k", "secret_key": "s", "session_token": "t"},
        ),
        ("gcs", '{"access_token": "t"}', "", {"access_token": "t"}),
        ("azure", '{"sas_token": "t", "x": "y"}', "", {"sas_token": "t"}),
        ("azure", "[default]\naccount_key = k", "", {"account_key": "k"}),
    ],
)
def test_credentials_file_is_parsed(
    file: Path, kind: Kind, text: str, profile: str, secrets: dict[str, str]
) -> None:
    file.write_text(text)
    assert SecretFile(str(file), profile, kind).current() == secrets


@pytest.mark.parametrize(
    ("text", "profile", "error"),
    [
        ("", "", r"section \[default\]"),
        ("SECRET", "", "neither"),
        ("{SECRET", "", "neither"),
        (INI, "third", r"section \[third\]"),
        (
            "[default]\naws_access_key_id = SECRET",
            "",
            "set aws_access_key_id and aws_secret",
        ),
        ('{"AccessKeyId": "SECRET", "SecretAccessKey": 5}', "", "incomplete"),
        ('{"a": ' * 10_000, "", "neither"),
    ],
)
def test_credentials_file_with_invalid_content_is_refused(
    file: Path, text: str, profile: str, error: str
) -> None:
    file.write_text(text)
    with pytest.raises(AccessDenied, match=error) as caught:
        SecretFile(str(file), profile, "s3").current()
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644, 0o620, 0o666])
def test_a_file_for_others_is_refused(file: Path, mode: int) -> None:
    file.write_text(INI)
    file.chmod(mode)
    with pytest.raises(AccessDenied, match="chmod 600"):
        SecretFile(str(file), "", "s3").current()


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
def test_a_file_for_its_owner_and_a_group_is_not(file: Path, mode: int) -> None:
    file.write_text(INI)
    file.chmod(mode)
    assert SecretFile(str(file), "", "s3").current()


def test_credentials_path_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name, error in (("fifo", "not a regular file"), ("", "Is a directory"), ("x", "No such")):
        with pytest.raises(AccessDenied, match=error):
            SecretFile(str(tmp_path / name), "", "s3").current()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_credentials_file_of_another_user_is_refused(file: Path) -> None:
    file.write_text(INI)
    os.chown(file, 65534, 65534)
    with pytest.raises(AccessDenied, match="another user"):
        SecretFile(str(file), "", "s3").current()


def test_a_relative_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    file.write_text(INI)
    with pytest.raises(AccessDenied, match="CREDENTIALS_DIRECTORY"):
        SecretFile("keys", "", "s3")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(file.parent))
    assert SecretFile("keys", "", "s3").current()


def test_a_file_that_changes(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(file, keys_json(1))
    secrets = SecretFile(str(file), "", "s3")
    assert secrets.current()["access_key"] == "k1"
    write(file, keys_json(2))
    assert secrets.current()["access_key"] == "k2"
    for spoil in (file.unlink, lambda: write(file, "{"), lambda: file.chmod(0o644)):
        caplog.clear()
        spoil()
        assert secrets.current()["access_key"] == "k2"
        assert secrets.current()["access_key"] == "k2"
        assert len(caplog.records) == 1  # said once
    write(file, keys_json(3))
    assert secrets.current()["access_key"] == "k3"


def test_keys_of_a_file(file: Path) -> None:
    write(file, keys_json(1))
    keys = keys_for(S3Options(), "x", CredentialSource(file=str(file)))
    first = keys.keys()
    assert first == Keys("k1", "s1")
    assert not keys.renew(first)
    write(file, keys_json(2))
    assert keys.renew(first)
    assert keys.keys() == Keys("k2", "s2")


def test_keys_of_a_profile_that_the_server_refuses(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    write(file, INI)
    keys = keys_for(S3Options(), "x", CredentialSource(profile="other"))
    first = keys.keys()
    assert first == Keys("k2", "s2", "t2")
    write(file, INI.replace("k2", "k3"))
    assert keys.keys() == first  # the server has not refused them
    assert keys.renew(first)
    assert keys.renew(first)  # another thread has been told of the same ones
    assert keys.keys() == Keys("k3", "s2", "t2")
    write(file, INI.replace("k2", "k4"))
    assert not keys.renew(keys.keys())  # too soon after the last look
    missing = keys_for(S3Options(), "prod:x", CredentialSource(profile="none"))
    with pytest.raises(AccessDenied, match="prod:x: cannot get AWS credentials"):
        missing.keys()


def test_the_environment() -> None:
    source = CredentialSource(environment="PROD_")
    environ = {"PROD_AWS_ACCESS_KEY_ID": "k", "PROD_AWS_SECRET_ACCESS_KEY": "s"}
    assert environment_secrets(source, "s3", environ) == {"access_key": "k", "secret_key": "s"}
    with pytest.raises(AccessDenied, match="PROD_AWS_ACCESS_KEY_ID and PROD_AWS_SECRET_ACCESS"):
        environment_secrets(source, "s3", {"AWS_ACCESS_KEY_ID": "k"})
    azure = {"PROD_AZURE_STORAGE_SAS_TOKEN": "t"}
    assert environment_secrets(source, "azure", azure) == {"sas_token": "t"}
    google = {"PROD_GOOGLE_OAUTH_ACCESS_TOKEN": "t"}
    assert environment_secrets(source, "gcs", google) == {"access_token": "t"}


class _Fake:
    """A store that only some secrets open."""

    name = "fake"

    def __init__(self, secrets: dict[str, str], good: list[str]) -> None:
        self._secrets = secrets
        self._good = good
        self.listed = 0

    def list(self, files_max: int) -> Listing:
        self.listed += 1
        if self._secrets["access_token"] not in self._good:
            raise AccessDenied("refused")
        return Listing([], [], [])


def test_renewed_store_is_reopened_when_its_file_changes(file: Path) -> None:
    write(file, '{"access_token": "one"}')
    good = ["one"]
    opened: list[_Fake] = []

    def open_with(secrets: dict[str, str]) -> Any:
        opened.append(_Fake(secrets, good))
        return opened[-1]

    store = RenewedStore(SecretFile(str(file), "", "gcs"), open_with)
    store.list(1)
    store.list(1)
    assert len(opened) == 1
    good[:] = ["two"]
    with pytest.raises(AccessDenied):
        store.list(1)
    assert opened[0].listed == 3  # what has not changed is not tried again
    write(file, '{"access_token": "two"}')
    store.list(1)
    assert [each.listed for each in opened] == [3, 1]


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("gcs", {}, '{"access_token": "t"}'),
        ("azure", {"account_name": "a"}, '{"account_key": "a2V5"}'),
        ("azure", {"account_name": "a"}, '{"sas_token": "sv=1&sig=t"}'),
    ],
)
def test_store_uses_credentials_of_its_file(
    file: Path, kind: Kind, options: dict[str, Any], text: str
) -> None:
    write(file, text)
    place = Location(kind, "bucket/run", options)
    open_store(place, 1.0, CredentialSource(file=str(file))).close()
