"""Uploads to Google Cloud Storage: small objects by one request, large ones by a resumable upload.

A resumable upload takes the bytes of an object in order (JSON API, "Resumable uploads"). The last
request has the MD5 of the whole content, and Google refuses an object that differs. Google keeps an
unfinished upload for a week, invisible and without costs.
"""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Set
from http.client import HTTPMessage
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

from ckptfs._model.manifest import ListedFile, printable
from ckptfs._store.s3.client import Asked, S3Client
from ckptfs._store.s3.uploads import answer_to, fault_of_key
from ckptfs._store.uploads import Digests, other_bytes
from ckptfs.errors import StoreError

PART_BYTES = 8 << 20
"""The bytes of a part, a multiple of 256 KiB."""
_PATIENCE_S = 60.0
_MORE = 308
"""The status of an answer to a part that is not the last one."""
_DONE = frozenset([200, 201])
_GONE = frozenset([200, 204, 404, 410, 499])
"""The statuses of answers to the removal of an upload."""
_MD5 = re.compile(r'"([0-9a-f]{32}|[0-9A-Za-z+/]{22}==)"')
"""The ETags that are MD5s: Google's, and those of its test servers."""


class GoogleUploads:
    """Uploads to the directory `prefix` of a bucket, which is "" or ends with a slash. `client` is
    for uploads, and `objects` for other requests."""

    is_parallel = False
    repeats = True

    def __init__(self, client: S3Client, objects: S3Client, prefix: str, name: str) -> None:
        self._client = client
        self._objects = objects
        self._prefix = prefix
        self.name = name

    def part_bytes(self, size: int) -> int:
        return PART_BYTES

    def fault_of(self, path: str) -> str | None:
        if fault := fault_of_key(self._prefix + path):
            return fault
        return "the name holds a carriage return" if "\r" in path else None

    def prepare(self, paths: Set[str], *, merge: bool = False) -> None:
        """Do nothing, because Google removes unfinished uploads itself."""

    def is_same(self, listed: ListedFile, digests: Digests) -> bool | None:
        if not _MD5.fullmatch(listed.etag):
            return None
        digest = digests(max(1, listed.size))[0]
        return listed.etag.strip('"') in (digest.hex(), base64.b64encode(digest).decode())

    def begin(self, path: str, size: int, *, is_new: bool = False) -> "GoogleUpload":
        name = self._prefix + path
        key = f"storage/v1/b/{self._objects.address.bucket}/o"
        what = f"{printable(path)} in {self.name}"
        query = {"uploadType": "media", "name": name}
        if size > PART_BYTES:
            query["uploadType"] = "resumable"
            headers, _ = answer_to(self._client, Asked("POST", key, query), what)
            query = dict(parse_qsl(urlsplit(headers.get("location", "")).query))
            if not query.get("upload_id"):
                raise _not_googles(what)
        return GoogleUpload(self._client, key, query, name, size, what)

    def remove(self, path: str) -> None:
        expected = frozenset([200, 204, 404])
        what = f"{printable(path)} in {self.name}"
        answer_to(self._objects, Asked("DELETE", self._prefix + path, expected=expected), what)

    def is_own(self, path: str) -> bool:
        return False


class GoogleUpload:
    """The upload of one object. `query` belongs to its requests, and `what` is for messages."""

    def __init__(
        self, client: S3Client, key: str, query: dict[str, str], name: str, size: int, what: str
    ) -> None:
        self._client = client
        self._key = key
        self._query = query
        self._name = name
        self._size = size
        self._what = what
        self._digest = hashlib.md5(usedforsecurity=False)
        self._digested = 0  # the parts in it
        self._etag = ""

    def send(self, number: int, data: memoryview) -> None:
        if number > self._digested:
            self._digest.update(data)
            self._digested = number
        begin = (number - 1) * PART_BYTES
        done = 0
        while not self._etag:
            headers, answer, status = self._put(begin + done, data[done:])
            if status in _DONE:
                self._check(answer)
                return
            persisted = re.fullmatch(r"bytes=0-(\d+)", headers.get("range", ""))
            end = int(persisted[1]) + 1 if persisted else 0
            if not begin + done < end <= begin + len(data):
                raise _not_googles(self._what)
            done = end - begin
            if done == len(data):
                return

    def _put(self, begin: int, data: memoryview) -> tuple[HTTPMessage, bytes, int]:
        end = begin + len(data)
        headers = {"content-type": "application/octet-stream"}
        if end == self._size:
            headers |= hash_of(self._digest.digest())
        if self._query["uploadType"] == "media":
            asked = Asked("POST", self._key, self._query, headers, data, _DONE, _PATIENCE_S)
            return *answer_to(self._client, asked, self._what), 200
        headers["content-range"] = f"bytes {begin}-{end - 1}/{self._size}"
        expected = _DONE if end == self._size else _DONE | {_MORE}
        asked = Asked("PUT", self._key, self._query, headers, data, expected, _PATIENCE_S)
        answered, body = answer_to(self._client, asked, self._what)
        return answered, body, _MORE if end < self._size else 200

    def _check(self, answer: bytes) -> None:
        check_object(answer, self._name, self._digest.digest(), self._what)
        self._etag = f'"{self._digest.hexdigest()}"'

    def finish(self) -> str:
        return self._etag

    def shown_etag(self) -> None:
        return None

    def abort(self) -> None:
        if self._query["uploadType"] != "media":
            asked = Asked("DELETE", self._key, self._query, expected=_GONE)
            answer_to(self._client, asked, self._what)


def hash_of(digest: bytes) -> dict[str, str]:
    """The header with the MD5 of the content, which Google verifies."""
    return {"x-goog-hash": f"md5={base64.b64encode(digest).decode()}"}


def check_object(answer: bytes, name: str, digest: bytes, what: str) -> None:
    """Check the description of a finished object. Raises StoreError unless it is that of the object
    `name` with the MD5 `digest`."""
    found: Any = {}
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(answer)
    fields = cast("dict[str, object]", found) if isinstance(found, dict) else {}
    if fields.get("name") != name:
        raise _not_googles(what)
    expected = base64.b64encode(digest).decode()
    md5 = fields.get("md5Hash", expected)
    if md5 != expected:
        raise other_bytes(what, f"MD5 {expected}", f"{md5}")


def _not_googles(what: str) -> StoreError:
    return StoreError(
        f"{what}: the store's answer to the upload is not Google's; check the endpoint, and "
        "whether a proxy wants a login"
    )
