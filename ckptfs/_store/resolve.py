"""Stores from locations.

Only the stores that need pyarrow import it, because that takes 0.14 s and 40 MB.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgspec

from ckptfs._model.kinds import Kind
from ckptfs._model.location import Location
from ckptfs._model.named_store import Credentials
from ckptfs._store.base import Store
from ckptfs._store.builders import NAMESPACE
from ckptfs._store.cloud import resolve
from ckptfs._store.credentials import SecretFile, environment_secrets
from ckptfs._store.environment.resolve import connected
from ckptfs._store.http.resolve import open_directory
from ckptfs._store.kinds import KINDS
from ckptfs._store.s3.address import split_path
from ckptfs._store.s3.client import S3Client
from ckptfs._store.s3.keys import keys_for
from ckptfs._store.s3.options import s3_options
from ckptfs._store.s3.store import S3Store
from ckptfs._store.wrappers import RenewedStore
from ckptfs.errors import AccessDenied, LocationError

OpenStore: TypeAlias = Callable[[Location, float], Store]
"""A function that opens a location which brings its credentials or needs none."""
IN_PROCESS: frozenset[Kind] = frozenset(["s3", *resolve.KINDS])
"""The kinds that `open_store` does not leave to `open_other`."""


def open_here(location: Location, timeout_s: float) -> Store:
    """The store at a location of another kind than `IN_PROCESS`. Raises LocationError."""
    if location.kind == "http":
        return open_directory(location, {**location.options, **location.secrets}, timeout_s)
    from ckptfs._store.build import open_on_filesystem  # start-up time

    return open_on_filesystem(location, timeout_s)


def open_store(
    location: Location,
    timeout_s: float,
    credentials: Credentials = "default",
    open_other: OpenStore = open_here,
) -> Store:
    """The store at `location`. Opens no connection.

    An allow-list decides about the options, because the location may come from another process.
    `timeout_s` is the longest connect, and the longest silence within a request. `credentials` are
    those of a named store. `open_other` opens a store that only a library can read.

    Raises LocationError for an option that is not on the list, or of a wrong type, and AccessDenied
    if the file or variables with the credentials cannot be used.
    """
    row = KINDS.get(location.kind)
    if row is None:
        raise LocationError(
            f"{location.uri}: only a private daemon can read this filesystem; give the filesystem "
            "itself instead of its URI"
        )
    unknown = location.options.keys() - row.public | location.secrets.keys() - row.secret
    if unknown:
        raise LocationError(
            f"{location.uri}: unknown options {', '.join(sorted(unknown))}; leave them out"
        )
    if location.store is not None:
        location = connected(location)
    public = {k: v for k, v in location.options.items() if k != NAMESPACE}
    location = msgspec.structs.replace(location, options=public)
    if location.kind in resolve.KINDS:
        open_other = resolve.open_objects
    if location.kind != "s3":
        return _open_with_credentials(location, timeout_s, credentials, open_other)
    try:
        known = s3_options({**location.options, **location.secrets})
        timeout_s = max(known.request_timeout, known.connect_timeout) or timeout_s
        bucket, prefix = split_path(location.path)
        client = S3Client(bucket, known, keys_for(known, location.uri, credentials), timeout_s)
    except AccessDenied:
        raise
    except (OSError, ValueError) as error:
        raise LocationError(f"{location.uri}: {error}; check the options") from None
    return S3Store(client, prefix, location.uri)


def _open_with_credentials(
    location: Location, timeout_s: float, credentials: Credentials, open_other: OpenStore
) -> Store:
    def open_with(secrets: Mapping[str, str]) -> Store:
        complete = msgspec.structs.replace(location, secrets={**location.secrets, **secrets})
        return open_other(complete, timeout_s)

    if isinstance(credentials, str):
        return open_with({})
    if credentials.file:
        file = SecretFile(credentials.file, credentials.profile, location.kind)
        return RenewedStore(file, open_with)
    return open_with(environment_secrets(credentials, location.kind))
