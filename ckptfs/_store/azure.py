"""A Store on Azure Blob Storage, by its REST API; also on accounts with a hierarchical namespace.

pyarrow's client is not used: it aborts the process when an error has another body than it expects,
and its texts hold SAS tokens.

Objects are read as those of S3 are: each answer names its ETag, and Azure looks at conditions.
Listings, uploads and the names of errors are Azure's own.
"""

from ckptfs._model.manifest import ListedFile, Listing
from ckptfs._store.authorized import Authority, AuthorizedClient, repeat
from ckptfs._store.azurelisting import Blobs
from ckptfs._store.base import is_file, not_found
from ckptfs._store.s3 import S3Store
from ckptfs._store.s3client import S3Error
from ckptfs._store.s3options import S3Options
from ckptfs.errors import CkptfsError

_VERSION = "2021-12-02"
"""Of the REST API: the first that encodes names which XML cannot carry."""
_CODES = {
    "AuthenticationFailed": "AccessDenied",
    "BlobArchived": "InvalidObjectState",
    "BlobNotFound": "NoSuchKey",
    "ContainerNotFound": "NoSuchBucket",
    "InvalidAuthenticationInfo": "AccessDenied",
    "PublicAccessNotPermitted": "AccessDenied",
    "ServerBusy": "SlowDown",
}
"""Azure's names of errors (Storage Services REST reference, "Status and error codes"), and S3's."""


class AzureStore(S3Store):
    """The directory `prefix` of a container. `name` is the checkpoint's URI, for messages.

    Raises as `AuthorizedClient`.
    """

    def __init__(
        self,
        container: str,
        prefix: str,
        name: str,
        options: S3Options,
        authority: Authority,
        timeout_s: float,
    ) -> None:
        version = {"x-ms-version": _VERSION}
        self._blobs = AuthorizedClient(
            container,
            options,
            authority,
            timeout_s,
            headers=version,
            mark="x-ms-version",
            codes=_CODES,
        )
        super().__init__(self._blobs, prefix, name)
        self._answers_are_whole = True

    def list(self, files_max: int) -> Listing:
        """See Store.list."""
        listing = Blobs(self._blobs, self._prefix, self.name).list(files_max)
        if listing is None and self._prefix:
            self._check_directory()
        return listing or Listing([], [], [])

    def _is_listed(self, key: str) -> ListedFile | None:
        return Blobs(self._blobs, key, self.name).find()

    def _check_directory(self) -> None:
        """Raise what is right where nothing is below the prefix."""

        def attempt() -> CkptfsError | None:
            with self._blobs.request("HEAD", self._prefix[:-1]) as response:
                is_directory = response.headers.get("x-ms-meta-hdi_isfolder") == "true"
                return None if is_directory else is_file(self.name)

        def attempt_or_absent() -> CkptfsError | None:
            try:
                return attempt()
            except S3Error as error:
                if error.status == 404:
                    return not_found(self.name)
                raise

        if fault := repeat(attempt_or_absent, self.name):
            raise fault

    def put(self, path: str, data: bytes) -> None:
        """See Store.put."""
        headers = {"x-ms-blob-type": "BlockBlob", "content-type": "application/octet-stream"}
        expected = frozenset([201])

        def attempt() -> None:
            key = self._key(path)
            with self._blobs.request("PUT", key, None, headers, data, expected) as response:
                response.read()

        repeat(attempt, self._name_of(path))
