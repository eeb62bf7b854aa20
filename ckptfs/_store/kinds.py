# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""The kinds of stores: one row for each.

A new kind, option or environment variable is added here. Only the types and options in this table
cross the process border, so nothing that arrives can name code to run.

The module is cheap to import, because clients without pyarrow use the table as well: the builders
import pyarrow and fsspec when they run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ckptfs._model.location import Kind, Location, Option
from ckptfs.errors import LocationError

Options: TypeAlias = Mapping[str, Any]
Names: TypeAlias = Mapping[str, tuple[str, ...]]
"""Other names of options: in files, or of environment variables."""


@dataclass(frozen=True)
class StoreKind:
    """One kind of store.

    Attributes:
        type_name: The filesystem's class, of fsspec's after that of its package.
        public: Options that a location may have.
        secret: Credentials that a location may have.
        build: Makes a pyarrow filesystem of options and the longest silence in seconds.
        own_rights: Names the rights of its own that a daemon would use for these options; "": none.
        irrelevant: Constructor options that have no effect on reading, or none on the bytes.
        variables: Environment variables that stand for options; the first that is set counts.
        handled: Further variables that `ambient` and its neighbours use.
        travels: Those of all these variables that say whose credentials are used. They go with each
            location, and a daemon that is started on demand does not inherit them.
        ignored: Variables without effect, and why.
        in_files: The names of secrets in files of credentials. Behind a prefix, the first one in
            capitals is the variable's name.
        needed: One of these groups of secrets has to be in such a file.
        package: What has to be installed besides ckptfs.
    """

    type_name: str
    public: frozenset[str]
    secret: frozenset[str]
    build: Callable[[Options, float], Any]
    own_rights: Callable[[Mapping[str, Option]], str]
    irrelevant: frozenset[str] = frozenset()
    variables: Names = field(default_factory=dict[str, tuple[str, ...]])
    handled: tuple[str, ...] = ()
    travels: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict[str, str])
    in_files: Names = field(default_factory=dict[str, tuple[str, ...]])
    needed: tuple[tuple[str, ...], ...] = ()
    package: str = ""


PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
"""Each also in lower case, which counts first."""
CA_FILES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""Certificates to trust, in the order in which they count."""
NAMESPACE = "mount_namespace"
"""Option of a location that names the caller's files: the mount namespace that has them."""
_NETWORK = frozenset(["tls_ca_file_path", "tls_ca_dir_path", "tls_verify_certificates", NAMESPACE])
_NETWORK_SECRET = frozenset(["proxy", "tls_ca_pem"])


# -- what a daemon would read with rights of its own


def lent_for(location: Location) -> str:
    """The rights of the daemon's own that `location` would be read with; "": it brings all it
    needs.

    A daemon has more than the credentials that a location brings: what AWS's chain and its likes
    find where it runs, its identity at HDFS, and the rights of its user (often root) on local
    files. A location that is not known to bring its own credentials counts as reading with the
    daemon's.
    """
    options: dict[str, Option] = {**location.options, **location.secrets}
    row = KINDS.get(location.kind)
    return row.own_rights(options) if row is not None else "own identity"


def _files(options: Mapping[str, Option], *more: str) -> str:
    for name in ("tls_ca_file_path", "tls_ca_dir_path", *more):
        if options.get(name):
            return f"right to read {name}"
    return ""


def _own_s3(options: Mapping[str, Option]) -> str:
    if files := _files(options, "web_identity_token_file", "container_token_file"):
        return files
    # As `awskeys.keys_for` decides; a role is assumed with the same keys.
    return "" if options.get("anonymous") or options.get("access_key") else "AWS credentials"


def _own_gcs(options: Mapping[str, Option]) -> str:
    if files := _files(options, "application_credentials"):
        return files
    # Impersonating a service account takes the rights of another identity.
    own = any(options.get(name) for name in ("anonymous", "access_token", "service_account_key"))
    alone = own and not options.get("target_service_account")
    return "" if alone else "Google credentials"


def _own_azure(options: Mapping[str, Option]) -> str:
    if files := _files(options, "federated_token_file"):
        return files
    # As pyarrow's AzureFileSystem decides: a client_id alone is that of a managed identity.
    client = [options.get(name) for name in ("client_id", "tenant_id", "client_secret")]
    key = options.get("account_key") or options.get("sas_token") or options.get("anonymous")
    return "" if all(client) or (key and not any(client)) else "Azure credentials"


def _own_hf(options: Mapping[str, Option]) -> str:
    return _files(options) or ("" if options.get("token") else "Hugging Face token")


def _always(rights: str) -> Callable[[Mapping[str, Option]], str]:
    def own(_: Mapping[str, Option]) -> str:
        return rights

    return own


# -- filesystems


def _kept(options: Options, known: frozenset[str], type_name: str) -> dict[str, Any]:
    """The options that a filesystem's constructor takes. Raises LocationError for the others."""
    for name in sorted(options.keys() - known - {NAMESPACE}):
        raise LocationError(f"a {type_name} cannot keep {name}; leave it out")
    return {name: value for name, value in options.items() if name != NAMESPACE}


def _build_s3(options: Options, _: float) -> Any:
    from pyarrow import fs as pafs

    known = {**options}
    if proxy := known.pop("proxy", ""):
        known["proxy_options"] = proxy
    names = _OF_ARROW_S3 | {"proxy_options", "request_timeout", "connect_timeout"}
    return pafs.S3FileSystem(**_kept(known, names, "S3FileSystem"))


def _build_gcs(options: Options, timeout_s: float) -> Any:
    from datetime import datetime, timedelta, timezone

    from pyarrow import fs as pafs

    token: dict[str, Any] = {}
    if options.get("access_token"):  # the caller brings another one in time
        token["credential_token_expiration"] = datetime.now(timezone.utc) + timedelta(days=1)
    known = _kept(options, _OF_ARROW_GCS, "GcsFileSystem")
    # The default is 15 minutes of silent retries.
    return pafs.GcsFileSystem(**known, **token, retry_time_limit=timedelta(seconds=timeout_s))


def _build_azure(options: Options, _: float) -> Any:
    from pyarrow import fs as pafs

    return pafs.AzureFileSystem(**_kept(options, _OF_ARROW_AZURE, "AzureFileSystem"))


def _build_hdfs(options: Options, _: float) -> Any:
    from pyarrow import fs as pafs

    return pafs.HadoopFileSystem(**options)


def _build_local(_options: Options, _: float) -> Any:
    from pyarrow import fs as pafs

    return pafs.LocalFileSystem()


def _build_http(options: Options, timeout_s: float) -> Any:
    return _of_fsspec("https", options, timeout_s)


def _build_hf(options: Options, timeout_s: float) -> Any:
    known = {name: value for name, value in options.items() if name != NAMESPACE}
    return _of_fsspec("hf", known, timeout_s)


def _build_az(options: Options, timeout_s: float) -> Any:
    return _of_fsspec("az", _kept(options, _OF_ADLFS, "AzureBlobFileSystem"), timeout_s)


def _of_fsspec(protocol: str, options: Options, timeout_s: float) -> Any:
    from pyarrow import fs as pafs

    from ckptfs._store import fsspec

    return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.build(protocol, options, timeout_s)))


_OF_ARROW_S3 = frozenset(
    [
        "anonymous",
        "region",
        "scheme",
        "endpoint_override",
        "role_arn",
        "session_name",
        "external_id",
        "load_frequency",
        "force_virtual_addressing",
        "tls_ca_file_path",
        "access_key",
        "secret_key",
        "session_token",
    ]
)
_OF_ARROW_GCS = frozenset(
    [
        "anonymous",
        "scheme",
        "endpoint_override",
        "target_service_account",
        "project_id",
        "access_token",
    ]
)
_OF_ARROW_AZURE = frozenset(
    [
        "account_name",
        "blob_storage_authority",
        "blob_storage_scheme",
        "dfs_storage_authority",
        "dfs_storage_scheme",
        "client_id",
        "tenant_id",
        "account_key",
        "client_secret",
        "sas_token",
    ]
)
_OF_ADLFS = frozenset(
    [
        "account_key",
        "account_name",
        "anon",
        "client_id",
        "client_secret",
        "connection_string",
        "sas_token",
        "tenant_id",
    ]
)
_S3_SECRET = frozenset(["access_key", "secret_key", "session_token", "container_token"])
_AZURE_SECRET = frozenset(["account_key", "client_secret", "sas_token"])
_WRITING = "it is for writing"
_OWN_RETRIES = "ckptfs repeats requests by rules of its own"
AZURE_VARIABLES: Names = {
    "account_key": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_KEY"),
    "sas_token": ("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"),
    "client_id": ("AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID"),
    "tenant_id": ("AZURE_STORAGE_TENANT_ID", "AZURE_TENANT_ID"),
    "client_secret": ("AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET"),
    "federated_token_file": ("AZURE_FEDERATED_TOKEN_FILE",),
    "authority_host": ("AZURE_AUTHORITY_HOST",),
}
"""They count for the account that they are for only, see `azureenv`."""

KINDS: dict[Kind, StoreKind] = {
    "s3": StoreKind(
        "S3FileSystem",
        public=(_OF_ARROW_S3 - _S3_SECRET)
        | _NETWORK
        | {
            "requester_pays",
            "request_timeout",
            "connect_timeout",
            "profile",
            "config_file",
            "credentials_file",
            "web_identity_token_file",
            "sts_endpoint_url",
            "container_credentials_uri",
            "container_token_file",
        },
        secret=_S3_SECRET | _NETWORK_SECRET,
        build=_build_s3,
        own_rights=_own_s3,
        irrelevant=frozenset(
            [
                "allow_bucket_creation",
                "allow_bucket_deletion",
                "allow_delayed_open",
                "background_writes",
                "check_directory_existence_before_creation",
                "default_metadata",
            ]
        ),
        variables={
            "access_key": ("AWS_ACCESS_KEY_ID",),
            "secret_key": ("AWS_SECRET_ACCESS_KEY",),
            "session_token": ("AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"),
            "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
        },
        handled=(
            "AWS_ENDPOINT_URL_S3",
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT_URL_STS",
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
            "AWS_DEFAULT_PROFILE",
            "AWS_PROFILE",
            "AWS_CONFIG_FILE",
            "AWS_SHARED_CREDENTIALS_FILE",
            "AWS_ROLE_ARN",
            "AWS_ROLE_SESSION_NAME",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
            "AWS_USE_DUALSTACK_ENDPOINT",
            "AWS_USE_FIPS_ENDPOINT",
            "AWS_CA_BUNDLE",
        ),
        travels=(
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "AWS_SECURITY_TOKEN",
            "AWS_DEFAULT_PROFILE",
            "AWS_PROFILE",
            "AWS_ENDPOINT_URL_S3",
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT_URL_STS",
            "AWS_ROLE_ARN",
            "AWS_ROLE_SESSION_NAME",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        ),
        ignored={
            "AWS_MAX_ATTEMPTS": _OWN_RETRIES,
            "AWS_RETRY_MODE": _OWN_RETRIES,
            "AWS_DEFAULTS_MODE": "store_timeout_s says how long ckptfs waits",
            "AWS_REQUEST_CHECKSUM_CALCULATION": _WRITING,
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "ckptfs compares versions and sizes",
            "AWS_S3_US_EAST_1_REGIONAL_ENDPOINT": "ckptfs always asks the region's own endpoint",
            "AWS_EC2_METADATA_DISABLED": "it counts where the daemon looks for keys",
        },
        in_files={
            "access_key": ("aws_access_key_id", "AccessKeyId", "access_key"),
            "secret_key": ("aws_secret_access_key", "SecretAccessKey", "secret_key"),
            "session_token": ("aws_session_token", "SessionToken", "session_token"),
        },
        needed=(("access_key", "secret_key"),),
    ),
    "gcs": StoreKind(
        "GcsFileSystem",
        public=(_OF_ARROW_GCS - {"access_token"}) | _NETWORK | {"application_credentials"},
        secret=_NETWORK_SECRET | {"access_token", "service_account_key"},
        build=_build_gcs,
        own_rights=_own_gcs,
        irrelevant=frozenset(
            ["credential_token_expiration", "default_bucket_location", "default_metadata"]
        ),
        handled=(
            "STORAGE_EMULATOR_HOST",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT",
            "GOOGLE_APPLICATION_CREDENTIALS",
            "CLOUDSDK_CONFIG",
        ),
        travels=("GOOGLE_OAUTH_ACCESS_TOKEN",),
        ignored={"GOOGLE_CLOUD_PROJECT": "reading needs no project"},
        in_files={"access_token": ("google_oauth_access_token", "access_token")},
        needed=(("access_token",),),
    ),
    "azure": StoreKind(
        "AzureFileSystem",
        public=(_OF_ARROW_AZURE - _AZURE_SECRET)
        | _NETWORK
        | {"anonymous", "federated_token_file", "authority_host"},
        secret=_AZURE_SECRET | _NETWORK_SECRET,
        build=_build_azure,
        own_rights=_own_azure,
        handled=(
            "AZURE_STORAGE_ACCOUNT_NAME",
            "AZURE_STORAGE_ACCOUNT",
            "AZURE_STORAGE_CONNECTION_STRING",
            *(name for names in AZURE_VARIABLES.values() for name in names),
        ),
        travels=(
            "AZURE_STORAGE_CONNECTION_STRING",
            *(name for option in sorted(_AZURE_SECRET) for name in AZURE_VARIABLES[option]),
        ),
        in_files={
            name: (f"azure_storage_{name}", name)
            for name in ("account_key", "sas_token", "tenant_id", "client_id", "client_secret")
        },
        needed=(("account_key",), ("sas_token",), ("tenant_id", "client_id", "client_secret")),
    ),
    "hdfs": StoreKind(
        "HadoopFileSystem",
        public=frozenset(["host", "port", "user"]),
        secret=frozenset(),
        build=_build_hdfs,
        own_rights=_always("identity at HDFS"),
        irrelevant=frozenset(["replication", "buffer_size", "default_block_size"]),
        ignored={"HADOOP_USER_NAME": "it counts where the daemon runs"},
    ),
    "local": StoreKind(
        "LocalFileSystem",
        public=frozenset(),
        secret=frozenset(),
        build=_build_local,
        own_rights=_always("rights on local files"),
        irrelevant=frozenset(["use_mmap"]),
    ),
    "hf": StoreKind(
        "huggingface_hub.HfFileSystem",
        public=_NETWORK | {"endpoint"},
        secret=_NETWORK_SECRET | {"token"},
        build=_build_hf,
        own_rights=_own_hf,
        variables={
            "endpoint": ("HF_ENDPOINT",),
            "token": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
        },
        handled=("HF_TOKEN_PATH", "HF_HOME", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_OFFLINE"),
        travels=("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
        package="huggingface_hub",
    ),
    "http": StoreKind(
        "fsspec.HTTPFileSystem",
        public=_NETWORK | {"encoded", "same_scheme", "simple_links"},
        secret=_NETWORK_SECRET,
        build=_build_http,
        own_rights=_files,  # there are no credentials
        package="fsspec aiohttp",
    ),
    # A location of this kind becomes one of kind "azure" as soon as its account is known.
    "az": StoreKind(
        "adlfs.AzureBlobFileSystem",
        public=_NETWORK | {"account_name", "anon", "client_id", "tenant_id"},
        secret=_NETWORK_SECRET | {"account_key", "client_secret", "connection_string", "sas_token"},
        build=_build_az,
        # adlfs completes what it is given from the daemon's environment.
        own_rights=_always("own identity"),
        handled=(
            "AZURE_STORAGE_ACCOUNT_NAME",
            "AZURE_STORAGE_ACCOUNT",
            "AZURE_STORAGE_CONNECTION_STRING",
            *(name for names in AZURE_VARIABLES.values() for name in names),
        ),
        package="adlfs",
    ),
}
TRAVELLING = frozenset(name for row in KINDS.values() for name in row.travels)
"""See `StoreKind.travels`."""
