"""A Store whose credentials are in a file that may change: it is opened anew with the next call."""

import threading
from collections.abc import Callable
from typing import TypeVar

from ckptfs._model.manifest import ListedFile, Listing
from ckptfs._store.base import Pin, Store
from ckptfs._store.credentials import SecretFile
from ckptfs.errors import AccessDenied

T = TypeVar("T")


class RenewedStore:
    """What `open_with` makes of the secrets in `file`."""

    def __init__(self, file: SecretFile, open_with: Callable[[dict[str, str]], Store]) -> None:
        self._file = file
        self._open_with = open_with
        self._lock = threading.Lock()  # guards the two below; never held during IO at the store
        self._secrets = file.current()
        self._store = open_with(self._secrets)
        self.name = self._store.name
        self.gives_up = self._store.gives_up

    def _now(self) -> Store:
        secrets = self._file.current()
        with self._lock:
            if secrets != self._secrets:
                # The former one is not closed, because calls in other threads may be under way. It
                # lets go of its worker and connections when these have ended.
                self._store = self._open_with(secrets)
                self._secrets = secrets
            return self._store

    def _call(self, call: Callable[[Store], T]) -> T:
        store = self._now()
        try:
            return call(store)
        except AccessDenied:
            renewed = self._now()  # it may have changed meanwhile
            if renewed is store:
                raise
        return call(renewed)

    def list(self, files_max: int) -> Listing:
        """See Store.list."""
        return self._call(lambda store: store.list(files_max))

    def confirm(self, pin: Pin) -> Pin:
        """See Store.confirm."""
        return self._call(lambda store: store.confirm(pin))

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        """See Store.read_into."""
        return self._call(lambda store: store.read_into(pin, offset, buffer))

    def get(self, path: str) -> bytes | None:
        """See Store.get."""
        return self._call(lambda store: store.get(path))

    def put(self, path: str, data: bytes) -> None:
        """See Store.put."""
        self._call(lambda store: store.put(path, data))

    def find(self, path: str) -> ListedFile | None:
        """See Store.find."""
        return self._call(lambda store: store.find(path))

    def close(self) -> None:
        """See Store.close."""
        self._store.close()
