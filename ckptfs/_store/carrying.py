"""Locations for a daemon that must not, or cannot, read the caller's files.

Such a daemon belongs to another user, or it has other files under the same names (a container). It
gets contents in place of paths: the text of certificates, and the keys that AWS's chain gives now.
These cannot be renewed by the daemon. When they expire, reads fail with `EACCES` until the user
attaches again, which gives the running attachment the new ones.
"""

import json
import os
import ssl
from typing import Any

import msgspec

from ckptfs._model.location import Location, Option
from ckptfs._store.awskeys import keys_for
from ckptfs._store.draft import OF_CALLER
from ckptfs._store.kinds import NAMESPACE
from ckptfs._store.s3options import S3Options, s3_options
from ckptfs.errors import AccessDenied

_TEXT_BYTES_MAX = 16_384
"""As a location's text may be."""
_OF_CHAIN = frozenset(
    [
        "config_file",
        "container_credentials_uri",
        "container_token_file",
        "credentials_file",
        "external_id",
        "load_frequency",
        "profile",
        "role_arn",
        "session_name",
        "sts_endpoint_url",
        "web_identity_token_file",
    ]
)


def carried(location: Location) -> Location | None:
    """The location for such a daemon; None where it names nothing of the caller's.

    Raises AccessDenied where a file cannot be read, or its contents cannot travel.
    """
    if not OF_CALLER & location.options.keys():
        return None
    options, secrets = dict(location.options), dict(location.secrets)
    options.pop(NAMESPACE, None)
    if location.kind == "s3" and not options.get("anonymous"):
        _carry_keys(location, options, secrets)
    for name in ("tls_ca_file_path", "tls_ca_dir_path"):
        if name in options and _is_systems(str(options[name])):
            del options[name]  # the daemon has them as well
    if path := options.pop("tls_ca_file_path", ""):
        secrets["tls_ca_pem"] = _text_of(location, str(path))
    for name in ("tls_ca_dir_path", "federated_token_file"):
        if path := options.get(name):
            raise AccessDenied(
                f"{location.uri}: {name} {path!r} cannot be sent to a ckptfs daemon of another "
                "user or container; start a daemon of your own (CKPTFS_SOCKET)"
            )
    if path := options.pop("application_credentials", ""):
        secrets["service_account_key"] = _service_account(location, str(path))
    return msgspec.structs.replace(location, options=options, secrets=secrets)


def _carry_keys(location: Location, options: dict[str, Option], secrets: dict[str, str]) -> None:
    known: S3Options = s3_options({**options, **secrets})
    keys = keys_for(known, location.uri).keys()
    for name in _OF_CHAIN:
        options.pop(name, None)
    secrets.pop("container_token", None)
    if keys is not None:
        secrets |= {"access_key": keys.access_key, "secret_key": keys.secret_key}
        secrets.pop("session_token", None)
        if keys.token:
            secrets["session_token"] = keys.token


def _is_systems(path: str) -> bool:
    """Whether it has the certificates that OpenSSL trusts without being told."""
    paths = ssl.get_default_verify_paths()
    real, folder = os.path.realpath(path), os.path.realpath(paths.openssl_capath)
    return real in (os.path.realpath(paths.openssl_cafile), folder) or (
        os.path.dirname(real) == folder
    )


def _text_of(location: Location, path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="ignore", opener=_open_at_once) as file:
            text = file.read(_TEXT_BYTES_MAX + 1)
    except OSError as error:
        raise AccessDenied(f"{location.uri}: {path}: {error.strerror}; check the path") from None
    if len(text) > _TEXT_BYTES_MAX:
        raise AccessDenied(
            f"{location.uri}: {path} is longer than the {_TEXT_BYTES_MAX} bytes that can be sent "
            "to a ckptfs daemon of another user or container; name a file that holds only the "
            "certificates of the store's authority"
        )
    return text


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO must not hold us up


def _service_account(location: Location, path: str) -> str:
    text = _text_of(location, path)
    try:
        found: Any = json.loads(text)
        kind = found.get("type")
    except (ValueError, AttributeError):
        kind = None
    if kind != "service_account":
        raise AccessDenied(
            f"{location.uri}: {path} is not the key of a service account, so it cannot be sent to "
            "a ckptfs daemon of another user or container; start a daemon of your own "
            "(CKPTFS_SOCKET)"
        )
    return text
