"""Hugging Face's standard settings besides those that the table of `kinds` has."""

import os

from ckptfs._store.draft import Draft, is_bare

_TOKEN_BYTES_MAX = 4096
_TRUE = frozenset(["1", "on", "yes", "true"])
"""As huggingface_hub reads its flags."""


def complete(draft: Draft) -> None:
    """Add the token that ``hf auth login`` has kept.

    Raises LocationError where the environment says that Hugging Face must not be asked.
    """
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
