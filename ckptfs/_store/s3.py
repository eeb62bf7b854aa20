"""A Store over S3, with conditional reads.

A range is asked for with If-Match, and its answer names the version that its bytes are of. On a
server that makes each answer of one version, as S3 does, nothing more has to be asked: the first
touch of an object is one request, because the ETag is known from the listing.

Servers that hand out files of a disk do not do so: what they send may change on the way. They are
told apart by whether they look at conditions at all: `confirm` asks "if it is no longer this
version", and the answer 304 Not Modified is one that such a server does not give. Until that
was seen, each read has to be confirmed.
"""

import functools
import random
import re
import time
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPMessage
from typing import TypeVar
from urllib.parse import unquote_plus
from xml.etree import ElementTree

import msgspec

from ckptfs._model.manifest import ListedFile, Listing, Skipped, printable
from ckptfs._store.base import Pin, changed, check_count, is_file, not_found
from ckptfs._store.deadline import left_s
from ckptfs._store.s3client import (
    BrokenConnection,
    S3Client,
    S3Error,
    SilentServer,
    read_all,
    read_into,
)
from ckptfs.errors import (
    AccessDenied,
    CheckpointNotFound,
    CkptfsError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

_DENIED = frozenset(
    [
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    ]
)
_TRANSIENT = frozenset(["InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"])
_TRANSIENT_STATUS = frozenset([408, 429, 500, 502, 503, 504])
# Amazon S3 API reference, "Error responses".

_ANSWER_BYTES_MAX = 16 << 20
"""Of a page of a listing (1,000 objects, each with a name of at most 1 KiB, 3 when encoded), and
of an object that is read as a whole."""
_PAGE_TAGS_MAX = 250_000
"""Of a page: 1,000 objects have some 20 each. Parsed, one takes 100 times its bytes."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_ETAG = re.compile(r'(W/)?"[\x21\x23-\x7e]*"')  # RFC 9110, 8.8.3
_ATTEMPTS = 2
"""Of requests that nobody repeats (`outages` does so for reads)."""
_PAUSE_S = 0.2
_PAUSE_S_MAX = 10.0
"""Between them: the shortest, times 0.5 to 1, and the longest that a server may ask for."""

T = TypeVar("T")


class S3Store:
    """The directory `prefix` of a bucket. `name` is the checkpoint's URI, for messages."""

    gives_up = True

    def __init__(self, client: S3Client, prefix: str, name: str) -> None:
        self._client = client
        self._prefix = f"{prefix}/" if prefix else ""
        self.name = name
        self._answers_are_whole = client.is_amazon

    def list(self, files_max: int) -> Listing:
        """See Store.list."""
        listing = Listing([], [], [])
        exists = not self._prefix
        query = {"list-type": "2", "encoding-type": "url", "prefix": self._prefix}
        while True:
            page = _repeat(functools.partial(self._page, query), self.name)
            about = _fields(page)
            items = [child for child in page if _tag(child) == "Contents"]
            for item in items:
                self._take_in(_fields(item), listing, about.get("EncodingType") == "url")
            exists |= bool(items)
            found = len(listing.files) + len(listing.directories) + len(listing.skipped)
            check_count(self.name, found, files_max)
            token = about.get("NextContinuationToken", "")
            if about.get("IsTruncated") != "true" or not token:
                break
            if not items:
                raise StoreError(f"{self.name}: the store's listing has no end; check the store")
            query["continuation-token"] = token
        if not exists:
            raise self._why_not_found()
        return listing

    def _page(self, query: dict[str, str]) -> ElementTree.Element:
        with self._client.request("GET", query=query) as response:
            text = read_all(response, _ANSWER_BYTES_MAX)
        # A document type could define entities that grow in memory; UTF-16 would hide it.
        if b"<!DOCTYPE" in text or b"\0" in text or text.count(b"<") > _PAGE_TAGS_MAX:
            raise StoreError(
                f"{self.name}: the store's listing is not valid XML, or too much of it; check the "
                "endpoint"
            )
        try:
            page = ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            raise StoreError(
                f"{self.name}: the store's listing is not valid XML ({error}); if an object's name "
                "has a control character, rename or remove that object"
            ) from None
        if _tag(page) != "ListBucketResult":  # a web page can be XML, too, and has no objects
            raise StoreError(
                f"{self.name}: the store answered with <{printable(_tag(page))}> instead of a "
                "listing; check the endpoint"
            )
        return page

    def _take_in(self, item: dict[str, str], listing: Listing, encoded: bool) -> None:
        key = item.get("Key", "")
        if encoded:
            key = unquote_plus(key, errors="surrogateescape")
        path = key[len(self._prefix) :]
        if not path:
            return  # the marker of this very directory
        size = _number(item.get("Size", ""))
        if path.endswith("/"):
            listing.directories.append(path[:-1])
            if size > 0:
                listing.skipped.append(Skipped(printable(path), "it is a directory with content"))
            return
        if size < 0:
            listing.skipped.append(Skipped(printable(path), "the store gives no size of it"))
            return
        mtime_ns = _listed_ns(item.get("LastModified", ""))
        listing.files.append(ListedFile(path, size, mtime_ns, _etag(item.get("ETag", ""))))

    def confirm(self, pin: Pin) -> Pin:
        """See Store.confirm."""
        condition = {"if-none-match": pin.etag} if pin.etag else {}
        current = self._of_object(pin, lambda: self._head(self._key(pin.path), condition))
        if current is None:
            self._answers_are_whole = True
            return pin
        self._check_etag(pin, current.etag)
        if current.size != pin.size:
            raise changed(self.name, pin, f"{pin.size} bytes became {current.size}")
        # The listing has fractions of seconds, Last-Modified has not.
        if not pin.etag and pin.mtime_ns and current.mtime_ns // 10**9 != pin.mtime_ns // 10**9:
            raise changed(self.name, pin, "it was written again")
        return msgspec.structs.replace(pin, etag=current.etag)

    def _check_etag(self, pin: Pin, etag: str) -> None:
        if pin.etag and not etag:  # no version at all: this was something between us and the store
            raise StoreError(
                f"{printable(pin.path)} in {self.name}: the store answered without an ETag, which "
                "its listing had; check the endpoint"
            )
        if pin.etag and etag != pin.etag:
            raise changed(self.name, pin, f"ETag {pin.etag} became {etag or 'none'}")

    def _key(self, path: str) -> str:
        return self._prefix + path

    def _head(self, key: str, condition: dict[str, str]) -> ListedFile | None:
        """What a HEAD says; None: 304. The path is left out."""
        expected = frozenset([200, 304] if condition else [200])
        try:
            with self._client.request("HEAD", key, headers=condition, expected=expected) as answer:
                if answer.status == 304:
                    return None
                headers = answer.headers
        except S3Error as error:
            if error.status != 400:
                raise
            likely = "HEAD gives no reason, this one is likely"
            raise S3Error(400, error.code or "ExpiredToken", likely) from None
        size = _number(headers.get("content-length", ""))
        return ListedFile("", size, _mtime_ns(headers), _etag(headers.get("etag", "")))

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        """See Store.read_into."""
        return self._of_object(pin, lambda: self._read_into(pin, offset, buffer))

    def _read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        last = offset + len(buffer) - 1
        headers = {"range": f"bytes={offset}-{last}"}
        if pin.etag:
            headers["if-match"] = pin.etag
        # Some servers answer 200 to a range.
        expected = frozenset([200, 206])
        key = self._key(pin.path)
        with self._client.request("GET", key, headers=headers, expected=expected) as response:
            self._check_etag(pin, _etag(response.headers.get("etag", "")))
            found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            start, stop, size = map(int, found.groups()) if found else (0, -1, response.length)
            if size is None:
                raise StoreError(
                    f"{self._name_of(pin.path)}: the store does not say what its answer is of"
                )
            if size != pin.size:
                raise changed(self.name, pin, f"{pin.size} bytes became {size}")
            if (start, stop if found else size - 1) != (offset, last):
                raise StoreError(
                    f"{printable(pin.path)} in {self.name}: the store answered with other bytes "
                    f"than were asked for ({headers['range']}); does it know ranges?"
                )
            count = read_into(response, buffer)
            if count != len(buffer):
                raise BrokenConnection(f"the answer ended after {count} of {len(buffer)} bytes")
        return bool(pin.etag) and self._answers_are_whole

    def get(self, path: str) -> bytes | None:
        """See Store.get."""
        return _repeat(lambda: self._or_none(lambda: self._get(path)), self._name_of(path))

    def _get(self, path: str) -> bytes:
        with self._client.request("GET", self._key(path)) as response:
            data = read_all(response, _ANSWER_BYTES_MAX + 1)
        if len(data) > _ANSWER_BYTES_MAX:
            raise StoreError(f"{self._name_of(path)} has more than {_ANSWER_BYTES_MAX} bytes")
        return data

    def put(self, path: str, data: bytes) -> None:
        """See Store.put."""

        def attempt() -> None:
            with self._client.request("PUT", self._key(path), body=data) as response:
                response.read()

        _repeat(attempt, self._name_of(path))

    def find(self, path: str) -> ListedFile | None:
        """See Store.find."""
        head = functools.partial(self._head, self._key(path), {})
        found = _repeat(lambda: self._or_none(head), self._name_of(path))
        return None if found is None else msgspec.structs.replace(found, path=path)

    def close(self) -> None:
        """See Store.close."""
        self._client.close()

    @property
    def is_slow(self) -> bool:
        """Whether first bytes took longer than the usual silence lately (see `patience`)."""
        return self._client.is_slow

    # -- errors

    def _name_of(self, path: str) -> str:
        return f"{printable(path)} in {self.name}"

    def _or_none(self, attempt: Callable[[], T]) -> T | None:
        """None where there is no such object."""
        try:
            return attempt()
        except S3Error as error:
            if error.status == 404 and error.code in ("", "NoSuchKey"):
                return None
            raise

    def _of_object(self, pin: Pin, attempt: Callable[[], T]) -> T:
        """Do something once with an object that was there."""
        try:
            return attempt()
        except S3Error as error:
            if error.status == 404 and error.code != "NoSuchBucket":
                raise changed(self.name, pin, "it was deleted") from None
            if error.status == 412:
                raise changed(self.name, pin, "it was written again") from None
            if error.status == 416:
                raise changed(self.name, pin, "it became shorter") from None
            raise translate_error(error, self._name_of(pin.path)) from error
        except BrokenConnection as error:
            raise translate_error(error, self._name_of(pin.path)) from error

    def _why_not_found(self) -> CkptfsError:
        """To be called where nothing is below the prefix."""
        key = self._prefix[:-1]
        found = _repeat(lambda: self._or_none(lambda: self._head(key, {})), self.name)
        return not_found(self.name) if found is None else is_file(self.name)


def _repeat(attempt: Callable[[], T], what: str) -> T:
    """Try it once more where that can help."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            return attempt()
        except (S3Error, BrokenConnection) as error:
            translated = translate_error(error, what)
            if not left or not isinstance(translated, StoreUnavailable):
                raise translated from error
            pause_s = max(_PAUSE_S, translated.retry_after_s)
            if pause_s > min(_PAUSE_S_MAX, left_s()):
                raise translated from error
            time.sleep(pause_s * random.uniform(0.5, 1) if pause_s == _PAUSE_S else pause_s)
    raise AssertionError


def translate_error(error: S3Error | BrokenConnection, what: str) -> CkptfsError:
    """The exception of ours that says what the server's answer means for `what`."""
    cause = printable(str(error))
    if isinstance(error, SilentServer):
        return StoreTimeout(f"{what}: the store did not answer ({cause}); {error.advice}")
    if isinstance(error, BrokenConnection):
        return StoreUnavailable(f"{what}: cannot reach the store ({cause}); {error.advice}")
    if error.code == "NoSuchBucket":
        return CheckpointNotFound(f"{what}: there is no such bucket; check its name")
    if error.code in _TRANSIENT or error.status in _TRANSIENT_STATUS:
        busy = StoreUnavailable(f"{what}: the store is busy or broken ({cause}); try again later")
        busy.retry_after_s = error.retry_after_s
        return busy
    if error.code in _DENIED or error.status in (401, 403, 407):  # 407: a proxy
        return AccessDenied(f"{what}: access denied ({cause}); check credentials and permissions")
    return StoreError(f"{what}: {cause}")


# What stands in answers. The server is not trusted: what makes no sense is as good as missing.


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]  # without the namespace


def _fields(element: ElementTree.Element) -> dict[str, str]:
    return {_tag(child): child.text or "" for child in element}


def _number(text: str) -> int:
    """-1: there is none."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else -1


def _etag(text: str) -> str:
    """With its quotes, which some servers leave out of listings."""
    quoted = text if text.endswith('"') else f'"{text}"'
    return quoted if text and _ETAG.fullmatch(quoted) and quoted != '""' else ""


def _listed_ns(text: str) -> int:
    """A time of a listing, as 2026-01-31T23:59:59.000Z; 0: there is none."""
    seconds, _, fraction = text.rstrip("Z").partition(".")
    try:
        moment = datetime.fromisoformat(seconds).replace(tzinfo=timezone.utc)
        return max(0, int(moment.timestamp()) * 10**9 + int(fraction[:9].ljust(9, "0")))
    except ValueError:
        return 0


def _mtime_ns(headers: HTTPMessage) -> int:
    """0: there is none."""
    try:
        moment = parsedate_to_datetime(headers.get("last-modified", ""))
    except ValueError:
        return 0
    return max(0, int(moment.timestamp()) * 10**9)
