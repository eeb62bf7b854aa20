"""Uploads to Azure Blob Storage: large blobs in blocks, small ones by one request.

Each request with content has a Content-MD5, which Azure verifies. Blocks become visible when the
list of them is stored ("Put Block List"). Azure keeps blocks without a list for a week, and they
belong to no visible blob. All uploads of a blob share these blocks. So the ids of an upload's
blocks begin with random digits of its own.

Azure has no checksum of a blob that was made of blocks. So the list comes with the MD5 of the MD5s
of the blocks, in the blob's metadata. The next upload compares it with a local file.
"""

import base64
import secrets
from collections.abc import Set
from threading import Lock

from ckptfs._model.manifest import ListedFile, printable
from ckptfs._store.s3.client import Asked, S3Client
from ckptfs._store.s3.uploads import answer_to, etag_of, md5_of
from ckptfs._store.uploads import Digests, part_bytes_for, parts_of
from ckptfs._store.versions import etag_in

PART_BYTES = 8 << 20
_BLOCKS_MAX = 50_000
"""Blob service REST API, "Put Block List"."""
_NAME_LENGTH_MAX = 1024
"""Blob service REST API, "Naming and referencing containers, blobs, and metadata"."""
_PATIENCE_S = 60.0
_CREATED = frozenset([201])
_MARK = "x-ms-meta-ckptfs_md5"
_TYPE = {"x-ms-blob-content-type": "application/octet-stream"}


class AzureUploads:
    """Uploads to the directory `prefix` of a container, which is "" or ends with a slash."""

    is_parallel = True
    repeats = True

    def __init__(self, client: S3Client, prefix: str, name: str) -> None:
        self._client = client
        self._prefix = prefix
        self.name = name

    def part_bytes(self, size: int) -> int:
        return part_bytes_for(size, PART_BYTES, _BLOCKS_MAX)

    def fault_of(self, path: str) -> str | None:
        if len(self._prefix + path) > _NAME_LENGTH_MAX:
            return f"the blob's name would be longer than {_NAME_LENGTH_MAX} characters"
        return "the name holds a backslash, of which Azure makes a slash" if "\\" in path else None

    def prepare(self, paths: Set[str], *, merge: bool = False) -> None:
        """Do nothing, because the list of blocks drops those of earlier uploads."""

    def is_same(self, listed: ListedFile, digests: Digests) -> bool | None:
        asked = Asked("HEAD", self._prefix + listed.path)
        headers, _ = answer_to(self._client, asked, self._what(listed.path))
        part_bytes = self.part_bytes(listed.size)
        if mark := headers.get(_MARK, ""):
            is_comparable = mark.endswith(f"-{parts_of(listed.size, part_bytes)}")
            return mark == _mark_of(digests(part_bytes)) if is_comparable else None
        if found := headers.get("content-md5", ""):
            return found == _base64(digests(max(1, listed.size))[0])
        return None

    def begin(self, path: str, size: int, *, is_new: bool = False) -> "AzureUpload":
        is_whole = size <= self.part_bytes(size)
        return AzureUpload(self._client, self._prefix + path, is_whole, self._what(path))

    def remove(self, path: str) -> None:
        asked = Asked("DELETE", self._prefix + path, expected=frozenset([202, 404]))
        answer_to(self._client, asked, self._what(path))

    def is_own(self, path: str) -> bool:
        return False

    def _what(self, path: str) -> str:
        return f"{printable(path)} in {self.name}"


class AzureUpload:
    """The upload of one blob. `is_whole` says whether it has one part."""

    def __init__(self, client: S3Client, key: str, is_whole: bool, what: str) -> None:
        self._client = client
        self._key = key
        self._is_whole = is_whole
        self._what = what
        self._block_ids = secrets.token_hex(8)  # their beginning
        self._lock = Lock()  # guards the one below
        self._digests: dict[int, bytes] = {}
        self._etag = ""

    def send(self, number: int, data: memoryview) -> None:
        digest = md5_of(data)
        headers, query = {"content-md5": _base64(digest)}, {}
        if self._is_whole:
            headers |= {"x-ms-blob-type": "BlockBlob", **_TYPE}
        else:
            query = {"comp": "block", "blockid": self._block_id(number)}
        asked = Asked("PUT", self._key, query, headers, data, _CREATED, _PATIENCE_S)
        answered, _ = answer_to(self._client, asked, self._what)
        self._etag = etag_in(answered.get("etag", ""))
        with self._lock:
            self._digests[number] = digest

    def finish(self) -> str:
        if self._is_whole:
            return self._etag
        numbers = sorted(self._digests)
        blocks = "".join(f"<Latest>{self._block_id(number)}</Latest>" for number in numbers)
        text = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{blocks}</BlockList>'
        query, body = {"comp": "blocklist"}, text.encode()
        headers = {_MARK: _mark_of([self._digests[number] for number in numbers]), **_TYPE}
        headers["content-md5"] = _base64(md5_of(body))
        asked = Asked("PUT", self._key, query, headers, body, _CREATED, _PATIENCE_S)
        answered, _ = answer_to(self._client, asked, self._what)
        return etag_in(answered.get("etag", ""))

    def _block_id(self, number: int) -> str:
        """The id of a block. All ids of a blob have the same length."""
        return _base64(f"{self._block_ids}{number:06}".encode())

    def shown_etag(self) -> None:
        return None

    def abort(self) -> None:
        """Do nothing, because Azure removes blocks without a list itself."""


def _mark_of(digests: list[bytes]) -> str:
    return etag_of(digests).strip('"')


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
