"""AWS Signature Version 4 in headers, as S3 expects it.

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

UNSIGNED = "UNSIGNED-PAYLOAD"
"""Stands for the SHA-256 of a body that the signature does not cover."""


class Keys(msgspec.Struct, frozen=True):
    """Keys that sign requests. `token` is "" for keys that do not expire. Never printed."""

    access_key: str
    secret_key: str
    token: str = ""

    def __repr__(self) -> str:
        return "Keys(…)"

    @property
    def secrets(self) -> dict[str, str]:
        """The keys as the secrets of a location."""
        found = {"access_key": self.access_key, "secret_key": self.secret_key}
        return {**found, "session_token": self.token} if self.token else found


def encoded(text: str, safe: str = "") -> str:
    """`text` percent-encoded as in the signatures of S3."""
    return quote(text, safe=f"{safe}-_.~", errors="surrogateescape")


def encoded_query(query: Mapping[str, str]) -> str:
    """A query, encoded and in the canonical order."""
    return "&".join(f"{encoded(name)}={encoded(query[name])}" for name in sorted(query))


def signed(
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    body: bytes | memoryview,
    keys: Keys,
    region: str,
    now: datetime,
    body_digest: str = "",
) -> dict[str, str]:
    """The headers to send: `headers` and those that authenticate the request.

    `path` is encoded and begins with a slash, and `query` is from `encoded_query`. `headers` has
    lower-case names, among them `host`, and all are signed. S3 accepts a difference of 15 minutes
    to `now`, a time in UTC. `body_digest` stands for the body's SHA-256, for example `UNSIGNED`.
    """
    time = now.strftime("%Y%m%dT%H%M%SZ")
    body_digest = body_digest or hashlib.sha256(body).hexdigest()
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
