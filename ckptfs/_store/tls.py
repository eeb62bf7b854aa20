"""TLS: which certificates count, and what a failure means.

A context takes milliseconds to make and memory to keep, so connections share one. The file of
certificates is looked at for each new connection, because it may have been replaced.
"""

import contextlib
import functools
import os
import socket
import ssl
from collections.abc import Generator
from typing import Any, NamedTuple

from ckptfs._store.s3errors import BrokenConnection

_CONTEXTS_MAX = 16
"""Different ones at the same time: each store of a node may have certificates of its own."""
_NO_TLS = frozenset(
    [
        "HTTP_REQUEST",
        "PACKET_LENGTH_TOO_LONG",
        "RECORD_LAYER_FAILURE",
        "UNKNOWN_PROTOCOL",
        "WRONG_VERSION_NUMBER",
    ]
)
"""OpenSSL's reasons where bytes are no TLS record."""
_USE_HTTP = "if the server speaks plain HTTP, give the option scheme=http"
_AUTHORITY = (
    "if you trust the server, name its authority's certificate: AWS_CA_BUNDLE, ca_file or "
    "tls_ca_file_path"
)
_CHECK_CLOCK = "renew the server's certificate, or set this machine's clock"
_CHECK_NAME = "write the endpoint with a name that the server's certificate has"
_ADVICE = {
    9: _CHECK_CLOCK,  # not yet valid
    10: _CHECK_CLOCK,  # expired
    62: _CHECK_NAME,  # of a host
    64: _CHECK_NAME,  # of an address
}
"""By OpenSSL's X509_V_ERR_*; all others are of authorities that are not known."""

Stamp = tuple[int, int, int, int] | None


class Trust(NamedTuple):
    """Which certificates count.

    Attributes:
        ca_file: Certificates to trust instead of the system's; "": there are none.
        ca_dir: A directory of such certificates, as OpenSSL hashes their names; "": there is none.
        is_verified: False: any certificate counts.
        ca_text: The text of such certificates, from a caller whose files are not ours; "": none.
    """

    ca_file: str = ""
    ca_dir: str = ""
    is_verified: bool = True
    ca_text: str = ""

    def context(self) -> ssl.SSLContext:
        """A context with the certificates as they are now. Raises OSError: they cannot be read."""
        if not self.is_verified:
            return _unverified()
        if not self.ca_file and not self.ca_dir and not self.ca_text:
            paths = ssl.get_default_verify_paths()
            return _context(self, _stamp(paths.cafile), _stamp(paths.capath))
        return _context(self, _stamp(self.ca_file or None), _stamp(self.ca_dir or None))


@functools.lru_cache(_CONTEXTS_MAX)
def _context(trust: Trust, _file: Stamp, _dir: Stamp, /) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(
            cafile=trust.ca_file or None,
            capath=trust.ca_dir or None,
            cadata=trust.ca_text or None,
        )
    except ssl.SSLError as error:
        what = trust.ca_file or "the text of the caller's file"
        raise OSError(f"{what}: it has no certificates ({error.reason})") from None


@functools.cache
def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _stamp(path: str | None) -> Stamp:
    """What differs when a file or directory was replaced. Raises OSError."""
    if path is None:
        return None
    about = os.stat(path)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def secured(sock: socket.socket, host: str, trust: Trust) -> Any:
    """`sock` with TLS to `host`; also through the TLS of a proxy.

    Raises:
        BrokenConnection: The server does not prove to be `host`, or does not speak TLS.
        OSError: There is no answer, or the certificates cannot be read.
    """
    context = trust.context()
    name = host.rstrip(".")  # certificates and SNI have no dot at the end (RFC 6066, section 3)
    with _explained(f"{host!r}"):
        if not isinstance(sock, ssl.SSLSocket):
            return context.wrap_socket(sock, server_hostname=name)
        # Python's own TLS sockets work on a file descriptor, which has the outer TLS here. botocore
        # brings urllib3.
        from urllib3.util.ssltransport import SSLTransport

        return SSLTransport(sock, context, name)


@contextlib.contextmanager
def _explained(host: str) -> Generator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        advice = _ADVICE.get(error.verify_code, _AUTHORITY)
        text = f"the certificate of {host} does not count: {error.verify_message}"
        raise BrokenConnection(text, advice) from error
    except ssl.SSLEOFError as error:
        raise BrokenConnection(f"{host} ended the TLS handshake", _USE_HTTP) from error
    except ssl.SSLError as error:
        reason = error.reason or ""
        if reason in _NO_TLS:
            raise BrokenConnection(f"{host} does not speak TLS ({reason})", _USE_HTTP) from error
        text = f"the TLS handshake with {host} failed: {reason or error}"
        raise BrokenConnection(text, "check which TLS versions it knows") from error
    except ConnectionResetError as error:
        raise BrokenConnection(f"{host} reset the TLS handshake", _USE_HTTP) from error
