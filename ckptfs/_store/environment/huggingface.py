"""Hugging Face's standard settings, besides those in the table of `kinds`."""

import os

from ckptfs._store.environment.draft import Draft, add_variables, is_bare

_TOKEN_BYTES_MAX = 4096
_TRUE = frozenset(["1", "on", "yes", "true"])
"""The true values of flags, as in huggingface_hub."""


def complete(draft: Draft) -> None:
    """Add the variables, and the token that ``hf auth login`` has stored. Raises LocationError if
    the environment forbids requests to Hugging Face."""
    add_variables(draft)
    place = "HF_HUB_OFFLINE"
    if _is_true(draft, place):
        raise draft.refused(place, draft.environ[place], "it forbids requests; unset it")
    if not is_bare(draft):
        return
    place = "HF_HUB_DISABLE_IMPLICIT_TOKEN"
    if _is_true(draft, place):
        draft.used(place, draft.environ[place])
        return
    where, file = _token_file(draft)
    try:
        with open(file, encoding="ascii") as opened:
            token = opened.read(_TOKEN_BYTES_MAX).strip()
    except (OSError, UnicodeDecodeError):
        return  # the user has not logged in
    if token:
        draft.take("token", token, where)


def _token_file(draft: Draft) -> tuple[str, str]:
    environ = draft.environ
    if path := environ.get("HF_TOKEN_PATH"):
        return "HF_TOKEN_PATH", path
    home = environ.get("HOME") or os.path.expanduser("~")
    cache = environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    folder = environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    file = os.path.join(os.path.expanduser(folder), "token")
    return f"the file {file}", file


def _is_true(draft: Draft, name: str) -> bool:
    return draft.environ.get(name, "").lower() in _TRUE
