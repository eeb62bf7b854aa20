"""Listings of Azure Blob Storage ("List Blobs" in the Storage Services REST reference).

The server is not trusted: a page is used only where it is one, and whole.
"""

import builtins
import re
from datetime import timezone
from email.utils import parsedate_to_datetime
from urllib.parse import unquote
from xml.etree import ElementTree

from ckptfs._model.manifest import ListedFile, Listing, Skipped, printable
from ckptfs._store.authorized import AuthorizedClient, repeat
from ckptfs._store.base import check_count
from ckptfs._store.deadline import left_s
from ckptfs._store.patience import PATIENCE_S_MAX
from ckptfs._store.s3client import read_all
from ckptfs.errors import CheckpointNotFound, StoreError

_PAGE_BLOBS = 1000
"""As many as S3 has in a page; Azure would send five times as many, all to be parsed at once."""
_PAGE_BYTES_MAX = 16 << 20
_PAGE_TAGS_MAX = 250_000
"""A blob has some 40 elements, and metadata of 8 KiB at most."""
_EMPTY_PAGES_MAX = 1000
"""Azure sends pages without blobs, e.g. where many were deleted."""
_PATIENCE_S_MIN = 0.2
_TAG = re.compile(r"[\x21\x23-\x7e]+")  # RFC 9110, 8.8.3


class Blobs:
    """What is below `prefix`. `name` is the checkpoint's URI, for messages."""

    def __init__(self, client: AuthorizedClient, prefix: str, name: str) -> None:
        self._client = client
        self._prefix = prefix
        self._name = name

    def list(self, files_max: int) -> Listing | None:
        """All blobs; None: there are none. Raises as Store.list."""
        listing = Listing([], [], [])
        exists, marker, empty = False, "", 0
        seen: set[str] = set()  # markers, and the first name of each page
        while True:
            blobs, marker = self._page(marker)
            for blob in blobs:
                self._take_in(blob, listing)
            exists |= bool(blobs)
            found = len(listing.files) + len(listing.directories) + len(listing.skipped)
            check_count(self._name, found, files_max)
            if not marker:
                return listing if exists else None
            signs = {f"marker {marker}", *(f"name {_name(blob)}" for blob in blobs[:1])}
            empty = 0 if blobs else empty + 1
            if seen & signs or empty > _EMPTY_PAGES_MAX:
                raise StoreError(f"{self._name}: the store's listing has no end; check the store")
            seen |= signs

    def find(self) -> ListedFile | None:
        """What the listing says of the one blob with the name `prefix`; None: it does not have it.
        The path is left out."""
        for blob in self._page("", blobs_max=1)[0]:
            if _name(blob) == self._prefix:
                return _file(blob, "")
        return None

    def _page(
        self, marker: str, blobs_max: int = _PAGE_BLOBS
    ) -> tuple[builtins.list[ElementTree.Element], str]:
        """The blobs of a page, and the marker of the next one."""
        query = {
            "restype": "container",
            "comp": "list",
            "include": "metadata",
            "maxresults": str(blobs_max),
            "prefix": self._prefix,
        }
        if marker:
            query["marker"] = marker
        # There is no other way to learn the names, so only the deadline ends the wait for a page.
        patience_s = min(max(left_s(), _PATIENCE_S_MIN), PATIENCE_S_MAX)

        def attempt() -> bytes:
            with self._client.request("GET", query=query, patience_s=patience_s) as response:
                return read_all(response, _PAGE_BYTES_MAX)

        try:
            page = self._parsed(repeat(attempt, self._name))
        except CheckpointNotFound:
            raise CheckpointNotFound(
                f"{self._name}: there is no such container; check its name"
            ) from None
        blobs = page.find("Blobs")
        following = page.find("NextMarker")
        if blobs is None or following is None:
            raise StoreError(
                f"{self._name}: a page of the store's listing is incomplete; check the endpoint"
            )
        return blobs.findall("Blob"), following.text or ""

    def _parsed(self, text: bytes) -> ElementTree.Element:
        # A document type could define entities that grow in memory; UTF-16 would hide it.
        if b"<!DOCTYPE" in text or b"\0" in text or text.count(b"<") > _PAGE_TAGS_MAX:
            raise StoreError(
                f"{self._name}: the store's listing is not valid XML, or too much of it; check the "
                "endpoint"
            )
        try:
            page = ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            raise StoreError(
                f"{self._name}: the store's listing is not valid XML ({error}); if a blob's name "
                "has a control character, rename or remove that blob"
            ) from None
        if page.tag != "EnumerationResults":
            raise StoreError(
                f"{self._name}: the store answered with <{printable(page.tag)}> instead of a "
                "listing; check the endpoint"
            )
        return page

    def _take_in(self, blob: ElementTree.Element, listing: Listing) -> None:
        name = _name(blob)
        if not name or not name.startswith(self._prefix):
            raise StoreError(
                f"{self._name}: the store listed {printable(name) or 'a blob without a name'}, "
                "which is not below the prefix that was asked for; check the endpoint"
            )
        path = name[len(self._prefix) :]
        if not path:
            return  # the marker of this very directory
        about = _about(blob)
        if _is_directory(blob, about):
            listing.directories.append(path.rstrip("/"))
        elif path.endswith("/"):
            listing.directories.append(path[:-1])
            if about.get("Content-Length") != "0":
                listing.skipped.append(Skipped(printable(path), "it is a directory with content"))
        elif about.get("AccessTier") == "Archive":
            reason = "it is archived; have it rehydrated and attach again"
            listing.skipped.append(Skipped(printable(path), reason))
        elif (file := _file(blob, path)) is None:
            listing.skipped.append(Skipped(printable(path), "the store gives no size of it"))
        else:
            listing.files.append(file)


def _about(blob: ElementTree.Element) -> dict[str, str]:
    return {child.tag: child.text or "" for child in blob.find("Properties") or ()}


def _file(blob: ElementTree.Element, path: str) -> ListedFile | None:
    """The blob as a file; None: its size is missing."""
    about = _about(blob)
    size = about.get("Content-Length", "")
    if not re.fullmatch("[0-9]{1,18}", size):
        return None
    mtime_ns = _mtime_ns(about.get("Last-Modified", ""))
    return ListedFile(path, int(size), mtime_ns, _etag(about.get("Etag", "")))


def _name(blob: ElementTree.Element) -> str:
    name = blob.find("Name")
    if name is None:
        return ""
    text = name.text or ""
    return unquote(text, errors="surrogateescape") if name.get("Encoded") == "true" else text


def _etag(text: str) -> str:
    """As HTTP has it, with quotes, which are not in listings; "": it is none."""
    tag = text.strip('"')
    return f'"{tag}"' if _TAG.fullmatch(tag) else ""


def _is_directory(blob: ElementTree.Element, about: dict[str, str]) -> bool:
    """Whether it stands for a directory: of a hierarchical namespace, or of a tool like Hadoop."""
    if about.get("ResourceType") == "directory":
        return True
    metadata = {child.tag.lower(): child.text for child in blob.find("Metadata") or ()}
    return metadata.get("hdi_isfolder") == "true"


def _mtime_ns(text: str) -> int:
    """0: there is none."""
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return 0
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return max(0, int(moment.timestamp())) * 10**9
