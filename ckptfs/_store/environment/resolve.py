"""The settings of a user for a store in standard places: variables, profiles and files.

ckptfs uses a setting, or refuses it by name. A few settings have no effect on reading, and the
table of `kinds` lists them with reasons. The caller's process resolves the settings that depend on
the caller, and sends them with the location. `explained` lists all settings for ``ckptfs doctor``.

Constructor options and parameters of the URI come first, then variables, then profiles.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from ckptfs._model.kinds import Kind
from ckptfs._model.location import Location
from ckptfs._store.environment import aws, azure, google, huggingface, networks
from ckptfs._store.environment.draft import Draft, Setting, add_variables
from ckptfs._store.kinds import CA_FILES, KINDS, PROXIES
from ckptfs.errors import AccessDenied, LocationError


def completed(location: Location, environ: Mapping[str, str] = os.environ) -> Location:
    """A location with all settings of the caller's environment. Raises LocationError for a setting
    that ckptfs cannot use, and AccessDenied for one that names credentials that do not exist."""
    draft = Draft(location, environ)
    _complete(draft)
    return draft.location


def connected(location: Location, environ: Mapping[str, str] = os.environ) -> Location:
    """A location with the proxy and the certificates of this process's environment.

    It is for a named store, whose table has all other settings. Raises LocationError.
    """
    row = KINDS.get(location.kind)
    if row is None or "proxy" not in row.secret:
        return location
    draft = Draft(location, environ)
    if location.kind == "s3":
        aws.add_ca_bundle(draft)
    networks.complete(draft)
    return msgspec.structs.replace(location, options=draft.options, secrets=draft.secrets)


def explained(location: Location, environ: Mapping[str, str] = os.environ) -> list[Setting]:
    """All settings for a location, up to the first that `completed` refuses."""
    draft = Draft(location, environ)
    with suppress(LocationError, AccessDenied):
        _complete(draft)
    return draft.settings


def _complete(draft: Draft) -> None:
    location_kind = draft.kind
    row = KINDS.get(location_kind)
    if row is None:
        return
    _COMPLETE.get(location_kind, add_variables)(draft)
    if "proxy" in row.secret:
        networks.complete(draft)
    for name, why in row.ignored.items():
        if value := draft.environ.get(name):
            draft.ignored(name, value, why)
    listed = {word for each in draft.settings for word in (each.place, *each.why.split())}
    for name in known_variables(location_kind):
        if draft.environ.get(name) and name not in listed:
            draft.ignored(name, "", "it has no effect on this location")


_COMPLETE: Mapping[Kind, Callable[[Draft], None]] = {
    "s3": aws.complete,
    "gcs": google.complete,
    "azure": azure.complete,
    "az": azure.complete,
    "hf": huggingface.complete,
}
"""The kinds that have more settings than the variables of their row."""


def known_variables(kind: Kind) -> tuple[str, ...]:
    """All variables with an effect on a kind of store."""
    row = KINDS[kind]
    network = (*PROXIES, *(name.lower() for name in PROXIES), *CA_FILES)
    of_options = [name for names in row.variables.values() for name in names]
    more = network if "proxy" in row.secret else ()
    return (*of_options, *row.handled, *row.ignored, *more)
