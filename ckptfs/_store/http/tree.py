"""The files below a URL of an HTTP(S) server: index pages, sizes and versions."""

import contextvars
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar
from urllib.parse import quote, urlsplit

from ckptfs._model.backoff import Backoff
from ckptfs._model.manifest import ListedFile, Listing, Skipped, fault_of_name, printable
from ckptfs._store.base import check_count, is_file, not_found
from ckptfs._store.http.client import Head, HttpClient, Missing, shown
from ckptfs._store.http.index import Entry, IndexPage
from ckptfs._store.request_context import left_s
from ckptfs._store.transport.answers import Answer, read_all
from ckptfs.errors import AccessDenied, LocationError, StoreError, StoreUnavailable

_THREADS = 16
_PAGE_BYTES_MAX = 64 << 20
"""The longest index page: 250,000 files of 250 bytes each."""
_TRIES = 4
"""The most tries of a request of a listing."""
_BACKOFF = Backoff(0.1, 1.6, factor=4.0)
"""The pauses between them, which have no jitter."""
_NO_HEAD = frozenset([400, 403, 405, 500, 501])
"""The statuses for HEAD of servers that answer only GET."""

T = TypeVar("T")
U = TypeVar("U")


class HttpTree:
    """The directory at `url`. `name` is for messages. Raises LocationError for another URL."""

    def __init__(self, client: HttpClient, url: str, name: str) -> None:
        self._client = client
        self._url = encoded_url(url)
        self.name = name

    def url_of(self, path: str) -> str:
        """The URL of a path below the directory, without a slash at its end."""
        return f"{self._url}/{quote(path)}" if path else self._url

    def what(self, path: str) -> str:
        """The name of a path below the directory, for messages."""
        return f"{printable(path)} in {self.name}" if path else self.name

    def login(self, what: str, head: Head) -> AccessDenied:
        """The error for a web page instead of a file or an index page."""
        led = f" at {shown(head.url)}" if head.is_redirected else ""
        return AccessDenied(
            f"{what}: the server answered with a web page{led}, perhaps a login; give an fsspec "
            "HTTPFileSystem with the credentials in client_kwargs"
        )

    def entries(self, directory: str) -> list[Entry] | None:
        """The links of the index page of a directory; None if a directory below the root has
        none."""
        what = self.what(directory)
        try:
            page, head = self._page(f"{self.url_of(directory)}/", directory)
        except Missing:
            if directory:
                return None
            try:  # the root of a server that does not end directories in a slash
                page, head = self._page(self._url, "")
            except Missing:
                raise not_found(self.name) from None
        if page.has_password_field or (head.is_redirected and not page.is_index):
            raise self.login(what, head)
        entries = page.entries()
        if not entries and not page.is_index:
            raise StoreError(
                f"{what}: the page lists no files, and is not an index page; switch index pages on "
                "at the server (autoindex)"
            )
        return entries

    def _page(self, url: str, directory: str) -> tuple[IndexPage, Head]:
        what = self.what(directory)
        with self._client.request("list", "GET", url, what) as (head, answer):
            if not head.is_html:
                if not directory:
                    raise is_file(self.name)
                raise StoreError(f"{what} is not an index page but {head.media_type}; check it")
            text = whole_body(answer, _PAGE_BYTES_MAX, what).decode("utf-8", "surrogateescape")
            page = IndexPage(head.url)
            page.feed(text)
            page.close()
            # A proxy or the server's own file may be cut, although the answer itself is complete.
            if not page.has_end and (page.has_begun or not head.has_end):
                raise StoreUnavailable(f"{what}: the index page is cut; try again")
        return page, head

    def head(self, path: str) -> Head | None:
        """The server's current fields of a file; None if it does not exist."""
        what, url = self.what(path), self.url_of(path)
        expected = frozenset([200]) | _NO_HEAD
        with suppress(Missing):
            with self._client.request("head", "HEAD", url, what, expected=expected) as (head, _):
                pass
            # Programs without support for HEAD answer it without a length, or with that of no body.
            if head.status != 200 or not head.size:
                got = self._head_of_get(path)
                if got.status == 416:  # there is no first byte
                    head = head if head.status == 200 else got
                    head.size = 0
                else:
                    head = got
            if head.is_redirected and head.is_html and not path.endswith((".html", ".htm")):
                raise self.login(what, head)
            return head
        return None

    def _head_of_get(self, path: str) -> Head:
        with self._client.request(
            "head",
            "GET",
            self.url_of(path),
            self.what(path),
            headers={"range": "bytes=0-0"},
            expected=frozenset([200, 206, 416]),
        ) as (head, _):
            return head


class Walk:
    """One listing."""

    def __init__(self, tree: HttpTree, files_max: int) -> None:
        self._tree = tree
        self._files_max = files_max
        self._listing = Listing([], [], [])
        self._files: list[str] = []

    def listing(self) -> Listing:
        """Raises as `Store.list`."""
        with ThreadPoolExecutor(_THREADS, "ckptfs-http") as pool:
            self._list(pool)
        return self._listing

    def _list(self, pool: ThreadPoolExecutor) -> None:
        level = [""]
        while level:
            pages = _each(pool, self._tree.entries, level)
            below: list[str] = []
            for directory, entries in zip(level, pages, strict=True):
                if entries is None:
                    self._skip(directory, "the link leads nowhere")
                    continue
                if directory:
                    self._listing.directories.append(directory)
                self._sort_out(directory, entries, below)
            level = below
        heads = _each(pool, self._tree.head, self._files)
        for path, head in zip(self._files, heads, strict=True):
            if head is None:
                self._skip(path, "the link leads nowhere")
            elif head.size is None:
                self._skip(path, "the server does not give its size")
            else:
                file = ListedFile(path, head.size, head.mtime_ns, head.etag)
                self._listing.files.append(file)

    def _sort_out(self, directory: str, entries: Iterable[Entry], below: list[str]) -> None:
        """Add the links of an index page; directories go to `below`."""
        for name, is_directory in entries:
            path = f"{directory}/{name}" if directory else name
            if fault := "the name holds a slash" if "/" in name else fault_of_name(path):
                self._skip(path, fault)
            else:
                (below if is_directory else self._files).append(path)
        found = self._listing.count + len(self._files) + len(below)
        check_count(self._tree.name, found, self._files_max)

    def _skip(self, path: str, reason: str) -> None:
        raw = path.encode("utf-8", "surrogateescape")
        name = printable(raw.decode("utf-8", "backslashreplace"))
        self._listing.skipped.append(Skipped(name, reason))


def encoded_url(url: str) -> str:
    """A URL for requests: percent-encoded, with the encoding that it already has. Raises
    LocationError."""
    shown_url = printable(url)
    if "#" in url or "?" in url:
        raise LocationError(
            f"{shown_url}: the URL of a directory has no '#' or '?'; write %23 or %3F in names"
        )
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise LocationError(f"{shown_url}: {error}; check the URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise LocationError(f"{shown_url} is not the URL of a directory; write https://host/path")
    path = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", parts.path)
    path = quote(path, safe="/%:@!$&'()*+,;=~", errors="surrogateescape")
    return parts._replace(path=path.rstrip("/")).geturl()


def whole_body(answer: Answer, bytes_max: int, what: str) -> bytes:
    """The whole body. Raises StoreError if it is larger, and the errors of `read_all`."""
    data = read_all(answer, bytes_max + 1)
    if len(data) > bytes_max:
        raise StoreError(f"{what}: an answer of more than {bytes_max} bytes; check the server")
    return data


def _persist(request: Callable[[T], U], value: T) -> U:
    """Retry a request of a listing, because one cut answer of many must not end the listing."""
    for failures in range(1, _TRIES):
        try:
            return request(value)
        except StoreUnavailable as error:
            wait_s = max(_BACKOFF.longest_s(failures), error.retry_after_s)
            if wait_s >= left_s():
                raise
            time.sleep(wait_s)
    return request(value)


def _each(pool: ThreadPoolExecutor, request: Callable[[T], U], values: Iterable[T]) -> Iterable[U]:
    """The results, each from a thread that knows this thread's deadline. The first error ends the
    rest."""
    context = contextvars.copy_context()
    futures = [pool.submit(context.copy().run, _persist, request, value) for value in values]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
