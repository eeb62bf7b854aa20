"""Locations for a daemon that must not, or cannot, read the caller's files.

Such a daemon belongs to another user, or it has other files under the same names (a container). It
gets contents instead of paths: the text of certificates, and the keys that AWS's chain gives now.
The daemon cannot renew the keys. When they expire, reads fail with `EACCES` until the user attaches
again, which gives the new keys to the running attachment.
"""

import json
import os
import ssl
from typing import Any

import msgspec

from ckptfs._model.location import Location
from ckptfs._model.uri_parameters import Option
from ckptfs._store.builders import NAMESPACE
from ckptfs._store.credentials import open_at_once
from ckptfs._store.environment.draft import OF_CALLER
from ckptfs._store.s3.keys import keys_for
from ckptfs._store.s3.options import s3_options
from ckptfs.errors import AccessDenied

_TEXT_BYTES_MAX = 16_384
"""The longest text of a location."""
_CERTIFICATES = frozenset(["tls_ca_file_path", "tls_ca_dir_path"])
_OF_ROLE = ("external_id", "load_frequency", "role_arn", "session_name", "sts_endpoint_url")


def carried(location: Location) -> Location | None:
    """The location for such a daemon; None if the location names no file of the caller. Raises
    AccessDenied if a file cannot be read, or its contents cannot travel."""
    if not OF_CALLER & location.options.keys():
        return None
    options, secrets = dict(location.options), dict(location.secrets)
    options.pop(NAMESPACE, None)
    if location.kind == "s3" and not options.get("anonymous"):
        _carry_keys(location, options, secrets)
    for name in _CERTIFICATES:
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
    keys = keys_for(s3_options({**options, **secrets}), location.uri).keys()
    for name in (*OF_CALLER - _CERTIFICATES, *_OF_ROLE):  # the options of AWS's chain
        options.pop(name, None)
    secrets.pop("container_token", None)
    if keys is not None:
        secrets.pop("session_token", None)
        secrets |= keys.secrets


def _is_systems(path: str) -> bool:
    """Whether a path has the certificates that OpenSSL trusts by default."""
    paths = ssl.get_default_verify_paths()
    real, folder = os.path.realpath(path), os.path.realpath(paths.openssl_capath)
    return real in (os.path.realpath(paths.openssl_cafile), folder) or (
        os.path.dirname(real) == folder
    )


def _text_of(location: Location, path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="ignore", opener=open_at_once) as file:
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
