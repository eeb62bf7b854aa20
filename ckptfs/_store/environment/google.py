"""Google's standard settings: the emulator, and application default credentials."""

import os

from ckptfs._store.environment.draft import Draft, canonise_endpoint, is_bare

_ADC = "application_default_credentials.json"
"""The file that ``gcloud auth application-default login`` writes."""


def complete(draft: Draft) -> None:
    """Add an emulator's endpoint, and the file of credentials, to a location. Raises AccessDenied
    if GOOGLE_APPLICATION_CREDENTIALS names a file that cannot be read."""
    canonise_endpoint(draft)
    for name in ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
        if value := draft.environ.get(name):
            was_named = bool(draft.options.get("endpoint_override"))
            draft.take_endpoint(value, name, "http")
            if not was_named and is_bare(draft):
                draft.options["anonymous"] = True  # as Google's own libraries do with an emulator
    place = "GOOGLE_APPLICATION_CREDENTIALS"
    if path := draft.environ.get(place):
        if not is_bare(draft) or "application_credentials" in draft.options:
            draft.ignored(place, path, "other credentials are given, or none are needed")
        elif not os.access(path, os.R_OK):
            raise draft.denied(place, path, f"{path!r} cannot be read")
        else:
            draft.take("application_credentials", os.path.abspath(path), place)
    elif is_bare(draft) and os.access(file := _of_gcloud(draft), os.R_OK):
        draft.take("application_credentials", file, "gcloud auth application-default login")


def _of_gcloud(draft: Draft) -> str:
    home = draft.environ.get("HOME") or os.path.expanduser("~")
    folder = draft.environ.get("CLOUDSDK_CONFIG") or os.path.join(home, ".config/gcloud")
    return os.path.join(folder, _ADC)
