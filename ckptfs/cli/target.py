"""The checkpoint that a user names on the command line, in the same way for all commands.

- A URI, or ``store:path`` of a named store, names a place, attached or not.
- A path inside a mounted checkpoint names that attachment, or the file or directory in it. The
  attachment may have ended since.
- Another path names a local directory, which can be attached like other places.
"""

import contextlib
import os
from collections.abc import Generator
from typing import NamedTuple

from ckptfs import xattrs
from ckptfs._client import client
from ckptfs._config.load import load_config
from ckptfs._model import attributes
from ckptfs._model.location import Location
from ckptfs._model.named_store import is_uri
from ckptfs._model.protocol.replies import Trace
from ckptfs._model.protocol.requests import GetTrace
from ckptfs._model.uris import anonymous_uri, parse_place, scheme_of, shown_uri
from ckptfs.errors import LocationError, NotAttached


class Target(NamedTuple):
    """A named place, or a path inside the mount.

    Attributes:
        text: The argument, with the additions of the options.
        path: The absolute path inside the mount, or "".
        name: The attachment's directory in the mount, or "".
        place: The place; None for a path inside the mount.
    """

    text: str
    path: str
    name: str
    place: Location | None

    @property
    def shown(self) -> str:
        """The target in messages, without credentials."""
        return self.path or shown_uri(self.text)

    @contextlib.contextmanager
    def mounted(self) -> Generator[str]:
        """Yield the path in the mount. The context keeps a place attached."""
        if self.place is None:
            yield self.path
            return
        with client.leased(self.place) as path:
            yield path


def target_of(text: str, anonymous: bool = False) -> Target:
    """Find the target that a user has named. `anonymous` is for a store without credentials.

    Raises:
        LocationError: The text is neither a URI nor a path.
        NotAttached: The path is the mount itself, which is not a checkpoint.
    """
    if anonymous:
        text = anonymous_uri(text)
    if is_uri(text):
        return Target(text, "", "", location_of(text))
    path = os.path.abspath(os.path.expanduser(text))
    if name := _attachment_of(path):
        return Target(text, path, name, None)
    return Target(text, "", "", location_of(text))


def location_of(text: str) -> Location:
    """The place of a URI or a local path. Raises LocationError."""
    # Not at the top, because `status` and `umount` need no stores. These imports bring no pyarrow.
    from ckptfs._store.named import named

    if (location := named(text)) is not None:
        return location
    from ckptfs._store.environment.resolve import completed

    return completed(parse_place(local_path(text)))


def local_path(text: str) -> str:
    """Make a local path absolute, and return a URI as it is. Raises LocationError for text that
    looks like neither, which is usually a URI without its scheme."""
    if is_uri(text) or scheme_of(text):
        return text
    if not text:
        raise LocationError("the location is empty; give a URI, or a path")
    path = os.path.abspath(os.path.expanduser(text))
    if not os.path.lexists(path) and text[:1] not in ("/", "~", "."):
        raise LocationError(
            f"{text!r} is not in this directory; write a place in a store like s3://bucket/path, "
            "and a local one like /path or ./path"
        )
    return path


def traced(text: str) -> tuple[Trace, str, Location | None]:
    """The trace of a checkpoint, its directory in the mount ("" if it is no longer attached), and
    the place if the user named one. Raises NotAttached."""
    target = target_of(text)
    with client.connect() as connection:
        trace = connection.ask(GetTrace(name=target.name, location=target.place))
        return trace, connection.path_of(trace) if trace.name else "", target.place


def _attachment_of(path: str) -> str:
    """The attachment's directory that contains a path, or ""."""
    mount = load_config().mount
    if path == mount or path == os.path.realpath(mount):
        raise NotAttached(f"{path} is the mount itself; name a checkpoint in it (ckptfs status)")
    # This compares texts, because a detached checkpoint has no directory any more, and a mount
    # without a daemon does not answer.
    for each in (mount, os.path.realpath(mount)):
        if path.startswith(f"{each}/"):
            return path[len(each) + 1 :].partition("/")[0]
    try:
        top = xattrs.root_of(path)
    except (OSError, NotAttached):
        return ""
    name = os.path.basename(top)
    digest = xattrs.get(top, attributes.ID) or ""
    if digest in name:
        return name
    # The attachment is bound to another place, e.g. by a line in /etc/fstab.
    with client.connect() as connection:
        names = [each.name for each in connection.status().attachments]
    return next((each for each in names if digest in each), "")
