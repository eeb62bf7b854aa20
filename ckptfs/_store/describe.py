# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
"""A filesystem of this process -> Location.

A filesystem is described by its options (the ``__reduce__`` of pyarrow's, the ``storage_options``
of fsspec's), never pickled: only the types and options of `kinds` cross the process border, so
nothing that arrives can name code to run. What else the user has said, in variables and profiles,
`ambient` adds.
"""

import os
from collections.abc import Mapping
from typing import Any

from ckptfs._model.location import Kind, Location, Option
from ckptfs._store.ambient import completed, explained
from ckptfs._store.draft import Setting
from ckptfs._store.filesystems import (
    FileSystem,
    fsspec_name,
    fsspec_of,
    location_of,
    refuse_secrets_in,
    store_name_of,
    unwrapped,
)
from ckptfs._store.gcsfs import gcs_arguments
from ckptfs._store.kinds import KINDS
from ckptfs._store.named import asked_for
from ckptfs._store.networks import proxy_url
from ckptfs._store.s3fs import s3_arguments
from ckptfs.errors import LocationError

_GCSFS = frozenset(["gcsfs.GCSFileSystem", "gcsfs.ExtendedGcsFileSystem"])
"""The class, and what newer versions make instead."""
_LOAD_FREQUENCY_S = 900
"""pyarrow's default, and that of `S3Options`."""


class NotDescribable(LocationError):
    """A filesystem of a type, or with an option, that no `Location` can say."""


def describe(
    filesystem: FileSystem, path: str, environ: Mapping[str, str] = os.environ
) -> Location:
    """The location of `path` on `filesystem`, with what the environment says about it.

    Raises:
        NotDescribable: The filesystem's type or an option of it cannot be described.
        LocationError: There is no path, credentials are in it, or the environment has a setting
            that cannot be used.
        AccessDenied: The environment names credentials that are not there.
    """
    filesystem, path = unwrapped(filesystem, path)
    if store := store_name_of(filesystem):
        return asked_for(store, path.strip("/"), environ)
    return completed(given(filesystem, path), environ)


def explain(
    filesystem: FileSystem, path: str, environ: Mapping[str, str] = os.environ
) -> list[Setting]:
    """All that the user has said about `path` on `filesystem`, and what becomes of it; nothing of a
    named store, whose table says it. Raises as `given`."""
    filesystem, path = unwrapped(filesystem, path)
    return [] if store_name_of(filesystem) else explained(given(filesystem, path), environ)


def given(filesystem: FileSystem, path: str) -> Location:
    """The location of `path` on an unwrapped filesystem, by its own options only. Raises as
    `describe`."""
    kind, arguments = _arguments_of(filesystem)
    path = path.rstrip("/") or ("/" if kind in ("local", "hdfs") else "")
    if not path and kind in ("s3", "gcs", "azure", "hf", "az"):
        name = type(filesystem).__name__
        raise LocationError(f"a {name} without a path names no checkpoint; add a bucket and a path")
    if kind == "http":
        refuse_secrets_in(path)
    row = KINDS[kind]
    # Metadata of pyarrow cannot be compared with a text, so what is irrelevant goes first.
    said = {k: v for k, v in arguments.items() if k not in row.irrelevant and v not in (None, "")}
    for name, value in said.items():
        if name not in row.public | row.secret and not _is_default(value):
            raise NotDescribable(f"a {row.type_name} with {name} cannot be described")
    options: dict[str, Option] = {
        k: v
        for k, v in said.items()
        if k in row.public and (v is not False or k == "tls_verify_certificates")
    }
    secrets: dict[str, Any] = {k: v for k, v in said.items() if k in row.secret}
    if not all(isinstance(value, str) for value in secrets.values()):  # hf: token=False
        raise NotDescribable(f"a {row.type_name} with such credentials cannot be described")
    for name in ("tls_ca_file_path", "tls_ca_dir_path"):
        if name in options:
            options[name] = os.path.abspath(str(options[name]))
    return Location(kind, path, options, secrets)


def _is_default(value: object) -> bool:
    """Whether a constructor was not given this option, as far as its description shows that."""
    return value in (None, "", False, 0, -1) or value == {}


def _arguments_of(filesystem: FileSystem) -> tuple[Kind, dict[str, Any]]:
    """The kind of an unwrapped filesystem, and its constructor's arguments."""
    if (place := location_of(filesystem, "")) is not None:
        return place.kind, {**place.options, **place.secrets}
    inner = fsspec_of(filesystem)
    name = type(filesystem).__name__ if inner is None else fsspec_name(inner)
    try:
        if name == "s3fs.S3FileSystem":
            return "s3", s3_arguments(_storage_options(inner, name))
        if inner is not None and name in _GCSFS:
            options = _storage_options(inner, name)
            return "gcs", gcs_arguments(options, inner.credentials.method)
    except NotDescribable:
        raise
    except LocationError as error:
        raise NotDescribable(f"{name} with {error} cannot be described") from None
    kinds: dict[str, Kind] = {row.type_name: kind for kind, row in KINDS.items()}
    kind = kinds.get(name)
    if kind is None:
        known = ", ".join(row.type_name for row in KINDS.values())
        raise NotDescribable(
            f"a {name.lstrip('_')} cannot be mounted by the node's daemon; use one of {known}"
        )
    if inner is not None:
        return kind, _plain_options(inner, name, KINDS[kind].public | KINDS[kind].secret)
    arguments: dict[str, Any] = {} if kind == "local" else dict(filesystem.__reduce__()[1][0])
    if kind == "s3":
        arguments["proxy"] = proxy_url(arguments.pop("proxy_options", None) or {})
        for option in ("request_timeout", "connect_timeout"):
            if arguments.get(option, 0) <= 0:  # -1 stands for the default
                arguments.pop(option, None)
        if arguments.get("load_frequency") == _LOAD_FREQUENCY_S:
            del arguments["load_frequency"]
    return kind, arguments


def _storage_options(filesystem: Any, name: str) -> dict[str, Any]:
    if filesystem.storage_args:
        raise NotDescribable(f"a {name} with positional arguments cannot be described")
    return dict(filesystem.storage_options)


def _plain_options(filesystem: Any, name: str, allowed: frozenset[str]) -> dict[str, Any]:
    """Raises NotDescribable."""
    options = _storage_options(filesystem, name)
    plain = (str, int, float, bool, type(None))
    unknown = {k for k, v in options.items() if k not in allowed or not isinstance(v, plain)}
    if unknown:
        raise NotDescribable(f"a {name} with {', '.join(sorted(unknown))} cannot be described")
    return options
