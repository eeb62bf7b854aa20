"""The meaning of an S3 server's errors for users: the exception, and what to do.

The codes are those of the Amazon S3 API reference, "Error responses", and of servers that speak its
protocol. The status decides about other codes.
"""

from typing import NamedTuple

from ckptfs._model.manifest import printable
from ckptfs._store.s3.address import VIRTUAL_ONLY
from ckptfs._store.transport.errors import BrokenConnection, S3Error, SilentServer
from ckptfs.errors import (
    AccessDenied,
    CheckpointNotFound,
    CkptfsError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

_THROTTLED = frozenset(
    [
        "BandwidthLimitExceeded",
        "EC2ThrottledException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
    ]
)
_BROKEN = frozenset(
    [
        "ConditionalRequestConflict",  # another program writes the object now
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServerBusy",
        "ServiceUnavailable",
    ]
)
_FOR_GOOD = frozenset([501, 505, 507])
"""Statuses from 500 on that are permanent: not implemented, HTTP version, no space."""


class _Advice(NamedTuple):
    """An exception, and its text with a place for the server's words between cause and advice."""

    error: type[CkptfsError]
    text: str


_KEYS = _Advice(AccessDenied, "access denied ({}); check the access key and the secret key")
_EXPIRED = _Advice(AccessDenied, "the credentials have expired ({}); renew them")
_DENIED = _Advice(AccessDenied, "access denied ({}); check credentials and permissions")
_DENIED_BY_S3 = _Advice(
    AccessDenied,
    "access denied ({}); check credentials and permissions, and if the requester has to pay for "
    "the bucket's requests, add requester_pays=true",
)
_PAYER = _Advice(
    AccessDenied, "the requester has to pay for the bucket's requests ({}); add requester_pays=true"
)
_ACCOUNT = _Advice(AccessDenied, "the account cannot be used ({}); ask the owner of the bucket")
_REGION = "the bucket is in another region or at another endpoint ({}); name its region or endpoint"
_VIRTUAL = _Advice(
    StoreError,
    "the store wants the bucket in the host's name ({}), which cannot stand before this endpoint; "
    "write the endpoint as a name instead of an address, and check the bucket's name",
)
_KMS_DENIED = _Advice(
    AccessDenied,
    "the credentials may not use the KMS key of the object ({}); allow kms:Decrypt for that key, "
    "and kms:GenerateDataKey to write",
)
_KMS = _Advice(StoreError, "the KMS key of the object cannot be used ({}); check that key's state")
_CUSTOMER_KEY = _Advice(
    StoreError,
    "the object is encrypted with a key of its owner, SSE-C ({}), which ckptfs cannot send; store "
    "it with another kind of encryption",
)
_NO_BUCKET = _Advice(CheckpointNotFound, "there is no such bucket; check its name")
_LOST = _Advice(
    StoreError, "another program has ended the upload, or the store has lost parts ({}); try again"
)
_DIGEST = _Advice(StoreUnavailable, "the bytes were changed on the way ({}); try again")

_BY_CODE: dict[str, _Advice] = {
    "AccessDenied": _DENIED_BY_S3,
    "AccountProblem": _ACCOUNT,
    "AllAccessDisabled": _ACCOUNT,
    "AuthorizationHeaderMalformed": _Advice(AccessDenied, _REGION),
    "BadDigest": _DIGEST,
    "ExpiredToken": _EXPIRED,
    "IllegalLocationConstraintException": _Advice(StoreError, _REGION),
    "InvalidAccessKeyId": _KEYS,
    "InvalidBucketName": _Advice(StoreError, "the bucket's name is not valid ({}); check it"),
    "InvalidDigest": _DIGEST,
    "InvalidObjectState": _Advice(
        StoreError,
        "the object is archived ({}); restore it (aws s3api restore-object), and then attach the "
        "checkpoint again",
    ),
    "InvalidToken": _Advice(AccessDenied, "the session token is not valid ({}); renew it"),
    "MethodNotAllowed": _Advice(
        StoreError, "the store does not know this kind of request ({}); check the endpoint"
    ),
    "NoSuchBucket": _NO_BUCKET,
    "InvalidPart": _LOST,
    "NoSuchUpload": _LOST,
    "PermanentRedirect": _Advice(StoreError, _REGION),
    "QuotaExceeded": _Advice(StoreError, "the store has no space left ({}); free some"),
    "RequestTimeTooSkewed": _Advice(
        AccessDenied,
        "the clocks of this machine and of the store differ too much ({}); set this machine's "
        "clock, e.g. by NTP",
    ),
    "SignatureDoesNotMatch": _Advice(
        AccessDenied,
        "access denied ({}); check the secret key, and that nothing on the way changes requests",
    ),
    "TokenRefreshRequired": _EXPIRED,
    "XAmzContentSHA256Mismatch": _DIGEST,
    **dict.fromkeys(VIRTUAL_ONLY, _VIRTUAL),
}
_BY_STATUS: dict[int, _Advice] = {
    401: _DENIED,
    403: _DENIED,
    407: _Advice(AccessDenied, "the proxy refuses the request ({}); check its credentials"),
    404: _Advice(StoreError, "there is nothing at this address ({}); check endpoint and bucket"),
    507: _Advice(StoreError, "the store has no space left ({}); free some"),
    **dict.fromkeys((301, 302, 303, 307, 308), _Advice(StoreError, _REGION)),
}
_OTHER = _Advice(StoreError, "the store refuses the request ({}); check the endpoint")


def translate_error(error: S3Error | BrokenConnection, what: str) -> CkptfsError:
    """The exception of ckptfs for a server's error about `what`."""
    cause = printable(str(error))
    if isinstance(error, SilentServer):
        return StoreTimeout(f"{what}: the store did not answer ({cause}); {error.advice}")
    if isinstance(error, BrokenConnection):
        return StoreUnavailable(f"{what}: cannot reach the store ({cause}); {error.advice}")
    if error.code in _THROTTLED or error.status == 429:
        advice = "try again later, or lower connections_max"
        return _busy(error, f"{what}: the store asks for fewer requests ({cause}); {advice}")
    if _can_pass(error):
        return _busy(error, f"{what}: the store is busy or broken ({cause}); try again later")
    advice = _advice(error)
    return advice.error(f"{what}: {advice.text.format(cause)}")


def _can_pass(error: S3Error) -> bool:
    is_of_server = error.status >= 500 and error.status not in _FOR_GOOD
    return is_of_server or error.status == 408 or error.code in _BROKEN


def _busy(error: S3Error, text: str) -> StoreUnavailable:
    busy = StoreUnavailable(text)
    busy.retry_after_s = error.retry_after_s
    return busy


def _advice(error: S3Error) -> _Advice:
    message = error.message.lower()
    if error.code.startswith("KMS"):
        return _KMS
    if error.status == 403 and "kms" in message:
        return _KMS_DENIED
    if error.status == 403 and "requester" in message and "pay" in message:
        return _PAYER
    if error.code == "InvalidRequest" and "server side encryption" in message:
        return _CUSTOMER_KEY
    return _BY_CODE.get(error.code) or _BY_STATUS.get(error.status) or _OTHER
