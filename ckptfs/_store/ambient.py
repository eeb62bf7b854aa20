"""What a user has said in standard places about a store: variables, profiles and their likes.

The rule: a setting is used, or it is refused by name. A few settings have no effect on reading;
the table of `kinds` says which, and why. What depends on the caller is resolved in the caller's
process, and travels with the location. `explained` lists all of it, for ``ckptfs doctor``.

Constructor options and parameters of the URI come first, then variables, then profiles.
"""

import os
from collections.abc import Mapping
from contextlib import suppress

import msgspec

from ckptfs._model.location import Kind, Location
from ckptfs._store import awsprofile, azureenv, googleenv, hfenv, networks
from ckptfs._store.draft import Draft, Setting, add_variables
from ckptfs._store.kinds import CA_FILES, KINDS, PROXIES
from ckptfs.errors import AccessDenied, LocationError


def completed(location: Location, environ: Mapping[str, str] = os.environ) -> Location:
    """A location with all that the caller's surroundings say about it.

    Args:
        location: As a URI or a filesystem says it.
        environ: The caller's environment.

    Raises:
        LocationError: A setting cannot be used.
        AccessDenied: Credentials are named that are not there.
    """
    draft = Draft(location, environ)
    _complete(draft)
    return draft.location


def connected(location: Location, environ: Mapping[str, str] = os.environ) -> Location:
    """A location with the proxy and the certificates that this process's environment names.

    For a named store, whose table says all the rest. Raises LocationError.
    """
    row = KINDS.get(location.kind)
    if row is None or "proxy" not in row.secret:
        return location
    draft = Draft(location, environ)
    if location.kind == "s3":
        awsprofile.add_ca_bundle(draft, None)
    networks.complete(draft)
    return msgspec.structs.replace(location, options=draft.options, secrets=draft.secrets)


def explained(location: Location, environ: Mapping[str, str] = os.environ) -> list[Setting]:
    """All settings that concern a location, up to the first that `completed` refuses."""
    draft = Draft(location, environ)
    with suppress(LocationError, AccessDenied):
        _complete(draft)
    return draft.settings


def _complete(draft: Draft) -> None:
    location_kind = draft.kind
    row = KINDS.get(location_kind)
    if row is None:
        return
    if draft.kind in ("azure", "az"):
        azureenv.complete(draft)
    elif draft.kind == "s3":
        _canonical_endpoint(draft)
        awsprofile.complete(draft)
    elif draft.kind == "gcs":
        _canonical_endpoint(draft)
        add_variables(draft)
        googleenv.complete(draft)
    else:
        add_variables(draft)
        if draft.kind == "hf":
            hfenv.complete(draft)
    if "proxy" in row.secret:
        networks.complete(draft)
    for name, why in row.ignored.items():
        if value := draft.environ.get(name):
            draft.ignored(name, value, why)
    listed = {word for each in draft.settings for word in (each.place, *each.why.split())}
    for name in known_variables(location_kind):
        if draft.environ.get(name) and name not in listed:
            draft.ignored(name, "", "it has no effect on this location")


def _canonical_endpoint(draft: Draft) -> None:
    """One text for one endpoint, however it was written."""
    endpoint = draft.endpoint
    if endpoint is not None:
        draft.options |= {"endpoint_override": endpoint.place, "scheme": endpoint.scheme}
    elif draft.kind == "gcs" or draft.options.get("scheme") == "https":
        # pyarrow says "http" of each filesystem for Google that is anonymous.
        draft.options.pop("scheme", None)


def known_variables(kind: Kind) -> tuple[str, ...]:
    """All variables that concern a kind of store."""
    row = KINDS[kind]
    network = (*PROXIES, *(name.lower() for name in PROXIES), *CA_FILES)
    of_options = [name for names in row.variables.values() for name in names]
    more = network if "proxy" in row.secret else ()
    return (*of_options, *row.handled, *row.ignored, *more)
