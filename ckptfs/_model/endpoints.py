"""Endpoints of stores: one parser for URIs, variables, tables and mount options.

An endpoint is a scheme, a host, perhaps a port, and perhaps a path of the service. Two spellings of
one endpoint give equal `Endpoint`s, because the letter case of the host, the scheme's default port
and a trailing slash make no difference.
"""

import re
from ipaddress import AddressValueError, IPv6Address
from typing import Literal, cast

import msgspec

from ckptfs._model.manifest import printable
from ckptfs.errors import LocationError

Scheme = Literal["http", "https"]
_PORTS: dict[str, int] = {"http": 80, "https": 443}
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?\.?")
"""Host names of RFC 1123, and with underscores, which internal names of companies have."""
_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*")  # RFC 3986, section 3.3


class Endpoint(msgspec.Struct, frozen=True):
    """The endpoint of a service.

    Attributes:
        scheme: "http" or "https".
        host: The host in lower case; an IPv6 address without brackets.
        port: The port; None for the scheme's default.
        path: "", or a path that begins with a slash and does not end with one.
    """

    scheme: Scheme
    host: str
    port: int | None = None
    path: str = ""

    @property
    def authority(self) -> str:
        """The host and port as in a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    @property
    def place(self) -> str:
        """The endpoint without its scheme."""
        return self.authority + self.path

    @property
    def text(self) -> str:
        """The endpoint as a URL."""
        return f"{self.scheme}://{self.place}"


def parse_endpoint(text: str, scheme: str = "https") -> Endpoint:
    """The endpoint that `text` names.

    Args:
        text: A URL, or ``host[:port][/path]``.
        scheme: The scheme, if `text` names none.

    Raises:
        LocationError: The text is malformed, has credentials or a query, or another scheme.
    """
    given, separator, rest = text.strip().partition("://")
    if not separator:
        given, rest = scheme, text.strip()
    given = given.lower()
    if given not in _PORTS:
        raise _refused(text, "its scheme must be http or https")
    authority, slash, path = rest.partition("/")
    path = (slash + path).rstrip("/")
    if "@" in authority:
        raise LocationError(
            "an endpoint must not have credentials; write it as https://host:port, and give the "
            "credentials as keys"
        )
    if "?" in rest or "#" in rest:
        raise _refused(text, "it has a query or a fragment")
    if not _PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise _refused(text, "its path is malformed")
    found = re.fullmatch(r"(\[[^\[\]]*\]|[^:]*)(?::([0-9]{0,5}))?", authority)
    if found is None:
        raise _refused(text, "write it as host:port, and an IPv6 address in brackets")
    host = _host_of(text, found[1])
    port = int(found[2]) if found[2] else None
    if port is not None and not 0 < port < 65536:
        raise _refused(text, "its port is out of range")
    chosen = cast("Scheme", given)
    return Endpoint(chosen, host, None if port == _PORTS[given] else port, path)


def _host_of(text: str, host: str) -> str:
    if host.startswith("["):
        try:
            return str(IPv6Address(host[1:-1]))
        except AddressValueError:
            raise _refused(text, "it has a malformed IPv6 address") from None
    if not _HOST.fullmatch(host):
        raise _refused(text, "it names no host")
    return host.lower()


def _refused(text: str, why: str) -> LocationError:
    shown = printable(text, 200)
    return LocationError(f"endpoint {shown!r}: {why}; write it as https://host:port")
