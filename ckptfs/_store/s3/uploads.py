"""Uploads to S3: large objects in parts ("multipart upload"), small ones by one PUT.

**Checksums.** Each request with content has a Content-MD5. Of all checksums that S3 knows, most
servers verify this one: Amazon's S3, SeaweedFS, rclone, and JuiceFS's gateway (MinIO) do. rclone
and JuiceFS ignore x-amz-checksum-crc32, and rclone and SeaweedFS the SHA-256 of the signature. The
signature covers the header with the MD5 instead of the content, which saves a second checksum.

**ETags.** S3 computes the ETag of an object from MD5s: of the content, or of the MD5s of the parts
with a dash and their number behind it. So the ETag verifies an object, and says whether an object
has the content of a local file. Objects with server-side encryption by KMS or by the client's key
have other ETags, and so do some servers. Those ETags say nothing, as the answer to a part shows.

**Marks.** Some servers show another ETag than they have answered to the upload (rclone). So each
object has a mark of its upload in its metadata. An answer with that mark has the ETag of the
uploaded object, and not of one that another program has written meanwhile.

**New objects.** `If-None-Match: *` refuses to replace an object (status 412). Amazon's S3 and
SeaweedFS obey it in PutObject and CompleteMultipartUpload. rclone and JuiceFS's gateway ignore it.
The refused object may be of this upload, if an answer was lost. Its mark tells.
"""

import base64
import hashlib
import http.client
import logging
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from urllib.parse import unquote_plus
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from ckptfs._model.manifest import ListedFile, printable
from ckptfs._store.s3.advice import translate_error
from ckptfs._store.s3.client import Asked, S3Client
from ckptfs._store.s3.sigv4 import UNSIGNED
from ckptfs._store.transport.answers import read_all
from ckptfs._store.transport.errors import BrokenConnection, S3Error
from ckptfs._store.uploads import Digests, contradicts, other_bytes, part_bytes_for, parts_of
from ckptfs._store.versions import etag_in, is_web_page
from ckptfs.errors import AccessDenied, CkptfsError, StoreError, StoreUnavailable

_log = logging.getLogger(__name__)

PART_BYTES = 8 << 20
"""The bytes of a part. S3 wants 5 MiB at least. A larger part takes more memory, and a smaller one
more requests."""
_PARTS_MAX = 10_000
"""Amazon S3 user guide, "Amazon S3 multipart upload limits"."""
_KEY_BYTES_MAX = 1024
"""Amazon S3 user guide, "Naming Amazon S3 objects"; the same for Google Cloud Storage."""
_PATIENCE_S = 60.0
"""The longest silence before an answer. A server stores a part before it answers."""
_FINISH_PATIENCE_S = 600.0
"""The same for the request that makes an object of its parts, which can take minutes (Amazon S3 API
reference, CompleteMultipartUpload)."""
_ANSWER_BYTES_MAX = 16 << 20
_CREATED = frozenset([200, 201, 204])
_MD5 = re.compile(r'"([0-9a-f]{32})(?:-([0-9]+))?"')
_MARK = "x-amz-meta-ckptfs-upload"
_ENCRYPTION = "x-amz-server-side-encryption"
_MD5_ENCRYPTION = ("", "AES256")
"""The kinds of server-side encryption whose ETags are MD5s (Amazon S3 API reference, "Object")."""


class S3Uploads:
    """Uploads to the directory `prefix` of a bucket, which is "" or ends with a slash."""

    is_parallel = True
    repeats = True

    def __init__(self, client: S3Client, prefix: str, name: str) -> None:
        self._client = client
        self._prefix = prefix
        self.name = name
        self._unsure: set[str] = set()  # uploads that may have begun, although no answer came

    def part_bytes(self, size: int) -> int:
        return part_bytes_for(size, PART_BYTES, _PARTS_MAX)

    def fault_of(self, path: str) -> str | None:
        return fault_of_key(self._prefix + path)

    def prepare(self, paths: Set[str], *, merge: bool = False) -> None:
        # Programs that merge write different large objects, and small ones have no parts.
        keys = {self._prefix + path for path in paths}
        try:
            found = list(_abandoned(self._ask, self._prefix, self.name))
        except StoreUnavailable:
            raise
        except (AccessDenied, StoreError) as error:  # the upload itself needs no such list
            cause = error.__cause__
            if not isinstance(cause, S3Error):  # a login page, which says nothing of the store
                raise
            if cause.code != "NoSuchUpload":  # rclone: none
                _log.warning("cannot look for parts that killed uploads have left: %s", error)
            return
        for key, upload_id in found:
            if (key := key if key in keys else unquote_plus(key)) in keys:
                abort(self._client, key, upload_id, self._what(key))

    def is_same(self, listed: ListedFile, digests: Digests) -> bool | None:
        found = _MD5.fullmatch(listed.etag)
        if found is None:
            return None
        if found[2]:
            part_bytes = self.part_bytes(listed.size)
            if int(found[2]) != parts_of(listed.size, part_bytes):
                return None  # another program has chosen other parts
            expected = etag_of(digests(part_bytes))
        else:
            expected = f'"{digests(max(1, listed.size))[0].hex()}"'
        if listed.etag == expected:
            return True
        key = self._prefix + listed.path
        headers, _ = answer_to(self._client, Asked("HEAD", key), self._what(key))
        return False if _has_md5_etags(headers) else None

    def begin(self, path: str, size: int, *, is_new: bool = False) -> "S3Put | S3Multipart":
        key, mark = self._prefix + path, secrets.token_hex(16)
        if size <= self.part_bytes(size):
            return S3Put(self._client, key, self._what(key), mark, is_new=is_new)
        if path in self._unsure:
            self.prepare({path})
        try:
            answer = self._ask(Asked("POST", key, {"uploads": ""}, {_MARK: mark}))
        except StoreUnavailable:
            self._unsure.add(path)
            raise
        root = _root(answer, self._what(key))
        upload_id = _text(root, "UploadId")
        if not upload_id:
            raise StoreError(
                f"{self._what(key)}: the store's answer to the begin of an upload has no UploadId; "
                "check the endpoint"
            )
        return S3Multipart(self._client, key, self._what(key), mark, upload_id, is_new=is_new)

    def remove(self, path: str) -> None:
        expected = frozenset([200, 204, 404])
        self._ask(Asked("DELETE", self._prefix + path, expected=expected))

    def is_own(self, path: str) -> bool:
        return False

    def _ask(self, asked: Asked) -> bytes:
        what = self._what(asked.key) if asked.key else self.name
        return answer_to(self._client, asked, what)[1]

    def _what(self, key: str) -> str:
        return f"{printable(key.removeprefix(self._prefix))} in {self.name}"


class _S3Object:
    """An object that is uploaded with a mark. `what` is the object, for messages. With `is_new` it
    replaces no other one, if the server knows that condition."""

    def __init__(self, client: S3Client, key: str, what: str, mark: str, *, is_new: bool) -> None:
        self._client = client
        self._key = key
        self._what = what
        self._mark = mark
        self._condition = {"if-none-match": "*"} if is_new else {}

    def shown_etag(self) -> str:
        """See ObjectUpload.shown_etag."""
        headers, _ = answer_to(self._client, Asked("HEAD", self._key), self._what)
        if is_web_page(headers):
            raise _web_page(self._what)
        return etag_in(headers.get("etag", "")) if headers.get(_MARK) == self._mark else ""


class S3Put(_S3Object):
    """The upload of a small object, which has one part."""

    _etag = ""

    def send(self, number: int, data: memoryview) -> None:
        digest = md5_of(data)
        asked = _put(self._key, {}, data, digest, {_MARK: self._mark, **self._condition})
        try:
            headers, body = answer_to(self._client, asked, self._what)
        except CkptfsError as error:
            if not _is_there(error.__cause__):
                raise
            self._etag = self.shown_etag()
            return
        if body.strip() or is_web_page(headers):
            raise _web_page(self._what)
        self._etag = etag_in(headers.get("etag", ""))
        if _has_md5_etags(headers) and contradicts(self._etag, f'"{digest.hex()}"'):
            raise other_bytes(self._what, f'"{digest.hex()}"', self._etag)

    def finish(self) -> str:
        return self._etag

    def abort(self) -> None:
        """Do nothing, because the object has no parts."""


class S3Multipart(_S3Object):
    """The upload of a large object."""

    def __init__(
        self, client: S3Client, key: str, what: str, mark: str, upload_id: str, *, is_new: bool
    ) -> None:
        super().__init__(client, key, what, mark, is_new=is_new)
        self._upload_id = upload_id
        self._lock = threading.Lock()  # guards the rest
        self._etags: dict[int, str] = {}
        self._digests: dict[int, bytes] = {}
        self._has_md5_etags = True

    def send(self, number: int, data: memoryview) -> None:
        query = {"partNumber": str(number), "uploadId": self._upload_id}
        digest = md5_of(data)
        headers, _ = answer_to(self._client, _put(self._key, query, data, digest), self._what)
        etag = headers.get("etag", "").strip()
        if not etag:
            raise _web_page(self._what)
        with self._lock:
            self._etags[number], self._digests[number] = etag, digest
            self._has_md5_etags &= etag.strip('"') == digest.hex()

    def finish(self) -> str:
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag></Part>"
            for number, etag in sorted(self._etags.items())
        )
        text = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        query = {"uploadId": self._upload_id}
        headers = {"content-type": "application/xml", **self._condition}
        asked = Asked("POST", self._key, query, headers, text, patience_s=_FINISH_PATIENCE_S)
        try:
            with self._client.request(asked) as answer:
                root = _root(read_all(answer, _ANSWER_BYTES_MAX), self._what)
            if _tag(root) == "Error":  # S3 sends the status before it has made the object
                raise S3Error(500, _text(root, "Code"), _text(root, "Message"))
            if _tag(root) != "CompleteMultipartUploadResult":
                raise _web_page(self._what)
            found = etag_in(_text(root, "ETag"))
        except (S3Error, BrokenConnection) as error:
            if _is_there(error):
                self.abort()
                return self.shown_etag()
            is_gone = isinstance(error, S3Error) and error.code == "NoSuchUpload"
            found = self.shown_etag() if is_gone else ""  # an earlier answer may have been lost
            if not found:
                raise translate_error(error, self._what) from error
        expected = etag_of([self._digests[number] for number in sorted(self._digests)])
        if self._has_md5_etags and contradicts(found, expected):
            raise other_bytes(self._what, expected, found)
        return found

    def abort(self) -> None:
        abort(self._client, self._key, self._upload_id, self._what)


def fault_of_key(key: str) -> str | None:
    """The reason why no object can have that name, or None."""
    if len(key.encode()) <= _KEY_BYTES_MAX:
        return None
    return f"the object's name would be longer than {_KEY_BYTES_MAX} bytes"


def etag_of(digests: list[bytes]) -> str:
    """The ETag of an object of parts with these MD5s."""
    return f'"{md5_of(b"".join(digests)).hex()}-{len(digests)}"'


def md5_of(data: bytes | memoryview) -> bytes:
    """The MD5, which finds errors of networks and disks. It is not for security."""
    return hashlib.md5(data, usedforsecurity=False).digest()


def abort(client: S3Client, key: str, upload_id: str, what: str) -> None:
    """Remove the parts of an upload, which may have gone already."""
    expected = frozenset([200, 204, 404])
    answer_to(client, Asked("DELETE", key, {"uploadId": upload_id}, expected=expected), what)


def answer_to(client: S3Client, asked: Asked, what: str) -> tuple[http.client.HTTPMessage, bytes]:
    """The head and the body of an answer. Raises the errors of a Store, with the name `what`."""
    try:
        with client.request(asked) as answer:
            return answer.headers, read_all(answer, _ANSWER_BYTES_MAX)
    except (S3Error, BrokenConnection) as error:
        raise translate_error(error, what) from error


def _put(
    key: str, query: dict[str, str], data: memoryview, digest: bytes, more: Mapping[str, str] = {}
) -> Asked:
    headers = {"content-md5": base64.b64encode(digest).decode(), **more}
    return Asked("PUT", key, query, headers, data, _CREATED, _PATIENCE_S, body_digest=UNSIGNED)


def _is_there(error: BaseException | None) -> bool:
    """Whether the server has refused to replace an object. Amazon also does while another program
    replaces it ("conflict"), and that program's request may yet fail, so it is asked again."""
    return isinstance(error, S3Error) and error.status == 412


def _has_md5_etags(headers: http.client.HTTPMessage) -> bool:
    has_own_key = headers.get(f"{_ENCRYPTION}-customer-algorithm", "")
    return not has_own_key and headers.get(_ENCRYPTION, "") in _MD5_ENCRYPTION


def _abandoned(ask: Callable[[Asked], bytes], prefix: str, name: str) -> Iterator[tuple[str, str]]:
    """The keys and ids of the unfinished uploads below `prefix`. Keys may be encoded."""
    query = {"uploads": "", "prefix": prefix, "encoding-type": "url"}
    while True:
        root = _root(ask(Asked("GET", "", query)), name)
        if _tag(root).lower() == "html":
            raise _web_page(name)
        if _tag(root) != "ListMultipartUploadsResult":  # it ignores the parameter
            _log.warning("%s: the store lists no parts that killed uploads have left", name)
            return
        for child in root:
            if _tag(child) == "Upload":
                yield _text(child, "Key"), _text(child, "UploadId")
        marker = _text(root, "NextKeyMarker"), _text(root, "NextUploadIdMarker")
        before = query.get("key-marker", ""), query.get("upload-id-marker", "")
        if _text(root, "IsTruncated").lower() != "true" or not any(marker) or marker == before:
            return
        query = {**query, "key-marker": marker[0], "upload-id-marker": marker[1]}


def _root(body: bytes, what: str) -> ElementTree.Element:
    try:
        if b"<!DOCTYPE" not in body:
            return ElementTree.fromstring(body.strip())
    except ElementTree.ParseError:
        pass
    raise _web_page(what)


def _text(element: ElementTree.Element, tag: str) -> str:
    return next(((child.text or "").strip() for child in element if _tag(child) == tag), "")


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _web_page(what: str) -> StoreError:
    return StoreError(
        f"{what}: the store's answer to the upload is not that of S3; check the endpoint, and "
        "whether a proxy wants a login"
    )
