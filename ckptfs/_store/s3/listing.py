"""Listings of S3 servers: the next page to ask for, and the contents of pages.

Servers differ in how they say that more pages follow, and how to ask for them. **Any sign of more
means more**, and `Course` tries three ways to continue, until one brings new names:

1. the continuation token of ListObjectsV2;
2. `start-after` (ListObjectsV2) and `marker` (ListObjects) with the last name, in one request,
   because a server that knows only ListObjects ignores parameters that it does not know;
3. ListObjects alone.

A page that says nothing about more may be cut, so `Course` tries the ways 2 and 3 after it as well.
If they bring nothing new, it was the last page.

Only new names count as progress, whatever a page says of itself. So every listing ends, and a
listing that promises more and never brings it is an error.

The module does not trust the server. A page that contradicts itself or the request is an error,
because a listing that lacks files must never pass for the whole one.
"""

import re
from collections.abc import Callable
from typing import Literal, NamedTuple
from urllib.parse import unquote_plus, unquote_to_bytes
from xml.etree import ElementTree

from ckptfs._model.manifest import ListedFile, Listing, Skipped, printable
from ckptfs._store.base import check_count
from ckptfs._store.versions import etag_in, number_in, time_ns_in
from ckptfs.errors import StoreError

_TAGS_MAX = 250_000
"""The most tags of a page: 1,000 objects have some 20 each, and blobs of Azure some 40 and metadata
of 8 KiB at most. A parsed tag takes 100 times its bytes."""
_PAGE_NAMES = 1000
"""The size of a full page that does not name its limit: ListObjects' default, which is its most."""
_EMPTY_PAGES_MAX = 1000
"""The most pages without new names in a row. Servers send such pages after deleted objects."""
_TRUE, _FALSE = frozenset(["true", "1", "yes"]), frozenset(["false", "0", "no"])
_ARCHIVED = frozenset(["GLACIER", "DEEP_ARCHIVE"])
"""The storage classes whose objects a user has to restore before a read (Amazon S3 user guide,
"Understanding S3 Glacier storage classes")."""
_NOT_ENCODED = re.compile(r"[^\x21-\x7e]|%(?![0-9A-Fa-f]{2})")
"""The characters that an encoded name cannot have."""

Ask = Callable[[dict[str, str], dict[str, str]], bytes]
"""A function that returns the body of a page for a query and headers."""


class Item(NamedTuple):
    """An object of a page. `archived` says why it cannot be read now, or is ""."""

    key: str
    size: int
    mtime_ns: int
    etag: str
    archived: str


class Page(NamedTuple):
    """A page of a listing.

    Attributes:
        items: The objects.
        prefixes: The directories that the server did not list.
        more: Whether the page says that more pages follow; "unsaid" if it says neither.
        token: The continuation token; "" without one.
        marker: The name after which the next page begins; "" if the page does not say it.
        is_full: Whether it has as many names as a page can have, or fewer than it says.
    """

    items: list[Item]
    prefixes: list[str]
    more: Literal["yes", "no", "unsaid"]
    token: str
    marker: str
    is_full: bool

    @property
    def last(self) -> str:
        """The last name of the page; "" without names."""
        return max([item.key for item in self.items[-1:]] + self.prefixes[-1:], default="")


class Course:
    """The choice of the next page for one prefix. `name` is the checkpoint's URI, for messages."""

    def __init__(self, prefix: str, name: str) -> None:
        self._name = name
        self._prefix = prefix
        self._ways = ["token", "name", "marker"]  # the first one is in use
        self._tokens: set[str] = set()
        self._last = ""
        self._is_sure = True  # whether the last page with new names has a sign of more
        self._empty = 0

    def first(self) -> dict[str, str]:
        """The query for the first page."""
        return {"list-type": "2", "encoding-type": "url", "prefix": self._prefix}

    def after(self, page: Page, is_new: bool) -> dict[str, str] | None:
        """The query for the page after `page`; None after the last one. `is_new` says whether
        `page` had new names. Raises StoreError for a listing that promises more and brings none."""
        has_names = bool(page.items or page.prefixes)
        has_token = bool(page.token) and page.token not in self._tokens
        self._tokens.add(page.token)
        self._empty = 0 if has_names else self._empty + 1
        if is_new:
            self._last = page.last
            self._is_sure = page.more != "unsaid" or self._has_hint(page)
        if not self._has_more(page, is_new, has_token):
            return None
        is_by_token = self._way == "token" and has_token and self._empty <= _EMPTY_PAGES_MAX
        is_stuck = not is_new and (has_names or not is_by_token)
        if is_stuck and not self._has_another_way():
            return None
        if self._way == "token" and not page.token and not self._has_another_way():
            return None
        return self._next(page)

    @property
    def _way(self) -> str:
        return self._ways[0]

    def _has_another_way(self) -> bool:
        """Whether another way is left. Raises StoreError if none is left, and more must follow."""
        self._ways.pop(0)
        self._empty = 0
        if self._ways and self._last:
            return True
        if not self._is_sure:
            return False
        raise StoreError(
            f"{self._name}: the store's listing is incomplete: it says that more follows after "
            f"'{printable(self._last)}', and sends no more; check the store"
        )

    @staticmethod
    def _has_hint(page: Page) -> bool:
        return bool(page.token) or bool(page.marker) or page.is_full

    def _has_more(self, page: Page, is_new: bool, has_token: bool) -> bool:
        if page.more == "yes":
            return True
        hints = self._has_hint(page)
        if page.more == "no":  # a token at the last page is worth one more request
            return hints and is_new
        if page.items or page.prefixes:  # a page may be cut without any sign
            return hints or is_new or not self._is_sure
        return self._way == "token" and has_token  # the other ways ask for the names after one

    def _next(self, page: Page) -> dict[str, str]:
        if self._way == "token":
            return {**self.first(), "continuation-token": page.token}
        if self._way == "name":
            return {**self.first(), "start-after": self._last, "marker": self._last}
        marker = page.marker or self._last
        return {"encoding-type": "url", "prefix": self._prefix, "marker": marker}


class Collector:
    """The pages of a listing of `prefix` so far. `name` is the checkpoint's URI, for messages."""

    def __init__(self, prefix: str, name: str) -> None:
        self.listing = Listing([], [], [])
        self.exists = False
        self._prefix = prefix
        self._name = name
        self._highest = ""
        self._known: dict[str, int] | None = None  # positions; made for the first name out of order
        self._others: set[str] = set()  # names that are not files

    def take_in(self, page: Page, within: str) -> bool:
        """Add a page of the listing of `within`. Returns whether it has new names. Raises
        StoreError if the page contradicts itself or the request."""
        is_new = False
        of_page: dict[str, Item] = {}
        for item in page.items:
            if not item.key.startswith(within):
                raise StoreError(
                    f"{self._name}: the store's listing has '{printable(item.key)}', which is not "
                    f"below '{printable(within)}' as was asked for; check the endpoint"
                )
            if of_page.setdefault(item.key, item) != item:
                raise StoreError(
                    f"{self._name}: the store's listing has '{printable(item.key)}' twice, as two "
                    "different objects; check the store"
                )
        for item in of_page.values():
            is_new |= self._take_in(item)
        self.exists |= bool(page.items or page.prefixes)
        return is_new

    def _take_in(self, item: Item) -> bool:
        if item.key > self._highest:
            self._highest = item.key
            self._add(item)
            return True
        if self._known is None:
            files = self.listing.files
            self._known = {file.path: position for position, file in enumerate(files)}
        if item.key in self._others:
            return False
        position = self._known.get(item.key[len(self._prefix) :])
        if position is None:
            self._add(item)
            return True
        if not self._why_no_file(item, item.key[len(self._prefix) :]):
            self.listing.files[position] = self._file(item)  # the later page is the newer one
        return False

    def _add(self, item: Item) -> None:
        path = item.key[len(self._prefix) :]
        if not (reason := self._why_no_file(item, path)):
            if self._known is not None:
                self._known[path] = len(self.listing.files)
            self.listing.files.append(self._file(item))
            return
        self._others.add(item.key)
        if path.endswith("/"):
            self.listing.directories.append(path[:-1])
            if item.size <= 0:
                return
        if path:  # else it is the marker of this very directory
            lacking = bool(item.archived)
            self.listing.skipped.append(Skipped(printable(path), reason, lacking))

    def _file(self, item: Item) -> ListedFile:
        path = item.key[len(self._prefix) :]
        return ListedFile(path, item.size, item.mtime_ns, item.etag)

    @staticmethod
    def _why_no_file(item: Item, path: str) -> str:
        if not path or path.endswith("/"):
            return "it is a directory with content"
        if item.size < 0:
            return "the store does not say its size"
        return item.archived


def list_all(ask: Ask, prefix: str, name: str, files_max: int) -> Collector:
    """All pages of the listing of `prefix`, which is "" or ends with a slash. Raises StoreError,
    LimitExceeded, and the errors of `ask`."""
    found = Collector(prefix, name)
    left, begun = [prefix], {prefix}
    headers: dict[str, str] = {}
    while left:
        within = left.pop()
        course = Course(within, name)
        query: dict[str, str] | None = course.first()
        while query is not None:
            page = parse_page(ask(query, headers), within, name)
            if not headers and any(item.archived for item in page.items):
                # Servers name restored objects only on request, so ask again if some are archived.
                headers = {"x-amz-optional-object-attributes": "RestoreStatus"}
                continue
            is_new = found.take_in(page, within)
            new = [inner for inner in page.prefixes if inner not in begun]
            _check_inner(new, within, name)
            begun.update(new)
            left += new
            check_count(name, found.listing.count + len(begun) - 1, files_max)
            query = course.after(page, is_new or bool(new))
    return found


def _check_inner(prefixes: list[str], within: str, name: str) -> None:
    for inner in prefixes:
        if not inner.startswith(within) or inner == within:
            raise StoreError(
                f"{name}: the store's listing has the directory '{printable(inner)}', which is not "
                f"below '{printable(within)}' as was asked for; check the endpoint"
            )


# -- parsing


def parse_page(text: bytes, prefix: str, name: str) -> Page:
    """The page in an answer to a request for names with `prefix`. Raises StoreError."""
    root = parsed(text, name, "ListBucketResult")
    about = _fields(root)
    contents = [(child, _fields(child)) for child in root if _tag(child) == "Contents"]
    inner = [_fields(child).get("Prefix", "") for child in root if _tag(child) == "CommonPrefixes"]
    contents = [
        (child, fields) for child, fields in contents if any(map(str.strip, fields.values()))
    ]
    inner = [prefix_of for prefix_of in inner if prefix_of]
    if any(not fields.get("Key") for _, fields in contents):
        raise StoreError(f"{name}: the store's listing has an object without a name; check it")
    keys = [fields["Key"] for _, fields in contents] + inner
    decode = _decoder(about, prefix, keys)
    items = [_item(child, fields, decode(fields["Key"])) for child, fields in contents]
    flag = about.get("IsTruncated", "").strip().lower()
    most = number_in(about.get("MaxKeys", ""))
    names_max = most if most > 0 else _PAGE_NAMES
    count = number_in(about.get("KeyCount", ""))
    return Page(
        items=items,
        prefixes=[decode(prefix_of) for prefix_of in inner],
        more="yes" if flag in _TRUE else "no" if flag in _FALSE else "unsaid",
        token=about.get("NextContinuationToken", "").strip(),
        marker=decode(about.get("NextMarker", "")),
        is_full=count > len(keys) or (flag not in _FALSE and len(keys) >= names_max),
    )


def parsed(text: bytes, name: str, tag: str) -> ElementTree.Element:
    """The root of a page, whose name has to be `tag`. Raises StoreError."""
    # A document type could define entities that grow in memory; UTF-16 would hide it.
    if b"<!DOCTYPE" in text or b"\0" in text or text.count(b"<") > _TAGS_MAX:
        raise StoreError(
            f"{name}: the store's listing is not valid XML, or too much of it; check the endpoint"
        )
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise StoreError(
            f"{name}: the store's listing is not valid XML ({error}); if an object's name has a "
            "control character, rename or remove that object"
        ) from None
    # A web page can be XML, too, but it has no objects.
    if _tag(root) != tag:
        raise StoreError(
            f"{name}: the store answered with <{printable(_tag(root))}> instead of a listing; "
            "check the endpoint"
        )
    return root


def _decoder(about: dict[str, str], prefix: str, keys: list[str]) -> Callable[[str], str]:
    """The function that decodes the names of a page. Some servers encode names without saying so,
    or say so without encoding. A server that writes %20 for a space means each plus sign as it
    is."""
    said = about.get("EncodingType", "").strip().lower() == "url"
    shown = about.get("Prefix", "")
    is_encoded = shown != prefix and unquote_plus(shown, errors="surrogateescape") == prefix
    if not (said or is_encoded) or any(map(_NOT_ENCODED.search, keys)):
        return str
    if any("%20" in key for key in keys):
        return lambda key: unquote_to_bytes(key).decode(errors="surrogateescape")
    return lambda key: unquote_plus(key, errors="surrogateescape")


def _item(element: ElementTree.Element, fields: dict[str, str], key: str) -> Item:
    return Item(
        key,
        number_in(fields.get("Size", "")),
        time_ns_in(fields.get("LastModified", "")),
        etag_in(fields.get("ETag", "")),
        _why_archived(element, fields),
    )


def _why_archived(element: ElementTree.Element, fields: dict[str, str]) -> str:
    kind = fields.get("StorageClass", "").strip()
    if kind not in _ARCHIVED:
        return ""
    status: dict[str, str] = {}
    for child in element:
        if _tag(child) == "RestoreStatus":
            status = _fields(child)
    if status.get("IsRestoreInProgress", "").strip().lower() == "true":
        return f"it is archived ({kind}) and being restored; attach again after that"
    if status.get("RestoreExpiryDate", "").strip():
        return ""
    return f"it is archived ({kind}); restore it, and then attach again"


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]  # without the namespace


def _fields(element: ElementTree.Element) -> dict[str, str]:
    return {_tag(child): child.text or "" for child in element}
