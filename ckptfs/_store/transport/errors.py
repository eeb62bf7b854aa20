"""The errors of requests to an S3 server, and the fields of its error answers."""

import http.client
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit
from xml.etree import ElementTree

from ckptfs._store.versions import retry_after_s
from ckptfs.errors import CkptfsError

_ERROR_BYTES_MAX = 64 << 10
"""The most bytes that are read of an error answer, because only a few fields matter."""
_FIELDS: tuple[str, ...] = ("Code", "Message", "Region", "Endpoint")
_REQUEST_ID = re.compile(r"[A-Za-z0-9/+=_-]{1,128}")
_REGION = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""The regions of all kinds of servers. Only Amazon has the region in host names."""
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
    """An error answer of the server.

    Attributes:
        status: The HTTP status.
        code: S3's name of the error; "" if the server gave none (as always for HEAD).
        message: The server's text.
        retry_after_s: The pause that the server asks for; 0 if it names none.
        region: The bucket's region; "" if the answer does not name it.
        endpoint: The host that the answer names instead; "" if it names none.

    `request_id` is the server's id of the request, for its operator, or "".
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
    """The server sent no answer, or only a part of one. `advice` is for the user."""

    def __init__(self, text: str, advice: str = ADVICE) -> None:
        super().__init__(text)
        self.advice = advice


class SilentServer(BrokenConnection):
    """The server did not answer in time."""


@contextmanager
def translated() -> Generator[None]:
    """Turn the errors of sockets and of http.client in this context into a BrokenConnection."""
    try:
        yield
    except CkptfsError:  # some are builtin errors, too
        raise
    except TimeoutError as error:
        raise SilentServer(str(error) or "timed out") from error
    except (OSError, http.client.HTTPException) as error:
        raise BrokenConnection(text_of(error)) from error


def text_of(error: Exception) -> str:
    """The text of an error of a socket or of http.client."""
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended in the middle of an answer"
    text = error.strerror if isinstance(error, OSError) else str(error)
    return text or str(error) or type(error).__name__


def error_of(response: http.client.HTTPResponse, proxy: str = "") -> S3Error | BrokenConnection:
    """The error in an answer, whose body is read. `proxy` names a proxy that may have sent it."""
    body = response.read(_ERROR_BYTES_MAX)
    if response.status == 400 and any(text in body for text in _TLS_WANTED):
        return BrokenConnection(
            "the server expects TLS on this port", "write the endpoint with https://"
        )
    found = _fields(body)
    endpoint = found["Endpoint"] if _HOST.fullmatch(found["Endpoint"]) else ""
    message = found["Message"].partition("\n")[0].rstrip()  # Azure adds lines for itself
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
        retry_after_s(response.headers.get("retry-after", "")),
        text if _REQUEST_ID.fullmatch(text) else "",
        region=region_in(response) or _region(found["Region"]),
        endpoint=endpoint,
    )


def region_in(response: http.client.HTTPResponse) -> str:
    """The bucket's region in the head of an answer; "" if it has none."""
    return _region(response.headers.get("x-amz-bucket-region", ""))


def region_in_location(body: bytes) -> str:
    """The region in an answer to GetBucketLocation; "" if it has none."""
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
    """The scheme and host of a URL, because the rest may hold a signature."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if parts.scheme and _HOST.fullmatch(host) else ""
