"""AWS Signature Version 4 in headers, as S3 wants it.

The rules are those of the Amazon S3 API reference, "Authenticating requests: using the
Authorization header (AWS Signature Version 4)": the path is encoded once and not normalised, and
the body's SHA-256 is a header of its own.
"""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import datetime
from urllib.parse import quote

import msgspec


class Keys(msgspec.Struct, frozen=True):
    """Credentials. `token` is "" for those that do not expire. Never printed."""

    access_key: str
    secret_key: str
    token: str = ""

    def __repr__(self) -> str:
        return "Keys(…)"


def encoded(text: str, safe: str = "") -> str:
    """`text` percent-encoded as S3 does it, by which it also signs."""
    return quote(text, safe=f"{safe}-_.~", errors="surrogateescape")


def encoded_query(query: Mapping[str, str]) -> str:
    """A query in the canonical order, which is as good to send as any."""
    return "&".join(f"{encoded(name)}={encoded(query[name])}" for name in sorted(query))


def signed(
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    body: bytes,
    keys: Keys,
    region: str,
    now: datetime,
) -> dict[str, str]:
    """The headers to send: `headers` and those that authenticate the request.

    Args:
        method: E.g. GET.
        path: Encoded, beginning with a slash.
        query: As `encoded_query` makes it.
        headers: With lower-case names; all are signed. `host` has to be among them.
        body: What will be sent.
        keys: Whose request it is.
        region: Of the bucket.
        now: The time in UTC; S3 accepts 15 minutes of difference.
    """
    time = now.strftime("%Y%m%dT%H%M%SZ")
    body_digest = hashlib.sha256(body).hexdigest()
    all_headers = {**headers, "x-amz-content-sha256": body_digest, "x-amz-date": time}
    if keys.token:
        all_headers["x-amz-security-token"] = keys.token
    names = sorted(all_headers)
    canonical = "\n".join(
        [
            method,
            path,
            query,
            *(f"{name}:{' '.join(all_headers[name].split())}" for name in names),
            "",
            ";".join(names),
            body_digest,
        ]
    )
    scope = f"{time[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    to_sign = f"AWS4-HMAC-SHA256\n{time}\n{scope}\n{digest}"
    key = f"AWS4{keys.secret_key}".encode()
    for part in (*scope.split("/"), to_sign):
        key = hmac.digest(key, part.encode(), "sha256")
    all_headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, "
        f"SignedHeaders={';'.join(names)}, Signature={key.hex()}"
    )
    return all_headers
