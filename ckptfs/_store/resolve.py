"""Location -> Store.

pyarrow is imported for what needs it only: that takes 0.14 s and 40 MB of a daemon, and S3 does
without.
"""

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from ckptfs._model.location import Location
from ckptfs._store.awskeys import keys_for
from ckptfs._store.base import Store
from ckptfs._store.descriptions import DESCRIPTIONS
from ckptfs._store.s3 import S3Store
from ckptfs._store.s3client import S3Client
from ckptfs._store.s3options import S3Options
from ckptfs.errors import LocationError

OpenStore: TypeAlias = Callable[[Location, float], Store]
"""The type of `open_store`."""


def open_store(location: Location, timeout_s: float) -> Store:
    """The store at `location`. Opens no connection.

    Args:
        location: Checked here against the allow-list: it may come from another process.
        timeout_s: Longest connect, and longest silence within a request.

    Raises:
        LocationError: An option that is not on the list, or of a wrong type.
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
        from ckptfs._store.onfilesystem import open_on_filesystem

        return open_on_filesystem(location, options, timeout_s)
    try:
        known = msgspec.convert(options, S3Options)
        bucket, _, prefix = location.path.partition("/")
        client = S3Client(bucket, known, keys_for(known, location.uri), timeout_s)
    except (OSError, ValueError) as error:
        raise LocationError(f"{location.uri}: {error}; check the options") from None
    return S3Store(client, prefix, location.uri)
