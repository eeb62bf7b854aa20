"""What can go wrong with a request to an S3 server, and what an answer that is an error says."""

import http.client
import re
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from xml.etree import ElementTree

_RETRY_AFTER_S_MAX = 3600.0
_ERROR_BYTES_MAX = 64 << 10
"""Of an answer that is an error, of which only a few fields are of interest."""
_FIELDS: tuple[str, ...] = ("Code", "Message", "Region", "Endpoint")
_REQUEST_ID = re.compile(r"[A-Za-z0-9/+=_-]{1,128}")
_REGION = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Regions of all kinds of servers; one becomes a part of a host's name on Amazon only."""
_REDIRECTS = frozenset([301, 302, 303, 307, 308])
_HOST = re.compile(r"[A-Za-z0-9_.-]{1,255}(:[0-9]{1,5})?")
_TLS_WANTED = (
    b"plain HTTP request was sent to HTTPS port",  # nginx
    b"sent an HTTP request to an HTTPS server",  # Go: MinIO, SeaweedFS, rclone, Caddy
    b"speaking plain HTTP to an SSL-enabled server port",  # Apache
    b"combination of host and port requires TLS",  # Tomcat
)
ADVICE = "check the endpoint"


class S3Error(Exception):
    """The server's answer is an error.

    Attributes:
        status: Of HTTP.
        code: S3's name for it; "" where the server gave none (as always with HEAD).
        message: What the server said.
        retry_after_s: How long the server asks to be left alone; 0: it did not say.
        region: The bucket's region; "": the answer does not say it.
        endpoint: The host that the answer names instead; "": it names none.

    `request_id`: what the server calls the request, for its operator; "": it did not say.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        retry_after_s: float = 0.0,
        request_id: str = "",
        *,
        region: str = "",
        endpoint: str = "",
    ) -> None:
        text = f"{code or f'HTTP status {status}'}{': ' if message else ''}{message}"
        super().__init__(f"{text} [request {request_id}]" if request_id else text)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.region = region
        self.endpoint = endpoint


class BrokenConnection(Exception):
    """There was no answer, or only a part of one.

    Attributes:
        advice: What the user can do about it.
    """

    def __init__(self, text: str, advice: str = ADVICE) -> None:
        super().__init__(text)
        self.advice = advice


class SilentServer(BrokenConnection):
    """The server did not answer in time."""


def error_of(response: http.client.HTTPResponse, proxy: str = "") -> S3Error | BrokenConnection:
    """What an answer that is an error says. Reads its body. `proxy`: what may have made it, too."""
    body = response.read(_ERROR_BYTES_MAX)
    if response.status == 400 and any(text in body for text in _TLS_WANTED):
        return BrokenConnection(
            "the server expects TLS on this port", "write the endpoint with https://"
        )
    found = _fields(body)
    endpoint = found["Endpoint"] if _HOST.fullmatch(found["Endpoint"]) else ""
    message = found["Message"].partition("\n")[0].rstrip()  # Azure adds lines of its own use
    if proxy and not found["Code"]:
        message = message or f"through the proxy {proxy}"
    elsewhere = endpoint or _origin(response.headers.get("location", ""))
    if elsewhere and response.status in _REDIRECTS:
        message = f"{message or 'the store is elsewhere'} (it names {elsewhere})"
    text = response.headers.get("x-amz-request-id", "")
    return S3Error(
        response.status,
        found["Code"],
        message,
        _retry_after_s(response),
        text if _REQUEST_ID.fullmatch(text) else "",
        region=region_in(response) or _region(found["Region"]),
        endpoint=endpoint,
    )


def region_in(response: http.client.HTTPResponse) -> str:
    """The bucket's region that the head of an answer says; "": it says none."""
    return _region(response.headers.get("x-amz-bucket-region", ""))


def region_in_location(body: bytes) -> str:
    """The region that the answer to GetBucketLocation says; "": it says none."""
    root = _parsed(body)
    if root is None or root.tag.rpartition("}")[2] != "LocationConstraint":
        return ""
    return _region((root.text or "").strip())


def _fields(body: bytes) -> dict[str, str]:
    found = dict.fromkeys(_FIELDS, "")
    root = _parsed(body)
    for child in () if root is None else root:
        name = child.tag.rpartition("}")[2]
        if name in found:
            found[name] = (child.text or "").strip()
    return found


def _parsed(body: bytes) -> ElementTree.Element | None:
    if b"<!DOCTYPE" in body:  # it could define entities that grow in memory
        return None
    with suppress(ElementTree.ParseError):
        return ElementTree.fromstring(body)
    return None


def _region(text: str) -> str:
    return text if _REGION.fullmatch(text) else ""


def _origin(url: str) -> str:
    """Scheme and host of a URL; the rest may hold a signature."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if parts.scheme and _HOST.fullmatch(host) else ""


def _retry_after_s(response: http.client.HTTPResponse) -> float:
    """RFC 9110, 10.2.3: seconds, or a date."""
    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return min(float(text), _RETRY_AFTER_S_MAX)
    try:
        left_s = (parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, TypeError):  # the latter: a date of no time zone
        return 0.0
    return min(max(left_s, 0.0), _RETRY_AFTER_S_MAX)
