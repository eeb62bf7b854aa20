"""What the head of an answer, or a listing, says of an object's version.

The server is not trusted: a field that makes no sense counts as missing.
"""

import re
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPMessage
from typing import NamedTuple

_ETAG = re.compile(r'(?:[Ww]/)?"([\x21\x23-\x7e]+)"')  # RFC 9110, 8.8.3
_CONTENT_RANGE = re.compile(r"\s*bytes[ =]+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\s*", re.IGNORECASE)
_ISO = re.compile(
    r"\s*(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:[.,](\d{1,30}))?\s*([Zz]|[+-]\d\d:?\d\d)?\s*"
)
_STORED_AS_SENT = frozenset(["", "identity", "aws-chunked"])
"""Values of Content-Encoding that say nothing of the bytes (the last: Amazon S3, "Signature
calculations: transferring payload in multiple chunks")."""


class Seen(NamedTuple):
    """What an answer says of an object.

    Attributes:
        size: Bytes; -1: it does not say.
        mtime_ns: Modification time, nanoseconds since the epoch; 0: it does not say.
        etag: As HTTP has it, with quotes; "": it has none.
        date_s: The server's clock, seconds since the epoch; 0: it does not say.
    """

    size: int
    mtime_ns: int
    etag: str
    date_s: float = 0.0


class ContentRange(NamedTuple):
    """Which bytes an answer has: from `first` to `last`; `size`: of the object, -1: not said."""

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
    """The weak comparison of RFC 9110, 8.8.3.2: something on the way may have weakened one."""
    return bool(one) and one.removeprefix("W/") == other.removeprefix("W/")


def number_in(text: str) -> int:
    """-1: there is none."""
    return int(text) if re.fullmatch(r"\s*[0-9]{1,18}\s*", text) else -1


def time_ns_in(text: str) -> int:
    """A time as listings have it (ISO 8601, of any precision), or headers (RFC 9110, 5.6.7), in
    nanoseconds since the epoch; 0: there is none. A time without a zone is UTC."""
    try:
        if found := _ISO.fullmatch(text):
            day, time, fraction, zone = found.groups()
            moment = datetime.fromisoformat(f"{day}T{time}{_offset(zone)}")
            more_ns = int((fraction or "0")[:9].ljust(9, "0"))
        else:
            moment, more_ns = parsedate_to_datetime(text), 0
            moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        return max(0, int(moment.timestamp()) * 10**9 + more_ns)
    except (ValueError, TypeError, OverflowError):  # TypeError: Python 3.10's for no date
        return 0


def _offset(zone: str | None) -> str:
    if not zone or zone in "Zz":
        return "+00:00"
    return zone if ":" in zone else f"{zone[:3]}:{zone[3:]}"


def is_same_second(one_ns: int, other_ns: int) -> bool:
    """Whether two times may be of one version: listings have fractions of seconds, headers have
    none."""
    return not one_ns or not other_ns or one_ns // 10**9 == other_ns // 10**9


def is_same_moment(one_ns: int, other_ns: int) -> bool:
    """Whether two times of one listing's server may be the same: some give whole seconds to some
    questions only."""
    if one_ns % 10**9 and other_ns % 10**9:
        return one_ns == other_ns
    return is_same_second(one_ns, other_ns)


def content_range_in(headers: HTTPMessage) -> ContentRange | None:
    """None: there is none that makes sense."""
    found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    if found is None:
        return None
    first, last, size = found.groups()
    return ContentRange(int(first), int(last), number_in(size))


def seen_in(headers: HTTPMessage) -> Seen:
    """What the headers of an answer to HEAD, or to a GET of all or some bytes, say."""
    where = headers.get("content-range", "").rpartition("/")[2] or headers.get("content-length", "")
    return Seen(
        number_in(where),
        time_ns_in(headers.get("last-modified", "")),
        etag_in(headers.get("etag", "")),
        time_ns_in(headers.get("date", "")) / 1e9,
    )


def encoding_in(headers: HTTPMessage) -> str:
    """How the bytes were compressed, e.g. "gzip"; "": not at all, as far as the answer says."""
    encoding = headers.get("content-encoding", "").strip().lower()
    return "" if encoding in _STORED_AS_SENT else encoding


def is_web_page(headers: HTTPMessage, body: bytes = b"") -> bool:
    """Whether an answer is a page for people, e.g. of a portal that wants a login, and no object:
    it is HTML, and has no version or the beginning of one."""
    is_html = headers.get("content-type", "").lower().startswith(("text/html", "application/xhtml"))
    begin = body[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith((b"<!doctype html", b"<html")):
        return True
    has_version = etag_in(headers.get("etag", "")) or headers.get("last-modified")
    return is_html and (begin.startswith(b"<") or not has_version)
