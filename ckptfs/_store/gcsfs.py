"""Options of gcsfs, and what they are for pyarrow, which reads the same objects."""

import json
import os
from collections.abc import Mapping
from typing import Any, cast

from ckptfs._model.endpoints import parse_endpoint
from ckptfs.errors import LocationError

_IRRELEVANT = frozenset(
    [
        "access",
        "asynchronous",
        "block_size",
        "cache_timeout",
        "check_connection",
        "consistency",
        "default_location",
        "finalize_on_close",
        "listings_expiry_time",
        "loop",
        "max_mrd_pool_cache_queue_size",
        "max_paths",
        "mrd_pool_cache_size",
        "project",
        "requests_timeout",
        "secure_serialize",
        "skip_instance_cache",
        "timeout",
        "use_listings_cache",
    ]
)
"""How gcsfs buffers, remembers, writes and waits; ckptfs has settings of its own for that."""
_OWN_KINDS = ("service_account", "authorized_user")
"""Keys that hold all they need, see `tokens`."""
_CHAINS = ("google_default", "cloud")
"""Credentials that google-auth finds, as it does for ckptfs."""


def gcs_arguments(options: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The arguments of a location on Google that read the same objects as gcsfs with these options.

    Args:
        options: Of the filesystem.
        method: How gcsfs has found its credentials where `token` does not say it.

    Raises LocationError with the name of an option that they cannot say.
    """
    given = {k: v for k, v in options.items() if v not in (None, "") and k not in _IRRELEVANT}
    found = _credentials(given.pop("token", None) or method)
    endpoint = given.pop("endpoint_url", "")
    for option, value in given.items():
        if value not in (False, {}):
            raise LocationError(option)
    if endpoint:
        place = parse_endpoint(str(endpoint))
        found |= {"scheme": place.scheme, "endpoint_override": place.place}
    return found


def _credentials(token: object) -> dict[str, Any]:
    if token == "anon":
        return {"anonymous": True}
    if token in _CHAINS:
        return {}
    if isinstance(token, dict) and cast("dict[str, Any]", token).get("type") in _OWN_KINDS:
        return {"service_account_key": json.dumps(token)}
    if not isinstance(token, str) or token in ("cache", "browser"):
        raise LocationError("token")
    if os.path.exists(token):
        return {"application_credentials": os.path.abspath(token)}
    return {"access_token": token}
