"""Checks of a store, on the way to it: the name, the connection, TLS, the clock, the objects.

They use the credentials that an attach from here would use. Where that leaves the credentials to
the daemon, what is found here is right for a daemon of the same user and environment.
"""

import contextlib
import http.client
import os
import socket
import ssl
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from ckptfs._doctor.checks import Outcome, failed, ok, skipped, warning
from ckptfs._doctor.node import Node
from ckptfs._model.location import Location, Option
from ckptfs._model.units import size_text
from ckptfs._store.awskeys import FixedKeys, source_of
from ckptfs._store.base import pin_of
from ckptfs._store.deadline import ends_in
from ckptfs._store.networks import endpoint_of as where_of
from ckptfs._store.s3client import S3Client
from ckptfs._store.s3options import s3_options
from ckptfs.errors import AccessDenied, LimitExceeded

if TYPE_CHECKING:
    from ckptfs._model.manifest import ListedFile
    from ckptfs._store.base import Store
    from ckptfs._store.draft import Setting

_STEP_S = 5.0
"""Longest time for one step of the network, which usually takes milliseconds."""
_FILES_MAX = 10_000
"""Ten pages of a listing: enough for nearly every checkpoint, and done within seconds."""
_SKEW_WARNING_S = 60.0
_SKEW_MAX_S = 900.0
"""S3 refuses requests whose time is 15 minutes off."""
_READ_BYTES = 64 << 20
_SPAN_BYTES = 8 << 20
_READ_S = 2.0
"""Longest time for reading; the last span may add to it."""
_PROXY_PORTS = {"http": 80, "https": 443}
_HDFS_PORT = 8020
_CLOCK_REMEDY = "set the clock: enable an NTP service (timedatectl set-ntp true)"


class Endpoint(NamedTuple):
    """Where requests go. `tls`: the certificates to trust; None: the connection is plain."""

    host: str
    port: int
    tls: ssl.SSLContext | None


class Remote:
    """The checks, and what they find for each other."""

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
        """Whether the URI can be understood."""
        if not self._uri:
            return skipped("give a URI to check its store: ckptfs doctor s3://bucket/run")
        # Not at the top: pyarrow is for those that have a URI.
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
        """What the user has said about the store, in the URI, in variables and in a profile."""
        if not self._settings:
            return skipped("the URI alone says where the store is")
        used: list[str] = []
        others: list[str] = []
        for each in self._settings:
            shown = f"{each.place} = {each.value or '(secret)'}"
            if each.use == "used":
                used.append(shown)
            else:
                others.append(f"{each.place} is {each.use} ({each.why})")
        text = "; ".join([*used, *others])
        if any(each.use == "refused" for each in self._settings):
            return failed(text, "correct the setting that is refused, or unset it")
        return ok(text)

    def credentials(self) -> Outcome:
        """Whether there are credentials, and where they come from. They are never shown."""
        location = self._location
        if location.store is not None:
            return ok(f"those of the store {location.store.name!r} (ckptfs config shows where)")
        if location.kind == "s3":
            return self._credentials_of_s3()
        if location.secrets:
            return ok(f"{', '.join(sorted(location.secrets))}: given, or of the environment")
        from ckptfs._store.kinds import lent_for

        lent = lent_for(location)
        if location.kind in ("local", "http") or not lent:
            return ok("none are needed")
        return ok(f"none are given: the daemon's {lent} will do, or not: see store-list")

    def _credentials_of_s3(self) -> Outcome:
        secrets = self._location.secrets
        options = s3_options({**self._location.options, **secrets})
        if options.anonymous:
            return ok("none are needed: anonymous")
        if options.access_key and not options.role_arn:
            is_known = options.access_key == os.environ.get("AWS_ACCESS_KEY_ID")
            kind = "for a time" if options.session_token else "without an end"
            where = "the environment (AWS_ACCESS_KEY_ID)" if is_known else "the URI"
            return ok(f"of {where}, valid {kind}")
        source = source_of(options, self._location.uri)
        if options.profile:
            return ok(f"of AWS's chain: {source}, profile {options.profile!r}")
        if options.web_identity_token_file or options.container_credentials_uri:
            return ok(f"of the environment: {source}")
        served_by = self._node.served_by
        whose = f"; the daemon at {served_by} has its own" if served_by else ""
        return ok(f"of AWS's chain: {source}{whose}")

    def name(self) -> Outcome:
        """Whether the host of the store has an address."""
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
        """Whether the host can be reached."""
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
            return failed(f"{self._proxy}: {failure}", "check the proxy, and NO_PROXY")
        host, port = self._endpoint.host, self._endpoint.port
        return failed(
            f"{host} port {port}: {failure}",
            "check the endpoint, and routes, firewall and proxies on the way",
        )

    def tls(self) -> Outcome:
        """Whether the store proves to be the one that it should be."""
        endpoint = self._endpoint
        if endpoint.tls is None:
            return skipped("the connection is plain: http")
        if self._proxy:
            return skipped(f"it goes through {self._proxy}: see store-list")
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
        """Whether the machine's time is the store's."""
        if self._location.kind == "hdfs":
            return skipped("HDFS does not look at it")
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
            return skipped("the store says no time")
        facts = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the store's"
        if abs(skew_s) > _SKEW_MAX_S:
            return failed(f"{facts}: S3 refuses more than {_SKEW_MAX_S:.0f}", _CLOCK_REMEDY)
        if abs(skew_s) > _SKEW_WARNING_S:
            return warning(facts, _CLOCK_REMEDY)
        return ok("within a minute of the store's" if abs(skew_s) > 2 else "that of the store")

    def listing(self) -> Outcome:
        """Whether what is there can be listed, as an attach does it."""
        begun_s = time.monotonic()
        with ends_in(2 * _STEP_S):
            try:
                found = self._store.list(_FILES_MAX)
            except LimitExceeded:
                return warning(
                    f"more than {_FILES_MAX} objects, {_ms(begun_s)} for so many",
                    "give the URI of one checkpoint",
                )
            except AccessDenied as error:
                return _denied(error)
        self._largest = max(found.files, key=lambda file: file.size, default=None)
        size = sum(file.size for file in found.files)
        return ok(f"{len(found.files)} files, {size_text(size)}, {_ms(begun_s)}")

    def reading(self) -> Outcome:
        """How soon the first byte of the largest file is there, and how fast the others come."""
        if self._largest is None or not self._largest.size:
            return skipped("there is no file with content")
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
        speed = done / (time.monotonic() - begun_s) / 1e6
        return ok(f"{first} to the first byte, {speed:,.0f} MB/s on one connection")


def endpoint_of(location: Location) -> Endpoint | None:
    """Where requests to a location go; None: nowhere."""
    if location.kind in ("local", "private"):
        return None
    if location.kind == "hdfs":
        port = int(location.options.get("port") or _HDFS_PORT)
        return Endpoint(str(location.options.get("host", "")), port, None)
    if location.kind == "s3":
        bucket = location.path.partition("/")[0]
        known = s3_options(location.options)
        return _endpoint(*S3Client(bucket, known, FixedKeys(None), _STEP_S).endpoint)
    found = where_of(location.kind, location.path, location.options)
    if found is None:
        return None
    tls = _tls_of(location.options) if found.scheme == "https" else None
    return _endpoint(found.authority, tls)


def _tls_of(options: Mapping[str, Option]) -> ssl.SSLContext:
    names = ("tls_ca_file_path", "tls_ca_dir_path")
    cafile, capath = (str(options.get(name) or "") or None for name in names)
    return ssl.create_default_context(cafile=cafile, capath=capath)


def _endpoint(host: str, tls: ssl.SSLContext | None) -> Endpoint:
    kind = http.client.HTTPConnection if tls is None else http.client.HTTPSConnection
    parsed = kind(host)
    return Endpoint(parsed.host, parsed.port, tls)


def _denied(error: AccessDenied) -> Outcome:
    """A refusal, with what to do about this one."""
    cause = str(error)
    for codes, remedy in _REMEDIES.items():
        if any(code in cause for code in codes):
            return failed(cause.rpartition("; ")[0] or cause, remedy)
    return failed(cause.rpartition("; ")[0] or cause, "check what these credentials may do")


_REMEDIES = {
    ("ExpiredToken", "TokenRefreshRequired"): "the credentials have expired: renew them",
    ("RequestTimeTooSkewed",): _CLOCK_REMEDY,
    ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"): "correct the credentials",
}


def _ms(begun_s: float) -> str:
    return f"{(time.monotonic() - begun_s) * 1000:.0f} ms"
