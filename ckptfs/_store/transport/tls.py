"""TLS: the trusted certificates, and the meaning of failures.

A context takes milliseconds and memory, so connections share one. Each new connection checks the
file of certificates, because another program may have replaced it.
"""

import contextlib
import functools
import os
import socket
import ssl
from collections.abc import Generator
from typing import Any

import msgspec

from ckptfs._store.transport.errors import BrokenConnection

_CONTEXTS_MAX = 16
"""The most contexts at the same time, because each store of a node may have other certificates."""
NO_TLS = frozenset(
    [
        "HTTP_REQUEST",
        "PACKET_LENGTH_TOO_LONG",
        "RECORD_LAYER_FAILURE",
        "UNKNOWN_PROTOCOL",
        "WRONG_VERSION_NUMBER",
    ]
)
"""OpenSSL's reasons for bytes that are not a TLS record."""
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
"""The advice by OpenSSL's X509_V_ERR_*. All other codes mean that the authority is unknown."""

Stamp = tuple[int, int, int, int] | None


class Network(msgspec.Struct, frozen=True):
    """The options for the way to a server. Never printed, because the proxy may have credentials.

    Attributes:
        proxy: The URL of the proxy, perhaps with credentials; "" without a proxy.
        tls_ca_file_path: A file of certificates to trust instead of the system's.
        tls_ca_dir_path: A directory of such certificates, with the names that OpenSSL gives them.
        tls_ca_pem: The text of such certificates, from a caller whose files are not the daemon's.
        tls_verify_certificates: Whether the client checks the server's certificate.
    """

    proxy: str = ""
    tls_ca_file_path: str = ""
    tls_ca_dir_path: str = ""
    tls_ca_pem: str = ""
    tls_verify_certificates: bool = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def context(self) -> ssl.SSLContext:
        """A context with the current certificates. Raises OSError if they cannot be read."""
        if not self.tls_verify_certificates:
            return _unverified()
        file, directory = self.tls_ca_file_path or None, self.tls_ca_dir_path or None
        text = self.tls_ca_pem or None
        if file or directory or text:
            return _context(file, directory, text, _stamp(file), _stamp(directory))
        paths = ssl.get_default_verify_paths()
        return _context(None, None, None, _stamp(paths.cafile), _stamp(paths.capath))


NETWORK = frozenset(Network.__struct_fields__)
"""The names of the options."""


@functools.lru_cache(_CONTEXTS_MAX)
def _context(
    file: str | None, directory: str | None, text: str | None, *_: Stamp
) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=file, capath=directory, cadata=text)
    except ssl.SSLError as error:
        what = file or "the text of the caller's file"
        raise OSError(f"{what}: it has no certificates ({error.reason})") from None


@functools.cache
def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _stamp(path: str | None) -> Stamp:
    """A value that changes when a file or directory is replaced. Raises OSError."""
    if path is None:
        return None
    about = os.stat(path)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def secured(sock: socket.socket, host: str, context: ssl.SSLContext) -> Any:
    """`sock` with TLS to `host`. `sock` may already be the TLS of a proxy.

    Raises BrokenConnection if the server does not prove that it is `host`, or does not speak TLS,
    and OSError if it does not answer.
    """
    name = host.rstrip(".")  # certificates and SNI have no dot at the end (RFC 6066, section 3)
    with _explained(f"{host!r}"):
        if not isinstance(sock, ssl.SSLSocket):
            return context.wrap_socket(sock, server_hostname=name)
        # Python's own TLS sockets work on a file descriptor, but here that has the outer TLS.
        # botocore brings urllib3.
        from urllib3.util.ssltransport import SSLTransport

        return SSLTransport(sock, context, name)


@contextlib.contextmanager
def _explained(host: str) -> Generator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        advice = _ADVICE.get(error.verify_code, _AUTHORITY)
        text = f"the certificate of {host} is not trusted: {error.verify_message}"
        raise BrokenConnection(text, advice) from error
    except ssl.SSLEOFError as error:
        raise BrokenConnection(f"{host} ended the TLS handshake", _USE_HTTP) from error
    except ssl.SSLError as error:
        reason = error.reason or ""
        if reason in NO_TLS:
            raise BrokenConnection(f"{host} does not speak TLS ({reason})", _USE_HTTP) from error
        text = f"the TLS handshake with {host} failed: {reason or error}"
        raise BrokenConnection(text, "check which TLS versions the server supports") from error
    except ConnectionResetError as error:
        raise BrokenConnection(f"{host} reset the TLS handshake", _USE_HTTP) from error
