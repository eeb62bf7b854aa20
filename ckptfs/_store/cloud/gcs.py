"""A Store on Google Cloud Storage, by its XML API, which is that of S3 with other credentials.

The store does not use pyarrow's client, because that holds the interpreter's lock while it waits
for the server. Its listing also has no ETags, so it cannot distinguish two versions of one second
and size.

**Versions.** An object of Google is immutable, and each answer is of one generation of it. The
listing, HEAD and GET have the same ETag, and each answer names its own. So the ETag of the answer
names the version of the bytes, even if a server ignores If-Match.

**Content-Encoding: gzip.** Google decompresses such objects for clients that do not accept gzip,
and then knows neither length nor ranges. Requests for objects accept gzip, so all bytes come as
they are stored.
"""

from ckptfs._store.cloud.gcs_uploads import GoogleUploads, check_object, hash_of
from ckptfs._store.cloud.requests import AuthorizedClient, Service
from ckptfs._store.s3.client import Asked
from ckptfs._store.s3.retry import repeat
from ckptfs._store.s3.store import S3Store
from ckptfs._store.s3.uploads import md5_of
from ckptfs._store.transport.answers import read_all
from ckptfs._store.uploads import Uploads

HOST = "storage.googleapis.com"
_ANSWER_BYTES_MAX = 1 << 20
"""The longest answer to an upload, which describes the object."""


SERVICE = Service(object_headers={"accept-encoding": "gzip"}, mark="x-goog-generation")
UPLOADS = Service()


class GoogleStore(S3Store):
    """The directory `prefix` of a bucket. `name` is the checkpoint's URI, for messages.

    The path of uploads begins with a fixed word instead of the bucket, which is the bucket of
    `uploads`.
    """

    def __init__(
        self, client: AuthorizedClient, prefix: str, name: str, uploads: AuthorizedClient
    ) -> None:
        super().__init__(client, prefix, name)
        self._uploads = uploads

    def put(self, path: str, data: bytes) -> None:
        """Upload by the JSON API ("Objects: insert"), which more servers know."""
        query = {"uploadType": "media", "name": self._key(path)}
        digest = md5_of(data)
        headers = {"content-type": "application/octet-stream", **hash_of(digest)}
        key = f"storage/v1/b/{self._client.address.bucket}/o"
        asked = Asked("POST", key, query, headers, data)

        def attempt() -> None:
            with self._uploads.request(asked) as response:
                answer = read_all(response, _ANSWER_BYTES_MAX)
            check_object(answer, query["name"], digest, self._name_of(path))

        repeat(attempt, self._name_of(path))

    def uploads(self) -> Uploads:
        return GoogleUploads(self._uploads, self._client, self._prefix, self.name)

    def close(self) -> None:
        super().close()
        self._uploads.close()
