"""What pyarrow's S3FileSystem is made with, as far as a `Location` says it."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ckptfs._store.kinds import NAMESPACE


class S3Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options and secrets of a location on S3; their names are pyarrow's. Never printed.

    Attributes:
        region: Of the bucket; "": it is learned from the server.
        scheme: Where `endpoint_override` names none.
        endpoint_override: "host:port", also as a URL; "": Amazon's.
        force_virtual_addressing: The bucket is a part of the host's name, also with an endpoint.
        tls_ca_file_path: Certificates to trust instead of the system's.
        tls_ca_dir_path: A directory of such certificates, as OpenSSL hashes their names.
        tls_ca_pem: The text of such certificates, from a caller whose files are not the daemon's.
        tls_verify_certificates: False: the server's certificate is not checked.
        proxy: URL of the proxy for all requests, perhaps with credentials; "": there is none.
        requester_pays: The owner of the keys pays for the requests, and not the bucket's.
        anonymous: Requests are not signed.
        access_key, secret_key, session_token: "": those of AWS's chain.
        role_arn, session_name, external_id: A role to assume with them.
        load_frequency: Seconds that the role's keys are valid.
        request_timeout, connect_timeout: Longest silence in seconds; 0: the daemon's.
        profile, config_file, credentials_file: The caller's profile, and the files that have it.
        sts_endpoint_url: Amazon's security token service; "": the provider's.
        web_identity_token_file: The token that the role is assumed with.
        container_credentials_uri, container_token_file, container_token: Where the caller's
            container has its keys, as a URL or a path at Amazon's own address, and the
            authorization for it.
    """

    region: str = ""
    scheme: Literal["http", "https"] = "https"
    endpoint_override: str = ""
    force_virtual_addressing: bool = False
    tls_ca_file_path: str = ""
    tls_ca_dir_path: str = ""
    tls_ca_pem: str = ""
    tls_verify_certificates: bool = True
    proxy: str = ""
    requester_pays: bool = False
    anonymous: bool = False
    access_key: str = ""
    secret_key: str = ""
    session_token: str = ""
    role_arn: str = ""
    session_name: str = ""
    external_id: str = ""
    load_frequency: int = 900
    request_timeout: float = 0
    connect_timeout: float = 0
    profile: str = ""
    config_file: str = ""
    credentials_file: str = ""
    sts_endpoint_url: str = ""
    web_identity_token_file: str = ""
    container_credentials_uri: str = ""
    container_token_file: str = ""
    container_token: str = ""

    def __repr__(self) -> str:
        return "S3Options(…)"


def s3_options(options: Mapping[str, Any]) -> S3Options:
    """Options and secrets of a location as one. Raises ValueError for a wrong type."""
    return msgspec.convert({k: v for k, v in options.items() if k != NAMESPACE}, S3Options)
