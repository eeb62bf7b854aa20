"""Spellings of one endpoint are equal, and what is none is refused with how to write it."""

import pytest

from ckptfs._model.endpoints import Endpoint, parse_endpoint
from ckptfs.errors import LocationError


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("minio", Endpoint("https", "minio")),
        ("minio:9000", Endpoint("https", "minio", 9000)),
        ("MinIO:443/", Endpoint("https", "minio")),
        ("https://minio:443", Endpoint("https", "minio")),
        ("HTTP://minio:80//", Endpoint("http", "minio")),
        ("http://minio:443", Endpoint("http", "minio", 443)),
        (" https://h/storage/v1/s3/ ", Endpoint("https", "h", None, "/storage/v1/s3")),
        ("https://h/A", Endpoint("https", "h", None, "/A")),
        ("[::1]:9000", Endpoint("https", "::1", 9000)),
        ("http://[0:0:0:0:0:0:0:1]:80/x", Endpoint("http", "::1", None, "/x")),
        ("http://[2001:DB8::A]", Endpoint("http", "2001:db8::a")),
        ("my_store.internal", Endpoint("https", "my_store.internal")),
    ],
)
def test_spellings_of_an_endpoint(text: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(text) == endpoint
    assert parse_endpoint(endpoint.text) == endpoint
    assert parse_endpoint(endpoint.place, endpoint.scheme) == endpoint


def test_a_scheme_beside_the_endpoint_counts_where_it_has_none() -> None:
    assert parse_endpoint("h:80", "http") == Endpoint("http", "h")
    assert parse_endpoint("h:80", "https") == Endpoint("https", "h", 80)
    assert parse_endpoint("https://h:80", "http") == Endpoint("https", "h", 80)


@pytest.mark.parametrize(
    "text",
    [
        *("", "://", "https://", "ftp://h", "h:", "h:0", "h:65536", "h:x", "::1", "[::1", "[x]"),
        *("a b", "h/../x", "h/a b", "h?x=1", "h#x", "-h", "h\n", "https://key:S3CR3T@h", "h//x"),
    ],
)
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    if text in ("h:", "h\n"):  # RFC 3986 allows an empty port, and space around it is none of it
        assert parse_endpoint(text) == Endpoint("https", "h")
        return
    with pytest.raises(LocationError, match="write it as https://host:port") as caught:
        parse_endpoint(text)
    assert "S3CR3T" not in str(caught.value)
    assert str(caught.value).isprintable()
