"""Named stores: their tables, their places and their users."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs._config.load import load_config
from ckptfs._daemon.control.named_stores import Known, Peer, Stores, known_stores
from ckptfs._model.location import Location, StoreRef
from ckptfs._model.named_store import StoreTable, is_uri, named_location, split_named
from ckptfs._model.uris import parse_uri
from ckptfs._store.kinds import daemon_rights_for
from ckptfs.errors import (
    ConfigError,
    LocationError,
    ProtocolError,
    StoreNotAllowed,
    UnknownStore,
)

OTHER = os.geteuid() + 4242
TABLE = StoreTable("s3://bucket/runs", users=[OTHER], groups=[77])


def load(tmp_path: Path, text: str) -> dict[str, StoreTable]:
    file = tmp_path / "ckptfs.toml"
    file.write_text(text)
    return load_config({"CKPTFS_CONFIG": str(file)}).store


# -- tables


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('[store]\nprod = "s3://b"', "toml:2: store.prod must be a table"),
        ("store = 5", "toml:1: store must be tables"),
        (
            '[store.prod]\nuri = "s3://b"\nendpont = "x"',
            "'endpont' in [store.prod]; did you mean 'endpoint'",
        ),
        ("[store.prod]\n", "uri"),
        ("[store.prod]\nuri = 5", "store.prod.uri"),
        ('[store.prod]\nuri = "s3://b"\ncredentials = "defalt"', "store.prod.credentials"),
        (
            '[store.prod]\nuri = "s3://b"\ncredentials = { fil = "x" }',
            "'fil' in [store.prod.credentials]; did you mean 'file'",
        ),
        (
            '[store.prod]\nuri = "s3://b"\ncredentials = { file = "x", environment = "Y_" }',
            "one of file",
        ),
        ('[store.prod]\nuri = "s3://b"\ncredentials = {}', "one of file"),
        ('[store.prod]\nuri = "s3://b"\ncredentials = { environment = "A B" }', "not the prefix"),
        (
            '[store.prod]\nuri = "gs://b"\ncredentials = { profile = "x" }',
            "only s3:// has",
        ),
        ('[store.prod]\nuri = "hdfs://h/x"\ncredentials = "anonymous"', "no anonymous"),
        ('[store.prod]\nuri = "gs://b"\nrequester_pays = true', "a store at gs:// has no such key"),
        (
            '[store.prod]\nuri = "file:///x"\nverify_certificates = false',
            "file:// has no such key",
        ),
        ('[store.prod]\nuri = "s3://b"\nca_dir = "x"', "ca_dir: must be an absolute path"),
        ('[store.prod]\nuri = "s3a://b"', "must begin with"),
        ('[store.prod]\nuri = "s3://b c"', "not the name of a bucket"),
        ('[store.prod]\nuri = "file:///x"\ncredentials = { file = "x" }', "takes no credentials"),
        ('[store.prod]\nuri = "file:///x"\nusers = "*"', "other users may not use this store"),
        ('[store.prod]\nuri = "gs://b"\nregion = "x"', "region: a store at gs:// has no such key"),
        ('[store.prod]\nuri = "s3://b"\nca_file = "x"', "absolute"),
        ('[store.prod]\nuri = "s3://key:SECRET@b/x"', "holds no credentials"),
        ('[store.prod]\nuri = "s3://b/x?region=y"', "no query"),
        ('[store.prod]\nuri = "s3://b/../x"', "'.' or '..' between slashes"),
        ('[store.prod]\nuri = "s3://b//x"', "leads out"),
        ('[store.prod]\nuri = "s3://b/%2e%2e/x"', "leads out"),
        ('[store.prod]\nuri = "s3:///x"', "no bucket"),
        ('[store.prod]\nuri = "abfss://c/x"', "must be like abfss://"),
        ('[store.prod]\nuri = "file://host/x"', "must be like file:///"),
        ('[store.prod]\nuri = "https://x/y"', "must begin with"),
        ('[store.prod]\nuri = "s3://b"\nendpoint = "ftp://x"', "https://host:port"),
        ('[store.prod]\nuri = "s3://b"\nendpoint = "http://u:SECRET@x"', "https://host:port"),
        ('[store.s3]\nuri = "s3://b"', "is the beginning of URIs"),
        ('[store."a/b"]\nuri = "s3://b"', "not the name of a store"),
        ('[store.prod]\nuri = "s3://b"\nusers = "alice"', "store.prod.users"),
        ('[store.prod]\nuri = "s3://b"\nusers = [1.5]', "store.prod.users"),
    ],
)
def test_a_table_that_cannot_be_meant_is_an_error(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=r"ckptfs\.toml:[123]: ") as caught:
        load(tmp_path, text)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "below", "place"),
    [
        (
            {"uri": "s3://b/a b/", "endpoint": "http://h:9000", "region": "eu"},
            "x",
            Location(
                "s3",
                "b/a b/x",
                {"region": "eu", "scheme": "http", "endpoint_override": "h:9000"},
            ),
        ),
        ({"uri": "s3://b"}, "", Location("s3", "b")),
        ({"uri": "s3://b/%25"}, "x", Location("s3", "b/%/x")),
        (
            {"uri": "s3://b", "credentials": "anonymous", "endpoint": "h"},
            "x",
            Location("s3", "b/x", {"scheme": "https", "endpoint_override": "h", "anonymous": True}),
        ),
        (
            {"uri": "s3://b/run#2", "endpoint": "HTTP://H:80/a/", "requester_pays": True},
            "x",
            Location(
                "s3",
                "b/run#2/x",
                {"scheme": "http", "endpoint_override": "h/a", "requester_pays": True},
            ),
        ),
        (
            {
                "uri": "s3://b",
                "endpoint": "https://s3.eu-west-3.amazonaws.com",
                "force_virtual_addressing": True,
                "ca_file": "/f",
                "ca_dir": "/d",
                "verify_certificates": False,
            },
            "x",
            Location(
                "s3",
                "b/x",
                {
                    "region": "eu-west-3",
                    "force_virtual_addressing": True,
                    "tls_ca_file_path": "/f",
                    "tls_ca_dir_path": "/d",
                    "tls_verify_certificates": False,
                },
            ),
        ),
        ({"uri": "gs://b/r"}, "x", Location("gcs", "b/r/x")),
        (
            {"uri": "gs://b/r", "credentials": "anonymous", "endpoint": "http://h:1"},
            "x",
            Location(
                "gcs", "b/r/x", {"anonymous": True, "endpoint_override": "h:1", "scheme": "http"}
            ),
        ),
        (
            {"uri": "abfss://c@acc.dfs.core.windows.net/r", "endpoint": "http://h:10000/acc"},
            "x",
            Location(
                "azure",
                "c/r/x",
                {
                    "account_name": "acc",
                    "blob_storage_authority": "h:10000",
                    "blob_storage_scheme": "http",
                    "dfs_storage_authority": "h:10000",
                    "dfs_storage_scheme": "http",
                },
            ),
        ),
        (
            {"uri": "abfss://c@acc.dfs.core.windows.net/r", "credentials": "anonymous"},
            "x",
            Location("azure", "c/r/x", {"account_name": "acc", "anonymous": True}),
        ),
        (
            {"uri": "abfss://c@acc.dfs.core.windows.net/r"},
            "x",
            Location("azure", "c/r/x", {"account_name": "acc"}),
        ),
        (
            {"uri": "hdfs://nn:8020/r"},
            "x",
            Location("hdfs", "/r/x", {"host": "nn", "port": 8020}),
        ),
        ({"uri": "file:///data"}, "x/y", Location("local", "/data/x/y")),
    ],
)
def test_where_a_name_leads(table: dict[str, Any], below: str, place: Location) -> None:
    found = StoreTable(**table).location("prod", below)
    assert msgspec.structs.replace(found, store=None) == place
    assert found.uri == f"prod:{below}"
    assert found.identity == place.identity
    assert parse_uri(place.uri) == place
    further = msgspec.structs.replace(found, path=f"{found.path}/z")
    assert further.uri == f"prod:{below}/z".replace(":/", ":")


@given(st.text(max_size=30))
def test_whatever_is_asked_for_stays_below_the_store(below: str) -> None:
    table = StoreTable("s3://bucket/runs")
    try:
        path = table.location("prod", below).path
    except LocationError:
        return
    assert path == "bucket/runs" or path.startswith("bucket/runs/")
    assert os.path.normpath(path) == path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("prod:run7/x", ("prod", "run7/x")),
        ("prod:run7/", ("prod", "run7")),
        ("prod:", ("prod", "")),
        ("prod:a:b", ("prod", "a:b")),
        ("prod://run7", None),
        ("s3://bucket/x", None),
        ("s3:bucket", None),
        ("file:/x", None),
        ("hdfs:/x", None),
        ("/a:b", None),
        ("./prod:run7", None),
        ("run7/a:b", None),
        ("", None),
    ],
)
def test_what_is_a_name(text: str, found: tuple[str, str] | None) -> None:
    assert split_named(text) == found
    assert is_uri(text) == (found is not None or "://" in text)


# -- who may use them


@pytest.mark.parametrize(
    ("peer", "allowed"),
    [
        (Peer(0, 0), True),
        (Peer(os.geteuid(), 5), True),
        (Peer(OTHER, 5), True),
        (Peer(OTHER + 1, 77), True),
        (Peer(OTHER + 1, 5, frozenset([6, 77])), True),
        (Peer(OTHER + 1, 5, frozenset([6])), False),
    ],
)
def test_users_and_groups(peer: Peer, allowed: bool) -> None:
    stores = Stores(known_stores({"prod": TABLE}))
    asked = named_location("prod", "x", None)
    if allowed:
        assert stores.find(asked, peer) == TABLE.location("prod", "x")
    else:
        with pytest.raises(StoreNotAllowed, match=f"not for uid {peer.uid}"):
            stores.find(asked, peer)


def test_by_default_a_store_is_for_nobody_else() -> None:
    stores = Stores(known_stores({"prod": StoreTable("s3://bucket")}))
    with pytest.raises(StoreNotAllowed):
        stores.find(named_location("prod", "x", None), Peer(OTHER, OTHER))
    everybody = Stores(known_stores({"prod": StoreTable("s3://bucket", users="*")}))
    everybody.find(named_location("prod", "x", None), Peer(OTHER, OTHER))


def test_names_of_users_are_looked_up(caplog: pytest.LogCaptureFixture) -> None:
    table = StoreTable("s3://bucket", users=["root", "no such user"], groups=["root"])
    known = known_stores({"prod": table})["prod"]
    assert known == Known(table, frozenset([0]), frozenset([0]))
    assert "no user or group 'no such user'" in caplog.text


def test_a_store_like_that_of_the_client() -> None:
    stores = Stores(known_stores({"prod": TABLE}))
    same = msgspec.structs.replace(TABLE, users=[])
    assert stores.find(named_location("prod", "x", same), Peer(0, 0)).store is not None
    for other in (
        StoreTable("s3://bucket/other"),
        StoreTable("s3://bucket/runs", endpoint="http://x"),
        StoreTable("s3://bucket/runs", credentials="anonymous"),
    ):
        with pytest.raises(UnknownStore, match="like yours"):
            stores.find(named_location("prod", "x", other), Peer(0, 0))


@pytest.mark.parametrize(
    ("location", "error"),
    [
        (Location("s3", "bucket/x", {}, {}, StoreRef("prod", "bucket")), ProtocolError),
        (Location("named", "x", {"store": "prod"}, {}, StoreRef("prod", "")), ProtocolError),
        (Location("named", "x", {"store": "prod", "region": "y"}), LocationError),
        (Location("named", "x", {"store": "prod"}, {"access_key": "y"}), LocationError),
        (Location("named", "x", {"store": 5}), LocationError),
        (Location("named", "x"), LocationError),
        (Location("named", "x", {"store": "other"}), UnknownStore),
        (Location("named", "../x", {"store": "prod"}), LocationError),
        (Location("named", "x/..", {"store": "prod"}), LocationError),
        (Location("named", "/x", {"store": "prod"}), LocationError),
    ],
)
def test_what_a_client_may_not_say(location: Location, error: type[Exception]) -> None:
    stores = Stores(known_stores({"prod": TABLE}))
    with pytest.raises(error):
        stores.find(location, Peer(0, 0))


def test_a_location_that_was_looked_up_holds_as_long_as_its_table() -> None:
    opened: list[object] = []

    def open_with(*arguments: object) -> Any:
        opened.append(arguments)

    stores = Stores(known_stores({"prod": TABLE}), open_with)
    place = stores.find(named_location("prod", "x", None), Peer(0, 0))
    stores.open(place, 1.0, OTHER)
    assert opened == [(place, 1.0, OTHER, "default")]
    assert stores.still_for(place, OTHER, OTHER)
    assert not stores.still_for(place, OTHER + 1, OTHER)
    stores.known = known_stores({"prod": StoreTable("s3://elsewhere/runs", users="*")})
    assert not stores.still_for(place, OTHER, OTHER)
    for known in (stores.known, {}):
        stores.known = known
        with pytest.raises(LocationError, match="no longer what it was"):
            stores.open(place, 1.0, OTHER)


def test_a_named_location_is_nothing_by_itself() -> None:
    assert daemon_rights_for(named_location("prod", "x", None)) == "own identity"
