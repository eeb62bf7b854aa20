"""Listings of Azure Blob Storage ("List Blobs" in the Storage Services REST reference).

The module does not trust the server. It uses only pages that are valid and complete.
"""

import builtins
from urllib.parse import unquote
from xml.etree import ElementTree

from ckptfs._model.manifest import ListedFile, Listing, Skipped, printable
from ckptfs._store.base import check_count
from ckptfs._store.s3.listing import Ask, parsed
from ckptfs._store.versions import etag_in, number_in, time_ns_in
from ckptfs.errors import CheckpointNotFound, StoreError

_PAGE_BLOBS = 1000
"""The blobs of a page, as on S3. Azure would send five times as many, which are parsed at once."""
_EMPTY_PAGES_MAX = 1000
"""The most pages without blobs in a row. Azure sends such pages after many deletions."""


class Blobs:
    """The blobs with a `prefix`. `name` is the checkpoint's URI, for messages."""

    def __init__(self, ask: Ask, prefix: str, name: str) -> None:
        self._ask = ask
        self._prefix = prefix
        self._name = name

    def list(self, files_max: int) -> Listing | None:
        """All blobs; None without blobs. Raises as Store.list."""
        listing = Listing([], [], [])
        exists, marker, empty = False, "", 0
        seen: set[str] = set()  # markers, and the first name of each page
        while True:
            blobs, marker = self._page(marker)
            for blob in blobs:
                self._take_in(blob, listing)
            exists |= bool(blobs)
            check_count(self._name, listing.count, files_max)
            if not marker:
                return listing if exists else None
            signs = {f"marker {marker}", *(f"name {_name(blob)}" for blob in blobs[:1])}
            empty = 0 if blobs else empty + 1
            if seen & signs or empty > _EMPTY_PAGES_MAX:
                raise StoreError(
                    f"{self._name}: the store repeats a page of the listing; check the store"
                )
            seen |= signs

    def find(self) -> ListedFile | None:
        """The entry of the blob with the name `prefix`, without its path; None if it does not
        exist."""
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
        try:
            page = parsed(self._ask(query, {}), self._name, "EnumerationResults")
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
            listing.skipped.append(Skipped(printable(path), "the store does not say its size"))
        else:
            listing.files.append(file)


def _about(blob: ElementTree.Element) -> dict[str, str]:
    return {child.tag: child.text or "" for child in blob.iterfind("Properties/*")}


def _file(blob: ElementTree.Element, path: str) -> ListedFile | None:
    """The blob as a file; None without a size."""
    about = _about(blob)
    size = number_in(about.get("Content-Length", ""))
    if size < 0:
        return None
    mtime_ns = time_ns_in(about.get("Last-Modified", ""))
    return ListedFile(path, size, mtime_ns, etag_in(about.get("Etag", "")))


def _name(blob: ElementTree.Element) -> str:
    name = blob.find("Name")
    if name is None:
        return ""
    text = name.text or ""
    return unquote(text, errors="surrogateescape") if name.get("Encoded") == "true" else text


def _is_directory(blob: ElementTree.Element, about: dict[str, str]) -> bool:
    """Whether it stands for a directory: of a hierarchical namespace, or of a tool like Hadoop."""
    if about.get("ResourceType") == "directory":
        return True
    metadata = {child.tag.lower(): child.text for child in blob.iterfind("Metadata/*")}
    return metadata.get("hdi_isfolder") == "true"
