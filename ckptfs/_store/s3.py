"""A Store over S3, with conditional reads.

A range is asked for with If-Match, and its answer names the version that its bytes are of. On a
server that makes each answer of one version, as S3 does, nothing more has to be asked: the first
touch of an object is one request, because the ETag is known from the listing.

Servers that hand out files of a disk do not do so: what they send may change on the way. They are
told apart by whether they look at conditions at all: `confirm` asks "if it is no longer this
version", and the answer 304 Not Modified is one that such a server does not give. Until that
was seen, each read has to be confirmed.

**Versions of other servers.** A check (`confirm`) compares what HEAD says with the pin. Where they
differ and only the listing has named the pinned ETag so far, the listing of this one object
decides: if it still says what it said, the object is unchanged, and its own ETag is pinned. Where
HEAD has no ETag, each check asks the listing. A weak ETag is compared and never made a condition.

Without a strong ETag the time of a version is a whole second, so an object that is overwritten
within the second in which it was written looks the same. The first check of such an object
therefore waits until that second has passed by the server's own clock. From then on, each change
has another time.
"""

import base64
import functools
import hashlib
import http.client
import math
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from ckptfs._model.manifest import ListedFile, Listing, printable
from ckptfs._store.base import Pin, changed, is_file, not_found
from ckptfs._store.deadline import left_s
from ckptfs._store.patience import PATIENCE_S_MAX
from ckptfs._store.s3advice import translate_error
from ckptfs._store.s3client import (
    BrokenConnection,
    S3Client,
    S3Error,
    read_all,
    read_into,
)
from ckptfs._store.s3listing import find_one, list_all
from ckptfs._store.s3versions import (
    Seen,
    content_range_in,
    encoding_in,
    etag_in,
    is_same,
    is_same_moment,
    is_same_second,
    is_strong,
    is_web_page,
    seen_in,
)
from ckptfs.errors import CkptfsError, StoreError, StoreTimeout, StoreUnavailable

if TYPE_CHECKING:
    from http.client import HTTPResponse

__all__ = ["S3Store", "translate_error"]

_ANSWER_BYTES_MAX = 16 << 20
"""Of a page of a listing (1,000 objects, each with a name of at most 1 KiB, 3 when encoded), and
of an object that is read as a whole."""
_SETTLED_S = 2.0
"""A version is settled when its second, and one more for what was being written in it, is over."""
_ATTEMPTS = 2
"""Of requests that nobody repeats (`outages` does so for reads)."""
_PAGE_ATTEMPTS = 6
"""Of a page of a listing where the server says that it is busy or broken. boto3 makes 5."""
_PAUSE_S = 0.2
_PAUSE_S_MAX = 10.0
"""Between them: the first, times 0.5 to 1, and the longest that a server may ask for. Each further
one is twice as long. A page of a listing is waited for until the caller's deadline."""
_NO_REASON = frozenset([400, 403, 405, 501])
"""Refusals of HEAD, which has no body to say why; the last two: the server does not know HEAD."""

T = TypeVar("T")


class S3Store:
    """The directory `prefix` of a bucket. `name` is the checkpoint's URI, for messages."""

    gives_up = True

    def __init__(self, client: S3Client, prefix: str, name: str) -> None:
        self._client = client
        self._prefix = f"{prefix}/" if prefix else ""
        self.name = name
        self._answers_are_whole = client.is_amazon
        self._knows_conditions = True

    # -- listing

    def list(self, files_max: int) -> Listing:
        """See Store.list."""
        # There is no other way to learn the names, so only the deadline ends the wait for a page.
        patience_s = min(max(left_s(), _PAUSE_S), PATIENCE_S_MAX)
        ask = functools.partial(
            self._page,
            patience_s=patience_s,
            attempts_max=_PAGE_ATTEMPTS,
            pause_s_max=math.inf,
        )
        found = list_all(ask, self._prefix, self.name, files_max)
        if not found.exists and self._prefix:
            raise self._why_not_found()
        return found.listing

    def _page(
        self,
        query: dict[str, str],
        headers: dict[str, str],
        patience_s: float | None = None,
        attempts_max: int = _ATTEMPTS,
        pause_s_max: float = _PAUSE_S_MAX,
    ) -> bytes:
        def attempt() -> bytes:
            asked = self._client.request("GET", "", query, headers, patience_s=patience_s)
            with asked as response:
                return read_all(response, _ANSWER_BYTES_MAX)

        return _repeat(attempt, self.name, attempts_max, pause_s_max)

    def _is_listed(self, key: str) -> ListedFile | None:
        """What the listing says of one object; None: it does not have it."""
        query = {"list-type": "2", "encoding-type": "url", "prefix": key, "max-keys": "1"}
        item = find_one(self._page(query, {}), key, self.name)
        return None if item is None else ListedFile("", item.size, item.mtime_ns, item.etag)

    def _why_not_found(self) -> CkptfsError:
        """To be called where nothing is below the prefix."""
        key = self._prefix[:-1]
        found = _repeat(lambda: self._or_none(key, lambda: self._head(key, {})), self.name)
        return not_found(self.name) if found is None else is_file(self.name)

    # -- versions

    def confirm(self, pin: Pin) -> Pin:
        """See Store.confirm."""
        confirmed, seen = self._check(pin)
        if (
            seen is not None
            and not is_strong(confirmed.etag)
            and self._wait_until_settled(pin, seen)
        ):
            confirmed, _ = self._check(confirmed)
        return confirmed

    def _check(self, pin: Pin) -> tuple[Pin, Seen | None]:
        """Compare `pin` with the current version; returns the pin to go on with, and what was seen
        (None: no more than that nothing has changed)."""
        condition = {"if-none-match": pin.etag} if is_strong(pin.etag) else {}
        seen = self._of_object(pin, lambda: self._head(self._key(pin.path), condition))
        if seen is None:
            self._answers_are_whole = True
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
        if not etag:  # no version at all: this was something between us and the store
            raise StoreError(
                f"{self._name_of(pin.path)}: the store answered without an ETag, which its answers "
                "had before; check the endpoint"
            )
        if not is_same(etag, pin.etag):
            raise changed(self.name, pin, f"ETag {pin.etag} became {etag}")

    def _check_listing(self, pin: Pin, is_same_time: bool) -> None:
        """Raise ObjectChanged unless the listing says of the object what it said before.

        `is_same_time`: whether its own time is that of the listing, which decides where the listing
        says nothing."""
        listed = self._is_listed(self._key(pin.path))
        if listed is None:
            if not is_same_time:
                raise changed(self.name, pin, "it was written again")
            return
        if listed.size not in (-1, pin.size):
            raise changed(self.name, pin, f"{pin.size} bytes became {listed.size}")
        if pin.etag and not is_same(pin.etag, listed.etag):
            raise changed(self.name, pin, f"ETag {pin.etag} became {listed.etag or 'none'}")
        if not is_same_moment(pin.mtime_ns, listed.mtime_ns):
            raise changed(self.name, pin, "it was written again")

    def _wait_until_settled(self, pin: Pin, seen: Seen) -> bool:
        """Whether it had to wait."""
        mtime_ns = seen.mtime_ns or pin.mtime_ns
        age_s = (seen.date_s or time.time()) - mtime_ns // 10**9
        # A time that is far ahead of the server's clock was given to the object by its writer.
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
        """What the store says of an object; None: 304."""
        expected = frozenset([200, 304] if condition else [200])
        try:
            headers = {**condition, **_AS_STORED}
            with self._client.request("HEAD", key, headers=headers, expected=expected) as answer:
                return None if answer.status == 304 else self._seen(key, answer)
        except S3Error as error:
            if error.code or error.status not in _NO_REASON:
                raise
        return self._head_by_get(key)

    def _head_by_get(self, key: str) -> Seen:
        """What HEAD should have said: the answer to GET also has a reason where it is refused."""
        headers = {"range": "bytes=0-0", **_AS_STORED}
        expected = frozenset([200, 206, 416])
        with self._client.request("GET", key, headers=headers, expected=expected) as answer:
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
        """See Store.read_into."""

        def attempt() -> bool:
            knows_conditions = self._knows_conditions  # another thread may learn it meanwhile
            try:
                return self._read_into(pin, offset, buffer)
            except S3Error as error:
                # So S3 answers to headers that a server does not implement.
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
        key = self._key(pin.path)
        with self._client.request("GET", key, headers=headers, expected=expected) as response:
            etag = etag_in(response.headers.get("etag", ""))
            if etag and pin.etag and pin.etag_of != "checks":
                self._check_etag(pin, etag)
            self._check_range(pin, offset, len(buffer), response)
            count = read_into(response, buffer)
            if count != len(buffer):
                raise BrokenConnection(f"the answer ended after {count} of {len(buffer)} bytes")
            if response.length is None and "content-range" not in response.headers:
                self._check_end(pin, response)
        return is_conditional and etag == pin.etag and self._answers_are_whole

    def _check_range(self, pin: Pin, offset: int, length: int, response: "HTTPResponse") -> None:
        """Raise unless the body of the answer is the range that was asked for."""
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

    def _check_end(self, pin: Pin, response: "HTTPResponse") -> None:
        if response.read(1):
            raise changed(self.name, pin, f"{pin.size} bytes became more")

    def _other_bytes(self, pin: Pin, asked: str, answer: str) -> StoreError:
        return StoreError(
            f"{self._name_of(pin.path)}: the store answered with other bytes than were asked for: "
            f"{asked} were asked for, and the answer is {answer}; check that it knows ranges, and "
            "that nothing on the way changes answers"
        )

    # -- small objects

    def get(self, path: str) -> bytes | None:
        """See Store.get."""
        key = self._key(path)
        return _repeat(lambda: self._or_none(key, lambda: self._get(key)), self._name_of(path))

    def _get(self, key: str) -> bytes:
        with self._client.request("GET", key, headers=_AS_STORED) as response:
            data = read_all(response, _ANSWER_BYTES_MAX + 1)
            if is_web_page(response.headers, data):
                raise self._web_page(key)
        if len(data) > _ANSWER_BYTES_MAX:
            path = key.removeprefix(self._prefix)
            raise StoreError(f"{self._name_of(path)} has more than {_ANSWER_BYTES_MAX} bytes")
        return data

    def put(self, path: str, data: bytes) -> None:
        """See Store.put."""
        # Buckets with an object lock want a checksum, and each server knows this one.
        digest = hashlib.md5(data, usedforsecurity=False).digest()
        headers = {"content-md5": base64.b64encode(digest).decode()}

        def attempt() -> str:
            key = self._key(path)
            asked = self._client.request(
                "PUT", key, None, headers, data, frozenset([200, 201, 204])
            )
            with asked as response:
                if response.read(_ANSWER_BYTES_MAX).strip() or is_web_page(response.headers):
                    raise self._web_page(key)
                return etag_in(response.headers.get("etag", ""))

        if not _repeat(attempt, self._name_of(path)) and self.get(path) != data:
            raise StoreError(
                f"{self._name_of(path)}: the store accepted the upload, and does not have it; "
                "check the endpoint, and whether a proxy wants a login"
            )

    def find(self, path: str) -> ListedFile | None:
        """See Store.find."""
        key = self._key(path)

        def attempt() -> Seen | None:
            seen = self._head(key, {})
            return self._head_by_get(key) if seen is not None and seen.size < 0 else seen

        seen = _repeat(lambda: self._or_none(key, attempt), self._name_of(path))
        if seen is None:
            return None
        if seen.size < 0:
            raise StoreError(f"{self._name_of(path)}: the store does not say its size; check it")
        return ListedFile(path, seen.size, seen.mtime_ns, seen.etag)

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

    def _or_none(self, key: str, attempt: Callable[[], T]) -> T | None:
        """None where there is no such object."""
        try:
            return attempt()
        except S3Error as error:
            if error.status == 404 and error.code in ("", "NoSuchKey"):
                return None
            # S3 says so of a missing object, too, where the credentials may not list the bucket.
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


_AS_STORED = {"accept-encoding": "identity"}
"""So that nothing on the way compresses what it sends."""


def _proven(pin: Pin) -> Pin:
    """The pin, after an answer of the object has named its ETag."""
    return msgspec.structs.replace(pin, etag_of="answers") if pin.etag_of == "listing" else pin


def _repeat(
    attempt: Callable[[], T],
    what: str,
    attempts_max: int = _ATTEMPTS,
    pause_s_max: float = _PAUSE_S_MAX,
) -> T:
    """Try it again where that can help: `attempts_max` times where the server answers."""
    tried = 0
    while True:
        try:
            return attempt()
        except (S3Error, BrokenConnection) as error:
            tried += 1
            translated = translate_error(error, what)
            most = attempts_max if isinstance(error, S3Error) else _ATTEMPTS
            if tried >= most or not isinstance(translated, StoreUnavailable):
                raise translated from error
            own_s = _PAUSE_S * 2 ** (tried - 1)
            pause_s = max(own_s, translated.retry_after_s)
            if pause_s > min(pause_s_max, left_s()):
                raise translated from error
            time.sleep(max(own_s * random.uniform(0.5, 1), translated.retry_after_s))
