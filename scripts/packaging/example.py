"""An example of ``ckptfs.toml``: each setting with its meaning and default, commented out."""

import json
import textwrap
from typing import Any

import msgspec

from ckptfs._model.config import Config, descriptions

_PATHS = {
    "socket": "/run/ckptfs/control.sock",
    "node_socket": "/run/ckptfs/control.sock",
    "mount": "/run/ckptfs/mnt",
    "cache_dir": "/var/cache/ckptfs",
}
"""Defaults of root's daemon, which are found when they are asked for."""
_HEAD = """\
# Settings of ckptfs: /etc/ckptfs.toml for root's daemon, ~/.config/ckptfs/ckptfs.toml for others.
# A line that is commented out shows the default; `ckptfs config` shows what is in effect, and
# `ckptfs help config` explains it.

"""
_STORE = """\
# A named store: users attach prod:run7/checkpoint_000100, and need no keys.
#[store.prod]
#uri = "s3://training-checkpoints/llm"
#credentials = { file = "/etc/ckptfs/prod-keys" }
#groups = ["research"]
"""


def configuration() -> str:
    """The file's text."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(Config)}
    found = [
        f"{_comment(meta.description or '')}\n#{name} = {_value(name, defaults)}\n\n"
        for name, meta in descriptions(Config).items()
        if name != "store"
    ]
    return _HEAD + "".join(found) + _STORE


def _comment(text: str) -> str:
    return textwrap.fill(text, 98, initial_indent="# ", subsequent_indent="# ")


def _value(name: str, defaults: dict[str, Any]) -> str:
    return json.dumps(_PATHS.get(name, defaults[name]))  # TOML writes these as JSON does
