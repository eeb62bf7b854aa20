"""Named stores as this process's own configuration has them: for what it reads by itself, and for a
daemon that does not know the name.
"""

import contextlib
import os
from collections.abc import Mapping

import msgspec

from ckptfs._config import load_config
from ckptfs._model.location import Kind, Location
from ckptfs._model.stores import CredentialSource, StoreTable, named_location, split_named
from ckptfs._store.ambient import completed
from ckptfs._store.awskeys import keys_for
from ckptfs._store.base import Store
from ckptfs._store.credentials import SecretFile, environment_secrets
from ckptfs._store.resolve import open_store
from ckptfs._store.s3options import S3Options
from ckptfs.errors import AccessDenied, UnknownStore

_WHOSE = (
    "AWS_DEFAULT_PROFILE",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)
"""Variables of a caller that say whose keys AWS's chain finds."""


def own_table(name: str) -> StoreTable | None:
    """The table of a store in our configuration. Raises ConfigError."""
    return load_config().store.get(name)


def named(text: str) -> Location | None:
    """What is sent to a daemon for ``store:path``; None for another text.

    Raises LocationError, ConfigError.
    """
    found = split_named(text)
    return None if found is None else asked_for(*found)


def asked_for(name: str, below: str, environ: Mapping[str, str] = os.environ) -> Location:
    """What is sent to a daemon for a path in a store: the name, or where our own table has its
    credentials from the environment, and there are some in ours, the place with these.

    Raises LocationError, ConfigError, AccessDenied.
    """
    table = own_table(name)
    if table is not None:
        place = table.location(name, below)
        secrets = _in_environment(table, place.kind, environ)
        of_chain = place.kind == "s3" and table.credentials == "default"
        if secrets or (of_chain and any(environ.get(name) for name in _WHOSE)):
            place = msgspec.structs.replace(place, secrets=secrets, store=None)
            return completed(place, environ)
    return named_location(name, below, table)


def open_place(location: Location, timeout_s: float) -> tuple[Location, Store]:
    """The store at a location, named or not, with credentials of this process, and where it really
    is. Raises UnknownStore, and as ``resolve.open_store``."""
    if location.kind != "named":
        return location, open_store(location, timeout_s)
    table, place = _place_of(location)
    return place, open_store(place, timeout_s, table.credentials)


def open_own(name: str, below: str, timeout_s: float) -> Store:
    """The store at a path in a store of ours. Raises as `open_place`."""
    return open_place(named_location(name, below, None), timeout_s)[1]


def own_location(location: Location, environ: Mapping[str, str] = os.environ) -> Location:
    """A named location as one that needs no name: with the credentials, for a daemon.

    Raises UnknownStore where our configuration does not know it either, and AccessDenied where its
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
            f"{location.uri}: no store {name!r} is configured here; add [store.{name}] to your "
            "configuration (ckptfs config shows it)"
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
    if keys is None:
        return {}
    found = {"access_key": keys.access_key, "secret_key": keys.secret_key}
    return {**found, "session_token": keys.token} if keys.token else found


def _in_environment(table: StoreTable, kind: Kind, environ: Mapping[str, str]) -> dict[str, str]:
    """The credentials in our environment that the table means; those of AWS without a prefix travel
    as they do with a URI."""
    source = table.credentials
    if source == "default" and kind == "s3":
        source = CredentialSource()
    if isinstance(source, str) or source.file or source.profile:
        return {}
    with contextlib.suppress(AccessDenied):
        return environment_secrets(source, kind, environ)
    return {}
