"""The options of S3 stores: those of pyarrow's S3FileSystem, and some of our own."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ckptfs._store.builders import NAMESPACE
from ckptfs._store.transport.tls import Network


class S3Options(Network, frozen=True, forbid_unknown_fields=True):
    """Options and secrets of a location on S3, by pyarrow's names. Never printed.

    Attributes:
        region: The bucket's region; "" to learn it from the server.
        scheme: The scheme, if `endpoint_override` names none.
        endpoint_override: The endpoint as "host:port" or as a URL; "" for Amazon's.
        force_virtual_addressing: Whether the bucket is a part of the host's name at an endpoint.
        requester_pays: Whether the owner of the keys pays for the requests instead of the bucket's.
        anonymous: Whether requests are unsigned.
        access_key, secret_key, session_token: The keys; "" for those of AWS's chain.
        role_arn, session_name, external_id: The role to assume with them.
        load_frequency: The seconds for which the role's keys are valid.
        request_timeout, connect_timeout: The longest silence in seconds; 0 for the daemon's.
        profile, config_file, credentials_file: The caller's profile, and the files that have it.
        sts_endpoint_url: The endpoint of the security token service; "" for Amazon's.
        web_identity_token_file: The file of the token for assuming the role.
        web_identity_token: The token itself, of a caller who renews it.
        container_credentials_uri, container_token_file, container_token: The URL of the keys of the
            caller's container, or a path at Amazon's own address, and the authorization for it.
    """

    region: str = ""
    scheme: Literal["http", "https"] = "https"
    endpoint_override: str = ""
    force_virtual_addressing: bool = False
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
    web_identity_token: str = ""
    container_credentials_uri: str = ""
    container_token_file: str = ""
    container_token: str = ""


def s3_options(options: Mapping[str, Any]) -> S3Options:
    """The options and secrets of a location as one object. Raises ValueError for a wrong type."""
    return msgspec.convert({k: v for k, v in options.items() if k != NAMESPACE}, S3Options)
