"""Locations of the filesystems of this process.

ckptfs describes a filesystem by its options (``__reduce__`` of pyarrow's filesystems,
``storage_options`` of fsspec's) and never pickles it. Only the types and options of `kinds` cross
the process border, so nothing that arrives can name code to run. The package `environment` adds the
settings of variables and profiles.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from ckptfs._model.kinds import Kind
from ckptfs._model.location import Location
from ckptfs._model.uri_parameters import Option
from ckptfs._store.environment.draft import Setting
from ckptfs._store.environment.networks import proxy_url
from ckptfs._store.environment.resolve import completed, explained
from ckptfs._store.filesystems import (
    FileSystem,
    fsspec_name,
    fsspec_of,
    location_of,
    refuse_secrets_in,
    store_name_of,
    unwrapped,
)
from ckptfs._store.fsspec_options import gcs_arguments, s3_arguments
from ckptfs._store.kinds import KINDS, StoreKind
from ckptfs._store.named import asked_for
from ckptfs.errors import LocationError

_LOAD_FREQUENCY_S = 900
"""The default of pyarrow and of `S3Options`."""


class NotDescribable(LocationError):
    """A filesystem whose type or option a `Location` cannot express."""


def describe(
    filesystem: FileSystem, path: str, environ: Mapping[str, str] = os.environ
) -> Location:
    """The location of `path` on `filesystem`, with the settings of the environment.

    Raises NotDescribable; LocationError if the path is empty or contains credentials, or ckptfs
    cannot use a setting; AccessDenied if the environment names credentials that do not exist.
    """
    filesystem, path = unwrapped(filesystem, path)
    if store := store_name_of(filesystem):
        return asked_for(store, path.strip("/"), environ)
    return completed(given(filesystem, path), environ)


def explain(
    filesystem: FileSystem, path: str, environ: Mapping[str, str] = os.environ
) -> list[Setting]:
    """All settings of the user for `path` on `filesystem`, and whether ckptfs uses them.

    Empty for a named store, because its table has all its settings. Raises as `given`.
    """
    filesystem, path = unwrapped(filesystem, path)
    return [] if store_name_of(filesystem) else explained(given(filesystem, path), environ)


def given(filesystem: FileSystem, path: str) -> Location:
    """The location of `path` on an unwrapped filesystem, from its own options only. Raises as
    `describe`."""
    kind, arguments = _arguments_of(filesystem)
    path = path.rstrip("/") or _ROOTS.get(kind, "")
    if not path and kind != "http":
        name = type(filesystem).__name__
        raise LocationError(
            f"the path on this {name} is empty; give a bucket and the path of the checkpoint"
        )
    if kind == "http":
        refuse_secrets_in(path)
    row = KINDS[kind]
    # Metadata of pyarrow cannot be compared with a text, so irrelevant options go first.
    said = {k: v for k, v in arguments.items() if k not in row.irrelevant and v not in (None, "")}
    for name, value in said.items():
        if name not in row.public | row.secret and not _is_default(value):
            raise NotDescribable(f"a {row.type_name} with {name} cannot be described")
    secrets: dict[str, Any] = {k: v for k, v in said.items() if k in row.secret}
    if not all(isinstance(value, str) for value in secrets.values()):  # hf: token=False
        raise NotDescribable(f"a {row.type_name} with such credentials cannot be described")
    return Location(kind, path, _public_options(said, row), secrets)


_ROOTS: dict[Kind, str] = {"local": "/", "hdfs": "/"}
"""The path of the root, of kinds whose root is a directory."""


def _public_options(said: Mapping[str, Any], row: StoreKind) -> dict[str, Option]:
    options: dict[str, Option] = {
        name: value
        for name, value in said.items()
        if name in row.public and (value is not False or name == "tls_verify_certificates")
    }
    for name in ("tls_ca_file_path", "tls_ca_dir_path"):
        if name in options:
            options[name] = os.path.abspath(str(options[name]))
    return options


def _is_default(value: object) -> bool:
    """Whether an option has its default, as far as a filesystem's description shows that."""
    return value in (None, "", False, 0, -1) or value == {}


def _arguments_of(filesystem: FileSystem) -> tuple[Kind, dict[str, Any]]:
    """The kind of an unwrapped filesystem, and its constructor's arguments."""
    if (place := location_of(filesystem, "")) is not None:
        return place.kind, {**place.options, **place.secrets}
    inner = fsspec_of(filesystem)
    name = type(filesystem).__name__ if inner is None else fsspec_name(inner)
    if name in _TRANSLATED:
        kind, translate = _TRANSLATED[name]
        try:
            return kind, translate(inner, _storage_options(inner, name))
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
    return kind, _without_defaults(arguments) if kind == "s3" else arguments


def _of_gcsfs(filesystem: Any, options: dict[str, Any]) -> dict[str, Any]:
    return gcs_arguments(options, filesystem.credentials.method)


_TRANSLATED: dict[str, tuple[Kind, Callable[[Any, dict[str, Any]], dict[str, Any]]]] = {
    "s3fs.S3FileSystem": ("s3", lambda _, options: s3_arguments(options)),
    "gcsfs.GCSFileSystem": ("gcs", _of_gcsfs),
    "gcsfs.ExtendedGcsFileSystem": ("gcs", _of_gcsfs),  # newer versions make this one instead
}
"""The fsspec filesystems of kinds that ckptfs knows by the options of pyarrow."""


def _without_defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of pyarrow's S3FileSystem without those that have their defaults."""
    arguments["proxy"] = proxy_url(arguments.pop("proxy_options", None) or {})
    for option in ("request_timeout", "connect_timeout"):
        if arguments.get(option, 0) <= 0:  # -1 stands for the default
            arguments.pop(option, None)
    if arguments.get("load_frequency") == _LOAD_FREQUENCY_S:
        del arguments["load_frequency"]
    return arguments


def _storage_options(filesystem: Any, name: str) -> dict[str, Any]:
    if filesystem.storage_args:
        raise NotDescribable(f"a {name} with positional arguments cannot be described")
    return dict(filesystem.storage_options)


def _plain_options(filesystem: Any, name: str, allowed: frozenset[str]) -> dict[str, Any]:
    """The options of an fsspec filesystem. Raises NotDescribable for an option that is not
    allowed."""
    options = _storage_options(filesystem, name)
    plain = (str, int, float, bool, type(None))
    unknown = {k for k, v in options.items() if k not in allowed or not isinstance(v, plain)}
    if unknown:
        raise NotDescribable(f"a {name} with {', '.join(sorted(unknown))} cannot be described")
    return options
