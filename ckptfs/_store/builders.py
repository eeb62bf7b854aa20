# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""The builders of pyarrow filesystems, one for each kind of store.

The import is cheap, because the builders import pyarrow and fsspec when they run.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from ckptfs.errors import LocationError

Options: TypeAlias = Mapping[str, Any]
NAMESPACE = "mount_namespace"
"""The option with the mount namespace of the caller, for a location that names the caller's
files."""


def _kept(options: Options, known: frozenset[str], type_name: str) -> dict[str, Any]:
    """The options for a filesystem's constructor. Raises LocationError for an option that it does
    not take."""
    for name in sorted(options.keys() - known - {NAMESPACE}):
        raise LocationError(f"pyarrow's {type_name} has no option {name}; leave it out")
    return {name: value for name, value in options.items() if name != NAMESPACE}


def build_s3(options: Options, _: float) -> Any:
    from pyarrow import fs as pafs

    known = {**options}
    if proxy := known.pop("proxy", ""):
        known["proxy_options"] = proxy
    names = OF_ARROW_S3 | {"proxy_options", "request_timeout", "connect_timeout"}
    return pafs.S3FileSystem(**_kept(known, names, "S3FileSystem"))


def build_gcs(options: Options, timeout_s: float) -> Any:
    from datetime import datetime, timedelta, timezone

    from pyarrow import fs as pafs

    token: dict[str, Any] = {}
    if options.get("access_token"):  # the caller renews it before that
        token["credential_token_expiration"] = datetime.now(timezone.utc) + timedelta(days=1)
    known = _kept(options, OF_ARROW_GCS, "GcsFileSystem")
    # The default is 15 minutes of silent retries.
    return pafs.GcsFileSystem(**known, **token, retry_time_limit=timedelta(seconds=timeout_s))


def build_plain(type_name: str, known: frozenset[str], options: Options, _: float) -> Any:
    """A filesystem of pyarrow whose constructor takes the options as they are."""
    from pyarrow import fs as pafs

    return getattr(pafs, type_name)(**_kept(options, known, type_name))


def build_by_fsspec(protocol: str, options: Options, timeout_s: float) -> Any:
    from pyarrow import fs as pafs

    from ckptfs._store import fsspec

    known = {name: value for name, value in options.items() if name != NAMESPACE}
    return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.build(protocol, known, timeout_s)))


OF_ARROW_S3 = frozenset(
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
OF_ARROW_GCS = frozenset(
    [
        "anonymous",
        "scheme",
        "endpoint_override",
        "target_service_account",
        "project_id",
        "access_token",
    ]
)
OF_ARROW_AZURE = frozenset(
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
