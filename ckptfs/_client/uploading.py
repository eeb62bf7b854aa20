"""One upload: a directory goes to its store, and then into the cache of this node."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from ckptfs._client import client, save
from ckptfs._model.location import Location
from ckptfs._store.base import Store
from ckptfs._store.directory_upload import Told, Uploaded, Wanted, upload_directory
from ckptfs._store.uploads import Uploads
from ckptfs.errors import CkptfsError, DaemonError

_log = logging.getLogger("ckptfs._upload")


class Done(NamedTuple):
    """What was uploaded, the bytes of it in the cache of this node, and the error that has kept the
    cache from having all of them; "" without an error."""

    uploaded: Uploaded
    cached_bytes: int
    cache_error: str


def upload_and_save(
    top: str,
    store: Store,
    uploads: Uploads,
    wanted: Wanted,
    locate: Callable[[], Location],
    told: Told | None,
    *,
    cache: bool,
) -> Done:
    """Upload the directory `top`, and give it to the node's daemon unless `cache` is False.

    `locate` returns the target as the daemon gets it, or raises LocationError. Raises as
    `upload_directory`.
    """
    uploaded, contents = upload_directory(top, store, uploads, wanted, told)
    # The store has all of it, so no error from here on may look like one of the upload.
    saved = save.Saved(0, None)
    try:
        location = locate()
        client.tell_metadata_changed(location)
        if cache:
            saved = save.save(location, contents)
    except (CkptfsError, OSError) as error:  # it cannot be described
        saved = save.Saved(0, error if cache else None)
    except Exception as error:
        _log.warning("unexpected error after the upload of %s", uploaded.uri, exc_info=True)
        text = f"unexpected error ({type(error).__name__}); the log of the upload has it"
        saved = save.Saved(0, DaemonError(text) if cache else None)
    if saved.error is not None:
        text = "the cache of this node does not have all of %s: %s"
        _log.info(text, uploaded.uri, saved.error)
    return Done(uploaded, saved.bytes, str(saved.error or ""))
