"""Other users do not read with the daemon's credentials, identity or rights by default."""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.bench import SETTINGS, Bench
from support.fakes import InlineOffload
from support.rig import rig_in
from trio.testing import MockClock

from ckptfs._client.connection import _located  # pyright: ignore[reportPrivateUsage]
from ckptfs._model.kinds import Kind
from ckptfs._model.location import Location
from ckptfs._model.protocol.replies import Attached
from ckptfs._model.protocol.requests import Attach, Request
from ckptfs._store.builders import NAMESPACE
from ckptfs._store.environment.draft import mount_namespace
from ckptfs._store.kinds import KINDS, daemon_rights_for
from ckptfs._store.resolve import open_store
from ckptfs.errors import AccessDenied, LocationError, RightsNotLent

OTHER = os.geteuid() + 4242

BRINGS_ALL: list[tuple[Kind, dict[str, Any], dict[str, str]]] = [
    ("s3", {"anonymous": True}, {}),
    ("s3", {}, {"access_key": "k", "secret_key": "s"}),
    ("s3", {"role_arn": "arn:r"}, {"access_key": "k", "secret_key": "s"}),
    ("gcs", {"anonymous": True}, {}),
    ("gcs", {}, {"access_token": "t"}),
    ("gcs", {}, {"service_account_key": "{}"}),
    ("azure", {"account_name": "a"}, {"account_key": "k"}),
    ("azure", {"account_name": "a"}, {"sas_token": "t"}),
    ("azure", {"account_name": "a", "anonymous": True}, {}),
    ("azure", {"client_id": "c", "tenant_id": "t"}, {"client_secret": "s"}),
    ("hf", {}, {"token": "t"}),
    ("http", {}, {}),
]
TAKES_SOME: list[tuple[Kind, dict[str, Any], dict[str, str]]] = [
    ("s3", {}, {}),
    ("s3", {"anonymous": False}, {}),
    ("s3", {}, {"access_key": "", "secret_key": "s"}),
    ("s3", {}, {"secret_key": "s", "session_token": "t"}),
    ("s3", {"role_arn": "arn:r"}, {}),
    ("s3", {"tls_ca_file_path": "/root/x"}, {"access_key": "k", "secret_key": "s"}),
    ("gcs", {}, {}),
    ("gcs", {"anonymous": True, "target_service_account": "a"}, {}),
    ("gcs", {"application_credentials": "/root/x"}, {}),
    ("gcs", {"tls_ca_file_path": "/root/x", "anonymous": True}, {}),
    ("azure", {"account_name": "a", "tls_ca_file_path": "/root/x"}, {"account_key": "k"}),
    ("azure", {"client_id": "c", "tenant_id": "t", "federated_token_file": "/root/x"}, {}),
    ("azure", {"account_name": "a"}, {}),
    ("azure", {"account_name": "a", "client_id": "c"}, {"account_key": "k"}),
    ("azure", {"account_name": "a", "client_id": "c"}, {}),
    ("azure", {"account_name": "a"}, {"client_secret": "s"}),
    ("hf", {}, {}),
    ("hf", {}, {"token": ""}),
    ("az", {"account_name": "a"}, {"account_key": "k"}),
    ("az", {"anon": True}, {}),
    ("hdfs", {"host": "h", "user": "root"}, {}),
    ("local", {}, {}),
    ("private", {}, {}),
]


def test_every_kind_is_decided() -> None:
    assert {kind for kind, _, _ in TAKES_SOME} == {*KINDS, "private"} - {"http"}
    assert all(
        not daemon_rights_for(Location(kind, "p", options, secrets))
        for kind, options, secrets in BRINGS_ALL
    )


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    settings = SETTINGS | {"attachments_max": 100}
    async with rig_in(tmp_path, InlineOffload(), **settings) as rig:
        yield Bench(rig)


@pytest.mark.parametrize(("kind", "options", "secrets"), TAKES_SOME)
async def test_what_is_the_daemons_own_is_not_lent(
    bench: Bench,
    autojump_clock: MockClock,
    kind: Kind,
    options: dict[str, Any],
    secrets: dict[str, str],
) -> None:
    place = Location(kind, "bucket/run", options, secrets)
    with pytest.raises(AccessDenied, match="lend_daemon_rights") as refused:
        await bench.attach(place, OTHER)
    assert "\n" not in str(refused.value)
    assert not bench.opened  # the daemon has opened no store
    for uid in {0, os.geteuid()}:
        await bench.attach(place, uid)


@pytest.mark.parametrize(("kind", "options", "secrets"), BRINGS_ALL)
async def test_who_brings_credentials_needs_none(
    bench: Bench,
    autojump_clock: MockClock,
    kind: Kind,
    options: dict[str, Any],
    secrets: dict[str, str],
) -> None:
    await bench.attach(Location(kind, "bucket/run", options, secrets), OTHER)


async def test_lending_can_be_configured(tmp_path: Path, autojump_clock: MockClock) -> None:
    settings = SETTINGS | {"lend_daemon_rights": True}
    async with rig_in(tmp_path, InlineOffload(), **settings) as rig:
        await Bench(rig).attach(Location("local", "/tmp/x"), OTHER)


@pytest.mark.parametrize("region", ["evil.host/", "x.evil.host:80#", "a b", "r" * 65, "ü"])
def test_a_region_leads_to_no_other_host(region: str) -> None:
    """Two users with different servers behind the same name would share cached bytes."""
    place = Location("s3", "bucket/run", {"region": region}, {"access_key": "k"})
    with pytest.raises(LocationError, match="not a region"):
        open_store(place, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"profile": "p", "config_file": "/home/other/config"},
        {"web_identity_token_file": "/token", "role_arn": "arn:r"},
        {"container_credentials_uri": "http://127.0.0.1/"},
        {"tls_ca_file_path": "/ca.pem"},
    ],
)
async def test_files_of_another_user_are_never_read(
    tmp_path: Path, autojump_clock: MockClock, options: dict[str, Any]
) -> None:
    """A profile can name a program to run, which would have root's rights."""
    settings = SETTINGS | {"lend_daemon_rights": True}
    place = Location("s3", "bucket/run", options, {"access_key": "k", "secret_key": "s"})
    async with rig_in(tmp_path, InlineOffload(), **settings) as rig:
        bench = Bench(rig)
        with pytest.raises(RightsNotLent, match="does not read for uid"):
            await bench.attach(place, OTHER)
        assert not bench.opened
        await bench.attach(place, os.geteuid())


async def test_files_of_another_container_are_not_read(
    bench: Bench, autojump_clock: MockClock
) -> None:
    """The daemon would find other files under the same names."""
    here = {"profile": "p", NAMESPACE: mount_namespace()}
    await bench.attach(Location("s3", "bucket/here", here), os.geteuid())
    for uid in {0, os.geteuid()}:
        with pytest.raises(RightsNotLent, match="of another mount namespace"):
            await bench.attach(Location("s3", "b/x", {**here, NAMESPACE: "mnt:[1]"}), uid)


def test_a_client_sends_contents_to_a_daemon_that_reads_no_paths(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("-----BEGIN CERTIFICATE-----")
    place = Location("s3", "b/run", {"tls_ca_file_path": str(ca)}, {"access_key": "k"})
    asked: list[Location] = []
    attached = Attached(mount="/m", name="a", uri="", version="", files=0, size=0, skipped=0)

    def ask(request: Request[Attached]) -> Attached:
        assert isinstance(request, Attach)
        asked.append(request.location)
        if request.location.options:
            raise RightsNotLent("refused")
        return attached

    assert _located(Attach(location=place), ask) is attached
    assert asked[1].secrets["tls_ca_pem"] == ca.read_text()
    with pytest.raises(RightsNotLent, match="refused"):
        _located(Attach(location=Location("s3", "b/run", {"region": "x"})), ask)
