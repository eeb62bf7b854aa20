"""A Store over a directory of an HTTP(S) server that has index pages and supports ranges.

**Names** come from the links of index pages, decoded, and are encoded again for requests. **Sizes
and versions** come from one HEAD for each file, or from a GET of one byte if the server refuses
HEAD or does not give the size.

**Versions.** The store ignores the weakness of ETags, because Apache calls the ETag of an unchanged
file weak in its first second. Without ETags, Last-Modified and size count. If the ETag of an answer
is not the pinned one, HEAD decides, because gateways give GET and HEAD different ETags. A server of
files may change a file while it sends it, so the caller always confirms after the read.

Last-Modified has whole seconds, and nginx makes its ETag of that and the size. So the store does
not use an answer that was sent within the second of its version, and waits until the second is
over.

**Ranges.** The bytes of a 206 count if its Content-Range names the requested offset and the pinned
size. A 200 is the whole object. The store skips up to `_SKIP_BYTES_MAX` before the range; a read
further on fails with an error that says so.
"""

import time

import msgspec

from ckptfs._model.manifest import ListedFile, Listing, printable
from ckptfs._store.base import Pin, changed, not_found
from ckptfs._store.http.client import Head, HttpClient, HttpOptions, Missing
from ckptfs._store.http.tree import HttpTree, Walk, whole_body
from ckptfs._store.timestamps import is_same_time
from ckptfs._store.transport.answers import Answer, read_into
from ckptfs.errors import AccessDenied, ObjectChanged, StoreError, StoreUnavailable

_OBJECT_BYTES_MAX = 16 << 20
"""The largest object that is read as a whole, as on S3."""
_SKIP_BYTES_MAX = 64 << 20
"""The most bytes to skip at a server without ranges, because reading a file in parts this way costs
half its square."""
_PIECE_BYTES = 256 << 10
_YOUNG_TRIES = 3
_PARTS_MAX = 64
"""The most answers to one range, because a server may send less than the requested range."""


class HttpStore:
    """The directory at `url`. `name` is for messages. Raises LocationError if the URL does not name
    a directory, and OSError or ValueError if the certificates or the proxy cannot be used."""

    def __init__(self, url: str, name: str, options: HttpOptions, timeout_s: float) -> None:
        self.name = name
        self._client = HttpClient(options, timeout_s)
        self._tree = HttpTree(self._client, url, name)

    def list(self, files_max: int) -> Listing:
        return Walk(self._tree, files_max).listing()

    def confirm(self, pin: Pin) -> Pin:
        head = self._tree.head(pin.path)
        if head is None:
            raise changed(self.name, pin, "it was deleted")
        if head.size is not None and head.size != pin.size:
            raise changed(self.name, pin, f"{pin.size} bytes became {head.size}")
        if how := _difference(pin, head):
            raise changed(self.name, pin, how)
        return msgspec.structs.replace(pin, etag=head.etag or pin.etag)

    # -- reading and writing

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        done = 0
        for _ in range(_PARTS_MAX):
            if done == len(buffer):
                return False
            for _ in range(_YOUNG_TRIES):
                count = self._part(pin, offset + done, buffer[done:])
                if count:
                    break
                time.sleep(1.0)
            else:
                raise changed(self.name, pin, "it keeps changing")
            done += count
        raise self._unusable(pin, "the server sends ranges in too small parts")

    def _part(self, pin: Pin, offset: int, buffer: memoryview) -> int:
        """Read the first bytes of a range, and return their number; 0 if the version is too young
        to be told from the next one."""
        try:
            with self._client.request(
                "read",
                "GET",
                self._tree.url_of(pin.path),
                self._tree.what(pin.path),
                headers={"range": f"bytes={offset}-{offset + len(buffer) - 1}"},
                expected=frozenset([200, 206, 416]),
            ) as (head, answer):
                if fault := _fault_of_part(pin, offset, head):
                    raise self._unusable(pin, fault)
                if _difference(pin, head) and not self._is_tagged_otherwise(pin, head):
                    raise changed(self.name, pin, _difference(pin, head))
                if head.is_young:
                    return 0
                if head.range is None:
                    self._skip(pin, answer, offset)
                else:
                    buffer = buffer[: head.range.last + 1 - offset]
                if (count := read_into(answer, buffer)) < len(buffer):
                    raise StoreUnavailable(
                        f"{self._tree.what(pin.path)}: the answer is cut; try again"
                    )
                return count
        except Missing:
            raise changed(self.name, pin, "it was deleted") from None

    def _is_tagged_otherwise(self, pin: Pin, head: Head) -> bool:
        """Whether an answer to GET with another ETag may still be of the pinned version. Raises
        ObjectChanged if HEAD says that it is not."""
        self.confirm(pin)
        return bool(head.mtime_ns) and is_same_time(head.mtime_ns, pin.mtime_ns)

    def _skip(self, pin: Pin, answer: Answer, offset: int) -> None:
        """Skip the bytes before the range in an answer that is the whole object."""
        if offset > _SKIP_BYTES_MAX:
            raise StoreError(
                f"{self._tree.what(pin.path)}: the server cannot send a part of a file; copy the "
                "checkpoint to a store that does"
            )
        while offset:
            data = answer.read(min(offset, _PIECE_BYTES))
            if not data:
                raise StoreUnavailable(f"{self._tree.what(pin.path)}: the answer is cut; try again")
            offset -= len(data)

    def _unusable(self, pin: Pin, fault: str) -> ObjectChanged | StoreError:
        """The error for an answer to a range with a `fault`: the object has changed, or the server
        is wrong."""
        try:
            self.confirm(pin)
        except ObjectChanged as error:
            return error
        return StoreError(f"{self._tree.what(pin.path)}: {fault}; check the server")

    def get(self, path: str) -> bytes | None:
        what = self._tree.what(path)
        try:
            url = self._tree.url_of(path)
            with self._client.request("get", "GET", url, what) as (head, answer):
                if head.is_redirected and head.is_html:
                    raise self._tree.login(what, head)
                return whole_body(answer, _OBJECT_BYTES_MAX, what)
        except Missing:
            return None

    def put(self, path: str, data: bytes) -> None:
        """Upload by PUT, as WebDAV has it."""
        what = self._tree.what(path)
        expected = frozenset([200, 201, 204, 405, 501])
        try:
            with self._client.request(
                "put", "PUT", self._tree.url_of(path), what, body=data, expected=expected
            ) as (head, _):
                status = head.status
        except Missing:
            raise not_found(self.name) from None
        if status in (405, 501):
            raise AccessDenied(
                f"{self.name}: the server refuses PUT; change the file with another program"
            )

    def find(self, path: str) -> ListedFile | None:
        head = self._tree.head(path)
        if head is None or head.size is None:
            return None
        return ListedFile(path, head.size, head.mtime_ns, head.etag)

    def close(self) -> None:
        self._client.close()


def _difference(pin: Pin, head: Head) -> str:
    """The difference of an answer's version from the pinned one; "" if it may be the same."""
    is_of_time = is_same_time(head.mtime_ns, pin.mtime_ns)
    if pin.etag and head.etag:
        if head.etag != pin.etag:
            return f"ETag {printable(pin.etag)} became {printable(head.etag)}"
        return "" if is_of_time or not head.is_weak else "it was written again"
    if pin.etag and not head.mtime_ns:
        return f"ETag {printable(pin.etag)} became none"
    return "" if is_of_time or not head.mtime_ns or not pin.mtime_ns else "it was written again"


def _fault_of_part(pin: Pin, offset: int, head: Head) -> str:
    """The reason why an answer to a range lacks its bytes; "" if it has at least the first ones."""
    if head.encoding and head.size != pin.size:
        return f"the server sends it compressed ({printable(head.encoding)}), though asked not to"
    if head.status == 416:
        return "the server refuses a range within the file"
    if head.size is not None and head.size != pin.size:
        return f"an answer of {head.size} bytes to a range of {pin.size}"
    if head.status == 200:
        return "" if head.size is not None else "an answer to a range, without a length"
    if head.range is None:
        return "a part without Content-Range"
    if head.range.first != offset or head.range.last < offset:
        return f"bytes {head.range.first} to {head.range.last}, and not those from {offset} on"
    return ""
