"""The address of the requests for one bucket: host, path and region.

Amazon's host follows from the bucket and its region by botocore's endpoint rules. A test compares
this module with them. Other services have an endpoint. The bucket is a part of the path there,
unless the user or the service says that it belongs into the host's name.

The client follows the region or host in an answer only if the request stays with the same service.
It may be one of Amazon's hosts in another region, or the bucket's name before the endpoint's host.
"""

import re
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import unquote

import msgspec

from ckptfs._model.endpoints import Endpoint, Scheme, parse_endpoint
from ckptfs._store.s3.options import S3Options
from ckptfs._store.s3.sigv4 import encoded
from ckptfs._store.transport.errors import S3Error
from ckptfs.errors import LocationError

_OWN_REGION = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""The regions that a location may name. A region becomes a part of a host's name, and must not lead
to another host."""
_REGION = re.compile(r"[a-z0-9-]{1,40}")
_DEFAULT_REGION = "us-east-1"
_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # RFC 1123
_BUCKET = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
"""Buckets whose names can be in the host's name. A name with a dot cannot, because the wildcard of
a certificate stands for one label."""
_DOTTED_BUCKET = re.compile(rf"(?=.{{3,63}}$){_LABEL}(\.{_LABEL})*")
"""Buckets whose names can be in the host's name if the client checks no certificate."""
_SUFFIXES = {
    "cn-": "amazonaws.com.cn",
    "eu-isoe-": "cloud.adc-e.uk",
    "eusc-": "amazonaws.eu",
    "us-iso-": "c2s.ic.gov",
    "us-isob-": "sc2s.sgov.gov",
    "us-isof-": "csp.hci.ic.gov",
}
"""The domains of Amazon's partitions, by the beginnings of their regions (botocore's
partitions.json)."""
_SUFFIX = "amazonaws.com"
_AMAZON = re.compile(r"s3(?:[.-]([a-z]{2,5}(?:-[a-z0-9]+)+-[0-9]+))?\.amazonaws\.com(?:\.cn)?")
"""Hosts that serve the buckets of one region, which are the default without an endpoint."""
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
"""The codes of errors of servers that want the bucket in the host's name."""
ELSEWHERE = frozenset(
    [
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "PermanentRedirect",
        "Redirect",
        "TemporaryRedirect",
    ]
)
"""The codes of errors about the bucket's region, as in botocore."""
_ELSEWHERE_STATUS = frozenset([301, 302, 307, 400])
_UNKNOWN = {
    "--x-s3": "directory buckets of S3 Express need sessions, which ckptfs does not have",
    "--xa-s3": "directory buckets of S3 Express need sessions, which ckptfs does not have",
    "--op-s3": "buckets on S3 Outposts cannot be read by ckptfs",
    ".mrap": "multi-region access points need SigV4A signatures, which ckptfs does not have",
}
"""The ends of names on Amazon that are not buckets of one region, and why ckptfs cannot read
them."""
_UNKNOWN_HOSTS = {
    "s3express-": "--x-s3",
    "s3-outposts.": "--op-s3",
    "accesspoint.s3-global.": ".mrap",
}


class BucketAddress(msgspec.Struct, frozen=True):
    """The address of the requests for one bucket.

    Attributes:
        bucket: The bucket's name, or an access point with its account.
        scheme: The scheme of all requests.
        region: The region for signatures.
        service: The endpoint that the user has given; None for Amazon's endpoint of the region.
        is_virtual: Whether the bucket's name is a part of the host's name.
        is_access_point: Whether `bucket` is an access point, which stays in its region.
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
        """Whether the bucket's name can be a part of the host's name."""
        service = self._service()
        with suppress(ValueError):
            ip_address(service.host)
            return False
        is_dotted = service.scheme == "http" and not self.is_amazon
        return bool((_DOTTED_BUCKET if is_dotted else _BUCKET).fullmatch(self.bucket))

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint of requests, with the bucket in the host's name if it belongs there."""
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
        """The address to try instead after an error; None if the answer names no other one."""
        wants_virtual = error.code in VIRTUAL_ONLY or self._is_host_with_bucket(error.endpoint)
        if wants_virtual and not self.is_virtual and self.can_be_virtual:
            return msgspec.structs.replace(self, is_virtual=True)
        if error.code in ELSEWHERE or error.status in _ELSEWHERE_STATUS:
            return self.in_region(error.region or self._region_of_host(error.endpoint))
        return None

    def in_region(self, region: str) -> "BucketAddress | None":
        """The address with another region; None if the region is the same or malformed."""
        # For another service than Amazon's, a region is only signed and leads to no other host.
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
        """The region in the name of one of Amazon's hosts."""
        if self.service is not None:
            return ""
        found = _AMAZON.fullmatch(place.lower().removeprefix(f"{self.bucket}."))
        return (found[1] or "") if found else ""


def address_of(bucket: str, options: S3Options) -> BucketAddress:
    """The address of a bucket, or of an access point's ARN. Raises LocationError if the options do
    not lead to it."""
    if options.region and not _OWN_REGION.fullmatch(options.region):
        raise LocationError(f"{options.region!r} is not a region; give one such as us-east-1")
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
            f"{why} puts the bucket into the host's name, and {bucket!r} cannot stand before "
            f"{service.host!r}; use another bucket, or leave {why} out"
        )
    return msgspec.structs.replace(address, is_virtual=True)


def _access_point(address: BucketAddress) -> BucketAddress:
    arn = address.bucket
    found = _ARN.fullmatch(arn)
    what = _ACCESS_POINT.fullmatch(found["what"]) if found else None
    if found is None or found["service"] != "s3" or not what:
        raise LocationError(
            f"{arn}: ckptfs reads only the ARNs of S3 access points; name the bucket instead"
        )
    if not found["region"]:
        raise LocationError(f"{arn}: {_UNKNOWN['.mrap']}; name one of its buckets")
    region, name = found["region"], f"{what['name']}-{found['account']}"
    if not _REGION.fullmatch(region) or not re.fullmatch("[0-9]{12}", found["account"]):
        raise LocationError(f"{arn}: its region or account is malformed; check the ARN")
    point = msgspec.structs.replace(address, bucket=name, region=region, is_access_point=True)
    if not point.can_be_virtual:
        raise LocationError(f"{arn}: this endpoint has no access points; leave the endpoint out")
    return msgspec.structs.replace(point, is_virtual=True)


def _check_host(host: str) -> None:
    """Raise LocationError for a host that has no valid name, or a service that ckptfs cannot
    read."""
    if ":" not in host and any(not 0 < len(label) < 64 for label in host.rstrip(".").split(".")):
        raise LocationError(
            f"{host!r} is not a valid host name, because a part of it is empty or too long; check "
            "the bucket and the endpoint"
        )
    for start, kind in _UNKNOWN_HOSTS.items():
        if start in host and _is_of_amazon(host):
            raise LocationError(f"{host}: {_UNKNOWN[kind]}")


def _check_name(bucket: str) -> None:
    for end, why in _UNKNOWN.items():
        if bucket.endswith(end):
            raise LocationError(f"{bucket}: {why}; use an ordinary bucket")


def split_path(path: str) -> tuple[str, str]:
    """The bucket and the prefix of a location's path. The ARN of an access point may have a
    slash."""
    if found := _ARN_WITH_SLASH.fullmatch(path):
        return found[1], found[2]
    bucket, _, prefix = path.partition("/")
    return bucket, prefix


def _is_of_amazon(host: str) -> bool:
    return host.endswith((f".{_SUFFIX}", *(f".{suffix}" for suffix in _SUFFIXES.values())))


def _suffix_of(region: str) -> str:
    """The domain of a region's partition."""
    return next((end for start, end in _SUFFIXES.items() if region.startswith(start)), _SUFFIX)
