"""The signatures of the Amazon S3 API reference's examples, "Authenticating requests"."""

from datetime import datetime, timezone

import pytest

from ckptfs._store.s3.sigv4 import Keys, encoded, encoded_query, signed

KEYS = Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
NOW = datetime(2013, 5, 24, tzinfo=timezone.utc)
HOST = {"host": "examplebucket.s3.amazonaws.com"}


@pytest.mark.parametrize(
    ("method", "key", "query", "headers", "body", "signature"),
    [
        (
            "GET",
            "test.txt",
            {},
            {"range": "bytes=0-9"},
            b"",
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "PUT",
            "test$file.text",
            {},
            {
                "date": "Fri, 24 May 2013 00:00:00 GMT",
                "x-amz-storage-class": "REDUCED_REDUNDANCY",
            },
            b"Welcome to Amazon S3.",
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
        (
            "GET",
            "",
            {"lifecycle": ""},
            {},
            b"",
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
        ),
        (
            "GET",
            "",
            {"prefix": "J", "max-keys": "2"},
            {},
            b"",
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ],
)
def test_the_examples(
    method: str,
    key: str,
    query: dict[str, str],
    headers: dict[str, str],
    body: bytes,
    signature: str,
) -> None:
    path, text = "/" + encoded(key, "/"), encoded_query(query)
    made = signed(method, path, text, HOST | headers, body, KEYS, "us-east-1", NOW)
    assert made["authorization"].endswith(f", Signature={signature}")


def test_a_token_is_signed() -> None:
    keys = Keys("a", "b", "the-token")
    made = signed("GET", "/", "", HOST, b"", keys, "eu-west-3", NOW)
    assert made["x-amz-security-token"] == "the-token"
    assert "x-amz-security-token" in made["authorization"]


def test_names_are_encoded_as_s3_does_it() -> None:
    assert encoded("a b+c/ü~%\0'", "/") == "a%20b%2Bc/%C3%BC~%25%00%27"
    assert encoded_query({"b": "x/y", "a": " "}) == "a=%20&b=x%2Fy"


def test_keys_are_never_printed() -> None:
    assert "wJalr" not in f"{KEYS!r} {KEYS}"
