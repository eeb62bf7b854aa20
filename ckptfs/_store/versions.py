"""The fields of answers and listings: versions, times, ranges and pauses.

The module does not trust the server, so an invalid field counts as missing.
"""

import re
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPMessage
from typing import NamedTuple

_ETAG = re.compile(r'(?:[Ww]/)?"([\x21\x23-\x7e]+)"')  # RFC 9110, 8.8.3
_CONTENT_RANGE = re.compile(r"\s*bytes[ =]+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\s*", re.IGNORECASE)
_ISO = re.compile(
    r"\s*(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:[.,](\d{1,30}))?\s*([Zz]|[+-]\d\d:?\d\d)?\s*"
)
_RETRY_AFTER_S_MAX = 3600.0
_STORED_AS_SENT = frozenset(["", "identity", "aws-chunked"])
"""Values of Content-Encoding that leave the bytes as they are (the last: Amazon S3, "Signature
calculations: transferring payload in multiple chunks")."""


class Seen(NamedTuple):
    """The fields of an answer about an object.

    Attributes:
        size: The size in bytes; -1 if it is missing.
        mtime_ns: The modification time in nanoseconds since the epoch; 0 if it is missing.
        etag: The ETag with its quotes; "" if it is missing.
        date_s: The server's clock in seconds since the epoch; 0 if it is missing.
    """

    size: int
    mtime_ns: int
    etag: str
    date_s: float = 0.0


class ContentRange(NamedTuple):
    """The range of an answer, from `first` to `last`. `size` is that of the object, or -1."""

    first: int
    last: int
    size: int


def etag_in(text: str) -> str:
    """An ETag with its quotes, which some servers leave out of listings."""
    text = text.strip()
    weak, tag = (text[:2].upper(), text[2:]) if text[:2] in ("W/", "w/") else ("", text)
    quoted = tag if tag.endswith('"') else f'"{tag}"'
    return weak + quoted if _ETAG.fullmatch(quoted) else ""


def is_strong(etag: str) -> bool:
    """Whether equal ETags of that kind mean equal bytes (RFC 9110, 8.8.1)."""
    return bool(etag) and not etag.startswith("W/")


def is_same(one: str, other: str) -> bool:
    """The weak comparison of RFC 9110, 8.8.3.2, because a proxy may have weakened one ETag."""
    return bool(one) and one.removeprefix("W/") == other.removeprefix("W/")


def number_in(text: str) -> int:
    """The size in a text; -1 for another text."""
    return int(text) if re.fullmatch(r"\s*[0-9]{1,18}\s*", text) else -1


def time_ns_in(text: str) -> int:
    """A time of a listing (ISO 8601, of any precision) or a header (RFC 9110, 5.6.7) in nanoseconds
    since the epoch; 0 for another text. A time without a zone is UTC."""
    try:
        if found := _ISO.fullmatch(text):
            day, hours, fraction, zone = found.groups()
            moment = datetime.fromisoformat(f"{day}T{hours}{_offset(zone)}")
            more_ns = int((fraction or "0")[:9].ljust(9, "0"))
        else:
            moment, more_ns = parsedate_to_datetime(text), 0
            moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        return max(0, int(moment.timestamp()) * 10**9 + more_ns)
    except (ValueError, TypeError, OverflowError):  # TypeError: Python 3.10's for no date
        return 0


def retry_after_s(text: str) -> float:
    """The seconds of a Retry-After, which has seconds or a date (RFC 9110, 10.2.3); 0 for another
    text."""
    if re.fullmatch(r"\s*[0-9]{1,9}(\.[0-9]{1,9})?\s*", text):
        return min(float(text), _RETRY_AFTER_S_MAX)
    left_s = time_ns_in(text) / 1e9 - time.time()
    return min(max(left_s, 0.0), _RETRY_AFTER_S_MAX)


def _offset(zone: str | None) -> str:
    if not zone or zone in "Zz":
        return "+00:00"
    return zone if ":" in zone else f"{zone[:3]}:{zone[3:]}"


def is_same_second(one_ns: int, other_ns: int) -> bool:
    """Whether two times may be of one version. Listings have fractions of seconds, and headers do
    not."""
    return not one_ns or not other_ns or one_ns // 10**9 == other_ns // 10**9


def content_range_in(headers: HTTPMessage) -> ContentRange | None:
    """The range in the headers; None without a valid one."""
    found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    if found is None:
        return None
    first, last, size = found.groups()
    return ContentRange(int(first), int(last), number_in(size))


def seen_in(headers: HTTPMessage) -> Seen:
    """The version in the headers of an answer to HEAD, or to a GET of all or some bytes."""
    where = headers.get("content-range", "").rpartition("/")[2] or headers.get("content-length", "")
    return Seen(
        number_in(where),
        time_ns_in(headers.get("last-modified", "")),
        etag_in(headers.get("etag", "")),
        time_ns_in(headers.get("date", "")) / 1e9,
    )


def encoding_in(headers: HTTPMessage) -> str:
    """The compression of the bytes, for example "gzip"; "" if the answer names none."""
    encoding = headers.get("content-encoding", "").strip().lower()
    return "" if encoding in _STORED_AS_SENT else encoding


def is_web_page(headers: HTTPMessage, body: bytes = b"") -> bool:
    """Whether an answer is a web page instead of an object, for example of a portal that wants a
    login. It is HTML, and has no version, or begins like a web page."""
    is_html = headers.get("content-type", "").lower().startswith(("text/html", "application/xhtml"))
    begin = body[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith((b"<!doctype html", b"<html")):
        return True
    has_version = etag_in(headers.get("etag", "")) or headers.get("last-modified")
    return is_html and (begin.startswith(b"<") or not has_version)
