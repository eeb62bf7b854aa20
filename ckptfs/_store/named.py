"""Named stores of this process's own configuration.

A process needs them for what it reads itself, and for a daemon that does not know the name. The
daemon alone could not look names up, because copies, ``ckptfs find``, ``ckptfs doctor prod:...``
and pickled filesystems have to work without a daemon, or with one that was started before the table
was written.
"""

import contextlib
import os
from collections.abc import Mapping

import msgspec

from ckptfs._config.load import load_config
from ckptfs._model.kinds import Kind
from ckptfs._model.location import Location
from ckptfs._model.named_store import CredentialSource, StoreTable, named_location, split_named
from ckptfs._store.base import Store
from ckptfs._store.credentials import SecretFile, environment_secrets
from ckptfs._store.environment.resolve import completed
from ckptfs._store.resolve import open_store
from ckptfs._store.s3.keys import keys_for
from ckptfs._store.s3.options import S3Options
from ckptfs.errors import AccessDenied, UnknownStore

_FILES = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
"""The variables of a caller that name the files of AWS's profiles. A daemon that is started on
demand does not inherit them."""
_WHOSE = (
    *_FILES,
    "AWS_DEFAULT_PROFILE",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)
"""The variables of a caller that decide which keys AWS's chain finds."""


def own_table(name: str) -> StoreTable | None:
    """The table of a store in our configuration. Raises ConfigError."""
    return load_config().store.get(name)


def named(text: str) -> Location | None:
    """The location to send to a daemon for ``store:path``; None for another text. Raises
    LocationError, ConfigError."""
    found = split_named(text)
    if found is None:
        return None
    name, below = found
    return asked_for(name, below)


def asked_for(name: str, below: str, environ: Mapping[str, str] = os.environ) -> Location:
    """The location to send to a daemon for a path in a store.

    Usually it has only the name. It has the full location with credentials if our own table takes
    these from the environment and ours has them, or if the table names a profile and our
    environment names the files of profiles.

    Raises LocationError, ConfigError, AccessDenied.
    """
    table = own_table(name)
    if table is not None:
        place = table.location(name, below)
        secrets = _in_environment(table, place.kind, environ)
        of_chain = place.kind == "s3" and table.credentials == "default"
        profile = _profile_in_files(table, environ)
        if secrets or profile or (of_chain and any(environ.get(name) for name in _WHOSE)):
            options = {**place.options, "profile": profile} if profile else place.options
            place = msgspec.structs.replace(place, options=options, secrets=secrets, store=None)
            return completed(place, environ)
    return named_location(name, below, table)


def _profile_in_files(table: StoreTable, environ: Mapping[str, str]) -> str:
    """The profile of the table if our environment names AWS's files; else ""."""
    source = table.credentials
    if isinstance(source, str) or source.file or not any(environ.get(name) for name in _FILES):
        return ""
    return source.profile


def open_place(location: Location, timeout_s: float) -> tuple[Location, Store]:
    """The real location of a location that may be named, and the store there, with credentials of
    this process. Raises UnknownStore, and as ``resolve.open_store``."""
    if location.kind != "named":
        return location, open_store(location, timeout_s)
    table, place = _place_of(location)
    return place, open_store(place, timeout_s, table.credentials)


def own_location(location: Location, environ: Mapping[str, str] = os.environ) -> Location:
    """The full location of a named one, with its credentials, for a daemon that lacks the name.

    Raises UnknownStore if our configuration does not have the store either, and AccessDenied if its
    credentials cannot be read.
    """
    table, place = _place_of(location)
    secrets = _secrets_of(table, place, environ)
    return msgspec.structs.replace(place, secrets=secrets, store=None)


def _place_of(location: Location) -> tuple[StoreTable, Location]:
    name = str(location.options["store"])
    table = own_table(name)
    if table is None:
        raise UnknownStore(
            f"{location.uri}: your configuration has no store {name!r}; add [store.{name}] to it "
            "(ckptfs config shows the file). You can attach a store that only the node's daemon "
            "knows, but not search or examine it"
        )
    return table, table.location(name, location.path)


def _secrets_of(table: StoreTable, place: Location, environ: Mapping[str, str]) -> dict[str, str]:
    source = table.credentials
    if isinstance(source, str):
        return _in_environment(table, place.kind, environ)
    if source.file:
        return SecretFile(source.file, source.profile, place.kind).current()
    if source.environment:
        return environment_secrets(source, place.kind, environ)
    keys = keys_for(S3Options(), place.uri, source).keys()
    return {} if keys is None else keys.secrets


def _in_environment(table: StoreTable, kind: Kind, environ: Mapping[str, str]) -> dict[str, str]:
    """The credentials in our environment that the table names. The default credentials of AWS are
    the variables without a prefix, which travel as they do with a URI."""
    source = table.credentials
    if source == "default" and kind == "s3":
        source = CredentialSource()
    if isinstance(source, str) or source.file or source.profile:
        return {}
    with contextlib.suppress(AccessDenied):
        return environment_secrets(source, kind, environ)
    return {}
