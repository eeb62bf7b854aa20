"""ckptfs attaches the URI that a person types, or an error says how to write it.

ckptfs also attaches the URIs that it prints.
"""

import subprocess
import sys

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckptfs._model.location import Location
from ckptfs._model.named_store import named_location, split_named
from ckptfs._model.uris import parse_uri, shown_uri, with_parameters
from ckptfs.errors import LocationError

_keys = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda key: not key.endswith("/")
)
_ODD = ["#", " ", "[32, 16]", "(1)", "100%", "a%20b", "%", "a+b", "q?x=1", "a//b", "../a", "./a"]
_ODD += ["a/..", "/a", "//a", "a&scheme=https", "模型", "e\u0301", "\u00e9", "a\nb", "\t", "@a:b"]
_ODD += ["user:pw@x", "?anonymous=true", "\u202ex", "`\"'<>\\;|^{}$!*~", "a?"]

_PLACES: list[Location] = [
    Location("s3", "bucket"),
    Location("s3", "bucket", {"endpoint_override": "[::1]:9000/a/s3", "scheme": "http"}),
    Location("s3", "bucket", {"endpoint_override": "minio:9000", "scheme": "https"}),
    Location("s3", "bucket", {"scheme": "http", "anonymous": True, "requester_pays": True}),
    Location(
        "s3",
        "bucket",
        {
            "region": "eu-west-3",
            "force_virtual_addressing": True,
            "tls_ca_file_path": "/etc/c a/x&y?.pem",
            "tls_ca_dir_path": "/etc/#%20",
            "tls_verify_certificates": False,
            "role_arn": "arn:aws:iam::1:role/x+y",
            "session_name": "a b",
            "external_id": "x",
            "load_frequency": 60,
            "request_timeout": 2.5,
        },
    ),
    Location("gcs", "bucket"),
    Location("gcs", "bucket", {"endpoint_override": "127.0.0.1:4443", "scheme": "http"}),
    Location("gcs", "bucket", {"anonymous": True, "project_id": "p"}),
    Location("azure", "box", {"account_name": "me"}),
    Location("azure", "box", {"account_name": "me", "anonymous": True, "client_id": "i"}),
    Location("az", "box", {}),
    Location("az", "box", {"account_name": "me", "anon": True}),
]
for _blob, _dfs, _scheme in (
    ("127.0.0.1:10000", "127.0.0.1:10000", "http"),
    ("[::1]:10000", "[::1]:10000", "https"),
    ("azurite", "azurite", "http"),
    ("azurite", "azurite", "https"),
    ("gateway.example", "gateway.example", "https"),
    ("gateway.example/azure", "gateway.example/azure", "https"),
    (".blob.core.chinacloudapi.cn", ".dfs.core.chinacloudapi.cn", "https"),
    (".z1.blob.storage.azure.net", ".z1.dfs.storage.azure.net", "https"),
    (".blob.local:10000", ".dfs.local:10000", "http"),
    (".one.example", ".other.example", "https"),
    ("me.dfs.core.windows.net", "me.dfs.core.windows.net", "https"),
):
    _options: dict[str, str | int | float | bool] = {
        "account_name": "me",
        "blob_storage_authority": _blob,
        "dfs_storage_authority": _dfs,
    }
    if _scheme == "http":
        _options |= {"blob_storage_scheme": "http", "dfs_storage_scheme": "http"}
    _PLACES.append(Location("azure", "box", _options))


@pytest.mark.parametrize("place", _PLACES, ids=lambda place: place.uri)
def test_what_is_printed_is_attached_again(place: Location) -> None:
    for key in ("", *_ODD):
        location = msgspec.structs.replace(place, path=f"{place.path}/{key}".removesuffix("/"))
        again = parse_uri(location.uri)
        assert again == location
        assert again.identity == location.identity
        assert location.uri.isprintable()
        assert not set(location.uri) & set("# ")


@given(st.sampled_from(_PLACES), _keys)
def test_any_key_is_printed_so_that_it_can_be_attached_again(place: Location, key: str) -> None:
    location = msgspec.structs.replace(place, path=f"{place.path}/{key}")
    assert parse_uri(location.uri) == location


@given(_keys)
@example("a/../b")
def test_local_and_hdfs_uris_lead_back_to_the_place(key: str) -> None:
    local = Location("local", f"/{key}")
    assert parse_uri(local.uri) == local
    options = {"host": "nn", "port": 8020}
    hdfs = Location("hdfs", f"/{key}", {**options, "user": "me"})
    if {".", ".."} & set(key.split("/")):
        with pytest.raises(LocationError, match="without"):
            parse_uri(hdfs.uri)
    else:
        assert parse_uri(hdfs.uri) == hdfs


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("hdfs://nn:9000/a", "nn", 9000),
        ("hdfs://NN/a", "nn", 0),
        ("hdfs:///a", "default", 0),
        ("viewfs://cluster/a", "viewfs://cluster", 0),
    ],
)
def test_hosts_of_hdfs(text: str, host: str, port: int) -> None:
    location = parse_uri(text)
    assert location == Location("hdfs", "/a", {"host": host, "port": port})
    assert parse_uri(location.uri) == location
    older = Location("hdfs", "/a", {"host": f"hdfs://{host}", "port": port})
    if "://" not in host:  # as pyarrow has it
        assert older.identity == location.identity


_components = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="/"),
    min_size=1,
).filter(lambda name: name not in (".", ".."))


@given(st.lists(_components, max_size=4).map("/".join))
def test_a_named_store_takes_and_prints_paths_as_they_are(below: str) -> None:
    location = named_location("prod", below, None)
    assert location.uri == f"prod:{below}"
    if not below.startswith("//"):
        assert split_named(location.uri) == ("prod", below)


def test_what_is_below_a_place() -> None:
    assert parse_uri("s3://b/x").below("").uri == "s3://b/x"
    assert parse_uri("s3://b/x").below("a #1/b").uri == "s3://b/x/a%20%231/b"
    assert parse_uri("https://h/x").below("a #1/b?").uri == "https://h/x/a%20%231/b%3F"
    assert parse_uri("file:///").below("a").uri == "file:///a"
    assert named_location("prod", "run 7", None).below("a #1").uri == "prod:run 7/a #1"


# -- what is typed


@pytest.mark.parametrize("key", ["run#2/x", "h=[32, 16]", "100%/x", "5%off", "a+b c", "lr=(1, 2)"])
@pytest.mark.parametrize("more", ["", "?region=eu-west-3"])
def test_names_are_taken_as_they_are(key: str, more: str) -> None:
    assert parse_uri(f"s3://bucket/{key}{more}").path == f"bucket/{key}"
    assert parse_uri(f"gs://bucket/{key}").path == f"bucket/{key}"
    assert parse_uri(f"abfss://box@me.dfs.core.windows.net/{key}").path == f"box/{key}"
    assert parse_uri(f"file:///top/{key}").path == f"/top/{key}"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("s3://b", "b"),
        ("s3://b/", "b"),
        ("s3://b/run/", "b/run"),
        ("s3://b/a%20b", "b/a b"),
        ("s3://b/a%2Fb", "b/a/b"),
        ("s3://b/100%25", "b/100%"),
        ("s3://b/%e6%a8%a1", "b/模"),
        ("s3://b/a//b", "b/a//b"),
        ("s3://b//a", "b//a"),
        ("s3://b/%2E%2E/a", "b/../a"),
        ("s3://b/a%0Ab", "b/a\nb"),
        ("s3://b/e\u0301", "b/e\u0301"),
        ("s3://b/\u00e9", "b/\u00e9"),
        ("s3://b/@at:colon/x", "b/@at:colon/x"),
        ("s3://b/user:pw@x", "b/user:pw@x"),
        ("s3://b/run&scheme=https/x", "b/run&scheme=https/x"),
        ("s3://b/q%3Fx=1", "b/q?x=1"),
        ("gcs://b/x", "b/x"),
        ("abfs://box@me.dfs.core.windows.net/x", "box/x"),
        ("abfss://me.blob.core.windows.net/box/x", "box/x"),
        ("abfss://me.dfs.core.windows.net/box/x", "box/x"),
        ("abfss://me@box/x", "box/x"),
        ("file:/a/b", "/a/b"),
        ("file:///", "/"),
        ("file:///a/../b", "/a/../b"),
        ("hf://me/model/step 1%20?/", "me/model/step 1%20?"),
        ("https://HOST:443/a%20b/", "https://host/a%20b"),
        ("http://[::1]:80/a", "http://[::1]/a"),
    ],
)
def test_what_a_uri_names(text: str, path: str) -> None:
    assert parse_uri(text).path == path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3://b/q?x=1/ckpt", r"percent-encode it as %3F.*"),
        ("s3://b/what?", "%3F"),
        ("s3://b/a?b?region=x", "%3F"),
        ("s3://b/x?{S3CR3T}=1", r"begins parameters \(no known parameter follows"),
        ("s3://b/x?region", "parameter region has no value"),
        ("s3://b/x?regoin=eu", "unknown parameter 'regoin'; did you mean region.* known ones: "),
        ("s3://b/x?allow_bucket_creation=yes", "allow_bucket_creation: must be true or false"),
        ("s3://b/x?region=a&region=b", "parameter region is given twice"),
        ("s3://b/x?region=a/ckpt", "parameter region: must be like"),
        ("s3://b/x?anonymous=yes", "parameter anonymous: must be true or false"),
        ("s3://b/x?scheme=ftp", "parameter scheme: must be http or https"),
        ("s3://b/x?tls_ca_file_path=x.pem", "tls_ca_file_path: must be an absolute path"),
        ("s3://b/x?load_frequency=-1", "load_frequency: must be a whole number"),
        ("s3://b/x?endpoint_override=http://h&scheme=https", "leave scheme out"),
        ("s3://b/x?endpoint_override=h:99999", "port is out of range; write it as https://host"),
        ("gs://b/x?retry_limit_seconds=5", "unknown parameter 'retry_limit_seconds'"),
        ("gs://me@b/x", "takes no credentials"),
        ("hdfs://h/x?replication=2", "unknown parameter 'replication'; known ones: user"),
        ("file:///x?y=1", "unknown parameter 'y'; this scheme has no parameters"),
        (
            "abfss://b@me.dfs.core.windows.net/x?credential_kind=cli",
            "cli is not supported",
        ),
        ("abfss://c/x", "must be like abfss://container@account"),
        ("s3://b/../x", r"percent-encode the dots as %2E"),
        ("s3://b/./x", r"percent-encode the dots as %2E"),
        ("hdfs://h/a/../x", "without"),
        ("https://h/a/../x", "without"),
        ("https://h/a#b", "percent-encode it as %23"),
        ("s3://b/x//", "ends with two slashes"),
        ("s3://b/a\nb", "write it as %0A"),
        ("s3://b/%ff", "not UTF-8"),
        ("s3://b/\udcff", "not UTF-8"),
        ("s3://b/%00", "NUL"),
        ("s3://", "it names no bucket"),
        ("s3:///b/x", "it names no bucket"),
        ("s3:b/x", "write two slashes after the scheme"),
        ("s3a://b/x", "s3a://b/x: ckptfs does not support s3a://; write s3://bucket/path"),
        ("s3n://b/x", "write s3://"),
        ("S3://b/x", "lower case; write s3://"),
        ("wasbs://c@me.blob.core.windows.net/x", "write abfss://container@account"),
        ("s3://arn:aws:s3:eu-west-1:1:accesspoint/x/y", "write the alias of the access point"),
        ("s3://KEY@b/x", "write credentials as s3://key:secret@bucket"),
        ("gopher://h/x", "unknown scheme; use s3://"),
        ("file://host/x", "must be like file:///path"),
    ],
)
def test_an_error_says_how_to_write_it(text: str, said: str) -> None:
    with pytest.raises(LocationError, match=said) as caught:
        parse_uri(text)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(text.partition("://")[0][:4])


@pytest.mark.parametrize("text", ["true", "1", "TRUE"])
def test_flags(text: str) -> None:
    for uri in ("s3://b/x", "gs://b/x", "abfss://c@me.dfs.core.windows.net/x"):
        assert parse_uri(f"{uri}?anonymous={text}").options["anonymous"] is True
    assert "anonymous" not in parse_uri("s3://b/x?anonymous=false").options
    found = parse_uri(f"s3://b/x?requester_pays={text}&force_virtual_addressing={text}")
    assert found.options == {"requester_pays": True, "force_virtual_addressing": True}


def test_further_parameters() -> None:
    uri = with_parameters("s3://b/x?region=x", anonymous="true", endpoint_override="http://h:1")
    assert parse_uri(uri).options == {
        "anonymous": True,
        "endpoint_override": "h:1",
        "region": "x",
        "scheme": "http",
    }
    assert with_parameters("gs://b/x", anonymous="true") == "gs://b/x?anonymous=true"
    with pytest.raises(LocationError, match="region is given twice"):
        with_parameters("s3://b/x?region=x", region="y")


# -- credentials


_SECRET = st.text("S3CR/T+=:?#% ", min_size=1, max_size=12)


@given(st.text("S3CRT+=#% ", max_size=12), _SECRET)
def test_credentials_in_a_uri_are_shown_nowhere(key: str, secret: str) -> None:
    text = f"s3://K{key}:Z{secret}Z@bucket/run?regoin=x"
    shown = shown_uri(text)
    assert f"Z{secret}Z" not in shown
    with pytest.raises(LocationError) as caught:
        parse_uri(text)
    assert f"Z{secret}Z" not in str(caught.value)
    if not set(secret) & set("/?"):
        found = parse_uri(text.replace("regoin", "region"))
        assert found.path == "bucket/run"
        assert f"Z{secret}Z" not in found.uri


def test_credentials_become_secrets() -> None:
    found = parse_uri("s3://KEY:a%2Fb%40c+d@bucket/x")
    assert found == Location("s3", "bucket/x", {}, {"access_key": "KEY", "secret_key": "a/b@c+d"})
    assert parse_uri("s3://KEY:a@b@bucket/x").secrets["secret_key"] == "a@b"
    found = parse_uri("abfss://box:a2V5@me.dfs.core.windows.net/x")
    assert found.secrets == {"account_key": "a2V5"}
    assert found.uri == "abfss://box@me.dfs.core.windows.net/x"
    found = parse_uri("abfss://me:a2V5@127.0.0.1:10000/box/x?enable_tls=false")
    assert found.secrets == {"account_key": "a2V5"}
    assert found.uri == "abfss://me@127.0.0.1:10000/box/x?enable_tls=false"
    found = parse_uri("abfss://b@me.dfs.core.windows.net/x?client_id=i&client_secret=S3CR3T")
    assert found.secrets == {"client_secret": "S3CR3T"}
    assert "S3CR3T" not in found.uri


# -- one identity for one place


@pytest.mark.parametrize(
    "spellings",
    [
        [
            "s3://b/x?endpoint_override=https://minio.example",
            "s3://b/x?endpoint_override=minio.example",
            "s3://b/x?endpoint_override=MINIO.example:443&scheme=https",
            "s3://b/x?endpoint_override=minio.example/&region=eu-west-3",
            "s3://b/x?endpoint_override=https%3A%2F%2Fminio.example&anonymous=true",
        ],
        [
            "s3://b/x?endpoint_override=http://[::1]/a/",
            "s3://b/x?endpoint_override=[0:0::1]:80/a&scheme=http",
        ],
        [
            "s3://b/x",
            "s3://b/x?endpoint_override=s3.amazonaws.com",
            "s3://b/x?endpoint_override=https://s3.eu-west-3.amazonaws.com:443/",
            "s3://b/x?region=eu-west-3&requester_pays=true",
        ],
        ["gs://b/x", "gs://anonymous@b/x", "gs://b/x?endpoint_override=storage.googleapis.com"],
        [
            "abfss://box@me.dfs.core.windows.net/x",
            "abfss://me@box/x",
            "abfss://box@ME.dfs.core.windows.net/x?anonymous=true",
            "abfss://me.blob.core.windows.net/box/x",
        ],
        [
            "abfss://me@azurite:443/box/x",
            "abfss://me@AZURITE:443/box/x",
            "abfss://box@me.dfs.core.windows.net/x?blob_storage_authority=azurite",
        ],
        ["s3://b/x", "s3://b/x?allow_bucket_creation=true&allow_bucket_deletion=0"],
        ["https://host/x", "https://HOST:443/x/"],
    ],
)
def test_spellings_of_one_place_are_one(spellings: list[str]) -> None:
    found = [parse_uri(text) for text in spellings]
    assert len({each.identity for each in found}) == 1
    assert len({each.store_identity for each in found}) == 1
    assert len({each.directory for each in found}) == 1


def test_an_older_client_names_the_same_place() -> None:
    place = parse_uri("s3://b/x?endpoint_override=http://minio")
    for endpoint, scheme in (
        ("minio:80", "http"),
        ("MINIO", "http"),
        ("http://minio/", "https"),
        ("http://minio:80", ""),
    ):
        older = Location("s3", "b/x", {"endpoint_override": endpoint, "scheme": scheme})
        assert (older.identity, older.uri) == (place.identity, place.uri)
    malformed = Location("s3", "b/x", {"endpoint_override": "a b", "scheme": "http"})
    assert malformed.identity != place.identity
    assert malformed.uri == "s3://b/x?endpoint_override=a%20b&scheme=http"


def test_other_places_are_others() -> None:
    places = [
        "s3://b/x",
        "s3://b/x?region=cn-north-1",  # another part of Amazon, with buckets of its own
        "s3://b/x?region=us-gov-west-1",
        "s3://b/x?endpoint_override=h",
        "s3://b/x?endpoint_override=h:444",
        "s3://b/x?endpoint_override=http://h",
        "s3://b/x?endpoint_override=h/a",
        "gs://b/x",
        "gs://b/x?endpoint_override=h",
        "abfss://b@me.dfs.core.windows.net/x",
        "abfss://b@other.dfs.core.windows.net/x",
        "abfss://b@me.dfs.core.chinacloudapi.cn/x",
        "abfss://me@h:1/b/x",
        "hdfs://h/b/x",
        "file:///b/x",
    ]
    assert len({parse_uri(text).identity for text in places}) == len(places)


def test_an_endpoint_is_shown_once_and_readable() -> None:
    options = {"endpoint_override": "minio:9000", "scheme": "http", "region": "x"}
    location = Location("s3", "b/run 1", options)
    assert location.uri == "s3://b/run%201?endpoint_override=http://minio:9000&region=x"
    implied = ("endpoint_override", "scheme", "region")
    of_environment = msgspec.structs.replace(location, implied=implied)
    assert of_environment.uri == "s3://b/run%201"
    assert of_environment.identity == location.identity
    of_filesystem = Location("s3", "b/x", {"endpoint_override": "s3.eu-west-3.amazonaws.com"})
    assert of_filesystem.uri == "s3://b/x?region=eu-west-3"
    own = parse_uri("s3://b/x?endpoint_override=https://s3.eu-west-3.amazonaws.com")
    assert own.uri == "s3://b/x?region=eu-west-3"
    assert parse_uri("gs://b/x?endpoint_override=storage.googleapis.com").uri == "gs://b/x"


def test_commands_find_a_place_without_pyarrow() -> None:
    """It takes longer to import than all the rest."""
    code = (
        "import sys\nfrom ckptfs.cli.target import location_of\n"
        "print(location_of('gs://b/x').path, 'pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=-1, text=True)
    assert done.stdout == "b/x False\n"
