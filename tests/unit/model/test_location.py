"""A location names one directory, leads back to it as a URI, and never shows a secret."""

import re
import sys
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import HfFileSystem
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs

from ckptfs._model.kinds import Kind
from ckptfs._model.location import Location
from ckptfs._store.describe import NotDescribable, describe
from ckptfs._store.filesystems import filesystem_of, unwrapped, wrapped
from ckptfs._store.resolve import open_store
from ckptfs.errors import LocationError

SECRETS = {"access_key": "AKIDS3CR3T", "secret_key": "S3CR3TKEY", "session_token": "S3CR3TTOKEN"}

_names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cc", "Cs")),
    min_size=1,
    max_size=8,
).filter(lambda name: name not in (".", ".."))
_secrets = st.text("0123456789QXZ", min_size=12, max_size=20)
_KINDS: list[Kind] = ["s3", "gcs", "azure", "hdfs", "local"]
_kinds = st.sampled_from(_KINDS)


def s3(path: str, **options: str) -> Location:
    return describe(pafs.S3FileSystem(**{"region": "eu-west-3", **options}), path, {})


@given(_kinds, st.lists(_names, min_size=1, max_size=3), _secrets)
def test_secrets_are_in_no_text_and_change_nothing(
    kind: Kind, names: list[str], secret: str
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
def test_options_of_a_wrong_kind_are_refused(options: dict[str, Any]) -> None:
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


# -- fsspec


def of_package(package: str, name: str, *args: Any, **options: Any) -> Any:
    """A filesystem whose class is called so in that package, which need not be installed."""
    body = {"__module__": f"{package}.core", "protocol": package, "cachable": False}
    return wrapped(type(name, (AbstractFileSystem,), body)(*args, **options))


def s3fs(*args: Any, **options: Any) -> Any:
    return of_package("s3fs", "S3FileSystem", *args, **options)


def hf(**options: Any) -> Any:
    return wrapped(HfFileSystem(skip_instance_cache=True, **options))


def http(**options: Any) -> Any:
    return wrapped(HTTPFileSystem(skip_instance_cache=True, **options))


def adlfs(**options: Any) -> Any:
    return of_package("adlfs", "AzureBlobFileSystem", **options)


def test_s3fs_is_read_as_s3() -> None:
    filesystem = s3fs(
        key="AKIDS3CR3T",
        secret="S3CR3TKEY",
        token="S3CR3TTOKEN",
        endpoint_url="http://127.0.0.1:9000/",
        client_kwargs={"region_name": "eu-west-3"},
        use_listings_cache=False,
    )
    location = describe(filesystem, "bucket/a/", {})
    same = pafs.S3FileSystem(
        region="eu-west-3", endpoint_override="127.0.0.1:9000", scheme="http", **SECRETS
    )
    assert (location.kind, location.path, location.secrets) == ("s3", "bucket/a", SECRETS)
    assert location.identity == describe(same, "bucket/a", {}).identity
    assert location.options == {
        "region": "eu-west-3",
        "endpoint_override": "127.0.0.1:9000",
        "scheme": "http",
    }
    open_store(location, 1).close()


def test_s3fs_options_in_client_kwargs_and_the_environment() -> None:
    filesystem = s3fs(client_kwargs={"endpoint_url": "https://host", "region_name": "eu-west-3"})
    location = describe(filesystem, "bucket/a", ENVIRONMENT)
    assert location.options["endpoint_override"] == "host"
    assert location.options["scheme"] == "https"
    assert location.options["region"] == "eu-west-3"
    assert location.secrets["access_key"] == "envkey"
    anonymous = s3fs(anon=True, client_kwargs={"region_name": "eu-west-3"})
    location = describe(anonymous, "bucket/a", ENVIRONMENT)
    assert location.options["anonymous"] is True
    assert location.secrets == {}
    open_store(location, 1).close()


@pytest.mark.parametrize(
    "filesystem",
    [
        s3fs(key="S3CR3T"),  # half of a key
        s3fs("positional", endpoint_url="http://h:1"),
        s3fs(endpoint_url="http://h:1", session=object()),
        s3fs(endpoint_url="http://h:1", version_aware=True),
        s3fs(endpoint_url="http://h:1", s3_additional_kwargs={"SSECustomerKey": "S3CR3T"}),
        s3fs(endpoint_url="http://h:1", client_kwargs={"api_version": "1"}),
        s3fs(endpoint_url="http://h:1", config_kwargs={"client_cert": "/x"}),
        s3fs(endpoint_url="http://h:1", config_kwargs={"signature_version": "s3"}),
        s3fs(endpoint_url="http://h:1", config_kwargs={"s3": {"use_accelerate_endpoint": True}}),
        hf(token=False),
        hf(token=True),
        hf(block_size=5),
        http(client_kwargs={"headers": {"Authorization": "S3CR3T"}}),
        http(headers={"Authorization": "S3CR3T"}),
        adlfs(credential=object()),
        adlfs(account_name=object()),
        wrapped(MemoryFileSystem()),
        pafs._MockFileSystem(),
    ],
    ids=lambda filesystem: filesystem.type_name,
)
def test_what_no_location_can_say_is_not_described(filesystem: Any) -> None:
    with pytest.raises(NotDescribable) as caught:
        describe(filesystem, "bucket/a", {})
    assert "S3CR3T" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hugging_face_with_and_without_a_token() -> None:
    assert describe(hf(), "me/model/step", {}) == Location("hf", "me/model/step")
    location = describe(hf(token="S3CR3T", endpoint="https://hub"), "me/model", {})
    assert location == Location("hf", "me/model", {"endpoint": "https://hub"}, {"token": "S3CR3T"})
    assert location.uri == "hf://me/model?endpoint=https://hub"
    environment = {"HF_TOKEN": "envtoken", "HF_ENDPOINT": "https://other"}
    location = describe(hf(), "me/model", environment)
    assert location.options == {"endpoint": "https://other"}
    assert location.secrets == {"token": "envtoken"}
    location = describe(hf(token="S3CR3T", endpoint="https://hub"), "me/model", environment)
    assert location.secrets == {"token": "S3CR3T"}
    assert location.options == {"endpoint": "https://hub"}
    open_store(location, 1).close()


def test_adlfs_is_read_as_azure() -> None:
    location = describe(adlfs(account_name="me", account_key="S3CR3T"), "box/run/", {})
    public, secrets = {"account_name": "me"}, {"account_key": "S3CR3T"}
    assert location == Location("azure", "box/run", public, secrets)
    assert location.identity == describe(pafs.AzureFileSystem("me"), "box/run", {}).identity
    environment = {
        "AZURE_STORAGE_ACCOUNT_NAME": "env",
        "AZURE_STORAGE_SAS_TOKEN": "envtoken",
    }
    location = describe(adlfs(), "box/run", environment)
    assert location == Location(
        "azure", "box/run", {"account_name": "env"}, {"sas_token": "envtoken"}
    )
    anonymous = describe(adlfs(anon=True, account_name="me"), "box/run", environment)
    assert (anonymous.options["anonymous"], anonymous.secrets) == (True, {})
    assert anonymous.identity != location.identity
    with pytest.raises(LocationError, match="no storage account is named"):
        describe(adlfs(), "box/run", {})


def test_two_connection_strings_are_two_accounts() -> None:
    def of(account: str, more: str = "") -> Location:
        text = f"AccountName={account};AccountKey=S3CR3T;{more}"
        return describe(adlfs(connection_string=text), "box/run", {})

    assert of("one").identity != of("two").identity
    assert of("one").secrets == {"account_key": "S3CR3T"}
    assert of("one").identity == describe(pafs.AzureFileSystem("one"), "box/run", {}).identity
    assert of("one", "EndpointSuffix=core.chinacloudapi.cn").identity != of("one").identity


def test_http_paths_are_whole_urls() -> None:
    location = describe(http(), "https://host/run/", {})
    assert location == Location("http", "https://host/run")
    assert location.uri == "https://host/run"
    assert location.name == "run"
    assert describe(http(simple_links=False, encoded=True), "https://host/run", {}).options == {
        "encoded": True
    }
    for secret in ("https://me:S3CR3T@host/run", "https://S3CR3T@host/run", "http://h/r?t=S3CR3T"):
        with pytest.raises(LocationError, match="client_kwargs") as caught:
            describe(http(), secret, {})
        assert "S3CR3T" not in str(caught.value)
    open_store(location, 1).close()


@pytest.mark.parametrize("uri", ["hf://me/model/step 1", "https://host/a%20b/run"])
def test_a_uri_of_fsspec_leads_back_to_the_place(uri: str) -> None:
    filesystem: Any = {"hf": hf, "https": http}[uri.partition(":")[0]]()
    path = uri if uri.startswith("https") else uri.partition("://")[2]
    location = describe(filesystem, path, {})
    assert location.uri == uri
    assert describe(*filesystem_of(location.uri), {}) == location


def test_directories_of_all_kinds_are_unwrapped() -> None:
    inner = pafs.S3FileSystem(region="eu-west-3", access_key="a", secret_key="b")
    hub = wrapped(DirFileSystem(path="me/model", fs=HfFileSystem()))
    assert describe(pafs.SubTreeFileSystem("run", hub), "/step/", {}).path == "me/model/run/step"
    assert describe(hub, "", {}).path == "me/model"
    local = DirFileSystem(path="/deep", fs=DirFileSystem(path="/top", fs=LocalFileSystem()))
    assert describe(wrapped(local), "ckpt", {}) == Location("local", "/top/deep/ckpt")
    found, path = unwrapped(pafs.SubTreeFileSystem("run", wrapped(local)), "ckpt")
    assert isinstance(found, pafs.LocalFileSystem)
    assert path == "/top/deep/run/ckpt"
    memory = MemoryFileSystem()
    found, path = unwrapped(wrapped(DirFileSystem(path="/runs", fs=memory)), "ckpt/")
    assert (found.handler.fs, path) == (memory, "/runs/ckpt")
    assert unwrapped(inner, "bucket/a/") == (inner, "bucket/a")


def test_a_place_without_a_path_is_refused() -> None:
    for filesystem in (pafs.S3FileSystem(region="eu-west-3"), hf(), adlfs(account_name="me")):
        with pytest.raises(LocationError, match="is empty; give a bucket"):
            describe(filesystem, "/", {})


def test_what_only_a_private_daemon_has_cannot_be_opened_by_name() -> None:
    with pytest.raises(LocationError, match="only a private daemon"):
        open_store(Location("private", "bucket/a"), 1)


@pytest.mark.parametrize("kind", ["hf", "http", "az"])
def test_options_of_fsspec_that_are_not_on_the_list_are_refused(kind: Any) -> None:
    for options, secrets in (
        ({"client_kwargs": "x"}, {}),
        ({"target_protocol": "file"}, {}),
        ({}, {"headers": "S3CR3T"}),
    ):
        with pytest.raises(LocationError, match="unknown options") as caught:
            open_store(Location(kind, "https://host/a", options, secrets), 1)  # type: ignore[arg-type]
        assert "S3CR3T" not in str(caught.value)


def test_a_package_that_the_daemon_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(LocationError, match="the ckptfs daemon needs adlfs; install it"):
        open_store(Location("az", "box/a", {"account_name": "me"}), 1)


def test_every_described_option_of_gcs_and_azure_can_be_opened_again() -> None:
    soon = datetime.now(timezone.utc) + timedelta(hours=1)
    for filesystem in (
        pafs.GcsFileSystem(anonymous=True),
        pafs.GcsFileSystem(access_token="S3CR3T", credential_token_expiration=soon),
        pafs.AzureFileSystem("me", account_key="c2VjcmV0"),
        pafs.AzureFileSystem("me", sas_token="sv=1&sig=S3CR3T"),
        pafs.AzureFileSystem("me", client_id="i", client_secret="S3CR3T", tenant_id="t"),
    ):
        try:
            location = describe(filesystem, "bucket/a", {})
        except NotDescribable:
            continue  # it goes to a private daemon
        open_store(location, 1).close()
