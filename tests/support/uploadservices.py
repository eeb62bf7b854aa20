"""S3, Google and Azure as far as uploads need them: objects in memory, and the names of requests.

They verify the checksums of requests, as the real services do. An object that is being uploaded
appears when its upload is complete.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from support.httpwire import Answer, error_answer

from ckptfs._model.location import Location

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.httpwire import Head

BUCKET = "bucket"
PREFIX = "run/"
METADATA = ".metadata.json"
SECRET = "S3CR3T"
TIME = "2020-01-01T00:00:00.000Z"
HTTP_TIME = "Wed, 01 Jan 2020 00:00:00 GMT"


class Request(NamedTuple):
    """A request. `key` is the object's name in the bucket; "" for the bucket."""

    head: Head
    method: str
    key: str
    query: dict[str, str]
    body: bytes


class Stored(NamedTuple):
    """An object, its ETag, and the headers that its uploader has chosen."""

    data: bytes
    etag: str
    headers: dict[str, str]


class CloudService:
    """A service with one bucket.

    Attributes:
        operations: The names of the requests of an upload.
        objects: The objects by their keys below `PREFIX`.
        unfinished: The uploads that have not ended by their ids, with their keys.
        has_plain_etags: Whether the ETags in listings say nothing of the content.
    """

    name: str
    operations: tuple[str, ...]
    mark: tuple[str, str] | None = None
    mismatch = "BadDigest"
    shows_unfinished = False

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self.unfinished: dict[str, str] = {}
        self.has_plain_etags = False
        self._parts: dict[str, dict[str, bytes]] = {}
        self._about: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()
        self._ids = itertools.count(1)

    def location(self, endpoint: str) -> Location:
        """The location of the checkpoint."""
        raise NotImplementedError

    def contents(self) -> dict[str, bytes]:
        """The objects of the checkpoint."""
        return {key: stored.data for key, stored in self.objects.items()}

    def put(self, key: str, data: bytes) -> None:
        """Make an object as another program would."""
        self.objects[key] = Stored(data, f'"{hashlib.md5(data).hexdigest()}"', {})

    def request_of(self, head: Head, body: bytes) -> Request:
        """The request of a head and a body."""
        url = urlsplit(head.target)
        query = {key: values[0] for key, values in parse_qs(url.query, True).items()}
        return Request(head, head.method, self._key(unquote(url.path), query), query, body)

    def operation_of(self, request: Request) -> str:
        """The name of a request, one of `operations`."""
        raise NotImplementedError

    def answer(self, request: Request) -> Answer:
        """Carry a request out."""
        with self._lock:
            if fault := self._fault_of(request):
                return fault
            found = self._answer(request)
        return found._replace(fields=[*found.fields, self.mark]) if self.mark else found

    def _key(self, path: str, query: dict[str, str]) -> str:
        return path.partition(f"/{BUCKET}")[2].lstrip("/")

    def _answer(self, request: Request) -> Answer:
        raise NotImplementedError

    def _fault_of(self, request: Request) -> Answer | None:
        """The refusal of a body that differs from its checksum."""
        given = request.head.value("content-md5")
        actual = base64.b64encode(hashlib.md5(request.body).digest()).decode()
        if given and given != actual:
            return error_answer(400, "Bad Request", self.mismatch)
        given = request.head.value("x-amz-content-sha256")
        if given not in ("", "UNSIGNED-PAYLOAD", hashlib.sha256(request.body).hexdigest()):
            return error_answer(400, "Bad Request", "XAmzContentSHA256Mismatch")
        return None

    def _object(self, request: Request) -> Answer:
        """The answer to GET and HEAD of an object."""
        found = self.objects.get(request.key.removeprefix(PREFIX))
        if found is None:
            refusal = error_answer(404, "Not Found", "NoSuchKey")
            return refusal._replace(body=b"") if request.method == "HEAD" else refusal
        fields = [("ETag", self._shown(found)), ("Last-Modified", HTTP_TIME)]
        fields += [("x-goog-generation", "1"), *found.headers.items()]
        data, status = found.data, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", request.head.range):
            first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            fields += [("Content-Range", f"bytes {first}-{last}/{len(data)}")]
            data, status = data[first : last + 1], 206
        if request.method == "HEAD":
            fields += [("Content-Length", str(len(data)))]
        return Answer(status, "OK", fields, data)

    def _shown(self, stored: Stored) -> str:
        """The ETag that listings and reads have."""
        if not self.has_plain_etags:
            return stored.etag
        return f'"{hashlib.blake2b(stored.data, digest_size=8).hexdigest()}"'

    def _listed(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        for key, stored in sorted(self.objects.items()):
            if (PREFIX + key).startswith(prefix):
                yield PREFIX + key, stored

    def _delete(self, request: Request, status: int = 204) -> Answer:
        self.objects.pop(request.key.removeprefix(PREFIX), None)
        return Answer(status, "Gone", [], b"")


class S3(CloudService):
    """S3. Google has its listings and objects."""

    name = "s3"
    operations = (
        *("list", "look", "list uploads", "initiate", "part", "complete", "abort"),
        *("put", "metadata", "head", "get", "read", "remove"),
    )
    shows_unfinished = True

    def location(self, endpoint: str) -> Location:
        options = {"endpoint_override": endpoint, "scheme": "http", "region": "us-east-1"}
        secrets = {"access_key": "k", "secret_key": SECRET}
        return Location("s3", f"{BUCKET}/run", options, secrets)

    def begin(self, key: str) -> str:
        """Begin an upload, as one that was killed then."""
        upload_id = str(next(self._ids))
        self.unfinished[upload_id] = key
        self._parts[upload_id] = {}
        self._about[upload_id] = {}
        return upload_id

    def operation_of(self, request: Request) -> str:
        method, query = request.method, request.query
        if "uploads" in query:
            return "initiate" if method == "POST" else "list uploads"
        if "uploadId" in query:
            return {"PUT": "part", "POST": "complete"}.get(method, "abort")
        if "list-type" in query:
            return "list"
        if method in ("HEAD", "GET") and request.key == PREFIX.rstrip("/"):
            return "look"  # whether a file has the name of the directory
        if method == "PUT":
            return "metadata" if request.key.endswith(METADATA) else "put"
        names = {"HEAD": "head", "DELETE": "remove"}
        return names.get(method) or ("read" if request.head.range else "get")

    def _answer(self, request: Request) -> Answer:
        operation = self.operation_of(request)
        if operation == "list":
            return self._listing(request.query.get("prefix", ""))
        if operation == "remove":
            return self._delete(request)
        if operation in ("look", "head", "get", "read"):
            return self._object(request)
        return self._upload(operation, request)

    def _upload(self, operation: str, request: Request) -> Answer:
        if operation == "list uploads":
            return self._uploads(request.query["prefix"])
        path = request.key.removeprefix(PREFIX)
        about = {
            name: value
            for name, value in request.head.fields
            if name.lower().startswith("x-amz-meta-")
        }
        digest = hashlib.md5(request.body).hexdigest()
        if operation == "initiate":
            upload_id = self.begin(path)
            self._about[upload_id] = about
            return _xml("InitiateMultipartUploadResult", f"<UploadId>{upload_id}</UploadId>")
        if operation in ("put", "metadata"):
            self.objects[path] = Stored(request.body, f'"{digest}"', about)
            return Answer(200, "OK", [("ETag", f'"{digest}"')], b"")
        upload_id = request.query["uploadId"]
        if self.unfinished.get(upload_id) != path:
            return error_answer(404, "Not Found", "NoSuchUpload")
        if operation == "part":
            self._parts[upload_id][request.query["partNumber"]] = request.body
            return Answer(200, "OK", [("ETag", f'"{digest}"')], b"")
        if operation == "complete":
            return self._complete(upload_id, path, request.body)
        self._end(upload_id)
        return Answer(204, "No Content", [], b"")

    def _complete(self, upload_id: str, path: str, body: bytes) -> Answer:
        parts = self._parts[upload_id]
        digests: list[bytes] = []
        data = b""
        for part in ElementTree.fromstring(body):
            number, etag = (part.findtext(tag) or "" for tag in ("PartNumber", "ETag"))
            digests.append(hashlib.md5(parts.get(number, b"")).digest())
            if number not in parts or etag.strip('"') != digests[-1].hex():
                return error_answer(400, "Bad Request", "InvalidPart")
            data += parts[number]
        etag = f'"{hashlib.md5(b"".join(digests)).hexdigest()}-{len(digests)}"'
        self.objects[path] = Stored(data, etag, self._about[upload_id])
        self._end(upload_id)
        return _xml("CompleteMultipartUploadResult", f"<ETag>{escape(etag)}</ETag>")

    def _end(self, upload_id: str) -> None:
        for known in (self.unfinished, self._parts, self._about):
            known.pop(upload_id, None)

    def _uploads(self, prefix: str) -> Answer:
        found = "".join(
            f"<Upload><Key>{PREFIX}{escape(key)}</Key><UploadId>{upload_id}</UploadId></Upload>"
            for upload_id, key in self.unfinished.items()
            if (PREFIX + key).startswith(prefix)
        )
        return _xml("ListMultipartUploadsResult", f"<IsTruncated>false</IsTruncated>{found}")

    def _listing(self, prefix: str) -> Answer:
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(stored.data)}</Size>"
            f"<ETag>{escape(self._shown(stored))}</ETag><LastModified>{TIME}</LastModified>"
            "</Contents>"
            for key, stored in self._listed(prefix)
        )
        return _xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{found}")


class Google(S3):
    """Google: the JSON API for uploads, the XML API for the rest."""

    name = "google"
    operations = (
        *("list", "look", "initiate", "part", "abort"),
        *("put", "metadata", "get", "read", "remove"),
    )
    mark = "x-goog-generation", "1"
    shows_unfinished = False

    def location(self, endpoint: str) -> Location:
        options = {"endpoint_override": endpoint, "scheme": "http"}
        return Location("gcs", f"{BUCKET}/run", options, {"access_token": SECRET})

    def _key(self, path: str, query: dict[str, str]) -> str:
        return query.get("name", "") if path.startswith("/upload/") else super()._key(path, query)

    def operation_of(self, request: Request) -> str:
        kind = request.query.get("uploadType")
        if kind is None:
            return super().operation_of(request)
        if kind == "media":
            return "metadata" if request.key.endswith(METADATA) else "put"
        return {"POST": "initiate", "PUT": "part"}.get(request.method, "abort")

    def _fault_of(self, request: Request) -> Answer | None:
        given = request.head.value("x-goog-hash").removeprefix("md5=")
        whole = b"".join(self._parts.get(request.query.get("upload_id", ""), {}).values())
        actual = base64.b64encode(hashlib.md5(whole + request.body).digest()).decode()
        if given and given != actual:
            error = {"code": 400, "errors": [{"reason": "invalid"}]}
            fields = [("Content-Type", "application/json")]
            return Answer(400, "Bad Request", fields, json.dumps({"error": error}).encode())
        return None

    def _upload(self, operation: str, request: Request) -> Answer:
        path, upload_id = request.key.removeprefix(PREFIX), request.query.get("upload_id", "")
        if operation == "initiate":
            query = f"uploadType=resumable&name={PREFIX}{path}&upload_id={self.begin(path)}"
            return Answer(200, "OK", [("Location", f"http://elsewhere/?{query}")], b"")
        if operation in ("put", "metadata"):
            return self._made(path, request.body)
        if upload_id not in self.unfinished:
            # One that is complete describes its object again.
            made = path in self.objects and operation == "part"
            return self._described(path) if made else error_answer(404, "Not Found", "")
        if operation == "abort":
            self._end(upload_id)
            return Answer(499, "Client Closed Request", [], b"")
        return self._part(upload_id, path, request)

    def _part(self, upload_id: str, path: str, request: Request) -> Answer:
        kept = self._parts[upload_id]
        numbers = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", request.head.value("content-range"))
        assert numbers is not None
        begin, end, size = int(numbers[1]), int(numbers[2]) + 1, int(numbers[3])
        persisted = sum(map(len, kept.values()))
        if begin <= persisted < end:
            kept[str(begin)] = request.body[persisted - begin :]
            persisted = end
        if persisted < size:
            return Answer(308, "Resume", [("Range", f"bytes=0-{persisted - 1}")], b"")
        data = b"".join(kept.values())
        self._end(upload_id)
        return self._made(path, data)

    def _made(self, path: str, data: bytes) -> Answer:
        self.put(path, data)
        return self._described(path)

    def _described(self, path: str) -> Answer:
        md5 = base64.b64encode(hashlib.md5(self.objects[path].data).digest()).decode()
        text = json.dumps({"name": PREFIX + path, "md5Hash": md5}).encode()
        return Answer(200, "OK", [("Content-Type", "application/json")], text)


class Azure(CloudService):
    """Azure's Blob service."""

    name = "azure"
    operations = (
        *("list", "look", "block", "block list"),
        *("put", "metadata", "head", "get", "read", "remove"),
    )
    mark = "x-ms-version", "2021-12-02"
    mismatch = "Md5Mismatch"

    def location(self, endpoint: str) -> Location:
        options = {"account_name": "account", "blob_storage_authority": endpoint}
        options |= {"blob_storage_scheme": "http"}
        key = base64.b64encode(SECRET.encode()).decode()
        return Location("azure", f"{BUCKET}/run", options, {"account_key": key})

    def __init__(self) -> None:
        super().__init__()
        self._committed: dict[str, dict[str, bytes]] = {}

    def operation_of(self, request: Request) -> str:
        method, part = request.method, request.query.get("comp")
        if part == "list":
            return "list"
        if part is not None:
            return {"block": "block", "blocklist": "block list"}[part]
        if method in ("HEAD", "GET") and request.key == PREFIX.rstrip("/"):
            return "look"
        if method == "PUT":
            return "metadata" if request.key.endswith(METADATA) else "put"
        names = {"HEAD": "head", "DELETE": "remove"}
        return names.get(method) or ("read" if request.head.range else "get")

    def _answer(self, request: Request) -> Answer:
        operation, path = self.operation_of(request), request.key.removeprefix(PREFIX)
        if operation == "list":
            return self._listing(request.query["prefix"])
        if operation == "remove":
            return self._delete(request, 202)
        if operation == "block":
            self._parts.setdefault(path, {})[request.query["blockid"]] = request.body
            return Answer(201, "Created", [], b"")
        if operation not in ("put", "metadata", "block list"):
            return self._object(request)
        data = request.body
        about = {k: v for k, v in request.head.fields if k.lower().startswith("x-ms-meta-")}
        if operation == "block list":
            # "Latest" also finds the blocks of the blob itself.
            kept = {**self._committed.get(path, {}), **self._parts.get(path, {})}
            ids = [each.text or "" for each in ElementTree.fromstring(request.body)]
            if any(each not in kept for each in ids):
                return error_answer(400, "Bad Request", "InvalidBlockList")
            self._parts.pop(path, None)
            self._committed[path] = {each: kept[each] for each in ids}
            data = b"".join(kept[each] for each in ids)
        else:
            about["Content-MD5"] = base64.b64encode(hashlib.md5(data).digest()).decode()
        etag = f'"0x8D{next(self._ids):X}"'
        self.objects[path] = Stored(data, etag, about)
        return Answer(201, "Created", [("ETag", etag)], b"")

    def _shown(self, stored: Stored) -> str:
        return stored.etag

    def _listing(self, prefix: str) -> Answer:
        found = "".join(
            f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{HTTP_TIME}"
            f"</Last-Modified><Etag>{escape(stored.etag)}</Etag>"
            f"<Content-Length>{len(stored.data)}</Content-Length></Properties></Blob>"
            for key, stored in self._listed(prefix)
        )
        return _xml("EnumerationResults", f"<Blobs>{found}</Blobs><NextMarker />")


def _xml(root: str, inner: str) -> Answer:
    fields = [("Content-Type", "application/xml")]
    return Answer(200, "OK", fields, f"<{root}>{inner}</{root}>".encode())
