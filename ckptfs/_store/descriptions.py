"""Which filesystems can be described by a `Location`, and by which of their options.

Only what is listed here crosses the process border, so nothing that arrives can name code to run.
"""

from typing import NamedTuple

from ckptfs._model.location import Kind


class Description(NamedTuple):
    """Which constructor options of a filesystem type cross the border. `type_name` is the class's
    name, of fsspec's after that of its package."""

    type_name: str
    public: frozenset[str]
    secret: frozenset[str]


DESCRIPTIONS: dict[Kind, Description] = {
    "s3": Description(
        "S3FileSystem",
        frozenset(
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
            ]
        ),
        frozenset({"access_key", "secret_key", "session_token"}),
    ),
    "gcs": Description(
        "GcsFileSystem",
        frozenset(
            [
                "anonymous",
                "scheme",
                "endpoint_override",
                "target_service_account",
                "project_id",
                "application_credentials",
                "tls_ca_file_path",
            ]
        ),
        frozenset({"access_token", "service_account_key", "proxy"}),
    ),
    "azure": Description(
        "AzureFileSystem",
        frozenset(
            [
                "account_name",
                "blob_storage_authority",
                "blob_storage_scheme",
                "dfs_storage_authority",
                "dfs_storage_scheme",
                "client_id",
                "tenant_id",
                "anonymous",
                "federated_token_file",
                "tls_ca_file_path",
            ]
        ),
        frozenset({"account_key", "client_secret", "sas_token", "proxy"}),
    ),
    "hdfs": Description("HadoopFileSystem", frozenset({"host", "port", "user"}), frozenset()),
    "local": Description("LocalFileSystem", frozenset(), frozenset()),
    "hf": Description(
        "huggingface_hub.HfFileSystem", frozenset({"endpoint"}), frozenset({"token"})
    ),
    "http": Description(
        "fsspec.HTTPFileSystem",
        frozenset({"encoded", "same_scheme", "simple_links"}),
        frozenset(),
    ),
    "az": Description(
        "adlfs.AzureBlobFileSystem",
        frozenset({"account_name", "anon", "client_id", "tenant_id"}),
        frozenset({"account_key", "client_secret", "connection_string", "sas_token"}),
    ),
}
