"""The options of s3fs and gcsfs as those of pyarrow, which reads the same objects."""

import json
import os
from collections.abc import Mapping
from typing import Any, cast

from ckptfs._model.endpoints import parse_endpoint
from ckptfs.errors import LocationError

_OF_FSSPEC = frozenset(
    [
        "asynchronous",
        "listings_expiry_time",
        "loop",
        "max_paths",
        "skip_instance_cache",
        "use_listings_cache",
    ]
)
"""The options of all filesystems of fsspec for how they buffer, cache and wait. ckptfs has its own
settings for that, and for those of the two lists of irrelevant options."""
_SAME = {
    "anon": "anonymous",
    "key": "access_key",
    "username": "access_key",
    "secret": "secret_key",
    "password": "secret_key",
    "token": "session_token",
    "profile": "profile",
    "requester_pays": "requester_pays",
}
_IRRELEVANT_TO_S3 = frozenset(
    [
        "batch_size",
        "cache_regions",
        "default_block_size",
        "default_cache_type",
        "default_fill_cache",
        "fixed_upload_size",
        "max_concurrency",
    ]
)
_CLIENT = {
    "region_name": "region",
    "aws_access_key_id": "access_key",
    "aws_secret_access_key": "secret_key",
    "aws_session_token": "session_token",
}
_CONFIG = {
    "region_name": "region",
    "read_timeout": "request_timeout",
    "connect_timeout": "connect_timeout",
}
_CONFIG_IRRELEVANT = frozenset(
    [
        "max_pool_connections",
        "parameter_validation",
        "request_checksum_calculation",
        "response_checksum_validation",
        "retries",
        "tcp_keepalive",
        "user_agent",
        "user_agent_appid",
        "user_agent_extra",
    ]
)


def _relevant(options: Mapping[str, Any], irrelevant: frozenset[str]) -> dict[str, Any]:
    left_out = irrelevant | _OF_FSSPEC
    return {k: v for k, v in options.items() if v not in (None, "") and k not in left_out}


def s3_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of S3FileSystem that read the same objects as s3fs with these options. Raises
    LocationError with the name of an option that a location cannot express."""
    given = _relevant(options, _IRRELEVANT_TO_S3)
    found: dict[str, Any] = {}
    client = _dict(given.pop("client_kwargs", None) or {}, "client_kwargs")
    config = _dict(given.pop("config_kwargs", None) or {}, "config_kwargs")
    endpoint = given.pop("endpoint_url", "") or client.pop("endpoint_url", "")
    use_ssl = given.pop("use_ssl", True) and client.pop("use_ssl", True)
    client.pop("endpoint_url", None)
    for option, value in given.items():
        if option not in _SAME or not isinstance(value, str | bool):
            raise LocationError(option)
        if value is not False:
            found[_SAME[option]] = value
    _add_client(found, client)
    _add_config(found, config, "http" if str(endpoint).startswith("http:") else "https")
    if bool(found.get("access_key")) != bool(found.get("secret_key")):
        raise LocationError("half of a key")
    if endpoint:
        place = parse_endpoint(str(endpoint), "https" if use_ssl else "http")
        return found | {"scheme": place.scheme, "endpoint_override": place.place}
    return found if use_ssl else found | {"scheme": "http"}


def _add_client(found: dict[str, Any], client: dict[str, Any]) -> None:
    verify = client.pop("verify", None)
    if verify is False:
        found["tls_verify_certificates"] = False
    elif isinstance(verify, str):
        found["tls_ca_file_path"] = verify
    elif verify not in (None, True):
        raise LocationError("client_kwargs: verify")
    for option, value in client.items():
        if option not in _CLIENT or not isinstance(value, str | None):
            raise LocationError(f"client_kwargs: {option}")
        if value:
            found.setdefault(_CLIENT[option], value)


def _add_config(found: dict[str, Any], config: dict[str, Any], scheme: str) -> None:
    for option, value in config.items():
        if option in _CONFIG and isinstance(value, str | int | float):
            found.setdefault(_CONFIG[option], value)
        elif option == "proxies":
            if proxy := _dict(value or {}, "proxies").get(scheme):
                found["proxy"] = str(proxy)
        elif option == "signature_version" and _is_unsigned(value):
            found["anonymous"] = True
        elif option == "s3":
            _add_style(found, _dict(value or {}, "s3"))
        elif option == "signature_version" and value in ("s3v4", "v4"):
            pass  # the only one that ckptfs has
        elif option not in _CONFIG_IRRELEVANT:
            raise LocationError(f"config_kwargs: {option}")


def _add_style(found: dict[str, Any], options: dict[str, Any]) -> None:
    for option, value in options.items():
        if option == "addressing_style" and value in ("virtual", "path", "auto"):
            if value == "virtual":
                found["force_virtual_addressing"] = True
        elif option != "payload_signing_enabled" and value not in (None, False):
            raise LocationError(f"config_kwargs: s3: {option}")


def _is_unsigned(value: object) -> bool:
    """Whether the value is botocore.UNSIGNED, whose class has no name."""
    return type(value).__module__ == "botocore" and not isinstance(value, str)


def _dict(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LocationError(name)
    return dict(cast("dict[str, Any]", value))


# -- Google

_IRRELEVANT_TO_GCS = frozenset(
    [
        "access",
        "block_size",
        "cache_timeout",
        "check_connection",
        "consistency",
        "default_location",
        "finalize_on_close",
        "max_mrd_pool_cache_queue_size",
        "mrd_pool_cache_size",
        "project",
        "requests_timeout",
        "secure_serialize",
        "timeout",
    ]
)
_OWN_KINDS = ("service_account", "authorized_user")
"""The types of keys that are complete in themselves, see `tokens`."""
_CHAINS = ("google_default", "cloud")
"""The tokens that leave the search for credentials to google-auth, as ckptfs does."""


def gcs_arguments(options: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The arguments of a location on Google that read the same objects as gcsfs with these options.

    `method` is the way in which gcsfs has found its credentials, if `token` does not say it. Raises
    LocationError with the name of an option that a location cannot express.
    """
    given = _relevant(options, _IRRELEVANT_TO_GCS)
    found = _credentials(given.pop("token", None) or method)
    endpoint = given.pop("endpoint_url", "")
    for option, value in given.items():
        if value not in (False, {}):
            raise LocationError(option)
    if endpoint:
        place = parse_endpoint(str(endpoint))
        found |= {"scheme": place.scheme, "endpoint_override": place.place}
    return found


def _credentials(token: object) -> dict[str, Any]:
    if token == "anon":
        return {"anonymous": True}
    if token in _CHAINS:
        return {}
    if isinstance(token, dict) and cast("dict[str, Any]", token).get("type") in _OWN_KINDS:
        return {"service_account_key": json.dumps(token)}
    if not isinstance(token, str) or token in ("cache", "browser"):
        raise LocationError("token")
    if os.path.exists(token):
        return {"application_credentials": os.path.abspath(token)}
    return {"access_token": token}
