"""What a user has said in standard places about a store: variables, profiles and their likes.

The rule: a setting is used, or it is refused by name. A few settings have no effect on reading;
the table of `kinds` says which, and why. What depends on the caller is resolved in the caller's
process, and travels with the location. `explained` lists all of it, for ``ckptfs doctor``.

Constructor options and parameters of the URI come first, then variables, then profiles.
"""

import os
from collections.abc import Mapping

import msgspec

from ckptfs._model.location import Kind, Location
from ckptfs._store import awsprofile, azure, google, huggingface, networks
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


def explained(
    location: Location, environ: Mapping[str, str] = os.environ
) -> tuple[list[Setting], str]:
    """All settings that concern a location, and the error that `completed` raises; "": none."""
    draft = Draft(location, environ)
    try:
        _complete(draft)
    except (LocationError, AccessDenied) as error:
        return draft.settings, str(error)
    return draft.settings, ""


def _complete(draft: Draft) -> None:
    row = KINDS.get(draft.kind)
    if row is None:
        return
    if draft.kind in ("azure", "az"):
        azure.complete(draft)
    elif draft.kind == "s3":
        _canonical_endpoint(draft)
        awsprofile.complete(draft)
    elif draft.kind == "gcs":
        _canonical_endpoint(draft)
        add_variables(draft)
        google.complete(draft)
    else:
        add_variables(draft)
        if draft.kind == "hf":
            huggingface.complete(draft)
    if "proxy" in row.secret:
        networks.complete(draft)
    for name, why in row.ignored.items():
        if value := draft.environ.get(name):
            draft.ignored(name, value, why)


def _canonical_endpoint(draft: Draft) -> None:
    """One text for one endpoint, whoever has written it."""
    endpoint = draft.endpoint
    draft.options["scheme"] = "https"
    if endpoint is not None:
        draft.options |= {"endpoint_override": endpoint.place, "scheme": endpoint.scheme}


def known_variables(kind: Kind) -> tuple[str, ...]:
    """All variables that concern a kind of store, for the documentation and its test."""
    row = KINDS[kind]
    network = (*PROXIES, *CA_FILES) if "proxy" in row.secret else ()
    of_options = [name for names in row.variables.values() for name in names]
    return (*of_options, *row.handled, *row.ignored, *network)
