"""A Store on Azure Blob Storage, by its REST API; also on accounts with a hierarchical namespace.

The store does not use pyarrow's client, because that aborts the process when an error has another
body than it expects, and its texts contain SAS tokens.

Reads are those of S3: each answer names its ETag, and Azure honours conditions. Listings, uploads
and the names of errors are Azure's own.
"""

import base64

from ckptfs._model.manifest import ListedFile, Listing
from ckptfs._store.base import is_file, not_found
from ckptfs._store.cloud.azure_listing import Blobs
from ckptfs._store.cloud.azure_uploads import AzureUploads
from ckptfs._store.cloud.requests import Service
from ckptfs._store.s3.client import Asked
from ckptfs._store.s3.retry import repeat
from ckptfs._store.s3.store import S3Store
from ckptfs._store.s3.uploads import md5_of
from ckptfs._store.uploads import Uploads

_VERSION = "2021-12-02"
"""The version of the REST API. It is the first that encodes names which XML cannot carry."""
_CODES = {
    "AuthenticationFailed": "AccessDenied",
    "BlobArchived": "InvalidObjectState",
    "BlobNotFound": "NoSuchKey",
    "ContainerNotFound": "NoSuchBucket",
    "InvalidAuthenticationInfo": "AccessDenied",
    "Md5Mismatch": "BadDigest",
    "PublicAccessNotPermitted": "AccessDenied",
    "ServerBusy": "SlowDown",
}
"""Azure's names of errors (Storage Services REST reference, "Status and error codes"), and S3's."""


SERVICE = Service(headers={"x-ms-version": _VERSION}, mark="x-ms-version", codes=_CODES)


class AzureStore(S3Store):
    """The directory `prefix` of a container. `name` is the checkpoint's URI, for messages."""

    def list(self, files_max: int) -> Listing:
        listing = Blobs(self._page_of_all, self._prefix, self.name).list(files_max)
        if listing is None and self._prefix:
            self._check_directory()
        return listing or Listing([], [], [])

    def _is_listed(self, key: str) -> ListedFile | None:
        return Blobs(self._page, key, self.name).find()

    def _check_directory(self) -> None:
        """Raise the error for a prefix with nothing below it, unless it is an empty directory."""
        key = self._prefix[:-1]

        def is_directory() -> bool:
            with self._client.request(Asked("HEAD", key)) as response:
                return response.headers.get("x-ms-meta-hdi_isfolder") == "true"

        found = repeat(lambda: self._or_none(key, is_directory), self.name)
        if not found:
            raise not_found(self.name) if found is None else is_file(self.name)

    def put(self, path: str, data: bytes) -> None:
        headers = {"x-ms-blob-type": "BlockBlob", "content-type": "application/octet-stream"}
        headers["content-md5"] = base64.b64encode(md5_of(data)).decode()
        asked = Asked("PUT", self._key(path), {}, headers, data, expected=frozenset([201]))

        def attempt() -> None:
            with self._client.request(asked) as response:
                response.read()

        repeat(attempt, self._name_of(path))

    def uploads(self) -> Uploads:
        return AzureUploads(self._client, self._prefix, self.name)
