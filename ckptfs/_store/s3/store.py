"""A Store over S3, with conditional reads.

The store asks for a range with If-Match, and the answer names the version of its bytes. On a server
like S3, all bytes of an answer are of one version, so the first access to an object is one request.
The listing has the ETag.

Servers that send files of a disk are different: the file may change while they send it. Such
    servers ignore conditions. `confirm` sends If-None-Match, and such a server never answers with
    304 Not Modified. Until the store has seen a 304, each read has to be confirmed.

**Versions of other servers.** A check (`confirm`) compares the answer to HEAD with the pin. If they
differ and only the listing has named the pinned ETag so far, the listing of this one object
decides. If that has not changed, the object is unchanged, and its own ETag is pinned. If HEAD has
no ETag, each check asks the listing. The store compares weak ETags, and never sends them as
conditions.

Without a strong ETag the time of a version is a whole second, so an object that is overwritten
within the second in which it was written looks the same. The first check of such an object
therefore waits until that second has passed by the server's own clock. From then on, each change
has another time.
"""

import base64
import hashlib
import http.client
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from ckptfs._model.manifest import ListedFile, Listing, printable
from ckptfs._store import timestamps
from ckptfs._store.base import Pin, changed, is_file, not_found
from ckptfs._store.request_context import left_s
from ckptfs._store.s3.advice import translate_error
from ckptfs._store.s3.client import Asked, S3Client
from ckptfs._store.s3.listing import list_all, parse_page
from ckptfs._store.s3.retry import ATTEMPTS, BACKOFF, repeat
from ckptfs._store.s3.uploads import S3Uploads
from ckptfs._store.transport.answers import read_all, read_into
from ckptfs._store.transport.errors import BrokenConnection, S3Error
from ckptfs._store.transport.patience import PATIENCE_S_MAX
from ckptfs._store.uploads import Uploads
from ckptfs._store.versions import (
    Seen,
    content_range_in,
    encoding_in,
    etag_in,
    is_same,
    is_same_second,
    is_strong,
    is_web_page,
    seen_in,
)
from ckptfs.errors import CkptfsError, StoreError, StoreTimeout

if TYPE_CHECKING:
    from http.client import HTTPResponse

_ANSWER_BYTES_MAX = 16 << 20
"""The longest page of a listing (1,000 objects, each with a name of at most 1 KiB, 3 KiB when
encoded), and the largest object that is read as a whole."""
_SETTLED_S = 2.0
"""The age of a settled version: its second, and one more for writes that began in that second."""
_PAGE_ATTEMPTS = 6
"""The tries for a page of a listing if the server is busy or broken. boto3 makes 5."""
_NO_REASON = frozenset([400, 403, 405, 501])
"""The refusals of HEAD, whose answer has no body with a reason. The last two mean that the server
does not support HEAD."""

T = TypeVar("T")


class S3Store:
    """The directory `prefix` of a bucket. `name` is the checkpoint's URI, for messages.

    Attributes:
        answers_are_whole: Whether all bytes of an answer are known to be of one version.
    """

    def __init__(self, client: S3Client, prefix: str, name: str) -> None:
        self._client = client
        self._prefix = f"{prefix}/" if prefix else ""
        self.name = name
        self.answers_are_whole = client.answers_are_whole
        self._knows_conditions = True

    # -- listing

    def list(self, files_max: int) -> Listing:
        found = list_all(self._page_of_all, self._prefix, self.name, files_max)
        if not found.exists and self._prefix:
            raise self._why_not_found()
        return found.listing

    def _page_of_all(self, query: dict[str, str], headers: dict[str, str]) -> bytes:
        # Only the listing has the names, so only the deadline ends the wait for a page.
        patience_s = min(max(left_s(), BACKOFF.first_s), PATIENCE_S_MAX)
        return self._page(query, headers, patience_s, _PAGE_ATTEMPTS, math.inf)

    def _page(
        self,
        query: dict[str, str],
        headers: dict[str, str],
        patience_s: float | None = None,
        attempts_max: int = ATTEMPTS,
        pause_s_max: float = BACKOFF.max_s,
    ) -> bytes:
        def attempt() -> bytes:
            asked = Asked("GET", "", query, headers, patience_s=patience_s)
            with self._client.request(asked) as response:
                return read_all(response, _ANSWER_BYTES_MAX)

        return repeat(attempt, self.name, attempts_max, pause_s_max)

    def _is_listed(self, key: str) -> ListedFile | None:
        """The entry of one object in the listing; None if the listing does not have it."""
        query = {"list-type": "2", "encoding-type": "url", "prefix": key, "max-keys": "1"}
        page = parse_page(self._page(query, {}), key, self.name)
        item = next((item for item in page.items if item.key == key), None)
        return None if item is None else ListedFile("", item.size, item.mtime_ns, item.etag)

    def _why_not_found(self) -> CkptfsError:
        """The error for a prefix with nothing below it."""
        key = self._prefix[:-1]
        found = repeat(lambda: self._or_none(key, lambda: self._head(key, {})), self.name)
        return not_found(self.name) if found is None else is_file(self.name)

    # -- versions

    def confirm(self, pin: Pin) -> Pin:
        confirmed, seen = self._check(pin)
        if (
            seen is not None
            and not is_strong(confirmed.etag)
            and self._wait_until_settled(pin, seen)
        ):
            confirmed, _ = self._check(confirmed)
        return confirmed

    def _check(self, pin: Pin) -> tuple[Pin, Seen | None]:
        """Compare `pin` with the current version. Returns the pin for later reads, and the server's
        answer (None for 304, which says only that nothing has changed)."""
        condition = {"if-none-match": pin.etag} if is_strong(pin.etag) else {}
        seen = self._of_object(pin, lambda: self._head(self._key(pin.path), condition))
        if seen is None:
            self.answers_are_whole = True
            return _proven(pin), None
        is_same_time = is_same_second(pin.mtime_ns, seen.mtime_ns)
        if seen.size not in (-1, pin.size):
            self._check_listing(pin, False)
            raise StoreError(
                f"{self._name_of(pin.path)}: the store's listing says {pin.size} bytes, and the "
                f"object itself has {seen.size}; check the store"
            )
        if is_same(pin.etag, seen.etag) and (is_strong(pin.etag) or is_same_time):
            return _proven(pin), seen
        if pin.etag and pin.etag_of == "answers":
            self._check_etag(pin, seen.etag)
        says_nothing = not seen.etag and not seen.mtime_ns
        if pin.etag or not is_same_time or says_nothing:
            self._check_listing(pin, is_same_time)
        if pin.etag_of == "checks" or (pin.etag and not seen.etag):
            return msgspec.structs.replace(pin, etag_of="checks"), seen
        return msgspec.structs.replace(pin, etag=seen.etag, etag_of="answers"), seen

    def _check_etag(self, pin: Pin, etag: str) -> None:
        if not etag:  # no version at all: something between ckptfs and the store has answered
            raise StoreError(
                f"{self._name_of(pin.path)}: the store's answer has no ETag, although its earlier "
                "answers had one; check the endpoint"
            )
        if not is_same(etag, pin.etag):
            raise changed(self.name, pin, f"ETag {pin.etag} became {etag}")

    def _check_listing(self, pin: Pin, is_same_time: bool) -> None:
        """Raise ObjectChanged unless the object's entry in the listing is the same as before.

        `is_same_time` says whether the object's own time is that of the listing. It decides if the
        listing does not have the object."""
        listed = self._is_listed(self._key(pin.path))
        if listed is None:
            if not is_same_time:
                raise changed(self.name, pin, "it was written again")
            return
        if listed.size not in (-1, pin.size):
            raise changed(self.name, pin, f"{pin.size} bytes became {listed.size}")
        if pin.etag and not is_same(pin.etag, listed.etag):
            raise changed(self.name, pin, f"ETag {pin.etag} became {listed.etag or 'none'}")
        has_times = pin.mtime_ns and listed.mtime_ns
        if has_times and not timestamps.is_same_time(pin.mtime_ns, listed.mtime_ns):
            raise changed(self.name, pin, "it was written again")

    def _wait_until_settled(self, pin: Pin, seen: Seen) -> bool:
        """Wait until the version is settled. Returns whether it had to wait."""
        mtime_ns = seen.mtime_ns or pin.mtime_ns
        age_s = (seen.date_s or time.time()) - mtime_ns // 10**9
        # If a time is far ahead of the server's clock, the object's writer has set it.
        if not mtime_ns or not -_SETTLED_S <= age_s < _SETTLED_S:
            return False
        wait_s = min(_SETTLED_S, _SETTLED_S - age_s)
        if wait_s > left_s():
            raise StoreTimeout(
                f"{self._name_of(pin.path)} was written just now, and the store has no ETags to "
                "tell its versions apart; try again in 2 s"
            )
        time.sleep(wait_s)
        return True

    def _key(self, path: str) -> str:
        return self._prefix + path

    def _head(self, key: str, condition: dict[str, str]) -> Seen | None:
        """The store's answer about an object; None for 304."""
        expected = frozenset([200, 304] if condition else [200])
        try:
            headers = {**condition, **_AS_STORED}
            asked = Asked("HEAD", key, headers=headers, expected=expected)
            with self._client.request(asked) as answer:
                return None if answer.status == 304 else self._seen(key, answer)
        except S3Error as error:
            if error.code or error.status not in _NO_REASON:
                raise
        return self._head_by_get(key)

    def _head_by_get(self, key: str) -> Seen:
        """The same by GET, whose answer has a reason if the server refuses it."""
        headers = {"range": "bytes=0-0", **_AS_STORED}
        asked = Asked("GET", key, headers=headers, expected=frozenset([200, 206, 416]))
        with self._client.request(asked) as answer:
            seen = self._seen(key, answer)
            return seen._replace(size=0) if answer.status == 416 else seen  # it has no first byte

    def _seen(self, key: str, answer: "HTTPResponse") -> Seen:
        if is_web_page(answer.headers):
            raise self._web_page(key)
        return seen_in(answer.headers)

    def _web_page(self, key: str) -> StoreError:
        return StoreError(
            f"{self._name_of(key.removeprefix(self._prefix))}: the store answered with a web page "
            "instead of an object; check the endpoint, and whether a proxy wants a login"
        )

    # -- reading

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:

        def attempt() -> bool:
            knows_conditions = self._knows_conditions  # another thread may learn it meanwhile
            try:
                return self._read_into(pin, offset, buffer)
            except S3Error as error:
                # S3 answers with this status to headers that a server does not implement.
                if error.status != http.client.NOT_IMPLEMENTED or not knows_conditions:
                    raise
            self._knows_conditions = False  # so each read has to be confirmed
            return self._read_into(pin, offset, buffer)

        return self._of_object(pin, attempt)

    def _read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        headers = {"range": f"bytes={offset}-{offset + len(buffer) - 1}", **_AS_STORED}
        is_pinned = is_strong(pin.etag) and pin.etag_of != "checks"
        is_conditional = is_pinned and self._knows_conditions
        if is_conditional:
            headers["if-match"] = pin.etag
        # Some servers answer 200 to a range.
        expected = frozenset([200, 206])
        asked = Asked("GET", self._key(pin.path), headers=headers, expected=expected)
        with self._client.request(asked) as response:
            etag = etag_in(response.headers.get("etag", ""))
            if etag and pin.etag and pin.etag_of != "checks":
                self._check_etag(pin, etag)
            self._check_range(pin, offset, len(buffer), response)
            count = read_into(response, buffer)
            if count != len(buffer):
                raise BrokenConnection(f"the answer ended after {count} of {len(buffer)} bytes")
            has_length = response.length is not None or "content-range" in response.headers
            if not has_length and response.read(1):
                raise changed(self.name, pin, f"{pin.size} bytes became more")
        return is_conditional and etag == pin.etag and self.answers_are_whole

    def _check_range(self, pin: Pin, offset: int, length: int, response: "HTTPResponse") -> None:
        """Raise StoreError or ObjectChanged unless the body of the answer is the requested
        range."""
        what = f"bytes {offset} to {offset + length - 1}"
        part = content_range_in(response.headers)
        if part is not None:
            if part.size not in (-1, pin.size):
                raise changed(self.name, pin, f"{pin.size} bytes became {part.size}")
            if (part.first, part.last) != (offset, offset + length - 1):
                raise self._other_bytes(pin, what, f"bytes {part.first} to {part.last}")
            return
        if response.status == 206:
            kind = response.headers.get("content-type", "no type")
            raise self._other_bytes(pin, what, f"a part that it does not name ({printable(kind)})")
        encoding = encoding_in(response.headers)
        if encoding and response.length != pin.size:
            raise self._other_bytes(pin, what, f"bytes that are compressed ({encoding})")
        if is_web_page(response.headers):
            raise self._web_page(self._key(pin.path))
        if response.length not in (None, pin.size):
            etag = etag_in(response.headers.get("etag", ""))
            if is_same(etag, pin.etag) or not etag:
                raise self._other_bytes(pin, what, f"{response.length} bytes of {pin.size}")
            raise changed(self.name, pin, f"{pin.size} bytes became {response.length}")
        if (offset, length) != (0, pin.size):
            raise self._other_bytes(pin, what, "the whole object")

    def _other_bytes(self, pin: Pin, asked: str, answer: str) -> StoreError:
        return StoreError(
            f"{self._name_of(pin.path)}: the store answered with other bytes than were asked for: "
            f"{asked} were asked for, and the answer is {answer}; check that the store supports "
            "ranges, and that no proxy changes its answers"
        )

    # -- small objects

    def get(self, path: str) -> bytes | None:
        key = self._key(path)
        return repeat(lambda: self._or_none(key, lambda: self._get(key)), self._name_of(path))

    def _get(self, key: str) -> bytes:
        with self._client.request(Asked("GET", key, headers=_AS_STORED)) as response:
            data = read_all(response, _ANSWER_BYTES_MAX + 1)
            if is_web_page(response.headers, data):
                raise self._web_page(key)
        if len(data) > _ANSWER_BYTES_MAX:
            path = key.removeprefix(self._prefix)
            raise StoreError(
                f"{self._name_of(path)} has more than {_ANSWER_BYTES_MAX} bytes; make it smaller"
            )
        return data

    def put(self, path: str, data: bytes) -> None:
        # Buckets with an object lock require a checksum, and each server supports this one.
        digest = hashlib.md5(data, usedforsecurity=False).digest()
        headers = {"content-md5": base64.b64encode(digest).decode()}
        key = self._key(path)
        asked = Asked("PUT", key, {}, headers, data, expected=frozenset([200, 201, 204]))

        def attempt() -> str:
            with self._client.request(asked) as response:
                if response.read(_ANSWER_BYTES_MAX).strip() or is_web_page(response.headers):
                    raise self._web_page(key)
                return etag_in(response.headers.get("etag", ""))

        if not repeat(attempt, self._name_of(path)) and self.get(path) != data:
            raise StoreError(
                f"{self._name_of(path)}: the store accepted the upload, but does not have the "
                "object; check the endpoint, and whether a proxy wants a login"
            )

    def uploads(self) -> Uploads:
        """See ``HasUploads``."""
        return S3Uploads(self._client, self._prefix, self.name)

    def find(self, path: str) -> ListedFile | None:
        key = self._key(path)

        def attempt() -> Seen | None:
            seen = self._head(key, {})
            return self._head_by_get(key) if seen is not None and seen.size < 0 else seen

        seen = repeat(lambda: self._or_none(key, attempt), self._name_of(path))
        if seen is None:
            return None
        if seen.size < 0:
            raise StoreError(
                f"{self._name_of(path)}: the store does not say the object's size; check the store"
            )
        return ListedFile(path, seen.size, seen.mtime_ns, seen.etag)

    def close(self) -> None:
        self._client.close()

    # -- errors

    def _name_of(self, path: str) -> str:
        return f"{printable(path)} in {self.name}"

    def _or_none(self, key: str, attempt: Callable[[], T]) -> T | None:
        """The result of `attempt`; None if the object does not exist."""
        try:
            return attempt()
        except S3Error as error:
            if error.status == 404 and error.code in ("", "NoSuchKey"):
                return None
            # S3 answers so for a missing object, too, if the credentials may not list the bucket.
            if error.status == 403 and error.code in ("", "AccessDenied") and self._is_absent(key):
                return None
            raise

    def _is_absent(self, key: str) -> bool:
        """Whether the listing can be read and does not have the object."""
        try:
            return self._is_listed(key) is None
        except CkptfsError:
            return False

    def _of_object(self, pin: Pin, attempt: Callable[[], T]) -> T:
        """The result of one `attempt` with an object that was in the listing."""
        try:
            return attempt()
        except (S3Error, BrokenConnection) as error:
            if (
                isinstance(error, S3Error)
                and error.code != "NoSuchBucket"
                and (how := _CHANGES.get(error.status))
            ):
                raise changed(self.name, pin, how) from None
            raise translate_error(error, self._name_of(pin.path)) from error


_CHANGES = {404: "it was deleted", 412: "it was written again", 416: "it became shorter"}
"""The statuses for an object that is no longer the pinned version, and what they say of it."""
_AS_STORED = {"accept-encoding": "identity"}
"""The header that keeps servers and proxies from compressing the bytes."""


def _proven(pin: Pin) -> Pin:
    """The pin, after an answer of the object has named its ETag."""
    return msgspec.structs.replace(pin, etag_of="answers") if pin.etag_of == "listing" else pin
