"""The kinds of stores as they are described and opened: one row for each.

A new kind, option or environment variable is a change of this table. Only its types and options
cross the process border, so nothing that arrives can name code to run. ``_model.kinds`` has the
other row of each kind, for URIs and tables.

The import is cheap, because clients without pyarrow use the table as well.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from ckptfs._model.kinds import Kind
from ckptfs._model.location import Location
from ckptfs._model.uri_parameters import Option
from ckptfs._store.builders import (
    NAMESPACE,
    OF_ARROW_AZURE,
    OF_ARROW_GCS,
    OF_ARROW_S3,
    Options,
    build_by_fsspec,
    build_gcs,
    build_plain,
    build_s3,
)

Names: TypeAlias = Mapping[str, tuple[str, ...]]
"""Other names of options, in files or as environment variables."""


@dataclass(frozen=True)
class StoreKind:
    """One kind of store.

    Attributes:
        type_name: The name of the filesystem's class, for fsspec after the name of its package.
        public: The options that a location may have.
        secret: The credentials that a location may have.
        build: A function that makes a pyarrow filesystem from options and the longest silence in
            seconds.
        own_rights: A function that names the daemon's own rights that a location with these options
            would use; "" if it uses none.
        irrelevant: The constructor options that have no effect on the bytes that are read.
        variables: The environment variables that stand for options. The first that is set counts.
        handled: Further variables that the package `environment` uses.
        travels: The variables among all these that choose the credentials. They travel with each
            location, and a daemon that is started on demand does not inherit them.
        ignored: The variables without effect, and the reasons.
        in_files: The names of secrets in files of credentials. A variable with a prefix has the
            first name in capitals.
        needed: Groups of secrets. A file of credentials needs all secrets of one group.
        package: The packages to install besides ckptfs.
        arrow_name: The type name of pyarrow for a filesystem of a URI, if it is built at first use.
        has_own_client: Whether a client of ckptfs reads the store, and not a library.
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
    arrow_name: str = ""
    has_own_client: bool = False


PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
"""The variables of proxies. Each may be in lower case, and that one counts first."""
CA_FILES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""The variables of trusted certificates, in the order in which they count."""
_NETWORK = frozenset(["tls_ca_file_path", "tls_ca_dir_path", "tls_verify_certificates", NAMESPACE])
_NETWORK_SECRET = frozenset(["proxy", "tls_ca_pem"])


# -- the daemon's own rights


def daemon_rights_for(location: Location) -> str:
    """The daemon's own rights that a read of `location` would use; "" if the location brings all
    credentials that it needs.

    A daemon has more than the credentials of a location: those that the chains of AWS, Google and
    Azure find on its machine, its identity at HDFS, and the rights of its user (often root) on
    local files. A location counts as using the daemon's rights unless it is known to bring its own.
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
    # As `s3.keys.keys_for` decides. A role is assumed with the same keys, or with the token.
    own = any(options.get(name) for name in ("anonymous", "access_key", "web_identity_token"))
    return "" if own else "AWS credentials"


def _own_gcs(options: Mapping[str, Option]) -> str:
    if files := _files(options, "application_credentials"):
        return files
    if options.get("federated_token"):  # which impersonates with its own rights, too
        return ""
    # Impersonating a service account takes the rights of another identity.
    own = any(options.get(name) for name in ("anonymous", "access_token", "service_account_key"))
    alone = own and not options.get("target_service_account")
    return "" if alone else "Google credentials"


def _own_azure(options: Mapping[str, Option]) -> str:
    if files := _files(options, "federated_token_file"):
        return files
    # As pyarrow's AzureFileSystem decides. A client_id alone names a managed identity.
    proof = options.get("client_secret") or options.get("federated_token")
    client = [options.get("client_id"), options.get("tenant_id"), proof]
    key = options.get("account_key") or options.get("sas_token") or options.get("anonymous")
    return "" if all(client) or (key and not any(client)) else "Azure credentials"


def _own_hf(options: Mapping[str, Option]) -> str:
    return _files(options) or ("" if options.get("token") else "Hugging Face token")


_S3_SECRET = frozenset(["access_key", "secret_key", "session_token", "container_token"])
_AZURE_SECRET = frozenset(["account_key", "client_secret", "sas_token"])
_OF_HDFS = frozenset(["host", "port", "user"])
_WRITING = "it has an effect on writing only"
_OWN_RETRIES = "ckptfs retries requests by its own rules"
AZURE_VARIABLES: Names = {
    "account_key": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_KEY"),
    "sas_token": ("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"),
    "client_id": ("AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID"),
    "tenant_id": ("AZURE_STORAGE_TENANT_ID", "AZURE_TENANT_ID"),
    "client_secret": ("AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET"),
    "federated_token_file": ("AZURE_FEDERATED_TOKEN_FILE",),
    "authority_host": ("AZURE_AUTHORITY_HOST",),
}
"""The variables of Azure, by option. They apply only to the account that they name, see
``environment.azure``."""
_AZURE_HANDLED = (
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT",
    "AZURE_STORAGE_CONNECTION_STRING",
    *(name for names in AZURE_VARIABLES.values() for name in names),
)
_AWS_CHAIN = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_STS",
    "AWS_DEFAULT_PROFILE",
    "AWS_PROFILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
)
"""The variables that tell AWS's chain where the keys are."""

KINDS: dict[Kind, StoreKind] = {
    "s3": StoreKind(
        "S3FileSystem",
        public=(OF_ARROW_S3 - _S3_SECRET)
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
        secret=_S3_SECRET | _NETWORK_SECRET | {"web_identity_token"},
        arrow_name="s3",
        has_own_client=True,
        build=build_s3,
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
            *_AWS_CHAIN,
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
            "AWS_CONFIG_FILE",
            "AWS_SHARED_CREDENTIALS_FILE",
            "AWS_USE_DUALSTACK_ENDPOINT",
            "AWS_USE_FIPS_ENDPOINT",
            "AWS_CA_BUNDLE",
        ),
        travels=(
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "AWS_SECURITY_TOKEN",
            *_AWS_CHAIN,
        ),
        ignored={
            "AWS_MAX_ATTEMPTS": _OWN_RETRIES,
            "AWS_RETRY_MODE": _OWN_RETRIES,
            "AWS_DEFAULTS_MODE": "store_timeout_s says how long ckptfs waits",
            "AWS_REQUEST_CHECKSUM_CALCULATION": _WRITING,
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "ckptfs compares versions and sizes",
            "AWS_S3_US_EAST_1_REGIONAL_ENDPOINT": "ckptfs always uses the region's own endpoint",
            "AWS_EC2_METADATA_DISABLED": "only the daemon's environment counts, which has the keys",
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
        public=(OF_ARROW_GCS - {"access_token"})
        | _NETWORK
        | {"application_credentials", "workload_provider"},
        secret=_NETWORK_SECRET | {"access_token", "federated_token", "service_account_key"},
        arrow_name="gcs",
        has_own_client=True,
        build=build_gcs,
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
        in_files={
            "access_token": ("google_oauth_access_token", "access_token"),
            "service_account_key": ("google_service_account_key", "service_account_key"),
        },
        needed=(("access_token",), ("service_account_key",)),
    ),
    "azure": StoreKind(
        "AzureFileSystem",
        public=(OF_ARROW_AZURE - _AZURE_SECRET)
        | _NETWORK
        | {"anonymous", "federated_token_file", "authority_host"},
        secret=_AZURE_SECRET | _NETWORK_SECRET | {"federated_token"},
        arrow_name="abfs",
        has_own_client=True,
        build=partial(build_plain, "AzureFileSystem", OF_ARROW_AZURE),
        own_rights=_own_azure,
        handled=_AZURE_HANDLED,
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
        public=_OF_HDFS,
        secret=frozenset(),
        build=partial(build_plain, "HadoopFileSystem", _OF_HDFS),
        own_rights=lambda _: "identity at HDFS",
        irrelevant=frozenset(["replication", "buffer_size", "default_block_size"]),
        ignored={"HADOOP_USER_NAME": "only the daemon's environment counts"},
    ),
    "local": StoreKind(
        "LocalFileSystem",
        public=frozenset(),
        secret=frozenset(),
        build=partial(build_plain, "LocalFileSystem", frozenset[str]()),
        own_rights=lambda _: "rights on local files",
        irrelevant=frozenset(["use_mmap"]),
    ),
    "hf": StoreKind(
        "huggingface_hub.HfFileSystem",
        public=_NETWORK | {"endpoint"},
        secret=_NETWORK_SECRET | {"token"},
        build=partial(build_by_fsspec, "hf"),
        own_rights=_own_hf,
        variables={"endpoint": ("HF_ENDPOINT",), "token": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")},
        handled=("HF_TOKEN_PATH", "HF_HOME", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_OFFLINE"),
        travels=("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
        in_files={"token": ("hf_token", "token")},
        needed=(("token",),),
        package="huggingface_hub",
    ),
    "http": StoreKind(
        "fsspec.HTTPFileSystem",
        public=_NETWORK | {"encoded", "same_scheme", "simple_links"},
        secret=_NETWORK_SECRET,
        has_own_client=True,
        build=partial(build_by_fsspec, "https"),
        own_rights=_files,  # there are no credentials
        package="fsspec aiohttp",
    ),
    # A location of this kind becomes one of kind "azure" as soon as its account is known.
    "az": StoreKind(
        "adlfs.AzureBlobFileSystem",
        public=_NETWORK | {"account_name", "anon", "client_id", "tenant_id"},
        secret=_NETWORK_SECRET | {"account_key", "client_secret", "connection_string", "sas_token"},
        arrow_name="py::fsspec+abfs",
        build=partial(build_by_fsspec, "az"),
        # adlfs completes what it is given from the daemon's environment.
        own_rights=lambda _: "own identity",
        handled=_AZURE_HANDLED,
        package="adlfs",
    ),
}
TRAVELLING = frozenset(name for row in KINDS.values() for name in row.travels)
"""See `StoreKind.travels`."""
