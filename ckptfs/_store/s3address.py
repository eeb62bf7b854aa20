"""Where the requests for one bucket go: host, path and region.

Amazon's host follows from the bucket and its region, and the rules are those of botocore's
endpoint rules, against which a test compares them. Other services have an endpoint; the bucket is
a part of the path there, until the user or the service says that it belongs into the host's name.

What an answer says about another region or host is followed only if the request stays with the
same service: Amazon's hosts of another region, or the bucket's name before the endpoint's host.
"""

import re
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import unquote

import msgspec

from ckptfs._model.endpoints import Endpoint, Scheme, parse_endpoint
from ckptfs._store.s3errors import S3Error
from ckptfs._store.s3options import S3Options
from ckptfs._store.sigv4 import encoded
from ckptfs.errors import LocationError

_OWN_REGION = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What a location may say: it becomes a part of a host's name, and must not lead to another one."""
_REGION = re.compile(r"[a-z0-9-]{1,40}")
_DEFAULT_REGION = "us-east-1"
_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # RFC 1123
_BUCKET = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
"""Buckets whose names can be in the host's. A certificate's wildcard stands for one label, so a
name with a dot cannot."""
_DOTTED_BUCKET = re.compile(rf"(?=.{{3,63}}$){_LABEL}(\.{_LABEL})*")
"""Buckets whose names can be in the host's where no certificate is checked."""
_SUFFIXES = {
    "cn-": "amazonaws.com.cn",
    "eu-isoe-": "cloud.adc-e.uk",
    "eusc-": "amazonaws.eu",
    "us-iso-": "c2s.ic.gov",
    "us-isob-": "sc2s.sgov.gov",
    "us-isof-": "csp.hci.ic.gov",
}
"""Domains of Amazon's partitions, by the beginnings of their regions (botocore's partitions.json).
"""
_SUFFIX = "amazonaws.com"
_AMAZON = re.compile(r"s3(?:[.-]([a-z]{2,5}(?:-[a-z0-9]+)+-[0-9]+))?\.amazonaws\.com(?:\.cn)?")
"""Hosts that serve the buckets of one region: the same as without an endpoint."""
_ACCELERATED = re.compile(r"s3-accelerate(\.dualstack)?\.amazonaws\.com")
_ARN = re.compile(
    r"arn:aws[a-z-]*:(?P<service>[a-z0-9-]*):(?P<region>[a-z0-9-]*):(?P<account>[0-9]*):(?P<what>.*)"
)
_ACCESS_POINT = re.compile(rf"accesspoint[:/](?P<name>{_LABEL})")
_ARN_WITH_SLASH = re.compile(r"(arn:[^/]*:accesspoint/[^/]+)/?(.*)", re.DOTALL)
VIRTUAL_ONLY = frozenset(
    [
        "InvalidPathAccess",  # Volcengine
        "PathStyleDomainForbidden",  # Tencent
        "SecondLevelDomainForbidden",  # Alibaba
        "VirtualHostDomainRequired",  # Huawei
    ]
)
"""Codes of errors that want the bucket in the host's name."""
ELSEWHERE = frozenset(
    [
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "PermanentRedirect",
        "Redirect",
        "TemporaryRedirect",
    ]
)
"""Codes of errors that have to do with the bucket's region; botocore looks at the same ones."""
_ELSEWHERE_STATUS = frozenset([301, 302, 307, 400])
_UNKNOWN = {
    "--x-s3": "directory buckets of S3 Express need sessions, which ckptfs does not have",
    "--xa-s3": "directory buckets of S3 Express need sessions, which ckptfs does not have",
    "--op-s3": "buckets on S3 Outposts cannot be read by ckptfs",
    ".mrap": "multi-region access points need SigV4A signatures, which ckptfs does not have",
}
"""Names on Amazon that mean something else than a bucket of one region, by their ends."""
_UNKNOWN_HOSTS = {
    "s3express-": "--x-s3",
    "s3-outposts.": "--op-s3",
    "accesspoint.s3-global.": ".mrap",
}


class BucketAddress(msgspec.Struct, frozen=True):
    """Where the requests for one bucket go.

    Attributes:
        bucket: Its name, or an access point with its account.
        scheme: Of all requests.
        region: For signatures.
        service: The endpoint that the user has given; None: Amazon's, by the region.
        is_virtual: Whether the bucket's name is a part of the host's.
        is_access_point: Whether `bucket` is one, which stays in its region.
    """

    bucket: str
    scheme: Scheme
    region: str
    service: Endpoint | None = None
    is_virtual: bool = False
    is_access_point: bool = False

    @property
    def is_amazon(self) -> bool:
        """Whether the service is Amazon's."""
        return self.service is None or _is_of_amazon(self.service.host)

    @property
    def can_be_virtual(self) -> bool:
        """Whether the bucket's name can be a part of the host's."""
        service = self._service()
        with suppress(ValueError):
            ip_address(service.host)
            return False
        is_dotted = service.scheme == "http" and not self.is_amazon
        return bool((_DOTTED_BUCKET if is_dotted else _BUCKET).fullmatch(self.bucket))

    @property
    def endpoint(self) -> Endpoint:
        """Where requests go, with the bucket in the host's name where it belongs there."""
        service = self._service()
        if not self.is_virtual:
            return service
        return msgspec.structs.replace(service, host=f"{self.bucket}.{service.host}")

    def path(self, key: str) -> str:
        """The encoded path of an object; of the bucket itself if `key` is ""."""
        base = encoded(unquote(self._service().path), "/")
        if not self.is_virtual:
            base = f"{base}/{encoded(self.bucket)}"
        return f"{base}/{encoded(key, '/')}" if key or self.is_virtual else base

    def after(self, error: S3Error) -> "BucketAddress | None":
        """The address to try instead after an error; None: the answer says no other one."""
        wants_virtual = error.code in VIRTUAL_ONLY or self._is_host_with_bucket(error.endpoint)
        if wants_virtual and not self.is_virtual and self.can_be_virtual:
            return msgspec.structs.replace(self, is_virtual=True)
        if error.code in ELSEWHERE or error.status in _ELSEWHERE_STATUS:
            return self.in_region(error.region or self._region_of_host(error.endpoint))
        return None

    def in_region(self, region: str) -> "BucketAddress | None":
        """The address with another region; None: it is the same, or cannot be one."""
        # Elsewhere a region is a word that is signed, and leads to no other host.
        is_possible = (_REGION if self.service is None else _OWN_REGION).fullmatch(region)
        if not is_possible or region == self.region or self.is_access_point:
            return None
        return msgspec.structs.replace(self, region=region)

    def _service(self) -> Endpoint:
        if self.service is not None:
            return self.service
        kind = "s3-accesspoint" if self.is_access_point else "s3"
        return Endpoint(self.scheme, f"{kind}.{self.region}.{_suffix_of(self.region)}")

    def _is_host_with_bucket(self, place: str) -> bool:
        service = self._service()
        host, _, port = place.lower().partition(":")
        is_port = port in ("", str(service.port or ""), "443", "80")
        return is_port and host == f"{self.bucket}.{service.host}"

    def _region_of_host(self, place: str) -> str:
        """The region that is a part of the name of one of Amazon's hosts."""
        if self.service is not None:
            return ""
        found = _AMAZON.fullmatch(place.lower().removeprefix(f"{self.bucket}."))
        return (found[1] or "") if found else ""


def address_of(bucket: str, options: S3Options) -> BucketAddress:
    """The address of a bucket, or of an access point's ARN.

    Raises LocationError: It cannot be reached in the way that the options say.
    """
    if options.region and not _OWN_REGION.fullmatch(options.region):
        raise LocationError(f"{options.region!r} is no region")
    scheme: Scheme = options.scheme
    service, region = None, options.region
    if options.endpoint_override:
        service = parse_endpoint(options.endpoint_override, options.scheme)
        scheme = service.scheme
        _check_host(service.host)
        if (found := _AMAZON.fullmatch(service.host)) and not service.port and not service.path:
            service, region = None, region or found[1]  # the same as without an endpoint
    address = BucketAddress(bucket, scheme, region or _DEFAULT_REGION, service)
    if bucket.startswith("arn:"):
        return _access_point(address)
    if address.is_amazon:
        _check_name(bucket)
    if service is None:
        return msgspec.structs.replace(address, is_virtual=address.can_be_virtual)
    is_accelerated = bool(_ACCELERATED.fullmatch(service.host))
    if not is_accelerated and not options.force_virtual_addressing:
        return address
    if not address.can_be_virtual:
        why = "S3 Transfer Acceleration" if is_accelerated else "force_virtual_addressing"
        raise LocationError(
            f"{why} wants the bucket in the host's name, and {bucket!r} cannot stand before "
            f"{service.host!r}"
        )
    return msgspec.structs.replace(address, is_virtual=True)


def _access_point(address: BucketAddress) -> BucketAddress:
    arn = address.bucket
    found = _ARN.fullmatch(arn)
    what = _ACCESS_POINT.fullmatch(found["what"]) if found else None
    if found is None or found["service"] != "s3" or not what:
        raise LocationError(f"{arn}: of ARNs, ckptfs knows those of S3 access points only")
    if not found["region"]:
        raise LocationError(f"{arn}: {_UNKNOWN['.mrap']}; name one of its buckets")
    region, name = found["region"], f"{what['name']}-{found['account']}"
    if not _REGION.fullmatch(region) or not re.fullmatch("[0-9]{12}", found["account"]):
        raise LocationError(f"{arn}: it has no region or account that can be one")
    point = msgspec.structs.replace(address, bucket=name, region=region, is_access_point=True)
    if not point.can_be_virtual:
        raise LocationError(f"{arn}: an access point cannot be reached at this endpoint")
    return msgspec.structs.replace(point, is_virtual=True)


def _check_host(host: str) -> None:
    """Refuse hosts that cannot be looked up, and those of services that ckptfs does not know."""
    if ":" not in host and any(not 0 < len(label) < 64 for label in host.rstrip(".").split(".")):
        raise LocationError(f"{host!r} is no name of a host: a part of it is empty or too long")
    for start, kind in _UNKNOWN_HOSTS.items():
        if start in host and _is_of_amazon(host):
            raise LocationError(f"{host}: {_UNKNOWN[kind]}")


def _check_name(bucket: str) -> None:
    for end, why in _UNKNOWN.items():
        if bucket.endswith(end):
            raise LocationError(f"{bucket}: {why}; use an ordinary bucket")


def split_path(path: str) -> tuple[str, str]:
    """Bucket and prefix of a location's path. An access point's ARN may have a slash in it."""
    if found := _ARN_WITH_SLASH.fullmatch(path):
        return found[1], found[2]
    bucket, _, prefix = path.partition("/")
    return bucket, prefix


def _is_of_amazon(host: str) -> bool:
    return host.endswith((f".{_SUFFIX}", *(f".{suffix}" for suffix in _SUFFIXES.values())))


def _suffix_of(region: str) -> str:
    """The domain of a region's partition."""
    return next((end for start, end in _SUFFIXES.items() if region.startswith(start)), _SUFFIX)
