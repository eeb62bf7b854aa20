"""What an HTTP(S) server holds below a URL: index pages, sizes and versions."""

import contextvars
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from urllib.parse import quote, urlsplit

from ckptfs._model.manifest import ListedFile, Listing, Skipped, fault_of_name, printable
from ckptfs._store.base import check_count, is_file, not_found
from ckptfs._store.deadline import left_s
from ckptfs._store.httpclient import Head, HttpClient, Missing, Response, shown
from ckptfs._store.httpindex import Entry, IndexPage
from ckptfs.errors import AccessDenied, LocationError, StoreError, StoreUnavailable

_THREADS = 16
_PAGE_BYTES_MAX = 64 << 20
"""Of an index page: 250,000 files of 250 bytes each."""
_PAUSES_S = 0.1, 0.4, 1.6
"""Before a request of a listing is made again whose error can pass."""
_NO_HEAD = frozenset([400, 403, 405, 500, 501])
"""What servers say to HEAD that answer GET."""

T = TypeVar("T")
U = TypeVar("U")


class HttpTree:
    """The directory at `url`. `name` is for messages. Raises LocationError: it cannot be one."""

    def __init__(self, client: HttpClient, url: str, name: str) -> None:
        self._client = client
        self._url = encoded_url(url)
        self.name = name

    def url_of(self, path: str) -> str:
        """The URL of a path below the directory, without a slash at its end."""
        return f"{self._url}/{quote(path)}" if path else self._url

    def what(self, path: str) -> str:
        """Names a path below the directory in messages."""
        return f"{printable(path)} in {self.name}" if path else self.name

    def login(self, what: str, head: Head) -> AccessDenied:
        """The error for a page for people in the place of a file or an index page."""
        led = f" at {shown(head.url)}" if head.is_redirected else ""
        return AccessDenied(
            f"{what}: the server shows a page for people{led}, perhaps a login; give an fsspec "
            "HTTPFileSystem with the credentials in client_kwargs"
        )

    def entries(self, directory: str) -> list[Entry] | None:
        """What the index page of a directory links to; None where there is none, below the root."""
        what = self.what(directory)
        try:
            page, head = self._page(f"{self.url_of(directory)}/", directory)
        except Missing:
            if directory:
                return None
            page, head = self._page_without_slash()
        if page.has_password_field or (head.is_redirected and not page.is_index):
            raise self.login(what, head)
        entries = page.entries()
        if not entries and not page.is_index:
            raise StoreError(
                f"{what}: the page lists no files, and does not look like an index page; switch "
                "index pages on at the server (autoindex)"
            )
        return entries

    def _page_without_slash(self) -> tuple[IndexPage, Head]:
        """The root's page at servers that do not end directories in a slash."""
        try:
            return self._page(self._url, "")
        except Missing:
            raise not_found(self.name) from None

    def _page(self, url: str, directory: str) -> tuple[IndexPage, Head]:
        what = self.what(directory)
        with self._client.request("list", "GET", url, what) as response:
            head = response.head
            if not head.is_html:
                if not directory:
                    raise is_file(self.name)
                raise StoreError(f"{what} is not an index page but {head.media_type}; check it")
            text = read_all(response, _PAGE_BYTES_MAX, what).decode("utf-8", "surrogateescape")
            page = IndexPage(head.url)
            page.feed(text)
            page.close()
            # A proxy or a file behind the server may be cut, too: then the answer itself is whole.
            if not page.has_end and (page.has_begun or not response.has_end):
                raise StoreUnavailable(f"{what}: the index page is cut; try again")
        return page, head

    def head(self, path: str) -> Head:
        """What the server says of a file now. Raises Missing."""
        what, url = self.what(path), self.url_of(path)
        expected = frozenset([200]) | _NO_HEAD
        with self._client.request("head", "HEAD", url, what, expected=expected) as response:
            head = response.head
        # Programs that do not care for HEAD answer it with no length, or with that of no body.
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

    def _head_of_get(self, path: str) -> Head:
        with self._client.request(
            "head",
            "GET",
            self.url_of(path),
            self.what(path),
            headers={"Range": "bytes=0-0"},
            expected=frozenset([200, 206, 416]),
        ) as response:
            return response.head

    def head_or_none(self, path: str) -> Head | None:
        """As `head`; None where the server has no such file."""
        try:
            return self.head(path)
        except Missing:
            return None


class _Walk:
    """One listing."""

    def __init__(self, tree: HttpTree, files_max: int) -> None:
        self._tree = tree
        self._files_max = files_max
        self._listing = Listing([], [], [])
        self._files: list[str] = []

    def run(self, pool: ThreadPoolExecutor) -> Listing:
        """Raises what `Store.list` raises."""
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
        heads = _each(pool, self._tree.head_or_none, self._files)
        for path, head in zip(self._files, heads, strict=True):
            if head is None:
                self._skip(path, "the link leads nowhere")
            elif head.size is None:
                self._skip(path, "the server does not give its size")
            else:
                file = ListedFile(path, head.size, head.mtime_ns, head.etag)
                self._listing.files.append(file)
        return self._listing

    def _sort_out(self, directory: str, entries: Iterable[Entry], below: list[str]) -> None:
        """Take in what an index page links to; directories go to `below`."""
        for name, is_directory in entries:
            path = f"{directory}/{name}" if directory else name
            if fault := "the name holds a slash" if "/" in name else fault_of_name(path):
                self._skip(path, fault)
            else:
                (below if is_directory else self._files).append(path)
        found = len(self._files) + len(self._listing.directories) + len(self._listing.skipped)
        check_count(self._tree.name, found + len(below), self._files_max)

    def _skip(self, path: str, reason: str) -> None:
        raw = path.encode("utf-8", "surrogateescape")
        name = printable(raw.decode("utf-8", "backslashreplace"))
        self._listing.skipped.append(Skipped(name, reason))


def listed(tree: HttpTree, files_max: int) -> Listing:
    """What `Store.list` returns and raises."""
    with ThreadPoolExecutor(_THREADS, "ckptfs-http") as pool:
        return _Walk(tree, files_max).run(pool)


def encoded_url(url: str) -> str:
    """A URL as requests have it: what a person typed is percent-encoded, and what is already so
    stays. Raises LocationError."""
    shown_url = printable(url)
    if "#" in url or "?" in url:
        raise LocationError(
            f"{shown_url}: a URL with '#' or '?' names no directory; write %23 or %3F where that "
            "is part of a name"
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


def read_all(response: Response, bytes_max: int, what: str) -> bytes:
    """The whole body. Raises StoreError where it is larger, and what urllib3 raises."""
    parts: list[bytes] = []
    length = 0
    while data := response.some(bytes_max):
        parts.append(data)
        length += len(data)
        if length > bytes_max:
            raise StoreError(f"{what}: an answer of more than {bytes_max} bytes; check the server")
    return b"".join(parts)


def _persist(request: Callable[[T], U], value: T) -> U:
    """Make a request of a listing again where its error can pass: one cut answer of many must not
    end all."""
    for pause_s in _PAUSES_S:
        try:
            return request(value)
        except StoreUnavailable as error:
            wait_s = max(pause_s, error.retry_after_s)
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
