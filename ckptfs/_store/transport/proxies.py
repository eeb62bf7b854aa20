"""HTTP proxies on the way to a store.

A request over plain HTTP names its whole URL to the proxy (RFC 9112, section 3.2.2). For HTTPS the
proxy makes a tunnel (RFC 9110, section 9.3.6), and cannot see the requests. The proxy resolves the
store's name. Only a header has the user and the password, and no message has them.
"""

import base64
import http.client
import socket
from typing import NamedTuple
from urllib.parse import unquote

from ckptfs._model.endpoints import Endpoint, parse_endpoint
from ckptfs._store.transport.answers import Answer, Limits
from ckptfs._store.transport.errors import BrokenConnection, S3Error
from ckptfs.errors import LocationError

_DENIED = frozenset([401, 403, 407])


class Proxy(NamedTuple):
    """A proxy, and the value of Proxy-Authorization ("" without credentials). Never printed."""

    endpoint: Endpoint
    authorization: str = ""

    def __repr__(self) -> str:
        return f"Proxy({self.endpoint.text!r}, …)"

    @property
    def headers(self) -> dict[str, str]:
        """The headers of each request to the proxy itself."""
        return {"proxy-authorization": self.authorization} if self.authorization else {}


def parse_proxy(url: str) -> Proxy:
    """The proxy that a URL names, e.g. ``http://user:password@proxy:3128``. Raises LocationError
    for a malformed URL, or a kind that ckptfs does not know. The message has no credentials."""
    scheme, separator, rest = url.strip().partition("://")
    if not separator:
        scheme, rest = "http", url.strip()
    user, at, place = rest.rpartition("@")
    shown = f"{scheme}://{place}"
    if scheme.lower() not in ("http", "https"):
        raise LocationError(
            f"proxy {shown!r}: ckptfs supports only http:// and https:// proxies; use one of these"
        )
    try:
        endpoint = parse_endpoint(shown)
    except LocationError:
        text = "it is malformed; write it as http://host:port"
        raise LocationError(f"proxy {shown!r}: {text}") from None
    if not at:
        return Proxy(endpoint)
    name, _, password = user.partition(":")
    pair = f"{unquote(name)}:{unquote(password)}".encode()
    return Proxy(endpoint, f"Basic {base64.b64encode(pair).decode()}")


def open_tunnel(sock: socket.socket, proxy: Proxy, to: Endpoint, limits: Limits) -> None:
    """Let the proxy at the other end of `sock` connect it to `to`, which speaks TLS.

    Raises S3Error if the proxy refuses for good, BrokenConnection if it cannot do it now, and
    OSError or http.client.HTTPException if it does not answer, or not with HTTP.
    """
    target = to.authority if to.port else f"{to.authority}:443"
    head = {"host": target, **proxy.headers}
    lines = [f"CONNECT {target} HTTP/1.1", *(f"{name}: {head[name]}" for name in head), "", ""]
    sock.sendall("\r\n".join(lines).encode("ascii"))
    with Answer(limits, sock, method="CONNECT") as answer:
        answer.begin()
        if answer.status == 200:
            answer.length = 0  # what comes now belongs to the tunnel
            return
        reason = f"{answer.status} {answer.reason}".strip()
    text = f"the proxy {proxy.endpoint.text} makes no tunnel to {target}: {reason}"
    if answer.status == http.client.PROXY_AUTHENTICATION_REQUIRED:
        raise refused(proxy)
    if answer.status in _DENIED:
        raise S3Error(answer.status, "ProxyDenied", text)
    raise BrokenConnection(text, "check the endpoint and the proxy")


def refused(proxy: Proxy) -> S3Error:
    """The error where a proxy asks for a user."""
    given = "does not accept its user and password" if proxy.authorization else "wants a user"
    return S3Error(
        407,
        "ProxyAuthenticationRequired",
        f"the proxy {proxy.endpoint.text} {given}; write the proxy as http://user:password@host:port",
    )
