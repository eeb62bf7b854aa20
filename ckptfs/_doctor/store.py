"""Checks of a store, step by step: the name, the connection, TLS, the clock, the objects.

They use the same credentials as an attach from this process. If an attach leaves the credentials to
the daemon, the results hold for a daemon with the same user and environment.
"""

import contextlib
import http.client
import os
import socket
import ssl
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from ckptfs._doctor.checks import Outcome, failed, ok, skipped, warning
from ckptfs._doctor.node import Node
from ckptfs._model.location import Location
from ckptfs._model.units import size_text
from ckptfs._model.wording import counted
from ckptfs._store.base import pin_of
from ckptfs._store.environment.networks import endpoint_of as where_of
from ckptfs._store.request_context import ends_in
from ckptfs._store.s3.client import S3Client
from ckptfs._store.s3.keys import fixed_keys, source_of
from ckptfs._store.s3.options import s3_options
from ckptfs.errors import AccessDenied, LimitExceeded

if TYPE_CHECKING:
    from ckptfs._model.manifest import ListedFile
    from ckptfs._store.base import Store
    from ckptfs._store.environment.draft import Setting

_STEP_S = 5.0
"""Longest time for one network step, which usually takes milliseconds."""
_FILES_MAX = 10_000
"""Ten pages of a listing, which suffice for nearly every checkpoint and take seconds."""
_SKEW_WARNING_S = 60.0
_SKEW_MAX_S = 900.0
"""S3 refuses requests with a time that is 15 minutes off."""
_READ_BYTES = 64 << 20
_SPAN_BYTES = 8 << 20
_READ_S = 2.0
"""Longest time for reading. The last span can exceed it."""
_RATE_BYTES_MIN = 1 << 20
"""Fewer bytes take hardly longer than the request itself, so their rate says nothing about the
connection."""
_PROXY_PORTS = {"http": 80, "https": 443}
_HDFS_PORT = 8020
_CLOCK_REMEDY = "set the clock: enable an NTP service (timedatectl set-ntp true)"


class Endpoint(NamedTuple):
    """The server of a store. `tls` has the trusted certificates, or is None without TLS."""

    host: str
    port: int
    tls: ssl.SSLContext | None


class Remote:
    """The checks, and the results that they share."""

    def __init__(self, uri: str, node: Node) -> None:
        self._uri = uri
        self._node = node
        self._location: Location
        self._store: Store
        self._endpoint: Endpoint
        self._addresses: list[tuple[str, int]] = []
        self._socket: socket.socket
        self._opened = contextlib.ExitStack()
        self._largest: ListedFile | None = None
        self._settings: list[Setting] = []
        self._proxy = ""

    def close(self) -> None:
        """Close the connections."""
        self._opened.close()

    def location(self) -> Outcome:
        """Check the URI."""
        if not self._uri:
            return skipped("give a URI to check its store: ckptfs doctor s3://bucket/run")
        # Not at the top, for the start-up time: only checks of a URI need pyarrow.
        from ckptfs._store.describe import describe, explain
        from ckptfs._store.filesystems import filesystem_of
        from ckptfs._store.named import open_place

        place = filesystem_of(self._uri)
        self._settings = explain(*place)
        described = describe(*place)
        timeout_s = self._node.config.store_timeout_s
        self._location, self._store = open_place(described, timeout_s)
        self._opened.callback(self._store.close)
        return ok(self._location.uri)

    def settings(self) -> Outcome:
        """Show the user's settings of the store in the URI, in variables and in a profile."""
        if not self._settings:
            return skipped("the URI alone describes the store")
        used: list[str] = []
        others: dict[str, list[str]] = {}  # places by their use
        for each in self._settings:
            shown = f"{each.place} = {each.value or '(secret)'}"
            if each.use == "used":
                used.append(shown)
            else:
                others.setdefault(f"{each.use} ({each.why})", []).append(each.place)
        said = [
            f"{', '.join(places)} {'is' if len(places) == 1 else 'are'} {use}"
            for use, places in others.items()
        ]
        text = "; ".join([*used, *said])
        if any(each.use == "refused" for each in self._settings):
            return failed(text, "correct or unset the refused setting")
        return ok(text)

    def credentials(self) -> Outcome:
        """Show the source of the credentials, but never the credentials themselves."""
        location = self._location
        if location.store is not None:
            return ok(f"those of the store {location.store.name!r} (ckptfs config shows where)")
        if location.kind == "s3":
            return self._credentials_of_s3()
        if location.secrets:
            return ok(f"{', '.join(sorted(location.secrets))} from the URI or the environment")
        from ckptfs._store.kinds import daemon_rights_for

        rights = daemon_rights_for(location)
        if location.kind in ("local", "http") or not rights:
            return ok("none are needed")
        return ok(f"the URI has none, so the daemon uses its {rights}; store-list tries them")

    def _credentials_of_s3(self) -> Outcome:
        secrets = self._location.secrets
        options = s3_options({**self._location.options, **secrets})
        if options.anonymous:
            return ok("none are needed, because access is anonymous")
        if options.access_key and not options.role_arn:
            is_known = options.access_key == os.environ.get("AWS_ACCESS_KEY_ID")
            kind = "temporary" if options.session_token else "permanent"
            where = "the environment (AWS_ACCESS_KEY_ID)" if is_known else "the URI"
            return ok(f"{kind}, from {where}")
        source = source_of(options, self._location.uri)
        if options.profile:
            return ok(f"from AWS's chain: {source}, profile {options.profile!r}")
        if options.web_identity_token_file or options.container_credentials_uri:
            return ok(f"from the environment: {source}")
        served_by = self._node.served_by
        whose = f"; the daemon at {served_by} has its own" if served_by else ""
        return ok(f"from AWS's chain: {source}{whose}")

    def name(self) -> Outcome:
        """Check whether the store's host name has an address."""
        endpoint = endpoint_of(self._location)
        if endpoint is None:
            return skipped("local files need no network")
        self._endpoint = endpoint
        host, port, what = endpoint.host, endpoint.port, ""
        if url := self._location.secrets.get("proxy"):
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or _PROXY_PORTS[parts.scheme]
            self._proxy = what = f"the proxy {host}:{port}"
            what += f" for {endpoint.host}: "
        begun_s = time.monotonic()
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            remedy = "check the proxy's variable" if what else "check the endpoint"
            return failed(f"{what}{host}: {error}", f"{remedy}, and /etc/resolv.conf")
        self._addresses = [(str(address[0]), port) for *_, address in found]
        return ok(f"{what}{host} is {self._addresses[0][0]}, {_ms(begun_s)}")

    def connection(self) -> Outcome:
        """Check whether the host accepts a connection."""
        failure: OSError | None = None
        for address in self._addresses[:3]:
            begun_s = time.monotonic()
            try:
                self._socket = socket.create_connection(address, _STEP_S / 3)
            except OSError as error:
                failure = error
            else:
                self._opened.enter_context(self._socket)
                return ok(f"{address[0]} port {address[1]} answers, {_ms(begun_s)}")
        if self._proxy:
            return failed(f"{self._proxy}: {_cause(failure)}", "check the proxy, and NO_PROXY")
        host, port = self._endpoint.host, self._endpoint.port
        return failed(
            f"{host} port {port}: {_cause(failure)}",
            "check the endpoint, and the routes, firewalls and proxies to it",
        )

    def tls(self) -> Outcome:
        """Check the store's certificate."""
        endpoint = self._endpoint
        if endpoint.tls is None:
            return skipped("the connection uses plain http")
        if self._proxy:
            return skipped(
                f"the connection goes through {self._proxy}; store-list checks TLS there"
            )
        begun_s = time.monotonic()
        self._socket.settimeout(_STEP_S)
        try:
            secured = endpoint.tls.wrap_socket(self._socket, server_hostname=endpoint.host)
        except ssl.SSLCertVerificationError as error:
            return failed(
                f"{endpoint.host}: {error.verify_message}",
                "install the authority's certificate, or give tls_ca_file_path",
            )
        self._socket = self._opened.enter_context(secured)
        return ok(f"{secured.version()}, {_ms(begun_s)}")

    def clock(self) -> Outcome:
        """Compare the machine's time with the store's."""
        if self._location.kind == "hdfs":
            return skipped("HDFS does not check the time")
        if self._proxy:
            return skipped(f"the connection goes through {self._proxy}")
        request = http.client.HTTPConnection(self._endpoint.host, self._endpoint.port)
        self._socket.settimeout(_STEP_S)
        request.sock = self._socket
        with contextlib.closing(request):
            request.request("HEAD", "/")
            theirs = request.getresponse().headers.get("date", "")
        now = datetime.now(timezone.utc)
        try:
            skew_s = (now - parsedate_to_datetime(theirs)).total_seconds()
        except (ValueError, TypeError):
            return skipped("the store sends no time")
        facts = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the store's"
        if abs(skew_s) > _SKEW_MAX_S:
            return failed(f"{facts}; S3 refuses more than {_SKEW_MAX_S:.0f} s", _CLOCK_REMEDY)
        if abs(skew_s) > _SKEW_WARNING_S:
            return warning(facts, _CLOCK_REMEDY)
        return ok("within a minute of the store's" if abs(skew_s) > 2 else "equal to the store's")

    def listing(self) -> Outcome:
        """List the checkpoint as an attach does."""
        begun_s = time.monotonic()
        with ends_in(2 * _STEP_S):
            try:
                found = self._store.list(_FILES_MAX)
            except LimitExceeded:
                return warning(
                    f"more than {_FILES_MAX} objects; listing these took {_ms(begun_s)}",
                    "give the URI of one checkpoint",
                )
            except AccessDenied as error:
                return _denied(error)
        self._largest = max(found.files, key=lambda file: file.size, default=None)
        size = sum(file.size for file in found.files)
        return ok(f"{counted(len(found.files), 'file')}, {size_text(size)}, {_ms(begun_s)}")

    def reading(self) -> Outcome:
        """Measure the time to the first byte of the largest file, and the rate of the file's bytes
        if they are enough for one."""
        if self._largest is None or not self._largest.size:
            return skipped("the checkpoint has no file with content")
        pin = pin_of(self._largest)
        buffer = memoryview(bytearray(min(_SPAN_BYTES, pin.size)))
        with ends_in(2 * _STEP_S):
            begun_s = time.monotonic()
            self._store.read_into(pin, 0, buffer[:1])
            first = _ms(begun_s)
            begun_s, done = time.monotonic(), 0
            while done < min(pin.size, _READ_BYTES) and time.monotonic() - begun_s < _READ_S:
                count = min(len(buffer), pin.size - done)
                self._store.read_into(pin, done, buffer[:count])
                done += count
        passed_s = time.monotonic() - begun_s
        if done < _RATE_BYTES_MIN:
            return ok(f"{first} to the first byte")
        rate = size_text(round(done / passed_s))
        return ok(f"{first} to the first byte, {rate}/s on one connection")


def endpoint_of(location: Location) -> Endpoint | None:
    """Return the server of a location; None if it has no server."""
    if location.kind in ("local", "private"):
        return None
    if location.kind == "hdfs":
        port = int(location.options.get("port") or _HDFS_PORT)
        return Endpoint(str(location.options.get("host", "")), port, None)
    if location.kind == "s3":
        bucket = location.path.partition("/")[0]
        known = s3_options(location.options)
        return _endpoint(*S3Client(bucket, known, fixed_keys(None), _STEP_S).endpoint)
    found = where_of(location.kind, location.path, location.options)
    if found is None:
        return None
    if found.scheme != "https":
        return _endpoint(found.authority, None)
    names = ("tls_ca_file_path", "tls_ca_dir_path")
    cafile, capath = (str(location.options.get(name) or "") or None for name in names)
    return _endpoint(found.authority, ssl.create_default_context(cafile=cafile, capath=capath))


def _endpoint(host: str, tls: ssl.SSLContext | None) -> Endpoint:
    kind = http.client.HTTPConnection if tls is None else http.client.HTTPSConnection
    parsed = kind(host)
    return Endpoint(parsed.host, parsed.port, tls)


def _denied(error: AccessDenied) -> Outcome:
    cause = str(error)
    found = (remedy for codes, remedy in _REMEDIES.items() if any(code in cause for code in codes))
    remedy = next(found, "check the rights of these credentials")
    return failed(cause.rpartition("; ")[0] or cause, remedy)


_REMEDIES = {
    ("ExpiredToken", "TokenRefreshRequired"): "the credentials have expired: renew them",
    ("RequestTimeTooSkewed",): _CLOCK_REMEDY,
    ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"): "correct the credentials",
}


def _cause(error: OSError | None) -> str:
    """Return the kernel's message without its number."""
    return (error and (error.strerror or str(error))) or "the name has no address"


def _ms(begun_s: float) -> str:
    return f"{(time.monotonic() - begun_s) * 1000:.0f} ms"
