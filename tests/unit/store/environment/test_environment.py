"""A setting of the caller in a standard place is used, or refused by name."""

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fsspec import AbstractFileSystem
from pyarrow import fs as pafs

from ckptfs._model.kinds import Kind
from ckptfs._model.location import Location
from ckptfs._store.builders import NAMESPACE
from ckptfs._store.describe import NotDescribable, describe
from ckptfs._store.environment.azure import parse_connection_string
from ckptfs._store.environment.draft import mount_namespace
from ckptfs._store.environment.resolve import completed, connected, explained, known_variables
from ckptfs._store.filesystems import wrapped
from ckptfs._store.kinds import KINDS
from ckptfs._store.portable import carried
from ckptfs._store.resolve import open_store
from ckptfs.errors import AccessDenied, LocationError

KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "S3CR3T"}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty home directory."""
    (tmp_path / ".aws").mkdir()
    return {"HOME": str(tmp_path)}


def config(home: Mapping[str, str], text: str, credentials: str = "") -> None:
    folder = Path(home["HOME"], ".aws")
    (folder / "config").write_text(text)
    if credentials:
        (folder / "credentials").write_text(credentials)


def s3(environ: Mapping[str, str], path: str = "bucket/run", **options: Any) -> Location:
    return completed(Location("s3", path, options), environ)


def of_package(package: str, name: str, **options: Any) -> Any:
    body = {"__module__": f"{package}.core", "protocol": package, "cachable": False}
    return wrapped(type(name, (AbstractFileSystem,), body)(**options))


# -- endpoints


@pytest.mark.parametrize(
    ("environ", "text", "endpoint"),
    [
        ({"AWS_ENDPOINT_URL_S3": "http://s3:1", "AWS_ENDPOINT_URL": "http://all:1"}, "", "s3:1"),
        ({"AWS_ENDPOINT_URL": "http://all:1"}, "endpoint_url = http://profile:1", "all:1"),
        ({}, "endpoint_url = http://profile:1", "profile:1"),
        (
            {},
            "services = mine\nendpoint_url = http://profile:1\n"
            "[services mine]\ns3 =\n  endpoint_url = http://service:1",
            "service:1",
        ),
        (
            {"AWS_ENDPOINT_URL": "http://all:1", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
            "",
            "",
        ),
        ({}, "endpoint_url = http://p:1\nignore_configured_endpoint_urls = true", ""),
        (
            {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false"},
            "endpoint_url = http://p:1\nignore_configured_endpoint_urls = true",
            "p:1",
        ),
        ({"AWS_ENDPOINT_URL": "HTTP://Host:80/"}, "", "host"),
    ],
)
def test_endpoints_of_s3_are_those_of_botocore(
    home: dict[str, str], environ: dict[str, str], text: str, endpoint: str
) -> None:
    config(home, f"[default]\n{text}\n")
    options = s3({**home, **KEYS, **environ}).options
    assert options.get("endpoint_override", "") == endpoint
    assert options.get("scheme") == ("http" if endpoint else None)


def test_an_endpoint_of_the_uri_comes_first(home: dict[str, str]) -> None:
    environ = {**home, **KEYS, "AWS_ENDPOINT_URL": "http://all:1"}
    place = Location("s3", "b/run", {"endpoint_override": "mine:1", "scheme": "http"})
    assert completed(place, environ).options["endpoint_override"] == "mine:1"
    [said] = [each for each in explained(place, environ) if each.place == "AWS_ENDPOINT_URL"]
    assert said.use == "ignored"


@pytest.mark.parametrize(
    ("environ", "text", "host"),
    [
        ({"AWS_USE_DUALSTACK_ENDPOINT": "true"}, "", "s3.dualstack.eu-west-3.amazonaws.com"),
        ({"AWS_USE_FIPS_ENDPOINT": "true"}, "", "s3-fips.eu-west-3.amazonaws.com"),
        ({}, "s3 =\n  use_accelerate_endpoint = true", "s3-accelerate.amazonaws.com"),
        (
            {},
            "s3 =\n  use_accelerate_endpoint = true\n  use_dualstack_endpoint = true",
            "s3-accelerate.dualstack.amazonaws.com",
        ),
    ],
)
def test_amazons_other_endpoints(
    home: dict[str, str], environ: dict[str, str], text: str, host: str
) -> None:
    config(home, f"[default]\nregion = eu-west-3\n{text}\n")
    options = s3({**home, **KEYS, **environ}).options
    assert (options["endpoint_override"], options["force_virtual_addressing"]) == (host, True)


def test_an_endpoint_that_needs_a_region_is_refused_by_name(home: dict[str, str]) -> None:
    with pytest.raises(LocationError, match=r"AWS_USE_FIPS_ENDPOINT: .* set AWS_REGION"):
        s3({**home, **KEYS, "AWS_USE_FIPS_ENDPOINT": "true"})
    config(home, "[default]\nservices = gone\n")
    with pytest.raises(LocationError, match=r"services: there is no section .services gone."):
        s3({**home, **KEYS})


# -- profiles


def test_the_callers_profile_says_region_style_and_keys(home: dict[str, str]) -> None:
    config(
        home,
        "[profile a]\nregion = eu-west-3\ns3 =\n  addressing_style = virtual\n",
        "[a]\naws_access_key_id = k\naws_secret_access_key = S3CR3T\n",
    )
    location = s3({**home, "AWS_PROFILE": "a"})
    assert location.options["region"] == "eu-west-3"
    assert location.options["force_virtual_addressing"] is True
    assert location.options["profile"] == "a"
    assert location.options["credentials_file"] == f"{home['HOME']}/.aws/credentials"
    assert location.options[NAMESPACE] == mount_namespace()
    assert location.secrets == {}
    open_store(location, 1).close()
    keys = s3({**home, **KEYS, "AWS_PROFILE": "a"})
    assert keys.options["region"] == "eu-west-3"
    assert "profile" not in keys.options
    assert keys.secrets["access_key"] == "k"
    assert "profile" not in s3({**home, "AWS_PROFILE": "a"}, anonymous=True).options


def test_environment_default_profile_is_used_if_present(home: dict[str, str]) -> None:
    assert "profile" not in s3(home).options
    config(home, "[default]\nregion = eu-west-3\n")
    assert "profile" not in s3(home).options  # it has no keys
    config(home, "[default]\ncredential_process = /bin/keys\n")
    assert s3(home).options["profile"] == "default"


@pytest.mark.parametrize("name", ["AWS_PROFILE", "AWS_DEFAULT_PROFILE"])
def test_environment_missing_profile_is_an_error(home: dict[str, str], name: str) -> None:
    for _ in range(2):  # without files, and with some
        with pytest.raises(AccessDenied, match=f"{name}: there is no profile 'gone' in .*config"):
            s3({**home, name: "gone"})
        config(home, "[profile other]\nregion = x\n")


def test_files_elsewhere(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "c").write_text("[profile a]\nregion = eu-west-3\nrole_arn = arn:r\n")
    environ = {**home, "AWS_CONFIG_FILE": str(tmp_path / "c"), "AWS_PROFILE": "a"}
    assert s3(environ).options["config_file"] == str(tmp_path / "c")
    (tmp_path / "c").write_text("not an ini file")
    with pytest.raises(AccessDenied, match="AWS configuration: "):
        s3(environ)


def test_a_profile_that_asks_for_a_code_is_refused_by_name(home: dict[str, str]) -> None:
    config(home, "[profile a]\nrole_arn = arn:r\nsource_profile = a\nmfa_serial = arn:mfa\n")
    with pytest.raises(AccessDenied, match=r"profile a: mfa_serial: .*get-session-token"):
        s3({**home, "AWS_PROFILE": "a"})


def test_half_a_key_is_refused_by_name(home: dict[str, str]) -> None:
    with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID: AWS_SECRET_ACCESS_KEY is not set"):
        s3({**home, "AWS_ACCESS_KEY_ID": "k"})


def test_a_web_identity_and_a_container(home: dict[str, str], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("S3CR3T")
    environ = {**home, "AWS_WEB_IDENTITY_TOKEN_FILE": str(token)}
    with pytest.raises(AccessDenied, match="AWS_ROLE_ARN is not set"):
        s3(environ)
    options = s3({**environ, "AWS_ROLE_ARN": "arn:r", "AWS_ROLE_SESSION_NAME": "me"}).options
    assert options["web_identity_token_file"] == str(token)
    assert (options["role_arn"], options["session_name"]) == ("arn:r", "me")
    missing = {**environ, "AWS_ROLE_ARN": "arn:r", "AWS_WEB_IDENTITY_TOKEN_FILE": "/gone"}
    with pytest.raises(AccessDenied, match="AWS_WEB_IDENTITY_TOKEN_FILE: '/gone' cannot be read"):
        s3(missing)
    container = {
        **home,
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://169.254.170.23/v1/credentials",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": "S3CR3T",
    }
    location = s3(container)
    assert location.options["container_credentials_uri"] == "http://169.254.170.23/v1/credentials"
    assert location.secrets == {"container_token": "S3CR3T"}
    open_store(location, 1).close()


# -- proxies


@pytest.mark.parametrize(
    ("environ", "proxy"),
    [
        ({"HTTP_PROXY": "http://p:1"}, "http://p:1"),
        ({"http_proxy": "http://low:1", "HTTP_PROXY": "http://up:1"}, "http://low:1"),
        ({"http_proxy": "", "HTTP_PROXY": "http://up:1"}, ""),
        ({"HTTPS_PROXY": "http://p:1"}, ""),
        ({"ALL_PROXY": "http://p:1"}, ""),
        ({"HTTP_PROXY": "p:1"}, "http://p:1"),
        ({"HTTP_PROXY": "//p:1"}, "http://p:1"),
        ({"HTTP_PROXY": "http://me:S3CR3T@p:1"}, "http://me:S3CR3T@p:1"),
        ({"HTTP_PROXY": "http://p:1", "REQUEST_METHOD": "GET"}, ""),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "*"}, ""),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "a, .corp.test"}, ""),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "corp.test"}, ""),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "s3.corp.test:9000"}, ""),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "s3.corp.test:9001"}, "http://p:1"),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "orp.test,10.0.0.0/8"}, "http://p:1"),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "*", "no_proxy": "x"}, "http://p:1"),
    ],
)
def test_proxies_are_those_of_botocore(
    home: dict[str, str], environ: dict[str, str], proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"endpoint_override": "s3.corp.test:9000", "scheme": "http"}
    location = s3({**home, **KEYS, **environ}, **place)
    assert location.secrets.get("proxy", "") == proxy
    assert "S3CR3T" not in location.uri + location.identity + repr(location)
    from botocore.httpsession import ProxyConfiguration
    from botocore.utils import get_environ_proxies

    for name in [*KEYS, "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"]:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    url = "http://s3.corp.test:9000/bucket"
    theirs = ProxyConfiguration(get_environ_proxies(url)).proxy_url_for(url)
    assert (theirs or "") == proxy


def test_no_proxy_may_have_networks(home: dict[str, str]) -> None:
    environ = {**home, **KEYS, "HTTP_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8,[fd00::]/8"}
    for host, is_direct in (("10.1.2.3:9000", True), ("11.1.2.3:9000", False)):
        location = s3(environ, endpoint_override=host, scheme="http")
        assert ("proxy" not in location.secrets) == is_direct


def test_a_proxy_of_another_kind_is_refused_by_name(home: dict[str, str]) -> None:
    with pytest.raises(LocationError, match="HTTPS_PROXY: a proxy of kind socks5") as caught:
        s3({**home, **KEYS, "HTTPS_PROXY": "socks5://me:S3CR3T@p:1"})
    assert "S3CR3T" not in str(caught.value)


def test_the_other_kinds_know_one_proxy_for_all(home: dict[str, str]) -> None:
    environ = {**home, "ALL_PROXY": "http://p:1"}
    for location in (
        Location("gcs", "b/run", {"anonymous": True}),
        Location("azure", "b/run", {"account_name": "me"}),
        Location("hf", "me/model"),
        Location("http", "https://host/run"),
    ):
        assert completed(location, environ).secrets["proxy"] == "http://p:1"
        assert "proxy" not in completed(location, {**environ, "NO_PROXY": "*"}).secrets
    assert completed(Location("local", "/run"), environ) == Location("local", "/run")


# -- certificates


def test_certificates_in_the_order_in_which_they_count(
    home: dict[str, str], tmp_path: Path
) -> None:
    names = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
    environ = {**home, **KEYS}
    for name in names:
        (tmp_path / name).touch()
        environ[name] = str(tmp_path / name)
    for name in names:
        location = s3(environ)
        assert location.options["tls_ca_file_path"] == str(tmp_path / name)
        assert location.options[NAMESPACE] == mount_namespace()
        plain = s3(environ, endpoint_override="h:1", scheme="http")
        assert "tls_ca_file_path" not in plain.options
        del environ[name]
    assert "tls_ca_file_path" not in s3(environ).options
    config(home, f"[default]\nca_bundle = {tmp_path / 'SSL_CERT_FILE'}\n")
    assert s3(environ).options["tls_ca_file_path"] == str(tmp_path / "SSL_CERT_FILE")


def test_a_directory_of_certificates(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environ = {**home, **KEYS, "SSL_CERT_DIR": str(tmp_path)}
    assert s3(environ).options["tls_ca_dir_path"] == str(tmp_path)
    both = s3({**environ, "SSL_CERT_FILE": str(tmp_path / "file")}).options
    assert {"tls_ca_dir_path", "tls_ca_file_path"} <= both.keys()
    given = s3(environ, tls_ca_file_path="/mine").options
    assert given["tls_ca_file_path"] == "/mine"
    assert "tls_ca_dir_path" not in given
    unverified = s3({**environ, "AWS_CA_BUNDLE": "/gone"}, tls_verify_certificates=False)
    assert not {"tls_ca_dir_path", "tls_ca_file_path"} & unverified.options.keys()


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_certificates_that_cannot_be_read_are_refused_by_name(
    home: dict[str, str], name: str
) -> None:
    with pytest.raises(LocationError, match=f"{name}: '/gone' cannot be read"):
        s3({**home, **KEYS, name: "/gone"})


def test_a_named_store_takes_proxy_and_certificates_only(
    home: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "ca").touch()
    environ = {
        **home,
        **KEYS,
        "AWS_CA_BUNDLE": str(tmp_path / "ca"),
        "HTTPS_PROXY": "http://p:1",
        "AWS_REGION": "eu-west-3",
        "AWS_ENDPOINT_URL": "http://all:1",
    }
    location = connected(Location("s3", "b/run", {"endpoint_override": "h:1"}), environ)
    assert location.secrets == {"proxy": "http://p:1"}
    assert location.options == {
        "endpoint_override": "h:1",
        "tls_ca_file_path": str(tmp_path / "ca"),
    }


# -- constructor options


def test_proxy_options_of_pyarrow(home: dict[str, str]) -> None:
    for given in (
        "http://me:S3CR3T@p:3128",
        {"scheme": "http", "host": "p", "port": 3128, "username": "me", "password": "S3CR3T"},
    ):
        filesystem = pafs.S3FileSystem(region="eu-west-3", proxy_options=given)
        location = describe(filesystem, "b/run", {**home, "HTTPS_PROXY": "http://other:1"})
        assert location.secrets == {"proxy": "http://me:S3CR3T@p:3128"}
        open_store(location, 1).close()


@pytest.mark.parametrize(
    "options",
    [
        {"background_writes": False},
        {"default_metadata": {"a": "b"}},
        {"allow_bucket_creation": True},
        {"allow_bucket_deletion": True},
        {"allow_delayed_open": True},
        {"check_directory_existence_before_creation": True},
    ],
)
def test_options_for_writing_change_nothing(home: dict[str, str], options: dict[str, Any]) -> None:
    plain = describe(pafs.S3FileSystem(region="eu-west-3"), "b/run", {**home, **KEYS})
    assert (
        describe(pafs.S3FileSystem(region="eu-west-3", **options), "b/run", {**home, **KEYS})
        == plain
    )


def test_timeouts_of_pyarrow_are_kept(home: dict[str, str]) -> None:
    filesystem = pafs.S3FileSystem(region="eu-west-3", request_timeout=55, connect_timeout=44)
    location = describe(filesystem, "b/run", {**home, **KEYS})
    assert (location.options["request_timeout"], location.options["connect_timeout"]) == (55, 44)
    open_store(location, 1).close()


def test_options_that_cannot_be_kept_are_refused_by_name() -> None:
    class HadoopFileSystem:
        def __reduce__(self) -> Any:
            options = {"host": "h", "port": 1, "extra_conf": {"a": "b"}, "replication": 5}
            return None, (options,)

    with pytest.raises(NotDescribable, match="a HadoopFileSystem with extra_conf"):
        describe(HadoopFileSystem(), "/run", {})
    from datetime import timedelta

    filesystem = pafs.GcsFileSystem(anonymous=True, retry_time_limit=timedelta(seconds=3))
    with pytest.raises(NotDescribable, match="a GcsFileSystem with retry_time_limit"):
        describe(filesystem, "b/run", {})


def test_options_of_s3fs_are_kept(home: dict[str, str], tmp_path: Path) -> None:
    filesystem = of_package(
        "s3fs",
        "S3FileSystem",
        key="k",
        secret="S3CR3T",
        requester_pays=True,
        default_block_size=5,
        client_kwargs={"endpoint_url": "https://h/sub/", "verify": "/ca.pem"},
        config_kwargs={
            "s3": {"addressing_style": "virtual"},
            "signature_version": "s3v4",
            "proxies": {"https": "http://p:1"},
            "read_timeout": 50,
            "retries": {"max_attempts": 3},
        },
    )
    location = describe(filesystem, "b/run", home)
    assert location.secrets == {
        "access_key": "k",
        "secret_key": "S3CR3T",
        "proxy": "http://p:1",
    }
    assert location.options == {
        "requester_pays": True,
        "scheme": "https",
        "endpoint_override": "h/sub",
        "force_virtual_addressing": True,
        "tls_ca_file_path": "/ca.pem",
        "request_timeout": 50,
        NAMESPACE: mount_namespace(),
    }
    config(home, "[profile a]\naws_access_key_id = k\n")
    profile = of_package("s3fs", "S3FileSystem", profile="a", client_kwargs={"verify": False})
    location = describe(profile, "b/run", {**home, **KEYS})
    assert location.options["profile"] == "a"  # an explicit one comes before keys, as in botocore
    assert location.options["tls_verify_certificates"] is False
    assert not location.secrets


# -- Google, Azure, Hugging Face


def test_googles_settings(home: dict[str, str], tmp_path: Path) -> None:
    def gcs(environ: dict[str, str], **options: Any) -> Location:
        return completed(Location("gcs", "b/run", options), {**home, **environ})

    emulator = gcs({"STORAGE_EMULATOR_HOST": "localhost:4443"})
    assert emulator.options == {
        "endpoint_override": "localhost:4443",
        "scheme": "http",
        "anonymous": True,
    }
    key = tmp_path / "key.json"
    key.write_text('{"type": "service_account", "private_key": "S3CR3T"}')
    location = gcs({"GOOGLE_APPLICATION_CREDENTIALS": str(key)})
    assert location.options["application_credentials"] == str(key)
    other = carried(location)
    assert other is not None
    assert other.secrets == {"service_account_key": key.read_text()}
    assert "application_credentials" not in other.options
    assert gcs({"GOOGLE_APPLICATION_CREDENTIALS": str(key)}, anonymous=True).options == {
        "anonymous": True,
    }
    with pytest.raises(AccessDenied, match="GOOGLE_APPLICATION_CREDENTIALS: '/gone' cannot"):
        gcs({"GOOGLE_APPLICATION_CREDENTIALS": "/gone"})
    key.write_text('{"type": "authorized_user"}')
    with pytest.raises(AccessDenied, match="is not the key of a service account"):
        carried(location)
    gcloud = tmp_path / ".config/gcloud"
    gcloud.mkdir(parents=True)
    (gcloud / "application_default_credentials.json").write_text("{}")
    assert gcs({}).options["application_credentials"].endswith("_default_credentials.json")  # type: ignore[union-attr]


def test_azures_settings(home: dict[str, str]) -> None:
    def azure(environ: dict[str, str], account: str = "me", kind: Kind = "azure") -> Location:
        options = {"account_name": account} if account else {}
        return completed(Location(kind, "box/run", options), {**home, **environ})

    account = {"AZURE_STORAGE_ACCOUNT_NAME": "me"}
    assert azure({"AZURE_STORAGE_ACCOUNT_KEY": "x"}).secrets == {"account_key": "x"}
    assert azure({"AZURE_STORAGE_KEY": "x", **account}).secrets == {"account_key": "x"}
    assert azure({"AZURE_STORAGE_SAS_TOKEN": "?sv=1"}).secrets == {"sas_token": "sv=1"}
    other = {"AZURE_STORAGE_ACCOUNT_NAME": "other", "AZURE_STORAGE_ACCOUNT_KEY": "x"}
    assert azure(other).secrets == {}
    client = {"AZURE_CLIENT_ID": "c", "AZURE_TENANT_ID": "t", "AZURE_CLIENT_SECRET": "s"}
    location = azure(client)
    assert location.options == {"account_name": "me", "client_id": "c", "tenant_id": "t"}
    assert location.secrets == {"client_secret": "s"}
    federated = {**client, "AZURE_FEDERATED_TOKEN_FILE": "/token"}
    del federated["AZURE_CLIENT_SECRET"]
    assert azure(federated).options["federated_token_file"] == "/token"
    text = "AccountName=me;AccountKey=x"
    assert azure({"AZURE_STORAGE_CONNECTION_STRING": text}, "", "az") == Location(
        "azure", "box/run", {"account_name": "me"}, {"account_key": "x"}
    )
    assert azure({"AZURE_STORAGE_CONNECTION_STRING": text}, "other").secrets == {}


@pytest.mark.parametrize(
    ("text", "name", "secrets", "options"),
    [
        ("AccountName=me;AccountKey=a=b==", "me", {"account_key": "a=b=="}, {}),
        ("accountname=me;SharedAccessSignature=?sv=1", "me", {"sas_token": "sv=1"}, {}),
        ("BlobEndpoint=https://me.blob.core.windows.net/", "me", {}, {}),
        (
            "AccountName=me;EndpointSuffix=core.chinacloudapi.cn;DefaultEndpointsProtocol=https",
            "me",
            {},
            {
                "blob_storage_authority": ".blob.core.chinacloudapi.cn",
                "dfs_storage_authority": ".dfs.core.chinacloudapi.cn",
            },
        ),
        (
            "AccountName=me;BlobEndpoint=http://127.0.0.1:10000/me",
            "me",
            {},
            {
                "blob_storage_authority": "127.0.0.1:10000",
                "dfs_storage_authority": "127.0.0.1:10000",
                "blob_storage_scheme": "http",
                "dfs_storage_scheme": "http",
            },
        ),
    ],
)
def test_connection_strings(
    text: str, name: str, secrets: dict[str, str], options: dict[str, str]
) -> None:
    assert parse_connection_string(text) == (name, secrets, options)


def test_the_emulators_connection_string() -> None:
    found = parse_connection_string("UseDevelopmentStorage=true")
    assert found.name == "devstoreaccount1"
    assert found.options["blob_storage_authority"] == "127.0.0.1:10000"


@pytest.mark.parametrize(
    "text",
    ["AccountKey=S3CR3T", "S3CR3T", "AccountName=me;BlobEndpoint=https://S3CR3T.example/a/b"],
)
def test_connection_strings_that_are_malformed_show_no_secret(text: str) -> None:
    with pytest.raises(LocationError) as caught:
        parse_connection_string(text)
    assert "S3CR3T" not in str(caught.value)


def test_hugging_faces_settings(home: dict[str, str], tmp_path: Path) -> None:
    def hf(environ: dict[str, str]) -> Location:
        return completed(Location("hf", "me/model"), {**home, **environ})

    assert hf({}).secrets == {}
    assert hf({"HF_TOKEN": "t", "HF_ENDPOINT": "https://hub"}) == Location(
        "hf", "me/model", {"endpoint": "https://hub"}, {"token": "t"}, implied=("endpoint",)
    )
    (tmp_path / "token").write_text("kept\n")
    assert hf({"HF_HOME": str(tmp_path)}).secrets == {"token": "kept"}
    assert hf({"HF_TOKEN_PATH": str(tmp_path / "token")}).secrets == {"token": "kept"}
    quiet = {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    assert hf(quiet).secrets == {}
    with pytest.raises(LocationError, match="HF_HUB_OFFLINE: it forbids requests"):
        hf({"HF_HUB_OFFLINE": "1"})


# -- the list


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nothing_is_dropped_silently(kind: Kind, home: dict[str, str], tmp_path: Path) -> None:
    """Each variable that concerns a kind is in the list when it is set."""
    (tmp_path / "file").write_text("{}")
    values = {"AWS_PROFILE": "a", "AWS_DEFAULT_PROFILE": "a", "HF_HUB_OFFLINE": "0"}
    path = "https://host/run" if kind == "http" else "box/run"
    for name in known_variables(kind):
        is_file = name.endswith(("_FILE", "_BUNDLE", "_PATH", "_CREDENTIALS"))
        value = values.get(name, str(tmp_path / "file") if is_file else "http://value")
        environ = {**home, "AZURE_STORAGE_ACCOUNT": "value", name: value}
        settings = explained(Location(kind, path), environ)
        assert any(name in (each.place, *each.why.split()) for each in settings), name


def test_secrets_are_in_no_setting(home: dict[str, str]) -> None:
    environ = {
        **home,
        "AWS_ACCESS_KEY_ID": "S3CR3T",
        "AWS_SECRET_ACCESS_KEY": "S3CR3T",
        "AWS_SESSION_TOKEN": "S3CR3T",
        "HTTPS_PROXY": "http://me:S3CR3T@p:1",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": "S3CR3T",
    }
    given = Location("s3", "b/run", {}, {"access_key": "S3CR3T", "secret_key": "S3CR3T"})
    for place in (given, Location("s3", "b/run")):
        assert "S3CR3T" not in str(explained(place, environ))


# -- contents in place of paths


def test_a_profile_travels_as_its_keys_of_now(home: dict[str, str], tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("-----BEGIN CERTIFICATE-----")
    config(home, "", "[a]\naws_access_key_id = k\naws_secret_access_key = S3CR3T\n")
    environ = {**home, "AWS_PROFILE": "a", "AWS_CA_BUNDLE": str(ca)}
    other = carried(s3(environ))
    assert other is not None
    assert other.secrets == {
        "access_key": "k",
        "secret_key": "S3CR3T",
        "tls_ca_pem": "-----BEGIN CERTIFICATE-----",
    }
    assert other.options == {}
    assert carried(other) is None
    assert carried(s3({**home, **KEYS})) is None


def test_contents_that_cannot_travel_are_refused_by_name(
    home: dict[str, str], tmp_path: Path
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("x" * 20_000)
    with pytest.raises(AccessDenied, match=r"ca.pem is longer than the 16384 bytes"):
        carried(s3({**home, **KEYS, "AWS_CA_BUNDLE": str(ca)}))
    systems = ssl.get_default_verify_paths().openssl_capath
    if os.path.isdir(systems):
        other = carried(s3({**home, **KEYS, "SSL_CERT_DIR": systems}))
        assert other is not None
        assert not {"tls_ca_dir_path", NAMESPACE} & other.options.keys()
    with pytest.raises(AccessDenied, match=r"tls_ca_dir_path .* cannot be sent"):
        carried(s3({**home, **KEYS, "SSL_CERT_DIR": str(tmp_path)}))
