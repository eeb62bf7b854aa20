"""A Store on Google Cloud Storage, by its XML API, which is that of S3 with other credentials.

pyarrow's client is not used: it holds the interpreter's lock while it waits for the server, and its
listing has no ETags, so it cannot tell two versions of one second and size apart.

**Versions.** An object of Google is immutable, and each answer is of one generation of it. The
listing, HEAD and GET have the same ETag, and each answer names its own. So the ETag of the answer
says of which version the bytes are, also where a server does not look at If-Match.

**Content-Encoding: gzip.** Google decompresses such objects for clients that do not accept gzip,
and then knows neither length nor ranges. Requests for objects accept gzip, so all bytes come as
they are stored.
"""

import json
from typing import Any, cast

from ckptfs._store.authorized import Authority, AuthorizedClient, repeat
from ckptfs._store.s3 import S3Store
from ckptfs._store.s3client import read_all
from ckptfs._store.s3options import S3Options
from ckptfs.errors import StoreError

HOST = "storage.googleapis.com"
_ANSWER_BYTES_MAX = 1 << 20
"""Of the answer to an upload, which describes the object."""


class GoogleStore(S3Store):
    """The directory `prefix` of a bucket. `name` is the checkpoint's URI, for messages.

    Raises as `AuthorizedClient`.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str,
        name: str,
        options: S3Options,
        authority: Authority,
        timeout_s: float,
    ) -> None:
        as_stored = {"accept-encoding": "gzip"}
        client = AuthorizedClient(
            bucket,
            options,
            authority,
            timeout_s,
            object_headers=as_stored,
            mark="x-goog-generation",
        )
        super().__init__(client, prefix, name)
        self._answers_are_whole = True
        self._bucket = bucket
        # The path of uploads begins with a word where others have the bucket.
        self._uploads = AuthorizedClient("upload", options, authority, timeout_s)

    def put(self, path: str, data: bytes) -> None:
        """See Store.put. By the JSON API ("Objects: insert"), which more servers know."""
        query = {"uploadType": "media", "name": self._key(path)}
        headers = {"content-type": "application/octet-stream"}

        def attempt() -> None:
            key = f"storage/v1/b/{self._bucket}/o"
            with self._uploads.request("POST", key, query, headers, data) as response:
                answer = read_all(response, _ANSWER_BYTES_MAX)
            if _name_in(answer) != query["name"]:
                raise StoreError(
                    f"{self._name_of(path)}: the store's answer to the upload is not Google's; "
                    "check the endpoint, and whether the object was written"
                )

        repeat(attempt, self._name_of(path))

    def close(self) -> None:
        """See Store.close."""
        super().close()
        self._uploads.close()


def _name_in(answer: bytes) -> object:
    """The name of the object that a JSON answer describes; None: it describes none."""
    try:
        found: Any = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, object]", found).get("name") if isinstance(found, dict) else None
