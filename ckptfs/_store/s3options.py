"""What pyarrow's S3FileSystem is made with, as far as a `Location` says it."""

from typing import Literal

import msgspec


class S3Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options and secrets of a location on S3; their names are pyarrow's. Never printed.

    Attributes:
        region: Of the bucket; "": it is learned from the server.
        scheme: Where `endpoint_override` names none.
        endpoint_override: "host:port", also as a URL; "": Amazon's.
        force_virtual_addressing: The bucket is a part of the host's name, also with an endpoint.
        tls_ca_file_path: Certificates to trust instead of the system's.
        tls_ca_dir_path: A directory of such certificates, as OpenSSL hashes their names.
        tls_verify_certificates: False: the server's certificate is not checked.
        proxy: URL of the proxy for all requests, perhaps with credentials; "": there is none.
        requester_pays: The owner of the keys pays for the requests, and not the bucket's.
        anonymous: Requests are not signed.
        access_key, secret_key, session_token: "": those of AWS's chain.
        role_arn, session_name, external_id: A role to assume with them.
        load_frequency: Seconds that the role's keys are valid.
    """

    region: str = ""
    scheme: Literal["http", "https"] = "https"
    endpoint_override: str = ""
    force_virtual_addressing: bool = False
    tls_ca_file_path: str = ""
    tls_ca_dir_path: str = ""
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

    def __repr__(self) -> str:
        return "S3Options(…)"
