"""The store at a location, for an upload by a process that has only the location."""

from ckptfs._model.location import Location
from ckptfs._model.named_store import Credentials
from ckptfs._store.base import Store
from ckptfs._store.http.store import HttpStore
from ckptfs._store.resolve import open_store
from ckptfs._store.uploads import HasUploads, Uploads
from ckptfs.errors import AccessDenied


def own_uploads(store: Store) -> Uploads | None:
    """The store's own way to upload; None if only a library can. Raises AccessDenied for a kind of
    store to which ckptfs cannot upload."""
    uploads = store.uploads() if isinstance(store, HasUploads) else None
    if uploads is None and isinstance(store, HttpStore):
        raise AccessDenied(
            f"{store.name}: ckptfs cannot upload to a server of files by HTTP; choose another store"
        )
    return uploads


def open_target(
    location: Location, timeout_s: float, credentials: Credentials
) -> tuple[Store, Uploads]:
    """The store at `location`, and the uploads to it. Raises AccessDenied, and as
    ``resolve.open_store``."""
    store = open_store(location, timeout_s, credentials)
    uploads = own_uploads(store)
    if uploads is not None:
        return store, uploads
    from ckptfs._store.arrow_uploads import ArrowUploads  # start-up time: they bring pyarrow
    from ckptfs._store.build import filesystem_for

    return store, ArrowUploads(filesystem_for(location, timeout_s), location.path, store.name)
