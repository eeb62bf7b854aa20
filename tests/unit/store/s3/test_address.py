"""Hosts, paths and regions of buckets, compared with botocore's."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest

from ckptfs._store.s3.address import BucketAddress, address_of, split_path
from ckptfs._store.s3.options import S3Options
from ckptfs._store.transport.errors import S3Error
from ckptfs.errors import LocationError

POINT = "arn:aws:s3:us-west-2:123456789012:accesspoint"


def at(bucket: str = "bucket", endpoint: str = "", **options: Any) -> BucketAddress:
    return address_of(bucket, S3Options(endpoint_override=endpoint, **options))


def url(address: BucketAddress, key: str = "a") -> str:
    return address.endpoint.text.removesuffix(address.endpoint.path) + address.path(key)


class _Empty(io.BytesIO):
    def stream(self) -> Any:
        return iter([b""])


@functools.cache
def _session() -> Any:
    from botocore.session import Session

    session = Session()
    session.set_credentials("key", "secret")
    return session


def botocore_url(bucket: str, region: str, endpoint: str, is_virtual: bool) -> str:
    from botocore.awsrequest import AWSResponse
    from botocore.config import Config

    sent: list[str] = []

    def send(request: Any, **_: Any) -> AWSResponse:
        sent.append(request.url)
        return AWSResponse(request.url, 200, {}, _Empty())

    client: Any = _session().create_client(
        "s3",
        region_name=region,
        endpoint_url=endpoint or None,
        config=Config(s3={"addressing_style": "virtual"} if is_virtual else {}),
    )
    client.meta.events.register("before-send.s3", send)
    client.head_object(Bucket=bucket, Key="a")
    # Amazon's oldest region has a host without its name, too.
    return sent[0].replace("t.s3.amazonaws", "t.s3.us-east-1.amazonaws")


@pytest.mark.parametrize(
    ("bucket", "region", "endpoint", "is_virtual"),
    [
        ("bucket", "us-east-1", "", False),
        ("bucket", "eu-west-3", "", False),
        ("bucket", "us-gov-west-1", "", False),
        ("bucket", "cn-north-1", "", False),
        ("bucket", "us-iso-east-1", "", False),
        ("bucket", "us-isob-east-1", "", False),
        ("bucket", "eu-isoe-west-1", "", False),
        ("bucket", "us-isof-south-1", "", False),
        ("bucket", "eusc-de-east-1", "", False),
        ("bucket-s3alias", "us-west-2", "", False),
        ("a.b", "eu-west-3", "", False),
        ("a.b", "eu-west-3", "", True),
        ("A_b", "eu-west-3", "", False),
        (f"{POINT}/point", "eu-west-3", "", False),
        (f"{POINT}:point", "us-west-2", "", False),
        (f"{POINT}:point", "us-west-2", "https://h.test:8/base", False),
        ("bucket", "us-west-2", "https://s3-accelerate.amazonaws.com", False),
        ("bucket", "us-west-2", "https://s3-accelerate.dualstack.amazonaws.com", False),
        ("bucket", "us-west-2", "https://s3.dualstack.us-west-2.amazonaws.com", True),
        ("bucket", "us-west-2", "https://h.test", False),
        ("bucket", "us-west-2", "http://h.test:9000", False),
        ("bucket", "us-west-2", "http://[::1]:9000", False),
        ("bucket", "us-west-2", "https://h.test/storage/v1/s3", False),
        ("bucket", "us-west-2", "https://h.test/storage/v1/s3", True),
        ("bucket", "us-west-2", "https://h.test:8443", True),
        ("a.b", "us-west-2", "http://h.test", True),
    ],
)
def test_addresses_are_those_of_botocore(
    bucket: str, region: str, endpoint: str, is_virtual: bool
) -> None:
    ours = at(bucket, endpoint, region=region, force_virtual_addressing=is_virtual)
    assert url(ours) == botocore_url(bucket, region, endpoint, is_virtual)


@pytest.mark.parametrize(
    ("endpoint", "scheme", "expected"),
    [
        ("h:1", "https", "https://h:1/bucket/a"),
        ("http://h:1", "https", "http://h:1/bucket/a"),
        ("HTTP://H.Test:80/", "https", "http://h.test/bucket/a"),
        ("h.test:443", "https", "https://h.test/bucket/a"),
        ("h.test:443", "http", "http://h.test:443/bucket/a"),
        ("[2001:DB8:0::1]:9000/x/", "http", "http://[2001:db8::1]:9000/x/bucket/a"),
        ("xn--bcher-kva.example", "https", "https://xn--bcher-kva.example/bucket/a"),
        ("h.test/a@b", "https", "https://h.test/a%40b/bucket/a"),
        ("https://s3.amazonaws.com", "https", "https://bucket.s3.us-east-1.amazonaws.com/a"),
        ("https://s3.eu-west-3.amazonaws.com", "https", "https://bucket.s3.eu-west-3.amazonaws.com/a"),
        ("s3-eu-west-3.amazonaws.com/", "https", "https://bucket.s3.eu-west-3.amazonaws.com/a"),
        ("https://s3.eu-west-3.amazonaws.com:8", "https", "https://s3.eu-west-3.amazonaws.com:8/bucket/a"),
        ("https://vpce-1.s3.us-west-2.vpce.amazonaws.com", "https", "https://vpce-1.s3.us-west-2.vpce.amazonaws.com/bucket/a"),
    ],
)  # fmt: skip
def test_spellings_of_endpoints(endpoint: str, scheme: Any, expected: str) -> None:
    assert url(at(endpoint=endpoint, scheme=scheme)) == expected


def test_the_bucket_itself() -> None:
    assert at(endpoint="h/x").path("") == "/x/bucket"
    assert at(endpoint="h/x", force_virtual_addressing=True).path("") == "/x/"
    assert at().path("") == "/"
    assert at().path("a b/c+%") == "/a%20b/c%2B%25"


@pytest.mark.parametrize(
    ("bucket", "endpoint", "match"),
    [
        ("b--usw2-az1--x-s3", "", "S3 Express"),
        ("b--usw2-az1--xa-s3", "https://s3.us-west-2.amazonaws.com", "S3 Express"),
        ("mfzwi23gnjvgw.mrap", "", "multi-region"),
        ("my--op-s3", "", "Outposts"),
        (
            "arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw.mrap",
            "",
            "only the ARNs of S3 access points",
        ),
        ("arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw", "", "multi-region"),
        ("arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-0/accesspoint/x", "", "only"),
        ("arn:aws:s3-object-lambda:us-west-2:123456789012:accesspoint/x", "", "only"),
        (f"{POINT}/evil.host", "", "only"),
        ("arn:aws:s3:us-west-2:1:accesspoint/x", "", "account"),
        (f"{POINT}/x", "http://127.0.0.1:9000", "this endpoint has no access points"),
        ("b", "https://s3express-usw2-az1.us-west-2.amazonaws.com", "S3 Express"),
        ("b", "https://op-1.s3-outposts.us-west-2.amazonaws.com", "Outposts"),
        ("b", "https://accesspoint.s3-global.amazonaws.com", "multi-region"),
        ("a.b", "https://s3-accelerate.amazonaws.com", "Transfer Acceleration"),
        ("b", "https://a..b", "not a valid host name"),
        ("b", f"https://{'x' * 64}.test", "too long"),
        ("b", "https://bücher.example", "names no host"),
        ("b", "ftp://h", "http or https"),
    ],
)
def test_address_of_unsupported_service_is_refused(bucket: str, endpoint: str, match: str) -> None:
    with pytest.raises(LocationError, match=match) as refused:
        at(bucket, endpoint)
    assert "\n" not in str(refused.value)


def test_names_that_are_special_on_amazon_only() -> None:
    assert url(at("b--x-s3", "http://h:1")) == "http://h:1/b--x-s3/a"


@pytest.mark.parametrize(
    ("bucket", "endpoint"),
    [("a.b", "https://h.test"), ("B", "http://h.test"), ("bucket", "http://127.0.0.1:1")],
)
def test_a_bucket_that_cannot_be_in_the_host_is_refused_there(bucket: str, endpoint: str) -> None:
    with pytest.raises(LocationError, match="force_virtual_addressing"):
        at(bucket, endpoint, force_virtual_addressing=True)


@pytest.mark.parametrize("bucket", ["a.b", "evil.host#", "user@host", "A", "x:1"])
def test_a_bucket_that_is_no_label_stays_out_of_the_host(bucket: str) -> None:
    assert at(bucket).endpoint.host == "s3.us-east-1.amazonaws.com"


@pytest.mark.parametrize("region", ["evil.host/", "a b", "a.b", "x" * 65])
def test_address_region_with_host_syntax_is_refused(region: str) -> None:
    with pytest.raises(LocationError, match="is not a region"):
        at(region=region)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("bucket", ("bucket", "")),
        ("bucket/run/a", ("bucket", "run/a")),
        (f"{POINT}/point/run/a", (f"{POINT}/point", "run/a")),
        (f"{POINT}/point", (f"{POINT}/point", "")),
        (f"{POINT}:point/run", (f"{POINT}:point", "run")),
    ],
)
def test_an_access_point_may_have_a_slash(path: str, expected: tuple[str, str]) -> None:
    assert split_path(path) == expected


# -- what answers say


def error(status: int, code: str = "", region: str = "", endpoint: str = "") -> S3Error:
    return S3Error(status, code, "", region=region, endpoint=endpoint)


@pytest.mark.parametrize(
    "answer",
    [
        error(400, "AuthorizationHeaderMalformed", "eu-west-3"),
        error(403, "AuthorizationHeaderMalformed", "eu-west-3"),
        error(400, "IllegalLocationConstraintException", "eu-west-3"),
        error(301, "PermanentRedirect", "eu-west-3"),
        error(301, "", "eu-west-3"),
        error(307, "TemporaryRedirect", "eu-west-3"),
        error(400, "", "eu-west-3"),
        error(301, "PermanentRedirect", endpoint="bucket.s3.eu-west-3.amazonaws.com"),
        error(301, "PermanentRedirect", endpoint="s3-eu-west-3.amazonaws.com"),
        error(307, "TemporaryRedirect", endpoint="bucket.s3-eu-west-3.amazonaws.com"),
    ],
)
def test_regions_are_learned_from_answers(answer: S3Error) -> None:
    found = at().after(answer)
    assert found is not None
    assert url(found) == "https://bucket.s3.eu-west-3.amazonaws.com/a"
    assert found.after(answer) is None  # it is there


@pytest.mark.parametrize(
    "answer",
    [
        error(301, "PermanentRedirect", "evil.host/"),
        error(301, "PermanentRedirect", endpoint="evil.test"),
        error(301, "PermanentRedirect", endpoint="bucket.s3.evil.test"),
        error(403, "AccessDenied", "eu-west-3"),
        error(301, "PermanentRedirect", "us-east-1"),
        error(301, "PermanentRedirect"),
    ],
)
def test_address_stays_after_unrelated_errors(answer: S3Error) -> None:
    assert at().after(answer) is None


def test_a_region_of_another_service_changes_the_signature_only() -> None:
    found = at(endpoint="http://h:1").after(
        error(400, "AuthorizationHeaderMalformed", "Region_One")
    )
    assert found is not None
    assert (found.region, url(found)) == ("Region_One", "http://h:1/bucket/a")


def test_an_access_point_stays_in_its_region() -> None:
    assert at(f"{POINT}/x").after(error(301, "PermanentRedirect", "eu-west-3")) is None


@pytest.mark.parametrize(
    "answer",
    [
        error(403, "SecondLevelDomainForbidden"),
        error(403, "VirtualHostDomainRequired"),
        error(403, "PathStyleDomainForbidden"),
        error(400, "InvalidPathAccess"),
        error(301, "PermanentRedirect", endpoint="bucket.oss.test"),
        error(307, "TemporaryRedirect", endpoint="bucket.oss.test:9000"),
    ],
)
def test_a_service_that_wants_the_bucket_in_the_host_gets_it(answer: S3Error) -> None:
    found = at(endpoint="http://oss.test:9000").after(answer)
    assert found is not None
    assert url(found) == "http://bucket.oss.test:9000/a"
    assert found.after(answer) is None


@pytest.mark.parametrize(
    ("bucket", "endpoint", "named"),
    [
        ("bucket", "oss.test", "bucket.evil.test"),
        ("bucket", "oss.test", "bucket.oss.test.evil.test"),
        ("bucket", "oss.test", "bucket.oss.test:22"),
        ("bucket", "oss.test", "other.oss.test"),
        ("bucket", "127.0.0.1", "bucket.127.0.0.1"),
        ("a.b", "oss.test", "a.b.oss.test"),
    ],
)
def test_a_redirect_to_another_host_is_not_followed(bucket: str, endpoint: str, named: str) -> None:
    answer = error(301, "PermanentRedirect", endpoint=named)
    assert at(bucket, endpoint).after(answer) is None
