"""Location -> Store.

pyarrow is imported for what needs it only: that takes 0.14 s and 40 MB of a daemon, and S3 does
without.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgspec

from ckptfs._model.location import Location, Option
from ckptfs._model.stores import Credentials
from ckptfs._store import objectstore
from ckptfs._store.awskeys import keys_for
from ckptfs._store.base import Store
from ckptfs._store.credentials import SecretFile, environment_secrets
from ckptfs._store.descriptions import DESCRIPTIONS
from ckptfs._store.renewed import RenewedStore
from ckptfs._store.s3 import S3Store
from ckptfs._store.s3client import S3Client
from ckptfs._store.s3options import S3Options
from ckptfs.errors import AccessDenied, LocationError

OpenStore: TypeAlias = Callable[[Location, float], Store]
"""The type of `open_store`."""


def open_store(location: Location, timeout_s: float, credentials: Credentials = "default") -> Store:
    """The store at `location`. Opens no connection.

    Args:
        location: Checked here against the allow-list: it may come from another process.
        timeout_s: Longest connect, and longest silence within a request.
        credentials: Of its named store, if it has one.

    Raises:
        LocationError: An option that is not on the list, or of a wrong type.
        AccessDenied: The file or variables with the credentials cannot be used.
    """
    description = DESCRIPTIONS.get(location.kind)
    if description is None:
        raise LocationError(f"{location.uri} can be read by a private daemon only")
    unknown = (
        location.options.keys() - description.public | location.secrets.keys() - description.secret
    )
    if unknown:
        raise LocationError(f"{location.uri}: unknown options {', '.join(sorted(unknown))}")
    options = {**location.options, **location.secrets}
    if location.kind != "s3":
        return _open_on_filesystem(location, options, timeout_s, credentials)
    try:
        known = msgspec.convert(options, S3Options)
        bucket, _, prefix = location.path.partition("/")
        client = S3Client(bucket, known, keys_for(known, location.uri, credentials), timeout_s)
    except AccessDenied:
        raise
    except (OSError, ValueError) as error:
        raise LocationError(f"{location.uri}: {error}; check the options") from None
    return S3Store(client, prefix, location.uri)


def _open_on_filesystem(
    location: Location, options: Mapping[str, Option], timeout_s: float, credentials: Credentials
) -> Store:
    def open_with(secrets: Mapping[str, str]) -> Store:
        if location.kind in objectstore.KINDS:
            all_secrets = {**location.secrets, **secrets}
            place = msgspec.structs.replace(location, secrets=all_secrets)
            return objectstore.open_objects(place, timeout_s)
        from ckptfs._store.onfilesystem import open_on_filesystem

        return open_on_filesystem(location, {**options, **secrets}, timeout_s)

    if isinstance(credentials, str):
        return open_with({})
    if credentials.file:
        file = SecretFile(credentials.file, credentials.profile, location.kind)
        return RenewedStore(file, open_with)
    return open_with(environment_secrets(credentials, location.kind))
