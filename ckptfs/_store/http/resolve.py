"""Stores on HTTP(S) servers from locations. The module opens no connections."""

from collections.abc import Mapping
from typing import Any

from ckptfs._model.location import Location
from ckptfs._store.base import Store
from ckptfs._store.http.client import HttpOptions
from ckptfs._store.http.store import HttpStore
from ckptfs.errors import LocationError


def open_directory(location: Location, options: Mapping[str, Any], timeout_s: float) -> Store:
    """The store at the URL of a location, with these options. Raises LocationError if one is
    malformed."""
    known = {name: options[name] for name in HttpOptions.__struct_fields__ if name in options}
    try:
        return HttpStore(location.path, location.uri, HttpOptions(**known), timeout_s)
    except (OSError, ValueError) as error:
        if isinstance(error, LocationError):
            raise
        raise LocationError(f"{location.uri}: {error}; check the options") from None
