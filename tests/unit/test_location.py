"""A location names one directory, leads back to it as a URI, and never shows a secret."""

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs

from ckptfs._model.location import Location
from ckptfs._store.resolve import describe, filesystem_of, open_store
from ckptfs.errors import LocationError

SECRETS = {"access_key": "AKIDS3CR3T", "secret_key": "S3CR3TKEY", "session_token": "S3CR3TTOKEN"}

_names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cc", "Cs")),
    min_size=1,
    max_size=8,
).filter(lambda name: name not in (".", ".."))
_secrets = st.text("0123456789QXZ", min_size=12, max_size=20)
_kinds = st.sampled_from(["s3", "gcs", "azure", "hdfs", "local"])


def s3(path: str, **options: str) -> Location:
    return describe(pafs.S3FileSystem(**{"region": "eu-west-3", **options}), path, {})


@given(_kinds, st.lists(_names, min_size=1, max_size=3), _secrets)
def test_secrets_are_in_no_text_and_change_nothing(
    kind: str, names: list[str], secret: str
) -> None:
    path = "/".join(names)
    public = Location(kind, path, {"account_name": "me", "host": "h"})
    private = msgspec.structs.replace(public, secrets={"secret_key": secret})
    for text in (repr(private), str(private), private.uri, private.identity, private.name):
        assert secret not in text
    assert secret not in private.digest
    assert (private.identity, private.digest) == (public.identity, public.digest)
    assert private.uri == public.uri
    assert re.fullmatch(r"[0-9a-f]{12}", private.digest)
    assert re.fullmatch(r"[A-Za-z0-9_+=@-][A-Za-z0-9._+=@-]{0,99}", private.name)


@given(st.lists(_names, min_size=1, max_size=4), st.booleans())
def test_an_s3_uri_leads_back_to_the_place(names: list[str], plain: bool) -> None:
    path = "/".join(["bucket", *names])
    options = {"endpoint_override": "127.0.0.1:9000", "scheme": "http" if plain else "https"}
    location = s3(path, **options)
    filesystem, back = filesystem_of(location.uri)
    again = describe(filesystem, back, {})
    assert again.identity == location.identity
    assert again.uri == location.uri
    assert again.options["region"] == "eu-west-3"


@given(st.lists(_names, min_size=1, max_size=4))
def test_a_local_uri_leads_back_to_the_place(names: list[str]) -> None:
    location = Location("local", "/" + "/".join(names))
    filesystem, back = filesystem_of(location.uri)
    assert describe(filesystem, back, {}) == location


def test_identity_tells_stores_apart_but_not_ways_to_them() -> None:
    base = s3("bucket/a")
    assert s3("bucket/a/").identity == base.identity
    assert s3("bucket/a", region="us-east-1").identity == base.identity
    different = [
        s3("bucket/b"),
        s3("bucket/a", endpoint_override="host:1"),
        s3("bucket/a", endpoint_override="host:2"),
        s3("bucket/a", scheme="http"),
        Location("gcs", "bucket/a"),
        Location("local", "/bucket/a"),
    ]
    assert len({x.identity for x in [base, *different]}) == 7
    assert len({x.digest for x in [base, *different]}) == 7
    assert s3("bucket/b").store_identity == base.store_identity
    assert s3("bucket/a", scheme="http").store_identity != base.store_identity


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("bucket/run/step-5", "step-5"),
        ("bucket", "bucket"),
        ("", "checkpoint"),
        ("bucket/..", "checkpoint"),
        ("bucket/.hidden", "hidden"),
        ("bucket/a b\n/ü*", "__"),
        ("bucket/" + "x" * 300, "x" * 100),
    ],
)
def test_the_name_is_safe(path: str, name: str) -> None:
    assert Location("s3", path).name == name


def test_sub_trees_are_unwrapped() -> None:
    inner = pafs.S3FileSystem(region="eu-west-3", access_key="a", secret_key="b")
    outer = pafs.SubTreeFileSystem("run/", pafs.SubTreeFileSystem("bucket/deep", inner))
    location = describe(outer, "/step/", {})
    assert (location.kind, location.path) == ("s3", "bucket/deep/run/step")
    assert location == describe(inner, "bucket/deep/run/step", {})
    assert describe(outer, "", {}).path == "bucket/deep/run"


ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "envkey",
    "AWS_SECRET_ACCESS_KEY": "envsecret",
    "AWS_SESSION_TOKEN": "envtoken",
    "AWS_DEFAULT_REGION": "sa-east-1",
}


def test_the_callers_environment_is_taken_where_the_filesystem_has_no_credentials() -> None:
    location = describe(pafs.S3FileSystem(region="eu-west-3"), "bucket/a", ENVIRONMENT)
    assert location.secrets == {
        "access_key": "envkey",
        "secret_key": "envsecret",
        "session_token": "envtoken",
    }
    assert location.options["region"] == "eu-west-3"
    own = pafs.S3FileSystem(region="eu-west-3", access_key="mine", secret_key="too")
    assert describe(own, "bucket/a", ENVIRONMENT).secrets == {
        "access_key": "mine",
        "secret_key": "too",
    }
    anonymous = pafs.S3FileSystem(region="eu-west-3", anonymous=True)
    assert describe(anonymous, "bucket/a", ENVIRONMENT).secrets == {}
    assert describe(pafs.LocalFileSystem(), "/a", ENVIRONMENT).secrets == {}


def test_credentials_in_a_uri_become_secrets() -> None:
    uri = "s3://AKIDS3CR3T:S3CR3TKEY@bucket/a?region=eu-west-3&endpoint_override=h:1"
    location = describe(*filesystem_of(uri), {})
    assert location.secrets == {"access_key": "AKIDS3CR3T", "secret_key": "S3CR3TKEY"}
    assert "S3CR3T" not in location.uri + repr(location)


@pytest.mark.parametrize(
    "uri",
    [
        "relative/path",
        "",
        "ftp://host/a",
        "s3://AKIDS3CR3T:S3CR3TKEY@bucket/a?unknown=S3CR3T",
        "s3://AKIDS3CR3T:S3CR3T/KEY@bucket/a",
        "http://user:S3CR3T@host/a",
        "s3://bucket with space/a",
        "://",
    ],
)
def test_what_is_no_place_is_one_line_without_secrets(uri: str) -> None:
    with pytest.raises(LocationError) as caught:
        describe(*filesystem_of(uri), {})
    assert "\n" not in str(caught.value)
    assert "S3CR3T" not in str(caught.value)


def test_a_filesystem_that_cannot_be_described_is_named() -> None:
    class Handler(pafs.FileSystemHandler):
        pass

    Handler.__abstractmethods__ = frozenset()
    with pytest.raises(LocationError, match="cannot be mounted"):
        describe(pafs.PyFileSystem(Handler()), "/a", {})


@pytest.mark.parametrize(
    ("options", "secrets"),
    [
        ({"default_metadata": "x"}, {}),
        ({"proxy_options": "http://x"}, {}),
        ({}, {"region": "x"}),
        ({"secret_key": "S3CR3T"}, {}),
        ({}, {"__reduce__": "x"}),
        ({"retry_strategy": 1}, {}),
    ],
)
def test_options_that_are_not_on_the_list_are_refused(
    options: dict[str, str], secrets: dict[str, str]
) -> None:
    with pytest.raises(LocationError, match="unknown options") as caught:
        open_store(Location("s3", "bucket/a", options, secrets), 1)
    assert "S3CR3T" not in str(caught.value)


@pytest.mark.parametrize("options", [{"region": 5}, {"scheme": "gopher"}])
def test_options_of_a_wrong_kind_are_refused(options: dict[str, object]) -> None:
    location = Location("s3", "bucket/a", {"region": "x", **options}, SECRETS)
    with pytest.raises(LocationError) as caught:
        open_store(location, 1)
    assert "S3CR3T" not in str(caught.value)


def test_every_described_option_can_be_opened_again() -> None:
    filesystem = pafs.S3FileSystem(
        region="eu-west-3", endpoint_override="h:1", scheme="http", **SECRETS
    )
    location = describe(filesystem, "bucket/a", {})
    assert location.secrets == SECRETS
    open_store(location, 1).close()
    open_store(Location("local", "/"), 1).close()
