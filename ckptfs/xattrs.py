"""Reading the extended attributes of a mounted checkpoint, for code that has only a path."""

import errno
import os

from ckptfs._model.attributes import PREFIX as PREFIX
from ckptfs._model.attributes import URI
from ckptfs.errors import NotAttached


def get(path: "str | os.PathLike[str]", name: str) -> str | None:
    """The text of the attribute `name` (e.g. ``user.ckptfs.state``), or None where there is none.

    Raises OSError if the path does not exist or cannot be read.
    """
    try:
        return os.getxattr(path, name).decode("utf-8", "replace")
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return None
        raise


def read_all(path: "str | os.PathLike[str]") -> dict[str, str]:
    """All attributes that ckptfs states about `path`, by full name.

    Raises:
        NotAttached: The path is not inside a mounted checkpoint.
        OSError: The path does not exist or cannot be read.
    """
    if get(path, URI) is None:
        raise NotAttached(
            f"{os.fspath(path)} is not in a mounted checkpoint; ckptfs status lists them"
        )
    found = {name: get(path, name) for name in os.listxattr(path) if name.startswith(PREFIX)}
    return {name: value for name, value in found.items() if value is not None}
