# The packages of fsspec's protocols have no type stubs, and are not imported here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""What the exceptions of fsspec's packages mean.

Each package has its own: an HTTP status is the surest sign where an exception carries one. Others
are known by the names of their classes, because the packages need not be installed.
"""

import math
from typing import Any

from ckptfs._model.manifest import printable
from ckptfs.errors import (
    AccessDenied,
    CkptfsError,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

_RETRY_AFTER_S_MAX = 3600.0
_HINTS = {
    "GatedRepoError": "accept the repository's conditions at the Hub, and give a token (HF_TOKEN)",
    "RepositoryNotFoundError": "check the name; a private repository needs a token (HF_TOKEN)",
    "RevisionNotFoundError": "check the revision behind the @",
    "OfflineModeIsEnabled": "unset HF_HUB_OFFLINE where the store is read",
}
"""What to do, by the names of classes of huggingface_hub."""


def status_of(error: BaseException) -> int:
    """The HTTP status that an exception of aiohttp, requests, httpx, azure or gcsfs carries, else
    0."""
    response = getattr(error, "response", None)
    holders = (
        (error, "status"),
        (error, "status_code"),
        (error, "code"),
        (response, "status_code"),
    )
    for holder, name in holders:
        status = getattr(holder, name, None)
        if isinstance(status, str) and status.isdecimal():
            status = int(status)
        if isinstance(status, int) and 100 <= status <= 599:
            return status
    return 0


def translated(error: BaseException, what: str) -> CkptfsError:
    """The exception of ours that says what the `error` of an fsspec package means for `what`."""
    if isinstance(error, CkptfsError):
        return error
    status, name = status_of(error), type(error).__name__
    cause = printable(str(error).partition("\n")[0]) or name
    if name == "OfflineModeIsEnabled":
        return StoreError(f"{what}: {cause}; {_HINTS[name]}")
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        advice = _HINTS.get(name, "check credentials and permissions")
        return AccessDenied(f"{what}: access denied ({cause}); {advice}")
    if isinstance(error, TimeoutError) or "imeout" in name or status == 408:
        return StoreTimeout(f"{what}: the store did not answer ({cause}); check the endpoint")
    if _can_pass(error, name, status):
        advice = "try again later" if status == 429 else "check the endpoint"
        unavailable = StoreUnavailable(f"{what}: cannot reach the store ({cause}); {advice}")
        unavailable.retry_after_s = _retry_after_s(error)
        return unavailable
    return StoreError(f"{what}: {cause}; {_HINTS.get(name, 'check the store')}")


def _can_pass(error: BaseException, name: str, status: int) -> bool:
    if status:
        return status == 429 or (status >= 500 and status not in (501, 505))
    if isinstance(error, ConnectionError | EOFError):
        return True
    # aiohttp (a cut answer is its ClientPayloadError), azure-core, http.client, httpx, urllib3.
    signs = (
        "Connect",
        "Disconnected",
        "IncompleteRead",
        "NetworkError",
        "Payload",
        "ProtocolError",
        "ReadError",
        "ServiceRe",  # azure's ServiceRequestError, ServiceResponseError
    )
    return any(sign in name for sign in signs)


def _retry_after_s(error: BaseException) -> float:
    headers: Any = getattr(getattr(error, "response", None), "headers", None)
    try:
        seconds_s = float(headers.get("Retry-After", 0))
    except (AttributeError, TypeError, ValueError):
        return 0.0
    return min(max(0.0, seconds_s), _RETRY_AFTER_S_MAX) if math.isfinite(seconds_s) else 0.0


def raise_disguised(error: FileNotFoundError, what: str) -> None:
    """Raise what some packages hide: http's `info` calls each failure a missing file, and
    huggingface_hub a repository that may not be read."""
    cause = error.__cause__
    if not isinstance(cause, Exception) or "NotFound" in type(cause).__name__:
        return
    ours = translated(cause, what)
    if isinstance(ours, AccessDenied | StoreUnavailable):
        raise ours from cause


def hint_for(error: FileNotFoundError) -> str:
    """What to do about something missing at Hugging Face, behind "; ", or ""."""
    hint = _HINTS.get(type(error.__cause__).__name__, "")
    return f"; {hint}" if hint else ""
