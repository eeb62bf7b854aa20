# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""A filesystem of this process -> Location.

A filesystem is described by its options (the ``__reduce__`` of pyarrow's, the ``storage_options``
of fsspec's), never pickled: only the types and options listed here cross the process border, so
nothing that arrives can name code to run.
"""

import os
from collections.abc import Mapping
from typing import Any

from ckptfs._model.location import Kind, Location, Option
from ckptfs._store.descriptions import DESCRIPTIONS
from ckptfs._store.filesystems import (
    FileSystem,
    fsspec_name,
    fsspec_of,
    location_of,
    refuse_secrets_in,
    store_name_of,
    unwrapped,
)
from ckptfs._store.named import asked_for
from ckptfs.errors import LocationError


class NotDescribable(LocationError):
    """A filesystem of a type, or with an option, that no `Location` can say."""


# Environment variables that stand in for constructor options. The caller's must win over the
# daemon's, which may have been started from another shell. Secrets: only where none is given.
_ENVIRONMENT: dict[Kind, dict[str, tuple[str, ...]]] = {
    "s3": {
        "access_key": ("AWS_ACCESS_KEY_ID",),
        "secret_key": ("AWS_SECRET_ACCESS_KEY",),
        "session_token": ("AWS_SESSION_TOKEN",),
        "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    },
    "hf": {"endpoint": ("HF_ENDPOINT",), "token": ("HF_TOKEN",)},
    "az": {
        name: (f"AZURE_STORAGE_{name.upper()}",)
        for name in (
            "account_name",
            "account_key",
            "client_id",
            "client_secret",
            "connection_string",
            "sas_token",
            "tenant_id",
        )
    },
}

_OF_S3FS = {
    "anon": "anonymous",
    "key": "access_key",
    "secret": "secret_key",
    "token": "session_token",
}
"""Options of s3fs and what they are for pyarrow, which reads the same objects."""


def describe(
    filesystem: FileSystem, path: str, environ: Mapping[str, str] = os.environ
) -> Location:
    """The location of `path` on `filesystem`.

    Raises:
        NotDescribable: The filesystem's type or an option of it cannot be described.
        LocationError: There is no path, or credentials are in it.
    """
    filesystem, path = unwrapped(filesystem, path)
    if store := store_name_of(filesystem):
        return asked_for(store, path.strip("/"))
    kind, arguments = _arguments_of(filesystem)
    path = path.rstrip("/")
    if not path and kind in ("s3", "gcs", "azure", "hf", "az"):
        name = type(filesystem).__name__
        raise LocationError(f"a {name} without a path names no checkpoint; add a bucket and a path")
    if kind == "http":
        refuse_secrets_in(path)
    description = DESCRIPTIONS[kind]
    given = {k: v for k, v in arguments.items() if v not in (None, "")}
    options: dict[str, Option] = {
        k: v
        for k, v in given.items()
        if k in description.public and (v is not False or k == "tls_verify_certificates")
    }
    secrets: dict[str, Any] = {k: v for k, v in given.items() if k in description.secret}
    if not all(isinstance(value, str) for value in secrets.values()):  # hf: token=False
        raise NotDescribable(f"a {description.type_name} with such credentials cannot be described")
    bare = not secrets and not options.get("anonymous") and not options.get("anon")
    for name, variables in _ENVIRONMENT.get(kind, {}).items():
        value = next((environ[v] for v in variables if environ.get(v)), "")
        if value and name in description.public and name not in options:
            options[name] = value
        elif value and name in description.secret and bare:
            secrets[name] = value
    return Location(kind, path, options, secrets)


def _arguments_of(filesystem: FileSystem) -> tuple[Kind, dict[str, Any]]:
    """The kind of an unwrapped filesystem, and its constructor's arguments."""
    if (place := location_of(filesystem, "")) is not None:
        return place.kind, {**place.options, **place.secrets}
    inner = fsspec_of(filesystem)
    name = type(filesystem).__name__ if inner is None else fsspec_name(inner)
    if name == "s3fs.S3FileSystem":
        return "s3", _arguments_of_s3fs(inner)
    kinds: dict[str, Kind] = {d.type_name: k for k, d in DESCRIPTIONS.items()}
    kind = kinds.get(name)
    if kind is None:
        known = ", ".join(d.type_name for d in DESCRIPTIONS.values())
        raise NotDescribable(
            f"a {name.lstrip('_')} cannot be mounted by the node's daemon; use one of {known}"
        )
    if inner is not None:
        allowed = DESCRIPTIONS[kind].public | DESCRIPTIONS[kind].secret
        return kind, _plain_options(inner, name, allowed)
    arguments = {} if kind == "local" else filesystem.__reduce__()[1][0]
    if kind == "hdfs":
        arguments = {k: arguments.get(k) for k in ("host", "port", "user")}
    if kind == "gcs" and arguments.get("access_token"):
        raise NotDescribable(f"a {name} with an access_token, which expires, cannot be described")
    proxy = arguments.get("proxy_options")
    if proxy and proxy.get("host"):
        raise NotDescribable(f"a {name} with proxy_options cannot be mounted; use the environment")
    return kind, arguments


def _arguments_of_s3fs(filesystem: Any) -> dict[str, Any]:
    """What pyarrow's S3FileSystem needs to read the same objects."""
    client: Any = filesystem.storage_options.get("client_kwargs") or {}
    allowed = frozenset(_OF_S3FS) | {"endpoint_url", "use_listings_cache"}
    options = _plain_options(filesystem, "s3fs.S3FileSystem", allowed, apart="client_kwargs")
    if client.keys() - {"endpoint_url", "region_name"}:
        raise NotDescribable("an s3fs.S3FileSystem with these client_kwargs cannot be described")
    arguments = {_OF_S3FS[k]: v for k, v in options.items() if k in _OF_S3FS}
    endpoint = options.get("endpoint_url") or client.get("endpoint_url") or ""
    region = client.get("region_name")
    if not endpoint and not region:
        raise NotDescribable("an s3fs.S3FileSystem without a region cannot be described")
    scheme, _, authority = endpoint.rstrip("/").rpartition("://")
    return arguments | {"scheme": scheme, "endpoint_override": authority, "region": region}


def _plain_options(
    filesystem: Any, name: str, allowed: frozenset[str], apart: str = ""
) -> dict[str, Any]:
    """The options without `apart`. Raises NotDescribable."""
    options = {k: v for k, v in filesystem.storage_options.items() if k != apart}
    plain = (str, int, float, bool, type(None))
    unknown = {k for k, v in options.items() if k not in allowed or not isinstance(v, plain)}
    if filesystem.storage_args or unknown:
        what = ", ".join(sorted(unknown)) or "positional arguments"
        raise NotDescribable(f"a {name} with {what} cannot be described")
    return options
