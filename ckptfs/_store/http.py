"""A Store over a directory of an HTTP(S) server that has index pages and knows ranges.

**Names** are decoded from the links of index pages, and encoded again for requests. **Sizes and
versions** come from one HEAD for each file, or from a GET of one byte where the server refuses HEAD
or does not give the size.

**Versions.** ETags are compared without regard to their weakness: Apache calls the ETag of an
untouched file weak in its first second. Where there is none, Last-Modified and size count. An
answer whose ETag is not the pinned one decides nothing alone, because gateways tag GET and HEAD
differently: HEAD is asked then. A server of files may change what it sends on the way, so no answer
counts as whole; the caller confirms after the read.

Last-Modified has whole seconds, and nginx's ETag is made of that and the size. An answer that was
sent within the second of its version is not used: that second has to be over first.

**Ranges.** The bytes of a 206 count if its Content-Range names the offset that was asked for and
the pinned size. A 200 is the whole object: what lies before the range is skipped up to
`_SKIP_BYTES_MAX`, and further on the read fails with an error that says so.
"""

import time

import msgspec

from ckptfs._model.manifest import ListedFile, Listing, printable
from ckptfs._store.base import Pin, changed, not_found
from ckptfs._store.httpclient import Head, HttpClient, HttpOptions, Missing, Response
from ckptfs._store.httptree import HttpTree, listed, read_all
from ckptfs._store.settling import is_same_time
from ckptfs.errors import AccessDenied, ObjectChanged, StoreError, StoreUnavailable

_OBJECT_BYTES_MAX = 16 << 20
"""Of an object that is read as a whole, as on S3."""
_SKIP_BYTES_MAX = 64 << 20
"""Of a server that does not know ranges: to read a file in parts costs half its square."""
_YOUNG_TRIES = 3
_PARTS_MAX = 64
"""Answers to one range: a server may send less than it was asked for."""


class HttpStore:
    """The directory at `url`. `name` is for messages.

    Raises:
        LocationError: The URL cannot be that of a directory.
        OSError, ValueError: The certificates or the proxy cannot be used.
    """

    gives_up = False

    def __init__(self, url: str, name: str, options: HttpOptions, timeout_s: float) -> None:
        self.name = name
        self._client = HttpClient(options, timeout_s)
        self._tree = HttpTree(self._client, url, name)

    def list(self, files_max: int) -> Listing:
        """See Store.list."""
        return listed(self._tree, files_max)

    def confirm(self, pin: Pin) -> Pin:
        """See Store.confirm."""
        head = self._tree.head_or_none(pin.path)
        if head is None:
            raise changed(self.name, pin, "it was deleted")
        if head.size is not None and head.size != pin.size:
            raise changed(self.name, pin, f"{pin.size} bytes became {head.size}")
        if how := _difference(pin, head):
            raise changed(self.name, pin, how)
        return msgspec.structs.replace(pin, etag=head.etag or pin.etag)

    # -- reading and writing

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        """See Store.read_into."""
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
                raise changed(self.name, pin, "it is written again all the time")
            done += count
        raise self._unusable(pin, "the server sends ranges in too small parts")

    def _part(self, pin: Pin, offset: int, buffer: memoryview) -> int:
        """Read the first bytes of a range; returns how many. 0: the answer is too young to tell
        versions apart."""
        try:
            with self._client.request(
                "read",
                "GET",
                self._tree.url_of(pin.path),
                self._tree.what(pin.path),
                headers={"Range": f"bytes={offset}-{offset + len(buffer) - 1}"},
                expected=frozenset([200, 206, 416]),
            ) as response:
                head = response.head
                if fault := _fault_of_part(pin, offset, head):
                    raise self._unusable(pin, fault)
                if _difference(pin, head) and not self._is_tagged_otherwise(pin, head):
                    raise changed(self.name, pin, _difference(pin, head))
                if head.is_young:
                    return 0
                if head.range is None:
                    self._skip(pin, response, offset)
                else:
                    buffer = buffer[: head.range.last + 1 - offset]
                if (count := response.fill(buffer)) < len(buffer):
                    raise StoreUnavailable(
                        f"{self._tree.what(pin.path)}: the answer is cut; try again"
                    )
                return count
        except Missing:
            raise changed(self.name, pin, "it was deleted") from None

    def _is_tagged_otherwise(self, pin: Pin, head: Head) -> bool:
        """Whether an answer to GET that has another ETag may yet be of the pinned version. Raises
        ObjectChanged where HEAD says that it is not."""
        self.confirm(pin)
        return bool(head.mtime_ns) and is_same_time(head.mtime_ns, pin.mtime_ns)

    def _skip(self, pin: Pin, response: Response, offset: int) -> None:
        """Pass over what lies before the range in an answer that is the whole object."""
        if offset > _SKIP_BYTES_MAX:
            raise StoreError(
                f"{self._tree.what(pin.path)}: the server does not know ranges; copy the "
                "checkpoint to a store that does"
            )
        while offset:
            data = response.some(offset)
            if not data:
                raise StoreUnavailable(f"{self._tree.what(pin.path)}: the answer is cut; try again")
            offset -= len(data)

    def _unusable(self, pin: Pin, fault: str) -> ObjectChanged | StoreError:
        """Why an answer to a range has the `fault`: the object has changed, or the server errs."""
        try:
            self.confirm(pin)
        except ObjectChanged as error:
            return error
        return StoreError(f"{self._tree.what(pin.path)}: {fault}; check the server")

    def get(self, path: str) -> bytes | None:
        """See Store.get."""
        what = self._tree.what(path)
        try:
            with self._client.request("get", "GET", self._tree.url_of(path), what) as response:
                if response.head.is_redirected and response.head.is_html:
                    raise self._tree.login(what, response.head)
                return read_all(response, _OBJECT_BYTES_MAX, what)
        except Missing:
            return None

    def put(self, path: str, data: bytes) -> None:
        """See Store.put. By PUT, as WebDAV has it."""
        what = self._tree.what(path)
        expected = frozenset([200, 201, 204, 405, 501])
        try:
            with self._client.request(
                "put", "PUT", self._tree.url_of(path), what, body=data, expected=expected
            ) as response:
                status = response.head.status
        except Missing:
            raise not_found(self.name) from None
        if status in (405, 501):
            raise AccessDenied(f"{self.name} cannot be written to: the server refuses PUT")

    def find(self, path: str) -> ListedFile | None:
        """See Store.find."""
        head = self._tree.head_or_none(path)
        if head is None or head.size is None:
            return None
        return ListedFile(path, head.size, head.mtime_ns, head.etag)

    def close(self) -> None:
        """See Store.close."""
        self._client.close()


def _difference(pin: Pin, head: Head) -> str:
    """How the version of an answer differs from the pinned one; "": it may be that."""
    is_of_time = is_same_time(head.mtime_ns, pin.mtime_ns)
    if pin.etag and head.etag:
        if head.etag != pin.etag:
            return f"ETag {printable(pin.etag)} became {printable(head.etag)}"
        return "" if is_of_time or not head.is_weak else "it was written again"
    if pin.etag and not head.mtime_ns:
        return f"ETag {printable(pin.etag)} became none"
    return "" if is_of_time or not head.mtime_ns or not pin.mtime_ns else "it was written again"


def _fault_of_part(pin: Pin, offset: int, head: Head) -> str:
    """Why an answer to a range has not its bytes; "": it has, or at least its first."""
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
